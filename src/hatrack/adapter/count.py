"""How many parameters an adapter trains, from shapes alone. Knows no torch and reads no weights."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

CONV1D_MODELS = ("gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer")
"""Models whose projections are transformers' Conv1D: the weight is (d_in, d_out), the other way round."""

NOT_LINEAR = ("embed", "wte", "wpe", "relative_attention_bias", "norm", "position")
ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the names of a checkpoint's experts, which transformers joins into one tensor of each layer when it loads them."""
EXPERTS = re.compile(r"(.*\.(?:experts|input_linear|output_linear))\.")
"""Modules whose tensors of three dimensions hold a matrix for each expert."""
# fmt: off
_LIKE_QWEN = (
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
    "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker", "solar_open",
)
# fmt: on
EXPERT_NAMES = dict.fromkeys(_LIKE_QWEN, ("gate_proj", "up_proj", "down_proj"))
EXPERT_NAMES |= dict.fromkeys(("mixtral", "minimax", "minimax_m2"), ("w1", "w2", "w3"))
"""Model type -> names that peft takes for its experts' (`_convert_peft_config_moe`), those of dense layers as well."""


@dataclass(frozen=True)
class ParameterCount:
    """`trainable` = `lora` + `head`; `total` counts the base, the adapter, and the head a second time, since peft
    trains a copy of it."""

    trainable: int
    total: int
    lora: int
    head: int


def count_parameters(
    shapes: Mapping[str, tuple[int, ...]],
    adapted: Iterable[tuple[int, int]],
    *,
    r: int,
    variant: str = "lora",
    heads: Collection[str] = (),
) -> ParameterCount:
    """Counts as peft's `get_nb_trainable_parameters` does after wrapping.

    `shapes`: every parameter of the base's model, its head included; `adapted`: (d_in, d_out) of each adapted layer,
    r (d_in + d_out) parameters each, and d_out more for DoRA's magnitudes (Liu et al. 2024, equation 5).
    """
    lora = sum(r * (d_in + d_out) + (d_out if variant == "dora" else 0) for d_in, d_out in adapted)
    head = sum(math.prod(shape) for name, shape in shapes.items() if any(name.startswith(f"{h}.") for h in heads))
    base = sum(math.prod(shape) for shape in shapes.values())
    return ParameterCount(trainable=lora + head, total=base + lora + head, lora=lora, head=head)


def linear_layers_from_shapes(shapes: Mapping[str, tuple[int, ...]], model_type: str) -> dict[str, tuple[int, int]]:
    """Full name -> (d_in, d_out) of every linear layer: two-dimensional weights except embeddings and experts."""
    linears = {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        called = module.rpartition(".")[2].lower()
        if leaf != "weight" or len(shape) != 2 or ONE_EXPERT.search(name):
            continue
        if called == "shared" or any(part in called for part in NOT_LINEAR):
            continue
        turned = model_type in CONV1D_MODELS and any(part.isdigit() for part in module.split("."))
        linears[module] = (shape[0], shape[1]) if turned else (shape[1], shape[0])
    return linears


@dataclass(frozen=True)
class Experts:
    """A model's experts that are one tensor in each layer once it is loaded.

    `modules` hold them, by full name: `model.layers.0.mlp.experts`. `names` are the last names by which peft means
    them, wherever in the model a layer is called so.
    """

    modules: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def joined_experts(shapes: Mapping[str, tuple[int, ...]], model_type: str) -> Experts:
    """The experts of a model, from the shapes of its own tensors or of its checkpoint's."""
    found = {
        match[1]: None
        for name, shape in shapes.items()
        if (match := EXPERTS.match(name)) and (len(shape) == 3 or ONE_EXPERT.search(name))
    }
    return Experts(tuple(found), EXPERT_NAMES.get(model_type, ()) if found else ())


def trainable_line(trainable: int, total: int) -> str:
    """peft's own line: `trainable params: 739,586 || all params: 67,694,596 || trainable%: 1.0925`."""
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
