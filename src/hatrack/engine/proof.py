"""Proof that what was saved is what was trained: the same rows through the adapter as read back from disk."""

from typing import Any

import torch

from hatrack.base.load import Base
from hatrack.data.batch import collate
from hatrack.data.render import TokenRows
from hatrack.errors import MachineError
from hatrack.hat import Hat
from hatrack.say import say

PROBE_ROWS = 4


@torch.no_grad()
def probe(model: Any, rows: TokenRows, base: Base, task: str) -> torch.Tensor:
    """Probabilities (float32) for the shortest few rows: (rows, labels), or at the last position (rows, vocabulary)."""
    model.eval()
    chosen = rows.lengths.argsort(kind="stable")[:PROBE_ROWS]
    outputs = []
    for index in chosen:
        batch = collate([rows.row(int(index))], 0, task)  # one row at a time: no padding to depend on
        logits = model(
            input_ids=batch["input_ids"].to(base.device), attention_mask=batch["attention_mask"].to(base.device)
        ).logits
        outputs.append(logits[0].float() if task == "classify" else logits[0, -1].float())
    return torch.stack(outputs).softmax(-1).cpu()


def prove(hat: Hat, expected: torch.Tensor, rows: TokenRows) -> None:
    """Holds the re-loaded `hat` to `expected`, and says how far the adapter moves the base's answers.

    Raises MachineError where it does not reproduce what was trained: then the file is not to be trusted.
    """
    name = hat.active
    again = probe(hat.model, rows, hat.base, hat.task)
    tolerance = 1e-4 if hat.base.dtype == torch.float32 else 0.02  # bf16 keeps 8 bits; kernels may sum in another order
    apart = _distance(again, expected)
    if not apart <= tolerance:
        raise MachineError(
            "the saved adapter does not reproduce the trained one",
            got=f"answers {apart:.2%} of the probability apart, more than {tolerance:.2%}",
            fix="train again; if it happens twice, please report it",
        )
    hat.use(None)
    moved = _distance(probe(hat.model, rows, hat.base, hat.task), expected)
    hat.use(name)
    say(f"proof: read back from disk it gives the same answers; it moves {moved:.1%} of the base's probability")
    if moved < 1e-6:
        say("the adapter changes nothing: train longer, or with a higher --lr")


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Total variation: the share of probability that would have to move to turn one into the other, mean over rows."""
    return float((one - other).abs().sum(-1).mean() / 2)
