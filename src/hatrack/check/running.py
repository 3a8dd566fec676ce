"""Gotchas that only show during training, found in losses and gradients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hatrack.check.finding import Finding
from hatrack.check.settings import WILD

MIN_STEPS_GROWN = 5
"""Steps after which the running mean of the loss can show that the loss has grown."""
MIN_STEPS_MOVED = 10
"""Steps after which the held-out loss can show whether the model learns."""
MIN_CHANGE = 0.005
"""A held-out loss has moved if it changed by at least this share of the loss before training."""
ALREADY_LOW = 0.02
"""A held-out loss below this can hardly improve."""
MAX_ROWS_NAMED = 8


@dataclass(frozen=True)
class Step:
    """One optimizer step. `number` counts from 1; `norm` is the gradient norm; `rows` are row numbers in `source`."""

    number: int
    loss: float
    norm: float
    rows: Sequence[int]
    source: str

    @property
    def named_rows(self) -> str:
        """Formats the numbers of the first few rows and the name of their data."""
        shown = ", ".join(str(row) for row in sorted(self.rows)[:MAX_ROWS_NAMED])
        more = len(self.rows) - MAX_ROWS_NAMED
        return f"rows {shown}{f' and {more} more' if more > 0 else ''} of {self.source}"


@dataclass(frozen=True)
class LearningSettings:
    """The settings that may cause a bad loss: `lr` is the peak learning rate (`is_lr_measured`: by --lr auto),
    `usual_lr` the learning rate that hatrack derives for the base, `dtype` the base's dtype, `r` the rank."""

    lr: float
    usual_lr: float
    dtype: str
    r: int
    is_lr_measured: bool = False


def loss_not_a_number(step: Step, settings: LearningSettings) -> Finding | None:
    """The loss is nan or inf, and everything after it is too."""
    if math.isfinite(step.loss) and math.isfinite(step.norm):
        return None
    what, value = ("gradient", step.norm) if math.isfinite(step.loss) else ("loss", step.loss)
    if settings.dtype == "float16":
        cause = "likely float16, whose largest value is 65,504: start again with --dtype bfloat16"
    elif step.number == 1:
        cause = "nothing was learned yet, so likely the base itself: hatrack check looks at its weights"
    elif settings.lr > settings.usual_lr * WILD:
        cause = f"likely the learning rate: start again with --lr {settings.usual_lr:g}"
    else:
        cause = f"likely one of these rows, or the learning rate: start again with --lr {settings.lr / 3:.1g}"
    return Finding(
        "loss-not-a-number",
        f"the {what} is not a finite number at step {step.number:,}",
        f"{value:g} from {step.named_rows}",
        cause,
        refused=True,
    )


def has_grown(first: float, recent: float) -> bool:
    """Whether the loss exceeds its first value by more than 50% and by more than two nats.

    On good runs, the mean over a few rows of similar length varies by a nat (SmolLM2 on short questions: 0.9 to 1.9).
    On a diverged run, the loss grows to that of random guesses and beyond.
    """
    return recent > first + max(2.0, 0.5 * first)


def loss_explodes(first: float, recent: float, step: Step, settings: LearningSettings) -> Finding | None:
    """The loss grows past its first value and stays there. `first` is the loss before the first step, `recent` the mean
    over the last few steps."""
    if not has_grown(first, recent):
        return None
    slower = min(settings.usual_lr, settings.lr / 3)
    return Finding(
        "loss-explodes",
        f"the loss has grown far above its first value by step {step.number:,}",
        f"{recent:.3g} after {first:.3g}, now at {step.named_rows}",
        f"likely the learning rate {settings.lr:g}: start again with --lr {slower:.2g}",
        refused=True,
    )


def no_gradient(step: Step) -> Finding | None:
    """No gradient reaches the adapter. torch warns "None of the inputs have requires_grad=True", or says nothing."""
    if step.norm != 0 or step.loss < 1e-6:
        return None
    return Finding(
        "no-gradient",
        f"no gradient reaches the adapter at step {step.number:,}",
        f"a gradient of exactly 0 at a loss of {step.loss:.3g}",
        "another --targets: the adapted layers do not lead to the output, or something between them is detached",
        refused=True,
    )


def loss_barely_moves(before: float, now: float, step: int, settings: LearningSettings) -> Finding | None:
    """The held-out loss has not changed: nothing is learned. The advice is to raise the learning rate before the rank.

    `before` and `now` are the held-out losses before training and after `step` steps.
    """
    if step < MIN_STEPS_MOVED or before < ALREADY_LOW or before - now >= MIN_CHANGE * before:
        return None
    if now > before * (1 + MIN_CHANGE):  # it grew
        return None
    lr = settings.lr
    faster = settings.usual_lr if lr < settings.usual_lr else 3 * lr
    measure = "" if settings.is_lr_measured else "; --lr auto measures"
    return Finding(
        "loss-barely-moves",
        f"the held-out loss has barely moved in {step:,} steps",
        f"{before:.4f} before, {now:.4f} now, with --lr {lr:g} and --r {settings.r}",
        f"--lr {faster:.2g} before a larger --r, then more --epochs{measure}",
    )


def end_not_learned(row: int, end: str, likely: float, tokens: int) -> Finding:
    """The tuned model does not stop where the answers in its data end. `end` is the end token and `likely` (0 to 1) its
    probability at the end of `row`'s answer; the model generated `tokens` tokens without an end token."""
    return Finding(
        "end-not-learned",
        "the adapter's answers do not end by themselves",
        f"{end!r} is {likely:.0%} likely at the end of row {row}'s answer; {tokens} tokens were generated without it",
        "more --epochs or --steps, or a higher --lr; until then, --max-new-tokens limits them",
    )
