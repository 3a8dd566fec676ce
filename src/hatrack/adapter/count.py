"""Counts the parameters an adapter trains, from shapes alone; imports no torch."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

CONV1D_MODELS = ("gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer")
"""Models whose projections are transformers' Conv1D, with weights of (d_in, d_out), not (d_out, d_in)."""

NOT_LINEAR = ("embed", "wte", "wpe", "relative_attention_bias", "norm", "position")
ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the tensor names of a checkpoint's experts, which transformers joins into one tensor per layer on loading."""
EXPERTS = re.compile(r"(.*\.(?:experts|input_linear|output_linear))\.")
"""Modules whose three-dimensional tensors hold one matrix per expert."""
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
"""Model type -> names that peft takes for experts (`_convert_peft_config_moe`), also if dense layers have them."""


@dataclass(frozen=True)
class ParameterCount:
    """`trainable` = `lora` + `head`; `total` = base + adapter + head again, since peft trains a copy of the head."""

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
    """Full name -> (d_in, d_out) of each linear layer: two-dimensional weights except embeddings and experts."""
    linears = {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        own_name = module.rpartition(".")[2].lower()
        if leaf != "weight" or len(shape) != 2 or ONE_EXPERT.search(name):
            continue
        if own_name == "shared" or any(part in own_name for part in NOT_LINEAR):
            continue
        is_conv1d = model_type in CONV1D_MODELS and any(part.isdigit() for part in module.split("."))
        linears[module] = (shape[0], shape[1]) if is_conv1d else (shape[1], shape[0])
    return linears


@dataclass(frozen=True)
class Experts:
    """A model's experts, if loading joins them into one tensor per layer.

    `modules`: full names of the modules that hold them, such as `model.layers.0.mlp.experts`. `names`: last parts of
    names that peft takes for experts, wherever in the model they are.
    """

    modules: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def joined_experts(shapes: Mapping[str, tuple[int, ...]], model_type: str) -> Experts:
    """Finds a model's experts by the shapes of its parameters or of its checkpoint's tensors."""
    found = {
        match[1]: None
        for name, shape in shapes.items()
        if (match := EXPERTS.match(name)) and (len(shape) == 3 or ONE_EXPERT.search(name))
    }
    return Experts(tuple(found), EXPERT_NAMES.get(model_type, ()) if found else ())


def trainable_line(trainable: int, total: int) -> str:
    """peft's own line: `trainable params: 739,586 || all params: 67,694,596 || trainable%: 1.0925`."""
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
