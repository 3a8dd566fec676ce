"""The loss for training and scoring: one value per row, or per supervised token.

The values are summed, not averaged, so that micro-batches weigh all supervised tokens (or rows) of a step equally.
Unsupervised tokens never reach the output head (`kernels/loss.py`).
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from hatrack.kernels.frozen_linear import FrozenLinear, active_int_format
from hatrack.kernels.loss import next_token_losses
from hatrack.upstream.torch import has_hooks

Batch = dict[str, torch.Tensor]
"""`input_ids`, `attention_mask` and `labels`, as `data.batch.collate` makes them."""
Losses = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""The result of `losses`."""


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
    supervised = labels[:, 1:] != -100  # (B, T - 1): the hidden state at t predicts the token at t + 1
    hidden, W, b, int_format = _run_to_head(model, inputs)
    values = next_token_losses(hidden[:, :-1][supervised], W, b, labels[:, 1:][supervised], int_format)
    return values, supervised.nonzero()[:, 0], None


def detect_output_head(model: Any, task: str) -> None:
    """Tests a model's output head now. Otherwise the first call of `losses` does, with one more forward pass."""
    inner = _unwrap(model)
    if task != "classify" and _is_plain_linear(inner.get_output_embeddings()):
        _returns_head_output(inner, inner.get_output_embeddings())


def count_losses(batch: Batch, task: str) -> int:
    """How many losses a batch has: its rows (classify), or its supervised tokens."""
    labels = batch["labels"]
    return len(labels) if task == "classify" else int((labels[:, 1:] != -100).sum())


def _classify(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy for one label (B,), binary cross-entropy averaged over labels for several (B, L)."""
    if labels.dim() == 1:
        return F.cross_entropy(logits.float(), labels, reduction="none")
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(-1)


class _Identity(nn.Module):
    """Replaces the output head, returns its input and records it in `inputs`. It has the head's weight, since some
    models read its dtype."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.inputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs.append(x)
        return x


def _run_to_head(
    model: Any, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, str | None]:
    """Runs `model` up to its output head: (hidden states (B, T, d), W, b, what the head rounds its matmuls to); or all
    of it: (logits (B, T, V), None, None, None), if the head is not a plain frozen linear layer or not the last
    operation."""
    inner = _unwrap(model)
    head = inner.get_output_embeddings()
    if not _is_plain_linear(head) or not _returns_head_output(inner, head):
        return model(**inputs).logits, None, None, None
    return _run_headless(model, inner, inputs)[0], head.weight, head.bias, active_int_format(head)


def _run_headless(model: Any, inner: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """Runs `model` without the output head of `inner`, the model inside it: the logits it then returns, and whether
    they are the very tensor that the head would have got, (B, T, d)."""
    head = inner.get_output_embeddings()
    identity = _Identity(head.weight)
    inner.set_output_embeddings(identity)
    try:
        logits = model(**inputs).logits
    finally:
        inner.set_output_embeddings(head)
    return logits, len(identity.inputs) == 1 and logits is identity.inputs[0]


def _unwrap(model: Any) -> Any:
    """The Hugging Face model inside the wrappers of peft and accelerate."""
    while not hasattr(model, "get_output_embeddings") or hasattr(model, "get_base_model"):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model.module
    return model


def _is_plain_linear(head: Any) -> bool:
    """Whether a head is a frozen linear layer without hooks."""
    return (
        type(head) in (nn.Linear, FrozenLinear)
        and not any(parameter.requires_grad for parameter in head.parameters())
        and not has_hooks(head)
    )


_tested_models: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Model -> result of `_returns_head_output`."""


@torch.no_grad()
def _returns_head_output(inner: Any, head: nn.Linear) -> bool:
    """Whether the model returns its head's output unchanged; tested once, by a forward pass over one token.

    Some models scale or cap their logits afterwards (Cohere, Gemma 2): hidden states and head do not give their loss.
    """
    if inner not in _tested_models:
        inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)}
        was_training = inner.training
        inner.eval()
        try:
            _tested_models[inner] = _run_headless(inner, inner, inputs)[1]
        finally:
            inner.train(was_training)
    return _tested_models[inner]
