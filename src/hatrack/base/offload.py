"""Layers of a frozen base larger than an accelerator's memory, copied to it one at a time.

Everything but the layers stays on the accelerator, which has two slots for a layer: while one is computed with, a
thread reads the next into page-locked memory and copies it to the other slot on a stream of its own, so that
reading, copying and computing overlap. Knows nothing of what the layers compute.
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
from hatrack.base.mapped_layers import NON_LAYER_WEIGHTS, MappedLayers, placeholder_weights, read_ahead

ALIGNED = 256
"""Each weight begins at a multiple of this many bytes, as the accelerator's own allocations do."""


class _Slot(NamedTuple):
    """Memory for one layer: page-locked on the host, and on the accelerator."""

    locked: torch.Tensor
    offloaded: torch.Tensor
    arrived: Any  # the event after the copy
    free: Any  # the event after the last matmul with what was here


def open_layers(
    model: Any, layer_stack: LayerStack, dtype: torch.dtype, folder: Path, device: torch.device
) -> MappedLayers:
    """The layers of a streamed base on `device`, to which `move_all_but_layers` has moved all other weights."""
    if device.type == "cpu":
        return MappedLayers(model, layer_stack, dtype, folder)
    return OffloadedLayers(model, layer_stack, dtype, folder, device)


def move_all_but_layers(model: nn.Module, layer_stack: LayerStack, dtype: torch.dtype, device: torch.device) -> None:
    """Moves everything but the frozen weights of the layers to an accelerator, its frozen weights in `dtype`."""
    if device.type == "cpu":
        return
    streamed = {id(weight) for layer in layer_stack.layers for weight in layer.parameters() if not weight.requires_grad}
    for weight in model.parameters():
        if id(weight) not in streamed:
            new_dtype = weight.dtype if weight.requires_grad or not weight.is_floating_point() else dtype
            weight.data = weight.data.to(device, new_dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            setattr(module, name, buffer.to(device))


def placeholders_if_streamed(base: Base) -> AbstractContextManager[None]:
    """While the block runs, the frozen weights of a streamed base are placeholders in its dtype on its device.

    Does nothing if the base is in memory.
    """
    return placeholder_weights(base.model.base_model, base.dtype, base.device) if base.streamed else nullcontext()


class OffloadedLayers(MappedLayers):
    """`MappedLayers` whose layers are on `device` while they are loaded. Everything else stays there."""

    def __init__(
        self, model: Any, layer_stack: LayerStack, dtype: torch.dtype, folder: Path, device: torch.device
    ) -> None:
        self.device = device
        super().__init__(model, layer_stack, dtype, folder)

    def _allocate_buffers(self) -> None:
        self.parts[NON_LAYER_WEIGHTS] = []
        slot_bytes = max(sum(_aligned_bytes(weight) for weight in weights) for weights in self.parts.values())
        self._stream = torch.Stream(self.device)
        self._slots = [self._make_slot(slot_bytes) for _ in range(2)]
        self._current = 0

    def _make_slot(self, size: int) -> _Slot:
        locked = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        offloaded = torch.empty(size, dtype=torch.uint8, device=self.device)
        return _Slot(locked, offloaded, torch.Event(self.device), torch.Event(self.device))

    def _start_reading(self, part: int) -> Future[Any]:
        return self._reader.submit(self._offload, part, 1 - self._current)

    def _offload(self, part: int, number: int) -> int:
        """Reads a part and copies it into slot `number`, in the reading thread."""
        read_ahead(self.spans[part])
        slot, weights = self._slots[number], self.parts[part]
        slot.arrived.synchronize()  # the copy of what was here before may still run
        for weight, target in zip(weights, _split(slot.locked, weights), strict=True):
            target.copy_(weight.data)
        end = sum(map(_aligned_bytes, weights))
        with self._stream:
            self._stream.wait_event(slot.free)
            slot.offloaded[:end].copy_(slot.locked[:end], non_blocking=True)
            slot.arrived.record(self._stream)
        return number

    def _activate(self, part: int, reading: Future[Any] | None) -> None:
        if part == NON_LAYER_WEIGHTS:
            return
        if reading is None:  # the slot is taken from the part that was read ahead
            self._pending_reads.clear()
            reading = self._start_reading(part)
        self._current = reading.result()
        slot, weights = self._slots[self._current], self.parts[part]
        torch.accelerator.current_stream(self.device).wait_event(slot.arrived)
        for weight, offloaded in zip(weights, _split(slot.offloaded, weights), strict=True):
            self._stored.append((weight, weight.data))
            weight.data = offloaded.to(self.dtype)

    def unload(self) -> None:
        """As `MappedLayers.unload`; the slot is free once the matmuls queued so far are done."""
        if self._stored:
            self._slots[self._current].free.record(torch.accelerator.current_stream(self.device))
        super().unload()


def _aligned_bytes(weight: nn.Parameter) -> int:
    return -(-weight.nbytes // ALIGNED) * ALIGNED


def _split(memory: torch.Tensor, weights: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Views of `memory` with the dtypes and shapes of the weights, one after the other."""
    found, start = [], 0
    for weight in weights:
        found.append(memory[start : start + weight.nbytes].view(weight.dtype).view(weight.shape))
        start += _aligned_bytes(weight)
    return found
