"""Takes training steps and undoes them, for measurements before a run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hatrack.evaluate.loss import Batch, count_losses, losses
from hatrack.training.prefix_cache import FrozenPrefix


@contextmanager
def undo_steps(model: Any) -> Iterator[list[torch.nn.Parameter]]:
    """Puts `model` in training mode and yields its trainable parameters. When the block ends, restores parameters,
    random state and mode, and removes gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before, was_training = [parameter.detach().clone() for parameter in parameters], model.training
    accelerators = [parameters[0].device] if parameters[0].device.type in ("cuda", "xpu") else []
    model.train()
    try:
        with torch.random.fork_rng(accelerators):
            yield parameters
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        model.train(was_training)


def add_gradients(model: Any, batches: Sequence[Batch], task: str, prefix: FrozenPrefix | None = None) -> float:
    """Adds the gradients of one step with the micro-batches `batches`, and returns its loss. `prefix` computes the
    layers below all adapters, or reads their cached output."""
    total, loss = max(sum(count_losses(batch, task) for batch in batches), 1), 0.0
    for values, _, _ in prefix.losses(batches) if prefix else (losses(model, batch, task) for batch in batches):
        part = values.sum() / total
        part.backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
    return loss
