"""Watches a run as it goes: stops it where the loss is lost, and says once where nothing is learned.

Knows nothing of models; the Trainer tells it losses, gradients and rows.
"""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from hatrack.check.finding import Finding
from hatrack.check.running import (
    FIRST,
    Step,
    has_grown,
    loss_barely_moves,
    loss_explodes,
    loss_not_a_number,
    no_gradient,
)
from hatrack.console import say
from hatrack.errors import Diverged
from hatrack.training import checkpoint
from hatrack.training.run import Run

SMOOTH = 0.8
"""Weight of the past in the running mean of the loss: about five steps count."""


class DivergenceWatch(TrainerCallback):  # type: ignore[misc]
    """Looks at every step before it is taken: a step that must not be taken never changes the adapter.

    `lr` is the peak learning rate, `usual_lr` the derived one, `before` the held-out loss that training began with,
    told at the first evaluation. `few` measures it on a few rows, which only a run that looks lost has to wait for.
    """

    def __init__(self, run: Run, *, lr: float, usual_lr: float, dtype: str) -> None:
        self.run, self.lr, self.usual_lr, self.dtype = run, lr, usual_lr, dtype
        self.before: float | None = None
        self.few: Callable[[], float] = lambda: 0.0
        self.first = 0.0  # the loss of the first step, of before it was taken
        self.seen = 0
        self.recent: float | None = None
        self.good = 0  # the newest step whose checkpoint a sound loss came after
        self.advised = False

    def step(self, number: int, loss: float, norm: float, rows: Callable[[], list[int]]) -> None:
        """Raises Diverged where optimizer step `number`, about to be taken, would lose what was learned.

        `rows` gives the row numbers of the step's batch.
        """
        self.recent = loss if self.recent is None else SMOOTH * self.recent + (1 - SMOOTH) * loss
        known, self.seen = self.seen >= FIRST, self.seen + 1
        if self.seen == 1:
            self.first = loss
        start = self._start(self.recent)
        suspicious = not (abs(self.recent) < float("inf") and abs(norm) < float("inf")) or norm == 0
        if not suspicious and self.recent <= start + 1:
            self.good = number - 1
        if not suspicious and not (known and has_grown(start, self.recent)):  # `rows` takes time to find out
            return
        step = Step(number, loss, norm, rows(), str(self.run.recipe.data))
        found = loss_not_a_number(step, self.lr, self.usual_lr, self.dtype)
        found = found or (no_gradient(step) if not known else None)
        found = found or (loss_explodes(start, self.recent, step, self.lr, self.usual_lr) if known else None)
        if found is not None:
            raise self._diverged(found)

    def _start(self, recent: float) -> float:
        """The loss that training began with. Rows of one length may be far harder than others, 5.4 where all are 2.0,
        so a loss above the first one is held against that of other rows too."""
        if self.before is None and recent > self.first + 1:
            self.before = self.few()
        return max(self.first, self.before or 0.0)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        recipe, loss = self.run.recipe, metrics["eval_loss"]
        if 2 * state.global_step < state.max_steps:  # a rate that still warms up, or a slow start, is no reason yet
            return
        found = loss_barely_moves(
            self.before or 0.0, loss, state.global_step, self.lr, self.usual_lr, recipe.r, measured=recipe.lr == "auto"
        )
        if found is not None and not self.advised:
            self.advised = True
            say(f"advice: {found}")

    def _diverged(self, found: Finding) -> Diverged:
        step = next((step for step in checkpoint.saved_steps(self.run.folder) if step <= self.good), None)
        kept = "no checkpoint had been saved before it"
        if step is not None:
            kept = f"the last good checkpoint is {checkpoint.checkpoint_folder(self.run.folder, step)}"
        return Diverged(f"{found.what}; {kept}", got=found.got, fix=f"{found.fix} [{found.gotcha}]")
