"""How long a run takes: its products at the speed the machine reaches, the passes between them, and each call's cost.

    seconds = operations / speed + numbers x pass + calls x call

The three prices come from a probe of the machine (`engine/measure.py`): it times products, and a small model of the
same make taking real training steps, so whatever a step costs beside its products is measured, not assumed. For a named
accelerator they come from its data sheet. Knows no torch.
"""

from dataclasses import dataclass, field

from hatrack.planning.memory import Batch, Method
from hatrack.planning.shape import Anatomy


@dataclass(frozen=True)
class Prices:
    """What a machine takes, in seconds: for an operation of a product, for a number passed over, for a call.

    `disk` is bytes a second, `start` seconds until training's imports are done; `source` says where it is known from.
    `rounded`: seconds for an operation of a product that is rounded to integers (`--compute`), by their names.
    """

    operation: float
    number: float
    call: float
    disk: float
    start: float
    source: str
    rounded: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """What a pass consists of: operations of products (a multiplication and an addition are two), numbers, calls.

    `frozen` of the operations are those of the base's matrices in training, which `--compute` rounds.
    """

    operations: float
    numbers: float
    calls: float
    frozen: float = 0.0

    def __add__(self, other: "Effort") -> "Effort":
        operations, numbers = self.operations + other.operations, self.numbers + other.numbers
        return Effort(operations, numbers, self.calls + other.calls, self.frozen + other.frozen)

    def __mul__(self, times: float) -> "Effort":
        return Effort(self.operations * times, self.numbers * times, self.calls * times, self.frozen * times)

    def seconds(self, prices: Prices, compute: str = "auto") -> float:
        """How long it takes, with products of the base's matrices in `compute`."""
        exact = self.operations - self.frozen
        products = exact * prices.operation + self.frozen * prices.rounded.get(compute, prices.operation)
        return products + self.numbers * prices.number + self.calls * prices.call


def forward(anatomy: Anatomy, batch: Batch) -> Effort:
    """The forward pass of a micro-batch, its loss included.

    Of a weight 2 operations a token; scores and their use 4 T operations a token and number of a query.
    """
    shape, tokens = anatomy.shape, batch.tokens
    attention = 4 * batch.longest * shape.query * shape.layers * tokens
    width = 4 * shape.hidden + shape.query + 2 * shape.key + (3 if shape.gated else 2) * shape.intermediate
    width += shape.heads * batch.longest  # the softmax
    numbers = tokens * (width * shape.layers + anatomy.adapted) + batch.learned * shape.vocabulary
    calls = 2 * anatomy.linears + 8 * shape.layers + 3 * anatomy.adapters
    return Effort(2 * anatomy.dense * tokens + attention + 2 * anatomy.head * batch.learned, numbers, calls)


def lower(anatomy: Anatomy, method: Method, batch: Batch) -> Effort:
    """The part of the forward pass of a micro-batch that is computed once for each row: layers below all adapters."""
    share = 0.0 if method.full else anatomy.below / max(anatomy.shape.layers, 1)
    head = Effort(2 * anatomy.head * batch.learned, batch.learned * anatomy.shape.vocabulary, 0)
    effort = (forward(anatomy, batch) + head * -1) * share
    return effort + Effort(0, 3 * anatomy.dense * share, 0) if method.quantize != "none" else effort


def step(anatomy: Anatomy, method: Method, batch: Batch) -> Effort:
    """Forward and backward pass of a micro-batch.

    The backward pass has as many products as the forward pass, for the gradient of the inputs, in the layers above the
    lowest adapter; twice as many where weights are trained. Attention computes its scores again. DoRA multiplies with
    the adapted weights a second time and takes their norms; a quantised base is unpacked in each pass.
    """
    shape, share = anatomy.shape, anatomy.reach / max(anatomy.shape.layers, 1)
    once = forward(anatomy, batch)
    head = Effort(2 * anatomy.head * batch.learned, batch.learned * shape.vocabulary, 0)
    layers = once + head * -1
    attention = Effort(6 * batch.longest * shape.query * shape.layers * batch.tokens, 0, 0)
    effort = once + head + (layers + attention) * share
    if method.full:
        effort += Effort(2 * anatomy.dense * batch.tokens, 6 * anatomy.frozen, 0)
    else:
        again = anatomy.again
        effort += Effort(4 * again * batch.tokens, 6 * again, 3 * anatomy.adapters if again else 0)
    if method.quantize != "none":
        effort += Effort(0, 3 * anatomy.dense * (1 + share), 0)
    if method.checkpointing or method.sweep:
        effort += layers * share
    below = anatomy.below / max(anatomy.shape.layers, 1)  # of which nothing is rounded
    passes = 1 - below + share * (2 if method.checkpointing or method.sweep else 1)
    frozen = 2 * anatomy.dense * batch.tokens * passes + 4 * anatomy.head * batch.learned
    return effort + Effort(0, 0, 0, 0 if method.full else frozen)
