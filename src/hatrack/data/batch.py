"""Batches token rows of similar length for torch. Knows nothing of text, files or devices."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from hatrack.data.order import epoch_batches
from hatrack.data.render import TokenRows


class LengthBatches(Sampler[list[int]]):
    """Batches of row indices, rows of similar length together, in another order each epoch.

    A batch has `batch_size` rows. With `by_tokens` that is the mean: batches of short rows have more rows, so that all
    batches have about the same number of tokens, and steps take about the same time and memory. Use it for losses that
    are means over tokens; in a mean over rows, long rows would weigh more. Every epoch has ceil(rows / `batch_size`)
    batches. The order depends only on `lengths`, `batch_size`, `seed` and the epoch, so a resumed run gets the same
    batches.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, *, by_tokens: bool = False) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, 0
        self.by_tokens = by_tokens

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose batches come next, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in epoch_batches(self.lengths, self.batch_size, self.seed, self.epoch, by_tokens=self.by_tokens):
            yield [int(row) for row in batch]


class RowsDataset(Dataset[Any]):
    """Token rows as a torch Dataset."""

    def __init__(self, rows: TokenRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows.row(index)


def collate(items: list[Any], pad_id: int, task: str) -> dict[str, torch.Tensor]:
    """Pads rows on the right into `input_ids` and `attention_mask` (B, T), and `labels`.

    labels: (B,) int64 or (B, L) float32 for classify; else (B, T) int64, -100 for unsupervised tokens.
    """
    longest = max(len(ids) for ids, _, _ in items)
    input_ids = np.full((len(items), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(items), longest), dtype=np.int64)
    labels = np.full((len(items), longest), -100, dtype=np.int64)
    for index, (ids, supervised, _) in enumerate(items):
        input_ids[index, : len(ids)] = ids
        mask[index, : len(ids)] = 1
        labels[index, : len(ids)][supervised] = ids[supervised]
    if task == "classify":
        labels = np.stack([label for _, _, label in items])
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(np.asarray(labels)),
    }
