"""Stops a run whose loss diverges; prints advice if the loss barely moves.

Knows nothing of models: the Trainer gives it losses, gradient norms and rows.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hatrack.check.finding import Finding
from hatrack.check.running import (
    MIN_STEPS_GROWN,
    LearningSettings,
    Step,
    has_grown,
    loss_barely_moves,
    loss_explodes,
    loss_not_a_number,
    no_gradient,
)
from hatrack.console import say
from hatrack.errors import Diverged
from hatrack.recipe import Recipe
from hatrack.training import checkpoint

SMOOTHING = 0.8
"""Weight of the earlier steps in the running mean of the loss, which so reaches back about five steps."""


class DivergenceWatch(TrainerCallback):  # type: ignore[misc]
    """Checks each step before the optimizer takes it, so that a diverged step never changes the adapter.

    `folder` is the run's. `lr` is the peak learning rate, `usual_lr` the one that hatrack derives for the base, and
    `dtype` the base's. The training loop sets `start_loss`, the held-out loss before training, at the first evaluation,
    and `estimate_start_loss`, which measures it on a few rows: slow, so only called if the run looks diverged.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, lr: float, usual_lr: float, dtype: str) -> None:
        self.recipe, self.folder = recipe, folder
        self.settings = LearningSettings(lr, usual_lr, dtype, recipe.r, recipe.lr == "auto")
        self.start_loss: float | None = None
        self.estimate_start_loss: Callable[[], float] = lambda: 0.0
        self.first_loss = 0.0
        self.seen = 0  # steps
        self.mean: float | None = None
        self.last_good = 0  # the newest step after which the loss was sound
        self.is_advised = False

    def step(self, number: int, loss: float, norm: float, rows: Callable[[], list[int]]) -> None:
        """Raises Diverged if the optimizer must not take step `number`.

        `loss` is the step's loss and `norm` its gradient norm; `rows` finds the numbers of its rows, which is slow.
        """
        self.mean = loss if self.mean is None else SMOOTHING * self.mean + (1 - SMOOTHING) * loss
        enough, self.seen = self.seen >= MIN_STEPS_GROWN, self.seen + 1
        if self.seen == 1:
            self.first_loss = loss
        start = self._starting_loss(self.mean)
        is_broken = not (math.isfinite(self.mean) and math.isfinite(norm)) or norm == 0
        if not is_broken and self.mean <= start + 1:
            self.last_good = number - 1
        if not is_broken and not (enough and has_grown(start, self.mean)):
            return
        step = Step(number, loss, norm, rows(), str(self.recipe.data))
        found = loss_not_a_number(step, self.settings)
        found = found or (no_gradient(step) if not enough else None)
        found = found or (loss_explodes(start, self.mean, step, self.settings) if enough else None)
        if found is not None:
            raise self._diverged(found)

    def _starting_loss(self, mean: float) -> float:
        """The loss that training began with. Rows of one length may be much harder than others (a loss of 5.4 where the
        mean is 2.0), so a loss above the first one is compared with that of other rows too."""
        if self.start_loss is None and mean > self.first_loss + 1:
            self.start_loss = self.estimate_start_loss()
        return max(self.first_loss, self.start_loss or 0.0)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if 2 * state.global_step < state.max_steps:  # the learning rate may still warm up
            return
        found = loss_barely_moves(self.start_loss or 0.0, metrics["eval_loss"], state.global_step, self.settings)
        if found is not None and not self.is_advised:
            self.is_advised = True
            say(f"advice: {found}")

    def _diverged(self, found: Finding) -> Diverged:
        steps = (step for step in checkpoint.saved_steps(self.folder) if step <= self.last_good)
        saved = "no checkpoint had been saved before it"
        if (step := next(steps, None)) is not None:
            saved = f"the last good checkpoint is {checkpoint.folder_of_step(self.folder, step)}"
        return Diverged(f"{found.what}; {saved}", got=found.got, fix=f"{found.fix} [{found.gotcha}]")
