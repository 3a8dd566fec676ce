"""A training step over a base larger than memory: each layer's weights are read twice, however many rows there are.

An ordinary step takes a few rows through all layers and back, then the next few: a base that does not fit in memory is
read twice for each of them. Here all micro-batches of a step go through a layer before the next layer is looked at.
Their hidden states at each layer's door are kept; on the way back, each layer is computed again from them and
differentiated (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, with the base in place of the
activations as what there is no room for). Random numbers are drawn from where the ordinary step would draw them, so
values and gradients are its own, dropout included.

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
from hatrack.base.mapped_layers import OUTSIDE, MappedLayers
from hatrack.evaluate.loss import Batch, Losses, detect_output_head, losses
from hatrack.planning.memory import STATES_IN_MEMORY
from hatrack.storage import machine_errors
from hatrack.training.prefix_cache import FrozenPrefix, memory_of

Random = tuple[torch.Tensor, ...]
"""The state of the processor's generator of random numbers, and of the accelerator's."""


@dataclass
class _Micro:
    """A micro-batch on its way: its hidden states (B, T, d) at the layer's door, or on the way back their gradient."""

    batch: Batch
    hidden: torch.Tensor
    calls: list[Call]
    random: Random  # the generators' states that go with `hidden`
    layer: int = 0  # whose door it is at when it enters: above those whose results are kept


class LayerStreaming:
    """Takes steps and scores for `model`, whose frozen base is shown through `window`.

    `folder` is where hidden states go that are more than `budget` bytes. `prefix` stands for layers below all adapters:
    rows whose results it has kept do not go through them, and where these are all rows, those layers are not read.
    """

    def __init__(
        self,
        model: Any,
        window: MappedLayers,
        *,
        task: str,
        folder: Path,
        budget: int = STATES_IN_MEMORY,
        prefix: FrozenPrefix | None = None,
    ) -> None:
        self.model, self.window, self.task, self.folder, self.budget = model, window, task, folder, budget
        self.trunk, self.prefix = window.layer_stack, prefix
        self._accelerator = None if window.device.type == "cpu" else torch.get_device_module(window.device)
        self.entry = None if prefix else 0  # the layer that surely comes next
        if task != "classify":
            window.load(OUTSIDE)
            with torch.no_grad(), self.trunk.only_last_layers(0):
                detect_output_head(model, task)  # it would ask all layers for it
        trained = (any(p.requires_grad for p in layer.parameters()) for layer in self.trunk.layers)
        self.first = next((number for number, adapted in enumerate(trained) if adapted), len(self.trunk.layers))

    def step(
        self, batches: Sequence[Batch], seeds: Sequence[int], loss_of: Callable[[Batch], torch.Tensor]
    ) -> torch.Tensor:
        """Adds the gradients of the sum of `loss_of` each micro-batch, drawn from its seed, and returns that sum ().

        `loss_of` must run the model once. Raises MachineError where the disk is full.
        """
        last = len(self.trunk.layers) - 1
        self.window.load(OUTSIDE, next_part=self.entry)
        with torch.enable_grad():
            micros = [self._enter(batch, loss_of, seed) for batch, seed in zip(batches, seeds, strict=True)]
        trained_below = any(micro.hidden.requires_grad for micro in micros)
        for micro in micros:
            micro.hidden = micro.hidden.detach()
        first = 0 if trained_below else self.first
        with closing(LayerInputs(self.folder, self.budget)) as doors:
            self._up(micros, doors, first)
            self.window.load(OUTSIDE, next_part=last)
            total = torch.stack([self._top(micro, loss_of, first <= last) for micro in micros]).sum()
            for number in range(last, first - 1, -1):
                self.window.load(number, next_part=number - 1 if number > first else OUTSIDE)
                for index, micro in enumerate(micros):
                    self._back(number, micro, doors.take((number, index)), number > first or trained_below)
        if trained_below:
            self.window.load(OUTSIDE)
            for micro, seed in zip(micros, seeds, strict=True):
                torch.autograd.backward(self._enter(micro.batch, loss_of, seed).hidden, micro.hidden)
        self.window.unload()
        return total

    @torch.no_grad()
    def losses(self, batches: Iterable[Batch]) -> Iterator[Losses]:
        """What `evaluate.loss.losses` gives for each batch; so many share a sweep that their states fit `budget`."""
        waiting = iter(batches)
        more = True
        while more:
            self.window.load(OUTSIDE, next_part=self.entry)
            group: list[_Micro] = []
            while more and (not group or sum(micro.hidden.nbytes for micro in group) < self.budget):
                batch = next(waiting, None)
                more = batch is not None
                if batch is not None:
                    group.append(self._enter(batch, self._score, None))
            self._up(group, None, 0)
            self.window.load(OUTSIDE, next_part=self.entry)
            for micro in group:
                with self.trunk.replace_layers(partial(getattr, micro, "hidden")):
                    yield losses(self.model, micro.batch, self.task)
        self.window.unload()

    def _score(self, batch: Batch) -> Any:
        return losses(self.model, batch, self.task)

    def _enter(self, batch: Batch, run: Callable[[Batch], Any], seed: int | None) -> _Micro:
        """A micro-batch at the door of the first layer that it has to go through."""
        if seed is not None:
            torch.manual_seed(seed)
        if self.prefix:
            self.prefix.set_eval()
        hidden, calls = self.trunk.capture_inputs(lambda: run(batch))
        found = _Micro(batch, hidden, calls, self._random())
        if self.prefix and (kept := self.prefix.read(batch)) is not None:
            found.hidden, found.layer = kept, self.prefix.depth
        return found

    @torch.no_grad()
    def _up(self, micros: Sequence[_Micro], doors: "LayerInputs | None", first: int) -> None:
        """All micro-batches through all layers; from layer `first` on, what goes in is kept in `doors`."""
        last = len(self.trunk.layers) - 1
        for number in range(min((micro.layer for micro in micros), default=0), last + 1):
            self.window.load(number, next_part=number + 1 if number < last else OUTSIDE)
            for index, micro in enumerate(micros):
                if number < micro.layer:
                    continue
                if doors is not None and number >= first:
                    doors.keep((number, index), micro.hidden, micro.random)
                self._draw_from(micro.random)
                micro.hidden = self.trunk.run_layer(number, micro.hidden, micro.calls[number])
                micro.random = self._random()
                if self.prefix and number == self.prefix.depth - 1:
                    micro.hidden = self.prefix.keep(micro.batch, micro.hidden)

    def _top(self, micro: _Micro, loss_of: Callable[[Batch], torch.Tensor], goes_on: bool) -> torch.Tensor:
        """The loss of a micro-batch that is through all layers, and its gradient for the last layer's output."""
        hidden = micro.hidden.requires_grad_(goes_on)

        def give() -> torch.Tensor:
            self._draw_from(micro.random)
            return hidden

        with torch.enable_grad(), self.trunk.replace_layers(give):
            loss = loss_of(micro.batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if goes_on:
            assert hidden.grad is not None
            micro.hidden = hidden.grad
        return loss.detach()

    def _back(self, number: int, micro: _Micro, door: tuple[torch.Tensor, Random], goes_on: bool) -> None:
        """A layer once more from what went into it, and its gradients from those of its output."""
        hidden, random = door
        hidden.requires_grad_(goes_on)
        self._draw_from(random)
        with torch.enable_grad():
            output = self.trunk.run_layer(number, hidden, micro.calls[number])
        torch.autograd.backward(output, micro.hidden)
        if goes_on:
            assert hidden.grad is not None
            micro.hidden = hidden.grad

    def _random(self) -> Random:
        there = [self._accelerator.get_rng_state(self.window.device)] if self._accelerator else []
        return (torch.get_rng_state(), *there)

    def _draw_from(self, random: Random) -> None:
        torch.set_rng_state(random[0])
        if self._accelerator:
            self._accelerator.set_rng_state(random[1], self.window.device)


class LayerInputs:
    """Hidden states and random states by key, as they were when a layer was entered: in memory up to `budget` bytes,
    then in a file in `folder` that has no name, and so is gone whenever the process is."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.left = folder, budget
        self._held: dict[tuple[int, int], tuple[torch.Tensor, Random]] = {}
        self._places: dict[tuple[int, int], int] = {}
        self._file: Any = None
        self._device = torch.device("cpu")

    def keep(self, key: tuple[int, int], hidden: torch.Tensor, random: Random) -> None:
        """Raises MachineError where the disk is full."""
        if hidden.nbytes <= self.left:
            self.left -= hidden.nbytes
        else:
            self._places[key] = self._write(hidden)
            self._device = hidden.device
            hidden = torch.empty_like(hidden, device="meta")
        self._held[key] = (hidden, random)

    def take(self, key: tuple[int, int]) -> tuple[torch.Tensor, Random]:
        """Hidden states and random state, once: they are forgotten afterwards."""
        hidden, random = self._held.pop(key)
        if key not in self._places:
            self.left += hidden.nbytes
            return hidden, random
        read = torch.empty_like(hidden, device="cpu")
        self._file.seek(self._places.pop(key))
        self._file.readinto(memory_of(read))
        return read.to(self._device), random

    def close(self) -> None:
        """Gives the file's place on the disk back."""
        if self._file is not None:
            self._file.close()

    def _write(self, hidden: torch.Tensor) -> int:
        with machine_errors(self.folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
            place = self._file.seek(0, 2)
            left = memory_of(hidden.contiguous().cpu())
            while left:
                left = left[self._file.write(left) :]
        return int(place)
