"""Which rows go together in a batch, from their lengths alone: those of like length, in a seeded order. No torch."""

import numpy as np

WINDOW = 50
"""Batches that are sorted by length together: long enough to save padding, short enough to stay random."""

SCORED_TOKENS = 4096
"""Tokens that are scored at a time: enough for products at full speed. Held-out rows may be far longer than others."""


def epoch_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, *, by_tokens: bool = False
) -> list[np.ndarray]:
    """The row indices of each batch of an epoch, counted from 0; see `data/batch.py` for what the options mean.

    A function of its arguments alone, so a resumed run meets the same batches, and a plan knows them beforehand. The
    first batch of all is the largest: what does not fit in memory is found out at once, and what it leaves free is room
    for those after it.
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
    batches = [batches[index] for index in random.permutation(len(batches))]
    if epoch == 0 and batches:
        largest = max(range(len(batches)), key=lambda index: len(batches[index]) * lengths[batches[index]].max())
        batches[0], batches[largest] = batches[largest], batches[0]
    return batches


def _cuts(lengths: np.ndarray, parts: int) -> np.ndarray:
    """Where to cut rows into `parts` of about as many tokens each, with at least a row in each."""
    number = np.arange(1, parts)
    tokens = np.cumsum(lengths)
    cuts = np.searchsorted(tokens, tokens[-1] * number / parts)
    cuts = np.clip(cuts, number, len(lengths) - parts + number)
    return np.asarray(np.maximum.accumulate(cuts - number) + number)


def scoring_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches for scoring, longest rows first: what does not fit in memory is found out at once.

    Of up to `batch_size` rows, and up to `SCORED_TOKENS` with their padding where that is more than one row.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        count = max(1, min(batch_size, SCORED_TOKENS // max(int(lengths[order[start]]), 1)))
        batches.append(order[start : start + count])
        start += count
    return batches
