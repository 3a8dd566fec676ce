"""Derives batch size, epochs and learning rate from the size of the model and of the data.

The reason for each is printed. LoRA needs a learning rate about ten times that of full fine-tuning, lower
for wider models, and does worse with large batches (Schulman et al., "LoRA Without Regret", 2025). Imports no torch.
"""

import math
from dataclasses import dataclass

from hatrack.recipe import Recipe

MIN_STEPS = 100
"""Minimum steps of a run: with few rows, up to ten epochs are run to reach it, so that the adapter learns."""


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run: `steps` of `batch_size` rows each, in micro-batches of `micro_batch` rows."""

    lr: float
    batch_size: int
    micro_batch: int
    epochs: float
    steps: int
    warmup_steps: int
    reasons: tuple[str, ...]

    @property
    def accumulation(self) -> int:
        """Micro-batches per step."""
        return self.batch_size // self.micro_batch


def batch_rows(recipe: Recipe, *, task: str, rows: int) -> int:
    """Rows per step: the recipe's, else a power of two for about 40 steps per epoch, from 4 to 32 (16 to generate)."""
    largest = 32 if task == "classify" else 16
    derived = min(largest, max(4, 2 ** round(math.log2(max(rows / 40, 1)))))
    return min(recipe.batch_size or derived, rows)


def derive(recipe: Recipe, *, task: str, rows: int, hidden_size: int, micro_batch: int) -> Schedule:
    """The schedule of a run over `rows` training rows, for a model with hidden states of `hidden_size`.

    `micro_batch`: rows per micro-batch, a divisor of the batch size. If the learning rate is to be measured (`auto`),
    the schedule has the usual one.
    """
    reasons = []
    batch_size = batch_rows(recipe, task=task, rows=rows)
    if recipe.batch_size is None:
        reasons.append(f"batch size {batch_size} (for {rows:,} rows)")
    per_epoch = math.ceil(math.ceil(rows / micro_batch) / (batch_size // micro_batch))

    epochs, steps = recipe.epochs, recipe.steps
    if steps is not None:
        epochs = steps / per_epoch
    elif epochs is None:
        epochs = 3.0 if rows < 20_000 else 2.0 if rows < 100_000 else 1.0
        epochs = max(epochs, min(10.0, float(math.ceil(MIN_STEPS / per_epoch))))
        reasons.append(f"{epochs:g} epochs (for {rows:,} rows)")
    if steps is None:
        steps = max(1, math.ceil(epochs * per_epoch))

    lr = learning_rate(hidden_size) if recipe.lr is None or recipe.lr == "auto" else recipe.lr
    if recipe.lr is None:
        reasons.append(f"learning rate {lr:g} (for a model {hidden_size:,} wide)")
    warmup = max(1, round(0.06 * steps)) if steps > 1 else 0  # the warmup starts at a rate of 0
    return Schedule(lr, batch_size, micro_batch, epochs, steps, warmup, tuple(reasons))


def learning_rate(hidden_size: int) -> float:
    """The usual learning rate: 5e-4 (2,000 / hidden_size)^0.78, which Schulman et al. fitted for Llama models, between
    1e-4 and 1.5e-3, to two digits."""
    value = min(max(5e-4 * (2000 / hidden_size) ** 0.781, 1e-4), 1.5e-3)
    return float(f"{value:.1e}")
