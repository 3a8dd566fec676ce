"""Takes training steps over a base larger than memory, which stays on disk.

An ordinary step passes one micro-batch after the other forward and backward through all layers, and so reads a base
that does not fit in memory twice for each micro-batch. Layer streaming passes all micro-batches of a step through one
layer before the next layer is read: the base is read twice per step, for any number of rows. The hidden states
that enter each layer are stored; the backward pass computes each layer again from them (activation checkpointing: Chen
et al., "Training Deep Nets with Sublinear Memory Cost", 2016). Random generators are set to the state that the ordinary
step would have, so losses and gradients are the same, dropout included.

Knows nothing of optimizers, schedules or recipes.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hatrack.base.layer_stack import Call
from hatrack.base.mapped_layers import NON_LAYER_WEIGHTS, MappedLayers
from hatrack.evaluate.loss import Batch, Losses, detect_output_head, losses
from hatrack.planning.memory import STATES_IN_MEMORY
from hatrack.storage import machine_errors
from hatrack.training.prefix_cache import FrozenPrefix, memory_of

RandomState = tuple[torch.Tensor, ...]
"""The state of the CPU's random generator, and of the accelerator's if there is one."""


@dataclass
class _MicroBatch:
    """A micro-batch on its way through the layers. `hidden` (B, T, d) is the next layer's input; in the backward pass,
    the gradient of the layer's output."""

    batch: Batch
    hidden: torch.Tensor
    calls: list[Call]
    random: RandomState  # of the generators when `hidden` enters the next layer
    first_layer: int = 0  # the layers below are skipped, as their output was cached


class LayerStreaming:
    """Computes steps and losses of `model`, whose layers `mapped_layers` reads from disk.

    `task` is classify, chat or complete; `inputs` stores what enters the layers during a step. `prefix` computes the
    layers below all adapters: rows with a cached output skip them, and where all rows do, they are not read.
    """

    def __init__(
        self,
        model: Any,
        mapped_layers: MappedLayers,
        task: str,
        inputs: "LayerInputs",
        prefix: FrozenPrefix | None = None,
    ) -> None:
        self.model, self.mapped_layers, self.task, self.inputs = model, mapped_layers, task, inputs
        self.stack, self.prefix = mapped_layers.layer_stack, prefix
        device = mapped_layers.device
        self._accelerator = None if device.type == "cpu" else torch.get_device_module(device)
        self._entry_layer = None if prefix else 0  # the first layer that a pass needs, where that is certain
        if task != "classify":
            mapped_layers.load(NON_LAYER_WEIGHTS)
            with torch.no_grad(), self.stack.only_last_layers(0):
                detect_output_head(model, task)  # without a stack of no layers it would read all of them
        is_trained = (any(p.requires_grad for p in layer.parameters()) for layer in self.stack.layers)
        self._first_trained = next((i for i, trained in enumerate(is_trained) if trained), len(self.stack.layers))

    def step(
        self, batches: Sequence[Batch], seeds: Sequence[int], loss_of: Callable[[Batch], torch.Tensor]
    ) -> torch.Tensor:
        """Adds the gradients of the sum of `loss_of` over the micro-batches `batches`, and returns the sum ().

        `seeds` has one seed per micro-batch. `loss_of` must run the model once. Raises MachineError if the disk is
        full.
        """
        last = len(self.stack.layers) - 1
        self.mapped_layers.load(NON_LAYER_WEIGHTS, next_part=self._entry_layer)
        with torch.enable_grad():
            micros = [self._enter(batch, loss_of, seed) for batch, seed in zip(batches, seeds, strict=True)]
        is_trained_below = any(micro.hidden.requires_grad for micro in micros)
        for micro in micros:
            micro.hidden = micro.hidden.detach()
        first = 0 if is_trained_below else self._first_trained
        with closing(self.inputs):
            self._forward(micros, first)
            self.mapped_layers.load(NON_LAYER_WEIGHTS, next_part=last)
            total = torch.stack([self._loss(micro, loss_of, first <= last) for micro in micros]).sum()
            for number in range(last, first - 1, -1):
                self.mapped_layers.load(number, next_part=number - 1 if number > first else NON_LAYER_WEIGHTS)
                for index, micro in enumerate(micros):
                    self._backward(number, micro, self.inputs.take((number, index)), number > first or is_trained_below)
        if is_trained_below:
            self.mapped_layers.load(NON_LAYER_WEIGHTS)
            for micro, seed in zip(micros, seeds, strict=True):
                torch.autograd.backward(self._enter(micro.batch, loss_of, seed).hidden, micro.hidden)
        self.mapped_layers.unload()
        return total

    @torch.no_grad()
    def losses(self, batches: Iterable[Batch]) -> Iterator[Losses]:
        """Yields the result of `evaluate.loss.losses` for each batch. Batches pass through the layers in groups whose
        hidden states fill the memory budget of `inputs`."""
        waiting = iter(batches)
        more = True
        while more:
            self.mapped_layers.load(NON_LAYER_WEIGHTS, next_part=self._entry_layer)
            group: list[_MicroBatch] = []
            while more and (not group or sum(micro.hidden.nbytes for micro in group) < self.inputs.budget):
                batch = next(waiting, None)
                more = batch is not None
                if batch is not None:
                    group.append(self._enter(batch, self._batch_losses, None))
            self._forward(group, None)
            self.mapped_layers.load(NON_LAYER_WEIGHTS, next_part=self._entry_layer)
            for micro in group:
                with self.stack.replace_layers(partial(getattr, micro, "hidden")):
                    yield losses(self.model, micro.batch, self.task)
        self.mapped_layers.unload()

    def _batch_losses(self, batch: Batch) -> Any:
        return losses(self.model, batch, self.task)

    def _enter(self, batch: Batch, run: Callable[[Batch], Any], seed: int | None) -> _MicroBatch:
        """Makes a micro-batch that is about to enter the first layer that it does not skip."""
        if seed is not None:
            torch.manual_seed(seed)
        if self.prefix:
            self.prefix.set_eval()
        hidden, calls = self.stack.capture_inputs(lambda: run(batch))
        micro = _MicroBatch(batch, hidden, calls, self._random_state())
        if self.prefix and (cached := self.prefix.read(batch)) is not None:
            micro.hidden, micro.first_layer = cached, self.prefix.depth
        return micro

    @torch.no_grad()
    def _forward(self, micros: Sequence[_MicroBatch], store_from: int | None) -> None:
        """Passes all micro-batches through all layers. Stores the inputs of the layers from `store_from` on."""
        last = len(self.stack.layers) - 1
        for number in range(min((micro.first_layer for micro in micros), default=0), last + 1):
            self.mapped_layers.load(number, next_part=number + 1 if number < last else NON_LAYER_WEIGHTS)
            for index, micro in enumerate(micros):
                if number < micro.first_layer:
                    continue
                if store_from is not None and number >= store_from:
                    self.inputs.store((number, index), micro.hidden, micro.random)
                self._set_random_state(micro.random)
                micro.hidden = self.stack.run_layer(number, micro.hidden, micro.calls[number])
                micro.random = self._random_state()
                if self.prefix and number == self.prefix.depth - 1:
                    micro.hidden = self.prefix.store(micro.batch, micro.hidden)

    def _loss(self, micro: _MicroBatch, loss_of: Callable[[Batch], torch.Tensor], needs_gradient: bool) -> torch.Tensor:
        """Computes the loss of a micro-batch that passed all layers. If a layer needs a gradient, `hidden` becomes the
        gradient of the last layer's output."""
        hidden = micro.hidden.requires_grad_(needs_gradient)

        def last_output() -> torch.Tensor:
            self._set_random_state(micro.random)
            return hidden

        with torch.enable_grad(), self.stack.replace_layers(last_output):
            loss = loss_of(micro.batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if needs_gradient:
            assert hidden.grad is not None
            micro.hidden = hidden.grad
        return loss.detach()

    def _backward(
        self, number: int, micro: _MicroBatch, entered: tuple[torch.Tensor, RandomState], needs_gradient: bool
    ) -> None:
        """Recomputes a layer from its stored input (`entered`), then its gradients from its output's gradient."""
        hidden, random = entered
        hidden.requires_grad_(needs_gradient)
        self._set_random_state(random)
        with torch.enable_grad():
            output = self.stack.run_layer(number, hidden, micro.calls[number])
        torch.autograd.backward(output, micro.hidden)
        if needs_gradient:
            assert hidden.grad is not None
            micro.hidden = hidden.grad

    def _random_state(self) -> RandomState:
        on_device = [self._accelerator.get_rng_state(self.mapped_layers.device)] if self._accelerator else []
        return (torch.get_rng_state(), *on_device)

    def _set_random_state(self, random: RandomState) -> None:
        torch.set_rng_state(random[0])
        if self._accelerator:
            self._accelerator.set_rng_state(random[1], self.mapped_layers.device)


class LayerInputs:
    """Stores the hidden states and random states that enter a layer, by key: up to `budget` bytes of hidden states in
    memory, the others in a temporary file in `folder`, which the system removes when the process ends."""

    def __init__(self, folder: Path, budget: int = STATES_IN_MEMORY) -> None:
        self.folder, self.budget = folder, budget
        self._free = budget  # bytes
        self._stored: dict[tuple[int, int], tuple[torch.Tensor, RandomState]] = {}
        self._offsets: dict[tuple[int, int], int] = {}  # in the file
        self._file: Any = None
        self._device = torch.device("cpu")

    def store(self, key: tuple[int, int], hidden: torch.Tensor, random: RandomState) -> None:
        """Stores one layer input. Raises MachineError if the disk is full."""
        if hidden.nbytes <= self._free:
            self._free -= hidden.nbytes
        else:
            self._offsets[key] = self._write(hidden)
            self._device = hidden.device
            hidden = torch.empty_like(hidden, device="meta")
        self._stored[key] = (hidden, random)

    def take(self, key: tuple[int, int]) -> tuple[torch.Tensor, RandomState]:
        """Returns the hidden states and random state of `key`, and removes them."""
        hidden, random = self._stored.pop(key)
        if key not in self._offsets:
            self._free += hidden.nbytes
            return hidden, random
        read = torch.empty_like(hidden, device="cpu")
        self._file.seek(self._offsets.pop(key))
        self._file.readinto(memory_of(read))
        return read.to(self._device), random

    def close(self) -> None:
        """Removes everything stored, and the file. More inputs can be stored afterwards."""
        if self._file is not None:
            self._file.close()
        self._file, self._free = None, self.budget
        self._stored.clear()
        self._offsets.clear()

    def _write(self, hidden: torch.Tensor) -> int:
        """Appends hidden states to the file and returns their offset."""
        with machine_errors(self.folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
            start = self._file.seek(0, 2)
            rest = memory_of(hidden.contiguous().cpu())
            while rest:
                rest = rest[self._file.write(rest) :]
        return int(start)
