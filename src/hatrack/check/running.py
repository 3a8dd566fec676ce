"""Gotchas that only a running training shows, told from its losses. Knows nothing of models."""

from collections.abc import Sequence
from dataclasses import dataclass

from hatrack.check.finding import Finding
from hatrack.check.settings import WILD

FIRST = 5
"""Steps before which the running mean is of too few to tell that a loss has grown."""
BARELY = 0.005
"""Of the loss before: less than half a per cent is no movement."""
KNOWN_ALREADY = 0.02
FEWEST = 10
"""Steps before which nobody can tell."""
ROWS_NAMED = 8


@dataclass(frozen=True)
class Step:
    """One optimizer step (counted from 1): its loss, the norm of its gradient, and which rows of `source` it saw."""

    number: int
    loss: float
    norm: float
    rows: Sequence[int]
    source: str

    @property
    def named_rows(self) -> str:
        """The numbers of the first few rows."""
        shown = ", ".join(str(row) for row in sorted(self.rows)[:ROWS_NAMED])
        more = len(self.rows) - ROWS_NAMED
        return f"rows {shown}{f' and {more} more' if more > 0 else ''} of {self.source}"


def loss_not_a_number(step: Step, lr: float, usual_lr: float, dtype: str) -> Finding | None:
    """The loss is nan or inf, and everything after it is too."""
    finite = float("-inf") < step.loss < float("inf") and float("-inf") < step.norm < float("inf")
    if finite:
        return None
    what = "gradient" if float("-inf") < step.loss < float("inf") else "loss"
    value = step.norm if what == "gradient" else step.loss
    if dtype == "float16":
        cause = "likely float16, which ends at 65,504: start anew with --dtype bfloat16"
    elif step.number == 1:
        cause = "nothing was learned yet, so likely the base itself: hatrack check looks at its weights"
    elif lr > usual_lr * WILD:
        cause = f"likely the learning rate: start anew with --lr {usual_lr:g}"
    else:
        cause = f"likely one of these rows, or the learning rate: start anew with --lr {lr / 3:.1g}"
    return Finding(
        "loss-not-a-number",
        f"the {what} is not a finite number at step {step.number:,}",
        f"{value:g} from {step.named_rows}",
        cause,
        refused=True,
    )


def has_grown(first: float, recent: float) -> bool:
    """Whether the loss is half as much again, and two nats more, than at the beginning.

    Means of few rows of like length move by a nat on sound runs (SmolLM2 on short questions: 0.9 to 1.9); a lost run's
    go on to those of guessing and beyond.
    """
    return recent > first + max(2.0, 0.5 * first)


def loss_explodes(first: float, recent: float, step: Step, lr: float, usual_lr: float) -> Finding | None:
    """The loss grows past where it began and does not come back. `first` is of before the first step, `recent` a mean
    over several steps."""
    if not has_grown(first, recent):
        return None
    slower = min(usual_lr, lr / 3)
    return Finding(
        "loss-explodes",
        f"the loss has grown far past where it began, by step {step.number:,}",
        f"{recent:.3g} after {first:.3g}, now at {step.named_rows}",
        f"likely the learning rate {lr:g}: start anew with --lr {slower:.2g}",
        refused=True,
    )


def no_gradient(step: Step) -> Finding | None:
    """torch: "None of the inputs have requires_grad=True", or no word at all: no gradient reaches the adapter."""
    if step.norm != 0 or step.loss < 1e-6:
        return None
    return Finding(
        "no-gradient",
        f"no gradient reaches the adapter at step {step.number:,}",
        f"a gradient of exactly 0 at a loss of {step.loss:.3g}",
        "another --targets: the adapted layers do not lead to the output, or something between them is cut off",
        refused=True,
    )


def loss_barely_moves(
    before: float, now: float, step: int, lr: float, usual_lr: float, r: int, measured: bool = False
) -> Finding | None:
    """The held-out loss is where it was: nothing is learned. The rate is to be raised before the rank.

    `measured`: the rate is that of --lr auto, which is not to be advised again.
    """
    if step < FEWEST or before < KNOWN_ALREADY or before - now >= BARELY * before or now > before * (1 + BARELY):
        return None
    faster = usual_lr if lr < usual_lr else 3 * lr
    return Finding(
        "loss-barely-moves",
        f"the held-out loss has barely moved in {step:,} steps",
        f"{before:.4f} before, {now:.4f} now, with --lr {lr:g} and --r {r}",
        f"--lr {faster:.2g} before a larger --r, then more --epochs{'' if measured else '; --lr auto measures'}",
    )


def end_not_learned(row: int, end: str, likely: float, tokens: int) -> Finding:
    """The tuned model goes on where the answers it learned from end."""
    return Finding(
        "end-not-learned",
        "the answers do not end by themselves yet",
        f"{end!r} {likely:.0%} likely at the end of row {row}'s answer, and {tokens} tokens without it when asked",
        "more --epochs or --steps, or a higher --lr; until then --max-new-tokens bounds them",
    )
