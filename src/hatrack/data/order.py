"""Which rows go together in a batch, from their lengths alone: those of like length, in a seeded order. No torch."""

import numpy as np

WINDOW = 50
"""Batches that are sorted by length together: long enough to save padding, short enough to stay random."""


def epoch_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, *, by_tokens: bool = False
) -> list[np.ndarray]:
    """The row indices of each batch of an epoch, counted from 0; see `data/batch.py` for what the options mean.

    A function of its arguments alone, so a resumed run meets the same batches, and a plan knows them beforehand.
    """
    lengths = np.asarray(lengths)
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    span = WINDOW * batch_size
    batches: list[np.ndarray] = []
    for start in range(0, len(order), span):
        window = order[start : start + span]
        window = window[np.argsort(lengths[window], kind="stable")]
        rows = np.arange(batch_size, len(window), batch_size)
        batches += np.split(window, _cuts(lengths[window], len(rows) + 1) if by_tokens else rows)
    return [batches[index] for index in random.permutation(len(batches))]


def _cuts(lengths: np.ndarray, parts: int) -> np.ndarray:
    """Where to cut rows into `parts` of about as many tokens each, with at least a row in each."""
    number = np.arange(1, parts)
    tokens = np.cumsum(lengths)
    cuts = np.searchsorted(tokens, tokens[-1] * number / parts)
    cuts = np.clip(cuts, number, len(lengths) - parts + number)
    return np.asarray(np.maximum.accumulate(cuts - number) + number)


def length_order(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches for scoring, longest rows first: what does not fit in memory is found out at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
