"""Scores a model on held-out rows; only one batch of logits is in memory at a time."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hatrack.data.batch import collate
from hatrack.data.order import scoring_batches
from hatrack.data.render import TokenRows
from hatrack.evaluate.loss import Batch, Losses, losses

LossRunner = Callable[[Iterable[Batch]], Iterable[Losses]]
"""Computes the losses of batches, in their order."""


@dataclass(frozen=True)
class Score:
    """`metrics` by name, and their parts, in the order of the rows.

    `outcomes` (n,): 1 if a row was classified correctly, else 0; or the sum of its tokens' losses.
    `weights` (n,): 1 each; or the number of the row's supervised tokens.
    """

    metrics: dict[str, float]
    outcomes: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class ScoreSettings:
    """How rows are scored: `task` is classify, chat or complete, `batch_size` in rows, batches go to `device`."""

    task: str
    batch_size: int
    pad_id: int
    device: torch.device


def main_metric(task: str) -> str:
    """The metric that decides which epoch is best: accuracy (higher is better), or loss (lower is better)."""
    return "accuracy" if task == "classify" else "loss"


@torch.no_grad()
def score(model: Any, rows: TokenRows, settings: ScoreSettings, run: LossRunner | None = None) -> Score:
    """Scores `model` on `rows`, in evaluation mode. `run` computes the losses in place of `losses`.

    classify: `accuracy` (with several labels per row, all must be right), `f1` (macro; micro with several labels per
    row), `loss`. chat and complete: `loss` per supervised token, `perplexity` = exp(loss).
    """
    task = settings.task
    was_training = model.training
    model.eval()
    total, weights, outcomes = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(rows))
    predictions: list[np.ndarray] = [np.empty(0)] * len(rows)
    try:
        groups = scoring_batches(rows.lengths, settings.batch_size)
        batches = (_batch(rows, indices, settings) for indices in groups)
        found = run(batches) if run else (losses(model, batch, task) for batch in batches)
        for indices, (values, owners, logits) in zip(groups, found, strict=True):
            owner = owners.cpu().numpy()
            np.add.at(total, indices[owner], values.double().cpu().numpy())
            np.add.at(weights, indices[owner], 1.0)
            if logits is not None:
                for index, guess in zip(indices, predict_labels(logits, rows.labels.ndim == 2), strict=True):
                    predictions[index] = guess
    finally:
        model.train(was_training)
    loss = float(total.sum() / max(weights.sum(), 1))
    if task != "classify":
        return Score({"loss": loss, "perplexity": math.exp(min(loss, 700.0))}, total, weights)
    guesses, expected = np.stack(predictions), rows.labels.astype(np.int64)
    outcomes = (guesses == expected).astype(float) if expected.ndim == 1 else (guesses == expected).all(1).astype(float)
    return Score({"accuracy": float(outcomes.mean()), "f1": f1(expected, guesses), "loss": loss}, outcomes, weights)


def _batch(rows: TokenRows, indices: np.ndarray, settings: ScoreSettings) -> Batch:
    batch = collate([rows.row(int(index)) for index in indices], settings.pad_id, settings.task)
    return {name: tensor.to(settings.device) for name, tensor in batch.items()}


def f1(expected: np.ndarray, guesses: np.ndarray) -> float:
    """F1 = 2 TP / (2 TP + FN + FP). For labels (n,): the mean over the labels that occur. For several labels per row
    (n, L), 1 or 0 each: computed over all of them at once. 0 if there are no positives.

    Written here because importing scikit-learn takes a second; a test compares it with scikit-learn.
    """
    if expected.ndim == 2:
        return float(2 * (expected & guesses).sum() / max(expected.sum() + guesses.sum(), 1))
    each = [
        2 * ((expected == label) & (guesses == label)).sum() / ((expected == label).sum() + (guesses == label).sum())
        for label in np.union1d(expected, guesses)
    ]
    return float(np.mean(each)) if each else 0.0


def predict_labels(logits: torch.Tensor, multi_label: bool) -> np.ndarray:
    """The label of each row (B,); with `multi_label`, 1 for each label (B, L) with a probability above 0.5, else 0."""
    chosen = (logits > 0).long() if multi_label else logits.argmax(-1)
    return np.asarray(chosen.cpu().numpy())
