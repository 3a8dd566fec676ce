"""The layers below the first adapted one: computed once for each row, ever, and read back from then on.

With adapters in the top layers only, nothing below them changes while training, and no gradient goes there. What comes
out of the last layer below, for the real tokens of a row, is a function of the base and the row alone: it is kept on
disk (`states.py`), for later epochs and for later runs with whatever rank, learning rate, seed or order of rows.
Embeddings, masks and position tables are made by the model's own code each time, as they cost nothing.

The layers below run without dropout, whether anything is kept or not: a mask drawn once would be no dropout.

Knows nothing of recipes, files of data or how adapters are placed.
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


class Kept(Protocol):
    """Hidden states of rows by their key: on disk (`states.HiddenStateCache`), or for a short while in memory."""

    def read(self, key: bytes, into: memoryview) -> bool:
        """Fills `into` with a row's states, and says whether they were there."""

    def add(self, key: bytes, states: memoryview) -> None:
        """Keeps a row's states."""

    def flush(self) -> None:
        """Makes them outlast this process, where they are to."""


class FrozenPrefix:
    """The first `depth` layers of `model`, none of which is trained, and what of their results is kept in `states`.

    Raises ValueError where their results would not be a function of the row alone: something is trained below them, or
    random numbers are drawn there all the same.
    """

    def __init__(self, model: Any, trunk: LayerStack, depth: int, *, task: str, states: Kept | None) -> None:
        self.model, self.trunk, self.depth, self.task, self.states = model, trunk, depth, task, states
        self.device = next(model.parameters()).device
        with trunk.only_last_layers(0):
            detect_output_head(model, task)  # it would ask by a pass of its own while states are given
        self._still = [module for layer in trunk.layers[:depth] for module in layer.modules()]
        self._still += self._called_before()
        trained = any(p.requires_grad for layer in trunk.layers[:depth] for p in layer.parameters())
        first, again = self._enter(), self._enter()
        if trained or first.requires_grad or not torch.equal(first, again):
            raise ValueError("what is below the adapters is not the same each time")
        self.width, self.dtype = first.shape[-1], first.dtype

    @contextmanager
    def use_cached(self, batch: Batch) -> Iterator[None]:
        """While the block runs the model on `batch`, its first layers give what they gave before, without computing."""
        self.set_eval()
        hidden, missing = self._read(batch)
        if missing:
            rows = torch.tensor(missing)
            hidden[rows] = self._compute(batch["input_ids"][missing], batch["attention_mask"][missing]).cpu()
            hidden = self.keep(batch, hidden)
        hidden = hidden.to(self.device)
        with self.trunk.replace_layers(lambda: hidden, self.depth):
            yield

    def losses(self, batches: Iterable[Batch]) -> Iterator[Losses]:
        """What `evaluate.loss.losses` gives for each batch."""
        for batch in batches:
            with self.use_cached(batch):
                found = losses(self.model, batch, self.task)
            yield found

    def set_eval(self) -> None:
        """Puts everything below the adapters into evaluation mode: `model.train()` reaches it each time."""
        for module in self._still:
            module.training = False

    def read(self, batch: Batch) -> torch.Tensor | None:
        """What the layers below gave for a batch (B, T, d), where all of it is kept."""
        hidden, missing = self._read(batch)
        return None if missing else hidden.to(self.device)

    def keep(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Keeps what the layers below gave for a batch (B, T, d), and returns it as `read` will: zero at padding, which
        nothing real looks at."""
        real = batch["attention_mask"].bool()
        hidden = hidden.detach().masked_fill(~real[..., None].to(hidden.device), 0)
        if self.states is not None:
            on_cpu = hidden.cpu()
            for row, (key, length) in enumerate(_keys(batch)):
                self.states.add(key, memory_of(on_cpu[row, :length]))
        return hidden

    def flush(self) -> None:
        """Makes what is kept so far outlast this process."""
        if self.states is not None:
            self.states.flush()

    @torch.no_grad()
    def _compute(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden, calls = self.trunk.capture_inputs(lambda: self.model(input_ids=ids, attention_mask=mask))
        for number in range(self.depth):
            hidden = self.trunk.run_layer(number, hidden, calls[number])
        return hidden

    def _read(self, batch: Batch) -> tuple[torch.Tensor, list[int]]:
        """What is kept for a batch (B, T, d), on the processor, zero elsewhere; and the rows that are not."""
        hidden = torch.zeros(*batch["input_ids"].shape, self.width, dtype=self.dtype)
        return hidden, [
            row
            for row, (key, length) in enumerate(_keys(batch))
            if self.states is None or not self.states.read(key, memory_of(hidden[row, :length]))
        ]

    def _enter(self) -> torch.Tensor:
        """What goes into the first layer for a few tokens, in training mode."""
        ids = torch.ones(1, PROBE_TOKENS, dtype=torch.long, device=self.device)
        was_training = self.model.training
        self.model.train()
        self.set_eval()
        devices = [self.device] if self.device.type in ("cuda", "xpu") else []
        try:
            with torch.random.fork_rng(devices), torch.enable_grad():
                return self.trunk.capture_inputs(lambda: self.model(input_ids=ids, attention_mask=ids))[0]
        finally:
            self.model.train(was_training)

    def _called_before(self) -> list[nn.Module]:
        """The modules that are done before the first layer is called: embeddings, their norm, their dropout."""
        layers = {module for layer in self.trunk.layers for module in layer.modules()}
        done: list[nn.Module] = []
        others = [module for module in self.model.modules() if module not in layers]
        hooks = [other.register_forward_hook(lambda module, *_: done.append(module)) for other in others]
        try:
            self._enter()
        finally:
            for hook in hooks:
                hook.remove()
        return done


def _keys(batch: Batch) -> Iterator[tuple[bytes, int]]:
    """The key and the length of each row."""
    for ids, length in zip(batch["input_ids"].cpu().numpy(), batch["attention_mask"].sum(1).tolist(), strict=True):
        yield row_key(ids[:length]), length


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
