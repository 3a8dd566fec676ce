"""Puts rows of similar length into batches, in a seeded order. Imports no torch."""

import numpy as np

WINDOW = 50
"""How many batches are sorted by length together: enough to save padding, few enough to stay random."""

SCORED_TOKENS = 4096
"""Tokens scored at a time: enough for fast matmuls. Held-out rows may be far longer than training rows."""


def epoch_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, *, by_tokens: bool = False
) -> list[np.ndarray]:
    """The row indices of each batch of an epoch, counted from 0; `LengthBatches` explains the options.

    Depends on its arguments only, so a resumed run gets the same batches, and a plan knows them in advance. The first
    batch of a run is the largest: if it does not fit in memory, the run fails at once.
    """
    lengths = np.asarray(lengths)
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    span = WINDOW * batch_size
    batches: list[np.ndarray] = []
    for start in range(0, len(order), span):
        window = order[start : start + span]
        window = window[np.argsort(lengths[window], kind="stable")]
        cuts = np.arange(batch_size, len(window), batch_size)
        batches += np.split(window, _balanced_cuts(lengths[window], len(cuts) + 1) if by_tokens else cuts)
    batches = [batches[index] for index in random.permutation(len(batches))]
    if epoch == 0 and batches:
        largest = max(range(len(batches)), key=lambda index: len(batches[index]) * lengths[batches[index]].max())
        batches[0], batches[largest] = batches[largest], batches[0]
    return batches


def _balanced_cuts(lengths: np.ndarray, parts: int) -> np.ndarray:
    """The positions that cut rows into `parts` with about equal tokens, and at least one row each."""
    number = np.arange(1, parts)
    tokens = np.cumsum(lengths)
    cuts = np.searchsorted(tokens, tokens[-1] * number / parts)
    cuts = np.clip(cuts, number, len(lengths) - parts + number)
    return np.asarray(np.maximum.accumulate(cuts - number) + number)


def scoring_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches of row indices for scoring, longest rows first: if memory is too small, the first batch fails.

    A batch has at most `batch_size` rows and `SCORED_TOKENS` tokens with padding, but at least one row.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        count = max(1, min(batch_size, SCORED_TOKENS // max(int(lengths[order[start]]), 1)))
        batches.append(order[start : start + count])
        start += count
    return batches
