"""A frozen base larger than an accelerator's memory: its layers are lent to the accelerator, one at a time.

Everything but the layers stays there. There are two places for a layer: while one is computed with, the next is read
into page-locked memory by a thread and copied over from there by a stream of its own, so that reading, copying and
computing go on side by side. Knows nothing of what the layers compute.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hatrack.base.layer_stack import LayerStack
from hatrack.base.load import Base
from hatrack.base.mapped_layers import OUTSIDE, MappedLayers, fake_dtype, read_ahead

ALIGNED = 256
"""Each weight begins at a multiple of so many bytes, as the accelerator's own allocations do."""


class _Place(NamedTuple):
    """Room for a layer on the accelerator, and on the way there."""

    locked: torch.Tensor
    lent: torch.Tensor
    arrived: Any  # the event after the copy
    left: Any  # the event after the last product with what was here


def open_layers(model: Any, trunk: LayerStack, dtype: torch.dtype, folder: Path, device: torch.device) -> MappedLayers:
    """The window for a base that computes on `device`, where all of it but the layers is (`settle`)."""
    if device.type == "cpu":
        return MappedLayers(model, trunk, dtype, folder)
    return OffloadedLayers(model, trunk, dtype, folder, device)


def settle(model: nn.Module, trunk: LayerStack, dtype: torch.dtype, device: torch.device) -> None:
    """Moves everything but the frozen weights of the layers to an accelerator, its frozen weights in `dtype`."""
    if device.type == "cpu":
        return
    lent = {id(weight) for layer in trunk.layers for weight in layer.parameters() if not weight.requires_grad}
    for weight in model.parameters():
        if id(weight) not in lent:
            kept = weight.dtype if weight.requires_grad or not weight.is_floating_point() else dtype
            weight.data = weight.data.to(device, kept)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def as_if_loaded(base: Base) -> AbstractContextManager[None]:
    """While the block runs, a base that is not in memory looks as if it were, to what is made beside its weights."""
    return fake_dtype(base.model.base_model, base.dtype, base.device) if base.mapped else nullcontext()


class OffloadedLayers(MappedLayers):
    """A window whose layers are on `device` while they are shown. Everything else is there for good (`settle`)."""

    def __init__(self, model: Any, trunk: LayerStack, dtype: torch.dtype, folder: Path, device: torch.device) -> None:
        self.device = device
        super().__init__(model, trunk, dtype, folder)

    def _make_room(self) -> None:
        self.parts[OUTSIDE] = []
        wanted = max(sum(_room(weight) for weight in weights) for weights in self.parts.values())
        self._stream = torch.Stream(self.device)
        self._places = [self._place(wanted) for _ in range(2)]
        self._current = 0

    def _place(self, wanted: int) -> _Place:
        locked = torch.empty(wanted, dtype=torch.uint8, pin_memory=True)
        lent = torch.empty(wanted, dtype=torch.uint8, device=self.device)
        return _Place(locked, lent, torch.Event(self.device), torch.Event(self.device))

    def _read(self, part: int) -> Future[Any]:
        return self._reader.submit(self._lend, part, 1 - self._current)

    def _lend(self, part: int, number: int) -> int:
        """Reads a part and copies it into place `number`, as the reading thread."""
        read_ahead(self.spans[part])
        place, weights = self._places[number], self.parts[part]
        place.arrived.synchronize()  # what was here before is still on its way, perhaps
        for weight, room in zip(weights, _split(place.locked, weights), strict=True):
            room.copy_(weight.data)
        end = sum(map(_room, weights))
        with self._stream:
            self._stream.wait_event(place.left)
            place.lent[:end].copy_(place.locked[:end], non_blocking=True)
            place.arrived.record(self._stream)
        return number

    def _take(self, part: int, reading: Future[Any] | None) -> None:
        if part == OUTSIDE:
            return
        if reading is None:  # it goes where another was read ahead
            self._ahead.clear()
            reading = self._read(part)
        self._current = reading.result()
        place, weights = self._places[self._current], self.parts[part]
        torch.accelerator.current_stream(self.device).wait_event(place.arrived)
        for weight, lent in zip(weights, _split(place.lent, weights), strict=True):
            self._stored.append((weight, weight.data))
            weight.data = lent.to(self.dtype)

    def close(self) -> None:
        """As `MappedLayers.close`; the place of the part shown is free once all that computes with it is done."""
        if self._stored:
            self._places[self._current].left.record(torch.accelerator.current_stream(self.device))
        super().close()


def _room(weight: nn.Parameter) -> int:
    return -(-weight.nbytes // ALIGNED) * ALIGNED


def _split(place: torch.Tensor, weights: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Tensors like the weights, one behind the other in the bytes of `place`."""
    found, start = [], 0
    for weight in weights:
        found.append(place[start : start + weight.nbytes].view(weight.dtype).view(weight.shape))
        start += _room(weight)
    return found
