"""Estimates the time of a run from its matmuls, the elements it passes over and its kernel calls.

    seconds = operations x seconds_per_operation + elements x seconds_per_element + calls x seconds_per_call

The three speeds are measured (`training/measure_machine.py`): that of matmuls directly, the others from training steps
of small models, so that they include all other costs of a step. For a named accelerator they come from its data sheet.
Imports no torch.
"""

from dataclasses import dataclass, field

from hatrack.planning.memory import Method, MicroBatch
from hatrack.planning.model_shape import ModelShape


@dataclass(frozen=True)
class MachineSpeed:
    """The speed of a machine: seconds per matmul operation, per element passed over, per kernel call.

    `start_seconds`: process start-up time, imports included. `source`: where the figures come from, for messages.
    `rounded`: `--compute` mode -> seconds per operation of a matmul that is rounded to integers.
    """

    seconds_per_operation: float
    seconds_per_element: float
    seconds_per_call: float
    disk_bytes_per_second: float
    start_seconds: float
    source: str
    rounded: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OpCounts:
    """The work of a pass: matmul operations (a multiply-add counts as two), elements passed over, kernel calls.

    `base_operations`: the operations that `--compute` rounds, those of training with the base's weights.
    """

    operations: float
    elements: float
    calls: float
    base_operations: float = 0.0

    def __add__(self, other: "OpCounts") -> "OpCounts":
        operations, elements = self.operations + other.operations, self.elements + other.elements
        return OpCounts(operations, elements, self.calls + other.calls, self.base_operations + other.base_operations)

    def __sub__(self, other: "OpCounts") -> "OpCounts":
        return self + other * -1

    def __mul__(self, times: float) -> "OpCounts":
        operations, base_operations = self.operations * times, self.base_operations * times
        return OpCounts(operations, self.elements * times, self.calls * times, base_operations)

    def seconds(self, speed: MachineSpeed, compute: str = "auto") -> float:
        """The time in seconds, with matmuls of the base's weights in `compute`."""
        rounded = speed.rounded.get(compute, speed.seconds_per_operation)
        exact_operations = self.operations - self.base_operations
        matmuls = exact_operations * speed.seconds_per_operation + self.base_operations * rounded
        return matmuls + self.elements * speed.seconds_per_element + self.calls * speed.seconds_per_call


def forward_counts(model: ModelShape, batch: MicroBatch) -> OpCounts:
    """The forward pass of a micro-batch, its loss included.

    Each weight takes 2 operations per token; attention takes 4 T operations per token and element of its query.
    """
    dims, tokens = model.dims, batch.tokens
    attention = 4 * batch.longest * dims.query * dims.layers * tokens
    width = 4 * dims.hidden + dims.query + 2 * dims.key + (3 if dims.gated else 2) * dims.intermediate
    width += dims.heads * batch.longest  # the softmax
    elements = tokens * (width * dims.layers + model.adapted_width) + batch.supervised * dims.vocabulary
    calls = 2 * model.linear_layers + 8 * dims.layers + 3 * model.adapted_layers
    operations = 2 * model.matmul_weights * tokens + attention + 2 * model.head_weights * batch.supervised
    return OpCounts(operations, elements, calls)


def frozen_prefix_counts(model: ModelShape, method: Method, batch: MicroBatch) -> OpCounts:
    """The part of the forward pass below all adapters, which is computed once per row and cached."""
    fraction = 0.0 if method.full else model.frozen_prefix_layers / max(model.dims.layers, 1)
    head = OpCounts(2 * model.head_weights * batch.supervised, batch.supervised * model.dims.vocabulary, 0)
    counts = (forward_counts(model, batch) - head) * fraction
    return counts + OpCounts(0, 3 * model.matmul_weights * fraction, 0) if method.quantize != "none" else counts


def step_counts(model: ModelShape, method: Method, batch: MicroBatch) -> OpCounts:
    """The forward and backward pass of a micro-batch.

    From the lowest adapter up, the backward pass has as many matmuls as the forward pass, for the gradients of the
    inputs; twice as many if the weights are trained. Attention recomputes its scores. DoRA multiplies with the adapted
    weights a second time and computes their norms. A quantized base is unpacked in each pass.
    """
    dims, backward_fraction = model.dims, model.backward_layers / max(model.dims.layers, 1)
    forward = forward_counts(model, batch)
    head = OpCounts(2 * model.head_weights * batch.supervised, batch.supervised * dims.vocabulary, 0)
    layers = forward - head
    attention = OpCounts(6 * batch.longest * dims.query * dims.layers * batch.tokens, 0, 0)
    counts = forward + head + (layers + attention) * backward_fraction
    if method.full:
        counts += OpCounts(2 * model.matmul_weights * batch.tokens, 6 * model.frozen, 0)
    else:
        dora = model.dora_weights
        counts += OpCounts(4 * dora * batch.tokens, 6 * dora, 3 * model.adapted_layers if dora else 0)
    if method.quantize != "none":
        counts += OpCounts(0, 3 * model.matmul_weights * (1 + backward_fraction), 0)
    if method.checkpointing or method.streamed:
        counts += layers * backward_fraction
    below = model.frozen_prefix_layers / max(model.dims.layers, 1)  # these are not rounded
    passes = 1 - below + backward_fraction * (2 if method.checkpointing or method.streamed else 1)
    base_operations = 2 * model.matmul_weights * batch.tokens * passes + 4 * model.head_weights * batch.supervised
    return counts + OpCounts(0, 0, 0, 0 if method.full else base_operations)
