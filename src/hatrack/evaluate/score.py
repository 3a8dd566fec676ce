"""How well a model does on rows it has not seen. Holds one batch of logits at a time, never all of them.

Knows nothing of training, adapters or how a score is shown.
"""

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
"""Gives the losses of batches, in their order."""


@dataclass(frozen=True)
class Score:
    """Metrics by name, and what they were made of, row by row in the order of the rows.

    `outcomes` (n,): 1 or 0, whether the row was classified rightly; or the sum of its tokens' losses.
    `weights` (n,): 1 each; or the row's supervised tokens.
    """

    metrics: dict[str, float]
    outcomes: np.ndarray
    weights: np.ndarray


def main_metric(task: str) -> str:
    """The metric that decides which epoch is best: accuracy (higher is better), or loss (lower is better)."""
    return "accuracy" if task == "classify" else "loss"


@torch.no_grad()
def score(
    model: Any,
    rows: TokenRows,
    *,
    task: str,
    batch_size: int,
    pad_id: int,
    device: torch.device,
    progress: Callable[[int], None] = lambda rows: None,
    run: LossRunner | None = None,
) -> Score:
    """Scores `model` on `rows`; `progress` is told the rows done after each batch.

    `run` gives the losses of batches, in their order, where `losses` of one after the other is not the way.

    classify: `accuracy` (of rows; with several labels a row, all must be right), `f1` (macro; micro with several
    labels a row), `loss`. chat and complete: `loss` per supervised token, `perplexity` = exp(loss).
    The model's training mode is put back as it was.
    """
    was_training = model.training
    model.eval()
    total, weights, outcomes = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(rows))
    predictions: list[np.ndarray] = [np.empty(0)] * len(rows)
    try:
        groups = scoring_batches(rows.lengths, batch_size)
        batches = (_batch(rows, indices, pad_id, task, device) for indices in groups)
        found = run(batches) if run else (losses(model, batch, task) for batch in batches)
        for indices, (values, owners, logits) in zip(groups, found, strict=True):
            owner = owners.cpu().numpy()
            np.add.at(total, indices[owner], values.double().cpu().numpy())
            np.add.at(weights, indices[owner], 1.0)
            if logits is not None:
                for index, guess in zip(indices, predicted(logits, rows.labels.ndim == 2), strict=True):
                    predictions[index] = guess
            progress(len(indices))
    finally:
        model.train(was_training)
    loss = float(total.sum() / max(weights.sum(), 1))
    if task != "classify":
        return Score({"loss": loss, "perplexity": math.exp(min(loss, 700.0))}, total, weights)
    guesses, wanted = np.stack(predictions), rows.labels.astype(np.int64)
    outcomes = (guesses == wanted).astype(float) if wanted.ndim == 1 else (guesses == wanted).all(1).astype(float)
    return Score({"accuracy": float(outcomes.mean()), "f1": f1(wanted, guesses), "loss": loss}, outcomes, weights)


def _batch(rows: TokenRows, indices: np.ndarray, pad_id: int, task: str, device: torch.device) -> Batch:
    batch = collate([rows.row(int(index)) for index in indices], pad_id, task)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def f1(wanted: np.ndarray, guesses: np.ndarray) -> float:
    """F1 = 2 hits / (2 hits + misses + false alarms): of labels (n,) the mean over all that occur in either; of several
    labels a row (n, L), 1 or 0 each, over all of them together. 0 where nothing was wanted or guessed.

    Written here because importing scikit-learn takes a second of every start; a test holds it against scikit-learn.
    """
    if wanted.ndim == 2:
        return float(2 * (wanted & guesses).sum() / max(wanted.sum() + guesses.sum(), 1))
    each = [
        2 * ((wanted == label) & (guesses == label)).sum() / ((wanted == label).sum() + (guesses == label).sum())
        for label in np.union1d(wanted, guesses)
    ]
    return float(np.mean(each)) if each else 0.0


def predicted(logits: torch.Tensor, several: bool) -> np.ndarray:
    """The label of each row (B,), or with `several` labels a row 1 or 0 for each (B, L): probability above a half."""
    chosen = (logits > 0).long() if several else logits.argmax(-1)
    return np.asarray(chosen.cpu().numpy())
