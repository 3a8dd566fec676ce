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
    """Float32 log-probabilities of the shortest few rows: (rows, labels), or the last position's (rows, vocabulary)."""
    model.eval()
    chosen = rows.lengths.argsort(kind="stable")[:PROBE_ROWS]
    outputs = []
    for index in chosen:
        batch = collate([rows.row(int(index))], 0, task)  # one row at a time: no padding to depend on
        logits = model(
            input_ids=batch["input_ids"].to(base.device), attention_mask=batch["attention_mask"].to(base.device)
        ).logits
        outputs.append(logits[0].float() if task == "classify" else logits[0, -1].float())
    return torch.stack(outputs).log_softmax(-1).cpu()


def prove(hat: Hat, expected: torch.Tensor, rows: TokenRows) -> None:
    """Holds the re-loaded `hat` to `expected`, and says how far the adapter moves the base's answers.

    Raises MachineError where it does not reproduce what was trained: then the file is not to be trusted.
    """
    name = hat.active
    again = probe(hat.model, rows, hat.base, hat.task)
    tolerance = 1e-4 if hat.base.dtype == torch.float32 else 0.1  # bf16 keeps 8 bits; kernels may sum in another order
    apart = float((again - expected).abs().max())
    if not apart <= tolerance:
        raise MachineError(
            f"the saved adapter does not reproduce the trained one: log-probabilities {apart:.2g} apart",
            got=f"more than {tolerance:g}",
            fix="train again; if it happens twice, please report it",
        )
    hat.use(None)
    moved = float((probe(hat.model, rows, hat.base, hat.task).exp() - expected.exp()).abs().sum(-1).mean() / 2)
    hat.use(name)
    say(f"proof: read back from disk it gives the same answers; it moves {moved:.1%} of the base's probability")
    if moved < 1e-6:
        say("the adapter changes nothing: train longer, or with a higher --lr")
