"""How deep adapters need to go: a small run at each of several depths, side by side, for `--layers auto`.

Each has its own few steps on the same rows, from the same start, down the same schedule in small, and is scored on the
same held-out rows. What the layers below the adapters give is computed once for each row, as in the run itself.
Everything is put back. Knows nothing of recipes or files.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hatrack.base.trunk import Trunk
from hatrack.data.render import TokenRows
from hatrack.engine.cache import Prefix
from hatrack.engine.rehearsal import gradients, rehearsal
from hatrack.evaluate.loss import Batch
from hatrack.evaluate.score import Score, score

SHARES = (1 / 2, 1 / 3, 1 / 6)
"""Depths that are tried beside all layers."""
KEEP = 0.95
"""A smaller depth has to keep this share of what all layers lowered the held-out loss by."""
LITTLE = 0.01
"""Nats; where all layers lowered the loss by less, the comparison tells nothing."""
FEWEST, MOST, PART = 8, 32, 20
"""Steps of each small run: the run's own by PART, at least FEWEST (else there is no comparison), at most MOST."""
SCORED = 256
"""Held-out rows that are scored at most."""


@dataclass(frozen=True)
class Depth:
    """What was measured with adapters on the last `top` of `layers` layers: the held-out score after the small run,
    seconds a step, and seconds a row of the layers below, which are computed once."""

    top: int
    layers: int
    score: Score
    step: float
    below: float

    @property
    def name(self) -> str:
        """As --layers takes it."""
        return "all" if self.top == self.layers else f"top-{self.top}"

    @property
    def loss(self) -> float:
        """The held-out loss."""
        return self.score.metrics["loss"]

    def seconds(self, steps: int, rows: int) -> float:
        """What so many steps will take, and so many different rows' way through the layers below."""
        return steps * self.step + rows * self.below


def steps_of(steps: int) -> int:
    """Steps of each small run, for a run of so many; 0 where that is too short to be worth a comparison."""
    return min(MOST, steps // PART) if steps >= FEWEST * PART else 0


def tops(layers: int) -> list[int]:
    """The depths to try, all layers first.

    >>> tops(30)
    [30, 15, 10, 5]
    """
    return sorted({layers, *(max(1, round(layers * share)) for share in SHARES)}, reverse=True)


def try_depths(
    model: Any,
    trunk: Trunk,
    steps: Sequence[Sequence[Batch]],
    held_out: TokenRows,
    *,
    task: str,
    pad_id: int,
    lr: float,
) -> Iterator[Depth]:
    """Measures one depth after the other, all layers first. `steps` are those of each small run, in micro-batches.

    `model` has adapters on all layers; where a smaller depth leaves none, it is not tried. Raises ValueError where what
    is below the adapters is not the same each time.
    """
    with rehearsal(model):
        gradients(model, steps[0], task)  # the first pass of all is slower: it would count against all layers
    for top in tops(len(trunk.layers)):
        with _still(trunk, len(trunk.layers) - top), rehearsal(model) as parameters:
            if not any(".lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad):
                continue
            yield _small_run(model, trunk, top, parameters, steps, held_out, task, pad_id, lr)


def choose(tried: Sequence[Depth], before: float, steps: int, rows: int) -> Depth:
    """The fastest of those that keep enough of what all layers, the first, lowered the held-out loss `before` by."""
    gained = before - tried[0].loss
    if not gained >= LITTLE:
        return tried[0]
    enough = [depth for depth in tried if before - depth.loss >= KEEP * gained]
    return min(enough, key=lambda depth: depth.seconds(steps, rows))


def _small_run(
    model: Any,
    trunk: Trunk,
    top: int,
    parameters: list[torch.nn.Parameter],
    steps: Sequence[Sequence[Batch]],
    held_out: TokenRows,
    task: str,
    pad_id: int,
    lr: float,
) -> Depth:
    depth, below = len(trunk.layers) - top, 0.0
    prefix = Prefix(model, trunk, depth, task=task, states=_InMemory()) if depth else None
    if prefix:
        began = time.perf_counter()
        rows = [len(_filled(prefix, batch)["labels"]) for step in steps for batch in step]
        below = (time.perf_counter() - began) / sum(rows)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = lr
    began = time.perf_counter()
    for step in steps:
        gradients(model, step, task, prefix)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = (time.perf_counter() - began) / len(steps)
    run = prefix.losses if prefix else None
    device = parameters[0].device
    found = score(model, held_out, task=task, batch_size=8, pad_id=pad_id, device=device, run=run)
    return Depth(top, len(trunk.layers), found, seconds, below)


def _filled(prefix: Prefix, batch: Batch) -> Batch:
    """Has `prefix` keep what it gives for a batch, and returns the batch."""
    with prefix.given(batch):
        return batch


@contextmanager
def _still(trunk: Trunk, layers: int) -> Iterator[None]:
    """While the block runs nothing in the first `layers` is trained: adapters there stay as they began, adding 0."""
    held = [p for layer in trunk.layers[:layers] for p in layer.parameters() if p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


class _InMemory(dict[bytes, bytes]):
    """Hidden states by row: those of a slice of the data are small."""

    def read(self, key: bytes, into: memoryview) -> bool:
        """Fills `into` with a row's states, and says whether they were there."""
        if key in self:
            into[:] = self[key]
        return key in self

    def add(self, key: bytes, states: memoryview) -> None:
        """Keeps a row's states."""
        self[key] = bytes(states)

    def flush(self) -> None:
        """They go with the comparison."""
