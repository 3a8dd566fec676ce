"""Packs token rows into batches of like length. Knows nothing of text, files or devices."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from hatrack.data.order import epoch_batches
from hatrack.data.render import TokenRows


class LengthBatches(Sampler[list[int]]):
    """Batches of row indices, rows of like length together; another order each epoch.

    A batch has `batch_size` rows. With `by_tokens` it has as many in the mean: more where they are short, fewer where
    they are long, so that all batches have about the same number of tokens, and steps take the same time and memory.
    That is for losses that are means over tokens: means over rows would weigh long rows more, and with them a label
    that goes with length. Every epoch has ceil(rows / `batch_size`) batches. The order is a function of (`lengths`,
    `batch_size`, `seed`, epoch) alone, so a resumed run meets the same batches.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, *, by_tokens: bool = False) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, 0
        self.by_tokens = by_tokens

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in epoch_batches(self.lengths, self.batch_size, self.seed, self.epoch, by_tokens=self.by_tokens):
            yield [int(row) for row in batch]


def fill(lengths: np.ndarray, batches: list[list[int]]) -> float:
    """The share of computed tokens that are real ones, the rest being padding."""
    computed = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    return float(sum(int(lengths[batch].sum()) for batch in batches) / max(computed, 1))


class RowsDataset(Dataset[Any]):
    """Token rows by index, as torch's loader wants them."""

    def __init__(self, rows: TokenRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows.row(index)


def collate(items: list[Any], pad_id: int, task: str) -> dict[str, torch.Tensor]:
    """Rows -> `input_ids`, `attention_mask` (B, T), padded on the right, and `labels`.

    labels: (B,) int64 or (B, L) float32 to classify; (B, T) int64 otherwise, -100 where nothing is learned.
    """
    longest = max(len(ids) for ids, _, _ in items)
    input_ids = np.full((len(items), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(items), longest), dtype=np.int64)
    labels = np.full((len(items), longest), -100, dtype=np.int64)
    for index, (ids, learn, _) in enumerate(items):
        input_ids[index, : len(ids)] = ids
        mask[index, : len(ids)] = 1
        labels[index, : len(ids)][learn] = ids[learn]
    wanted = np.stack([label for _, _, label in items]) if task == "classify" else labels
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(np.asarray(wanted)),
    }
