"""How many parameters an adapter trains, from shapes alone. Knows no torch and reads no weights."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Models whose projections are transformers' Conv1D: the weight is (d_in, d_out), the other way round."""

NOT_LINEAR = ("embed", "wte", "wpe", "shared", "relative_attention_bias", "norm", "position")


@dataclass(frozen=True)
class Count:
    """`trainable` = `lora` + `head`; `total` counts the base, the adapter, and the head a second time, since peft
    trains a copy of it."""

    trainable: int
    total: int
    lora: int
    head: int


def count(
    shapes: Mapping[str, tuple[int, ...]],
    adapted: Iterable[tuple[int, int]],
    *,
    r: int,
    variant: str = "lora",
    heads: Collection[str] = (),
) -> Count:
    """Counts as peft's `get_nb_trainable_parameters` does after wrapping.

    `shapes`: every parameter of the base's model, its head included; `adapted`: (d_in, d_out) of each adapted layer,
    r (d_in + d_out) parameters each, and d_out more for DoRA's magnitudes (Liu et al. 2024, equation 5).
    """
    lora = sum(r * (d_in + d_out) + (d_out if variant == "dora" else 0) for d_in, d_out in adapted)
    head = sum(math.prod(shape) for name, shape in shapes.items() if any(name.startswith(f"{h}.") for h in heads))
    base = sum(math.prod(shape) for shape in shapes.values())
    return Count(trainable=lora + head, total=base + lora + head, lora=lora, head=head)


def linears_from_shapes(shapes: Mapping[str, tuple[int, ...]], model_type: str) -> dict[str, tuple[int, int]]:
    """Full name -> (d_in, d_out) of every linear layer: two-dimensional weights that are no embedding."""
    linears = {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(shape) != 2 or any(part in module.lower() for part in NOT_LINEAR):
            continue
        turned = model_type in CONV1D_MODELS and any(part.isdigit() for part in module.split("."))
        linears[module] = (shape[0], shape[1]) if turned else (shape[1], shape[0])
    return linears


def line(trainable: int, total: int) -> str:
    """peft's own line: `trainable params: 739,586 || all params: 67,694,596 || trainable%: 1.0925`."""
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
