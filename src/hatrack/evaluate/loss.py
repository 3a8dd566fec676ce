"""The loss a model is trained on and scored by, one number for each thing it had to get right.

Sums rather than means are kept, so that a step split into micro-batches weighs every supervised token (or row) alike.
Tokens that are not learned from never reach the output head (`kernels/loss.py` says how the others do).
Knows nothing of batching, optimizers or reports.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from hatrack.kernels.frozen_linear import FrozenLinear, active_rounding
from hatrack.kernels.loss import next_token_losses
from hatrack.upstream.torch import has_hooks

Batch = dict[str, torch.Tensor]
"""`input_ids`, `attention_mask` and `labels`, as `data.batch.collate` makes them."""
Losses = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""What `losses` gives."""


def losses(model: Any, batch: Batch, task: str) -> Losses:
    """Runs `model` on a batch of B rows of T tokens.

    Returns (values, rows, logits): `values` (n,) float32 losses, one for each row (classify) or supervised token
    (chat, complete); `rows` (n,) the row in the batch that each belongs to; `logits` (B, labels) to classify, None
    otherwise.
    """
    labels = batch["labels"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if task == "classify":
        logits = model(**inputs).logits
        return _classify(logits, labels), torch.arange(len(labels), device=labels.device), logits
    supervised = labels[:, 1:] != -100  # (B, T - 1): the state at t is to tell the token at t + 1
    hidden, W, b, rounding = _before_head(model, inputs)
    values = next_token_losses(hidden[:, :-1][supervised], W, b, labels[:, 1:][supervised], rounding)
    return values, supervised.nonzero()[:, 0], None


def detect_output_head(model: Any, task: str) -> None:
    """Finds out what `losses` would find out about a model when it first meets it, by a pass of its own."""
    whole = _inside(model)
    if task != "classify" and _is_plain(whole.get_output_embeddings()):
        _ends_with_head(whole, whole.get_output_embeddings())


def count_losses(batch: Batch, task: str) -> int:
    """How many losses `losses` gives for this batch: its rows, or its supervised tokens."""
    labels = batch["labels"]
    return len(labels) if task == "classify" else int((labels[:, 1:] != -100).sum())


def _classify(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy for one label (B,), binary cross-entropy averaged over labels for several (B, L)."""
    if labels.dim() == 1:
        return F.cross_entropy(logits.float(), labels, reduction="none")
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(-1)


class _Pass(nn.Module):
    """Stands in for the output head and hands its input on; `given` holds what it was handed. It has the head's weight,
    since some models ask that for its format."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.given: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given.append(x)
        return x


def _before_head(
    model: Any, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, str | None]:
    """Runs `model` up to its output head: (states (B, T, d), W, b, what the head's products are rounded to); or all of
    it: (logits (B, T, V), None, None, None), where the head is not a plain frozen linear layer or the model does more
    after it."""
    whole = _inside(model)
    head = whole.get_output_embeddings()
    if not _is_plain(head) or not _ends_with_head(whole, head):
        return model(**inputs).logits, None, None, None
    return _headless(model, whole, inputs)[0], head.weight, head.bias, active_rounding(head)


def _headless(model: Any, whole: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """What `model` gives as logits without the head of `whole` inside it: states (B, T, d), and whether they are the
    very tensor that the head would have been given."""
    head = whole.get_output_embeddings()
    stand_in = _Pass(head.weight)
    whole.set_output_embeddings(stand_in)
    try:
        logits = model(**inputs).logits
    finally:
        whole.set_output_embeddings(head)
    return logits, len(stand_in.given) == 1 and logits is stand_in.given[0]


def _inside(model: Any) -> Any:
    """The Hugging Face model within peft's and accelerate's wrappers."""
    while not hasattr(model, "get_output_embeddings") or hasattr(model, "get_base_model"):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model.module
    return model


def _is_plain(head: Any) -> bool:
    return (
        type(head) in (nn.Linear, FrozenLinear)
        and not any(parameter.requires_grad for parameter in head.parameters())
        and not has_hooks(head)
    )


_endings: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@torch.no_grad()
def _ends_with_head(whole: Any, head: nn.Linear) -> bool:
    """Whether the model's logits are what its head gives and nothing else, found out once by a pass over one token.

    Some models scale or bound their logits afterwards (Cohere, Gemma 2): their states alone do not tell the loss.
    """
    if whole not in _endings:
        inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)}
        was_training = whole.training
        whole.eval()
        try:
            _endings[whole] = _headless(whole, whole, inputs)[1]
        finally:
            whole.train(was_training)
    return _endings[whole]
