"""How long a run takes: its products at the speed the machine reaches, the passes between them, and each call's cost.

    seconds = operations / speed + numbers x pass + calls x call

The three speed come from a probe of the machine (`training/measure_machine.py`): it times matmuls, and a small model
of the same make taking real training steps, so whatever a step costs beside its matmuls is measured, not assumed. For a
named accelerator they come from its data sheet. Knows no torch.
"""

from dataclasses import dataclass, field

from hatrack.planning.memory import Method, MicroBatch
from hatrack.planning.model_shape import ModelShape


@dataclass(frozen=True)
class MachineSpeed:
    """What a machine takes, in seconds: for an operation of a product, for a number passed over, for a call.

    `disk` is bytes a second, `start` seconds until training's imports are done; `source` says where it is known from.
    `rounded`: seconds for an operation of a product that is rounded to integers (`--compute`), by their names.
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
    """What a pass consists of: operations of products (a multiplication and an addition are two), numbers, calls.

    `frozen` of the operations are those of the base's matrices in training, which `--compute` rounds.
    """

    operations: float
    elements: float
    calls: float
    base_operations: float = 0.0

    def __add__(self, other: "OpCounts") -> "OpCounts":
        operations, numbers = self.operations + other.operations, self.elements + other.elements
        return OpCounts(operations, numbers, self.calls + other.calls, self.base_operations + other.base_operations)

    def __mul__(self, times: float) -> "OpCounts":
        return OpCounts(
            self.operations * times, self.elements * times, self.calls * times, self.base_operations * times
        )

    def seconds(self, speed: MachineSpeed, compute: str = "auto") -> float:
        """How long it takes, with products of the base's matrices in `compute`."""
        exact = self.operations - self.base_operations
        products = exact * speed.seconds_per_operation + self.base_operations * speed.rounded.get(
            compute, speed.seconds_per_operation
        )
        return products + self.elements * speed.seconds_per_element + self.calls * speed.seconds_per_call


def forward_counts(model: ModelShape, batch: MicroBatch) -> OpCounts:
    """The forward pass of a micro-batch, its loss included.

    Of a weight 2 operations a token; scores and their use 4 T operations a token and number of a query.
    """
    shape, tokens = model.dims, batch.tokens
    attention = 4 * batch.longest * shape.query * shape.layers * tokens
    width = 4 * shape.hidden + shape.query + 2 * shape.key + (3 if shape.gated else 2) * shape.intermediate
    width += shape.heads * batch.longest  # the softmax
    numbers = tokens * (width * shape.layers + model.adapted_width) + batch.supervised * shape.vocabulary
    calls = 2 * model.linear_layers + 8 * shape.layers + 3 * model.adapted_layers
    return OpCounts(
        2 * model.matmul_weights * tokens + attention + 2 * model.head_weights * batch.supervised, numbers, calls
    )


def cached_counts(model: ModelShape, method: Method, batch: MicroBatch) -> OpCounts:
    """The part of the forward pass of a micro-batch that is computed once for each row: layers below all adapters."""
    share = 0.0 if method.full else model.cached_layers / max(model.dims.layers, 1)
    head = OpCounts(2 * model.head_weights * batch.supervised, batch.supervised * model.dims.vocabulary, 0)
    effort = (forward_counts(model, batch) + head * -1) * share
    return effort + OpCounts(0, 3 * model.matmul_weights * share, 0) if method.quantize != "none" else effort


def step_counts(model: ModelShape, method: Method, batch: MicroBatch) -> OpCounts:
    """Forward and backward pass of a micro-batch.

    The backward pass has as many products as the forward pass, for the gradient of the inputs, in the layers above the
    lowest adapter; twice as many where weights are trained. Attention computes its scores again. DoRA multiplies with
    the adapted weights a second time and takes their norms; a quantised base is unpacked in each pass.
    """
    shape, share = model.dims, model.backward_layers / max(model.dims.layers, 1)
    once = forward_counts(model, batch)
    head = OpCounts(2 * model.head_weights * batch.supervised, batch.supervised * shape.vocabulary, 0)
    layers = once + head * -1
    attention = OpCounts(6 * batch.longest * shape.query * shape.layers * batch.tokens, 0, 0)
    effort = once + head + (layers + attention) * share
    if method.full:
        effort += OpCounts(2 * model.matmul_weights * batch.tokens, 6 * model.frozen, 0)
    else:
        again = model.dora_weights
        effort += OpCounts(4 * again * batch.tokens, 6 * again, 3 * model.adapted_layers if again else 0)
    if method.quantize != "none":
        effort += OpCounts(0, 3 * model.matmul_weights * (1 + share), 0)
    if method.checkpointing or method.streamed:
        effort += layers * share
    below = model.cached_layers / max(model.dims.layers, 1)  # of which nothing is rounded
    passes = 1 - below + share * (2 if method.checkpointing or method.streamed else 1)
    frozen = 2 * model.matmul_weights * batch.tokens * passes + 4 * model.head_weights * batch.supervised
    return effort + OpCounts(0, 0, 0, 0 if method.full else frozen)
