"""Tries one step for `hatrack check`: is the loss finite, does a gradient reach the adapter."""

import tempfile
from pathlib import Path

import torch

from hatrack.check.finding import Finding
from hatrack.check.prepared import Prepared
from hatrack.check.running import LearningSettings, Step, loss_not_a_number, no_gradient
from hatrack.data.batch import LengthBatches, collate
from hatrack.evaluate.loss import Batch, losses
from hatrack.training.adapted_model import AdaptedModel, load_adapted_model, open_layer_runners
from hatrack.training.auto_settings import measure_learning_rate
from hatrack.training.undone_steps import add_gradients

ROWS = 4


def one_step(prepared: Prepared) -> list[Finding]:
    """Loads the base and adds the adapter as `train` does, and computes the gradients of a few rows. With `--lr auto`,
    measures the learning rate. Saves nothing.

    Raises HatrackError if the base cannot be loaded.
    """
    adapted = load_adapted_model(prepared)
    train_rows = prepared.tokens.train
    chosen = next(iter(LengthBatches(train_rows.lengths, min(ROWS, len(train_rows)), prepared.recipe.seed)))
    batch = collate([train_rows.row(index) for index in chosen], adapted.base.tokenizer.pad_token_id, prepared.task)
    loss = _add_gradients(adapted, prepared, {name: tensor.to(adapted.base.device) for name, tensor in batch.items()})
    trained = [parameter for parameter in adapted.model.parameters() if parameter.requires_grad]
    found = [parameter.grad for parameter in trained if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(found)) if found else 0.0
    adapted.model.zero_grad()
    rows = [int(train_rows.row_numbers[index]) for index in chosen]
    step = Step(1, loss, norm, rows, str(prepared.recipe.data))
    settings = LearningSettings(prepared.schedule.lr, prepared.usual_lr, prepared.dtype, prepared.recipe.r)
    findings = [loss_not_a_number(step, settings), no_gradient(step)]
    if prepared.recipe.lr == "auto" and not any(findings):
        measure_learning_rate(adapted.base, adapted.model, prepared)
    return [finding for finding in findings if finding is not None]


def _add_gradients(adapted: AdaptedModel, prepared: Prepared, batch: Batch) -> float:
    """Adds the gradients of a batch's mean loss, computed as in training. Returns the loss."""
    model, seed = adapted.model.train(), prepared.recipe.seed
    with tempfile.TemporaryDirectory() as folder:
        streaming, prefix = open_layer_runners(adapted, prepared, None, Path(folder))
        if streaming is None:
            torch.manual_seed(seed)
            return add_gradients(model, [batch], prepared.task, prefix)
        return float(streaming.step([batch], [seed], lambda batch: losses(model, batch, prepared.task)[0].mean()))
