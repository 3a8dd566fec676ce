"""Computes the layers below the first adapter once per row, then reads their cached output.

With adapters in the top layers only, the layers below them do not change during training and get no gradient. Their
output for the real tokens of a row depends on the base and the row alone. It is cached on disk
(`hidden_states.py`), for later epochs and for later runs with any rank, learning rate, seed or order of rows.
Embeddings, masks and position tables are made by the model's own code each time, as they cost next to nothing.

The layers below always run without dropout: a cache would repeat one dropout mask in every epoch.

Knows nothing of recipes, data files or how adapters are placed.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from hatrack.base.layer_stack import LayerStack
from hatrack.evaluate.loss import Batch, Losses, detect_output_head, losses
from hatrack.training.hidden_states import row_key

PROBE_TOKENS = 4


class RowCache(Protocol):
    """Hidden states of rows by key: on disk (`hidden_states.HiddenStateCache`) or in memory."""

    def read(self, key: bytes, into: memoryview) -> bool:
        """Fills `into` with a row's hidden states. Returns False if they are not cached."""

    def add(self, key: bytes, states: memoryview) -> None:
        """Caches a row's hidden states."""

    def flush(self) -> None:
        """Makes the added rows available to later runs."""


class FrozenPrefix:
    """The first `depth` layers of `model`, none of which is trained. Their output for each row is cached in `states`.

    Raises ValueError if their output is not a function of the row alone: they, or modules before them, are trained, or
    draw random numbers even in evaluation mode.
    """

    def __init__(self, model: Any, stack: LayerStack, depth: int, *, task: str, states: RowCache | None) -> None:
        self.model, self.stack, self.depth, self.task, self.states = model, stack, depth, task, states
        self.device = next(model.parameters()).device
        with stack.only_last_layers(0):
            detect_output_head(model, task)  # later it would do so by a pass of its own, inside `use_cached`
        self._modules = [module for layer in stack.layers[:depth] for module in layer.modules()]
        self._modules += self._modules_before_layers()
        is_trained = any(p.requires_grad for layer in stack.layers[:depth] for p in layer.parameters())
        once, again = self._probe(), self._probe()
        if is_trained or once.requires_grad or not torch.equal(once, again):
            raise ValueError("the output of the layers below the adapters is not the same each time")
        self.width, self.dtype = once.shape[-1], once.dtype

    @contextmanager
    def use_cached(self, batch: Batch) -> Iterator[None]:
        """Replaces these layers by their cached output while the block runs the model on `batch`. Computes rows that
        are not cached first."""
        self.set_eval()
        hidden, missing = self._read(batch)
        if missing:
            rows = torch.tensor(missing)
            hidden[rows] = self._compute(batch["input_ids"][missing], batch["attention_mask"][missing]).cpu()
            hidden = self.store(batch, hidden)
        hidden = hidden.to(self.device)
        with self.stack.replace_layers(lambda: hidden, self.depth):
            yield

    def losses(self, batches: Iterable[Batch]) -> Iterator[Losses]:
        """Yields the result of `evaluate.loss.losses` for each batch."""
        for batch in batches:
            with self.use_cached(batch):
                found = losses(self.model, batch, self.task)
            yield found

    def set_eval(self) -> None:
        """Puts these layers and the modules before them into evaluation mode. Call it after `model.train()`."""
        for module in self._modules:
            module.training = False

    def read(self, batch: Batch) -> torch.Tensor | None:
        """Returns the cached output of these layers for a batch (B, T, d), or None unless all its rows are cached."""
        hidden, missing = self._read(batch)
        return None if missing else hidden.to(self.device)

    def store(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Caches the output of these layers for a batch (B, T, d). Returns it as `read` will: zero at padding, which no
        real token attends to."""
        real = batch["attention_mask"].bool()
        hidden = hidden.detach().masked_fill(~real[..., None].to(hidden.device), 0)
        if self.states is not None:
            on_cpu = hidden.cpu()
            for row, (key, length) in enumerate(_keys(batch)):
                self.states.add(key, memory_of(on_cpu[row, :length]))
        return hidden

    def flush(self) -> None:
        """Makes the rows cached so far available to later runs."""
        if self.states is not None:
            self.states.flush()

    @torch.no_grad()
    def _compute(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden, calls = self.stack.capture_inputs(lambda: self.model(input_ids=ids, attention_mask=mask))
        for number in range(self.depth):
            hidden = self.stack.run_layer(number, hidden, calls[number])
        return hidden

    def _read(self, batch: Batch) -> tuple[torch.Tensor, list[int]]:
        """Reads the cached output for a batch (B, T, d), on the CPU, zero elsewhere; and lists the missing rows."""
        hidden = torch.zeros(*batch["input_ids"].shape, self.width, dtype=self.dtype)
        return hidden, [
            row
            for row, (key, length) in enumerate(_keys(batch))
            if self.states is None or not self.states.read(key, memory_of(hidden[row, :length]))
        ]

    def _probe(self) -> torch.Tensor:
        """Returns the first layer's input for a few tokens, in training mode."""
        ids = torch.ones(1, PROBE_TOKENS, dtype=torch.long, device=self.device)
        was_training = self.model.training
        self.model.train()
        self.set_eval()
        devices = [self.device] if self.device.type in ("cuda", "xpu") else []
        try:
            with torch.random.fork_rng(devices), torch.enable_grad():
                return self.stack.capture_inputs(lambda: self.model(input_ids=ids, attention_mask=ids))[0]
        finally:
            self.model.train(was_training)

    def _modules_before_layers(self) -> list[nn.Module]:
        """Finds the modules that run before the first layer: embeddings, their norm, their dropout."""
        layers = {module for layer in self.stack.layers for module in layer.modules()}
        called: list[nn.Module] = []
        others = [module for module in self.model.modules() if module not in layers]
        hooks = [other.register_forward_hook(lambda module, *_: called.append(module)) for other in others]
        try:
            self._probe()
        finally:
            for hook in hooks:
                hook.remove()
        return called


def _keys(batch: Batch) -> Iterator[tuple[bytes, int]]:
    """Yields the key and the length of each row."""
    for ids, length in zip(batch["input_ids"].cpu().numpy(), batch["attention_mask"].sum(1).tolist(), strict=True):
        yield row_key(ids[:length]), length


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
