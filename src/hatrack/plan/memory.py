"""How many bytes a training run takes, by named term. Knows no torch and reads no weights.

The terms follow what stays in memory between the forward and the backward pass (Korthikanti et al., "Reducing
Activation Recomputation in Large Transformer Models", 2022, section 4). For a frozen base that is, in each layer, what
enters a product that is adapted, an activation function or a norm, and queries, keys and values; hatrack's adapted
layer adds next to nothing to it, peft's own (DoRA, quantised bases) a float32 copy of its input.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MIB = 2**20
FRAMEWORK = 650 * MIB
"""Resident memory of torch, transformers and peft once imported, on a CPU."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGITS = 2**23
"""Logits held at one time (`kernels/loss.py`)."""
BITS_AS_BYTES = {"8bit": 1.05, "4bit": 0.57}
"""Bytes a parameter of a quantised layer, its scales included."""


@dataclass(frozen=True)
class Shape:
    """The few numbers of a model that its memory depends on."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The numbers from a config.json, under whichever name its architecture has for them; 0 where it has none."""
    config = config.get("text_config", config)

    def number(*names: str) -> int:
        return next((int(config[name]) for name in names if isinstance(config.get(name), int)), 0)

    hidden = number("hidden_size", "n_embd", "dim", "d_model")
    return Shape(
        hidden=hidden,
        intermediate=number("intermediate_size", "n_inner", "hidden_dim", "d_ff", "ffn_dim") or 4 * hidden,
        layers=number("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        vocabulary=number("vocab_size"),
    )


def training_bytes(
    shape: Shape,
    *,
    task: str,
    parameters: int,
    trainable: int,
    copied_inputs: int,
    tokens: int,
    dtype: str,
    quantize: str = "none",
) -> dict[str, int]:
    """Bytes of one training step at its fullest, by term.

    `tokens` are those of one micro-batch, padding included; `copied_inputs` is the sum of d_in over the adapted layers
    that keep a float32 copy of their input; the base has `parameters` numbers in `dtype`, of which copies of the head
    count among the `trainable`.
    """
    item = ITEM_BYTES[dtype]
    per_token = shape.layers * (9 * shape.hidden + 4 * shape.intermediate) * item + copied_inputs * 4
    held = min(tokens * shape.vocabulary, max(LOGITS, 16 * shape.vocabulary))
    logits = held * (item + 8) if task != "classify" else 0
    return {
        "base": round(parameters * BITS_AS_BYTES.get(quantize, item)),
        "adapter": 4 * trainable,
        "gradients": 4 * trainable,
        "optimizer": 8 * trainable,
        "activations": tokens * per_token,
        "logits": logits,
        "framework": FRAMEWORK,
    }
