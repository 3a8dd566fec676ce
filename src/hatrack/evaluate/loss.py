"""The loss a model is trained on and scored by, one number for each thing it had to get right.

Knows nothing of batching, optimizers or reports. Sums rather than means are kept, so that a step split into
micro-batches weighs every supervised token (or row) alike.
"""

from typing import Any

import torch
from torch.nn import functional as F

CHUNK = 1024
"""Supervised tokens whose logits are held in float32 at one time."""


def losses(model: Any, batch: dict[str, torch.Tensor], task: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs `model` on a batch of B rows of T tokens.

    Returns (values, rows, logits): `values` (n,) float32 losses, one for each row (classify) or supervised token
    (chat, complete); `rows` (n,) the row in the batch that each belongs to; `logits` as the model gave them:
    (B, labels) or (B, T, vocabulary).
    """
    labels = batch["labels"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if task == "classify":
        return _classify(logits, labels), torch.arange(len(labels), device=labels.device), logits
    values, rows = _next_token(logits, labels)
    return values, rows, logits


def items(batch: dict[str, torch.Tensor], task: str) -> int:
    """How many losses `losses` gives for this batch: its rows, or its supervised tokens."""
    labels = batch["labels"]
    return len(labels) if task == "classify" else int((labels[:, 1:] != -100).sum())


def _classify(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy for one label (B,), binary cross-entropy averaged over labels for several (B, L)."""
    if labels.dim() == 1:
        return F.cross_entropy(logits.float(), labels, reduction="none")
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(-1)


def _next_token(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of token t + 1 given the logits at t, at supervised positions only; float32 a chunk at a time."""
    supervised = labels[:, 1:] != -100
    rows = supervised.nonzero()[:, 0]
    chosen = logits[:, :-1][supervised]  # (n, vocabulary)
    wanted = labels[:, 1:][supervised]  # (n,)
    parts = [
        F.cross_entropy(chosen[start : start + CHUNK].float(), wanted[start : start + CHUNK], reduction="none")
        for start in range(0, len(wanted), CHUNK)
    ]
    return (torch.cat(parts) if parts else chosen.new_zeros(0, dtype=torch.float32)), rows
