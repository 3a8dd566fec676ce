"""The sizes of a model and its adapter that memory and time depend on. Imports no torch.

Computed from config.json and the tensors' shapes, under the names that each architecture uses.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hatrack.adapter.count import ParameterCount, count_parameters, joined_experts, linear_layers_from_shapes
from hatrack.adapter.targets import ModelLayers, TargetChoice, check_rank, choose_targets
from hatrack.base.description import BaseDescription
from hatrack.base.header import head_shapes, parameter_count, task_shapes, weight_bytes
from hatrack.recipe import Recipe

AFTER_ATTENTION = ("o_proj", "out_proj", "out_lin", "c_proj", "dense", "wo", "Wo", "o", "proj")
"""Last part of the names of attention's output projection; its other projections are inputs."""
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model. Elements per token: `hidden` of its hidden state, `intermediate` in the MLP, `query` in the
    queries of all heads, `key` in the keys of all key heads (and in the values). `gated`: the MLP has a gate.
    """

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    heads: int = 1
    query: int = 0
    key: int = 0
    gated: bool = False


@dataclass(frozen=True)
class ModelShape:
    """A base with the adapter of a recipe. Weights, inputs and outputs are counted in elements, not bytes.

    Weights: `matmul_weights` of the linear layers inside the model's layers (there are `linear_layers` of them),
    `largest_matrix` of the largest of these, `head_weights` of the output head, `other_weights` of all else
    (embeddings, norms, heads).

    Per token: `adapter_inputs` of the adapted layers, saved for the backward pass; `other_inputs` of the other linear
    layers in the backward pass; `peft_copies` that peft's own layers save in addition; `adapted_width`, the sum of d_in
    and d_out of the adapted layers. DoRA multiplies with `dora_weights` twice and scales `dora_outputs`.

    Layers: `backward_layers` are in the backward pass; below all adapters are `frozen_prefix_layers`, whose output is
    cached (0 if nothing is cached). The checkpoint has `disk_bytes` bytes in `stored_dtype`.
    """

    dims: Dimensions
    counts: ParameterCount
    decoder: bool
    matmul_weights: int
    linear_layers: int
    largest_matrix: int
    head_weights: int
    other_weights: int
    adapter_inputs: int
    other_inputs: int
    peft_copies: int
    adapted_width: int
    adapted_layers: int
    dora_weights: int
    dora_outputs: int
    backward_layers: int
    frozen_prefix_layers: int
    stored_dtype: str
    disk_bytes: int

    @property
    def frozen(self) -> int:
        """Weights of the base, its own head included."""
        return self.matmul_weights + self.other_weights


def dimensions_of(config: Mapping[str, Any], linears: Mapping[str, tuple[int, int]] | None = None) -> Dimensions:
    """The dimensions in a config.json, under the names that its architecture uses; 0 if it has none."""
    config = config.get("text_config", config)

    def number(*names: str) -> int:
        return next((int(config[name]) for name in names if isinstance(config.get(name), int)), 0)

    hidden = number("hidden_size", "n_embd", "dim", "d_model")
    heads = number("num_attention_heads", "n_head", "n_heads", "num_heads") or 1
    width = number("head_dim", "d_kv") or hidden // heads
    intermediate = number("intermediate_size", "n_inner", "hidden_dim", "d_ff", "ffn_dim") or 4 * hidden
    mlp_inputs = [name for name, sides in (linears or {}).items() if sides == (hidden, intermediate)]
    fused = any(sides == (hidden, 2 * intermediate) for sides in (linears or {}).values())
    layers = number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    return Dimensions(
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        vocabulary=number("vocab_size"),
        heads=heads,
        query=heads * width,
        key=(number("num_key_value_heads", "n_head_kv") or heads) * width,
        gated=fused or len(mlp_inputs) >= 2 * max(layers, 1),
    )


def describe_model(base: BaseDescription, recipe: Recipe, *, task: str, labels: int) -> ModelShape:
    """The shape of a base with the adapter of `recipe` for `task`; `labels`: the number of labels to classify.

    Raises TargetError or RecipeError if the recipe does not fit the base.
    """
    config = base.config
    shapes = task_shapes(config, base.tensors, task, labels)
    linears = linear_layers_from_shapes(shapes, str(config.get("model_type")))
    heads = sorted({name.rpartition(".")[0] for name in head_shapes(config, labels)}) if task == "classify" else []
    experts = joined_experts(shapes, str(config.get("model_type")))
    choice = choose_targets(
        ModelLayers(linears, heads=heads, experts=experts), recipe.targets, recipe.top_layers, r=recipe.r
    )
    check_rank(recipe.r, choice, linears)
    adapted = [linears[name] for name in choice.names]
    dims = dimensions_of(config, linears)
    inside = _inside_layers(linears)
    matmul_weights = sum(d_in * d_out for d_in, d_out in inside.values())
    dora = recipe.variant == "dora"
    inputs, backward_layers = _input_elements(choice.names, linears, dims), _backward_layers(choice, linears)
    all_inputs = _input_elements(inside, linears, dims) * backward_layers // max(dims.layers, 1)
    return ModelShape(
        dims=dims,
        counts=count_parameters(shapes, adapted, r=recipe.r, variant=recipe.variant, heads=heads),
        decoder=task != "classify",
        matmul_weights=matmul_weights,
        linear_layers=len(inside),
        largest_matrix=max((d_in * d_out for d_in, d_out in inside.values()), default=0),
        head_weights=dims.vocabulary * dims.hidden if task != "classify" else 0,
        other_weights=parameter_count(shapes) - matmul_weights,
        adapter_inputs=inputs,
        other_inputs=max(0, all_inputs - inputs),
        peft_copies=sum(d_in for d_in, _ in adapted),
        adapted_width=sum(d_in + d_out for d_in, d_out in adapted),
        adapted_layers=len(adapted),
        dora_weights=sum(d_in * d_out for d_in, d_out in adapted) if dora else 0,
        dora_outputs=2 * sum(d_out for _, d_out in adapted) if dora else 0,
        backward_layers=backward_layers,
        frozen_prefix_layers=max(0, dims.layers - (recipe.top_layers or dims.layers)) if recipe.cache_limit != 0 else 0,
        stored_dtype=STORED.get(base.stored_dtype, "other"),
        disk_bytes=weight_bytes(base.tensors),
    )


def _layer_numbers(name: str) -> tuple[int, ...]:
    """The numbers in a module's name; the first is the index of its layer."""
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _inside_layers(linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The linear layers inside the model's layers."""
    return {name: sides for name, sides in linears.items() if _layer_numbers(name)}


def _backward_layers(choice: TargetChoice, linears: Collection[str]) -> int:
    """The number of layers in the backward pass: from the lowest adapted layer up."""
    depths = [numbers[0] for numbers in map(_layer_numbers, linears) if numbers]
    lowest = min((numbers[0] for numbers in map(_layer_numbers, choice.names) if numbers), default=0)
    return max(depths, default=-1) + 1 - lowest


def _input_elements(names: Collection[str], linears: Mapping[str, tuple[int, int]], dims: Dimensions) -> int:
    """Elements per token of the inputs of the named layers; an input that several layers read counts once."""
    distinct: dict[tuple[tuple[int, ...], str], int] = {}
    for name in names:
        d_in, d_out = linears[name]
        if d_out in (dims.intermediate, 2 * dims.intermediate) and d_in == dims.hidden:
            kind = "into the MLP"
        elif d_in == dims.intermediate:
            kind = "out of the MLP"
        elif name.rpartition(".")[2] in AFTER_ATTENTION and d_out == dims.hidden:
            kind = "out of attention"
        else:
            kind = "into attention"
        distinct[_layer_numbers(name), kind] = d_in
    return sum(distinct.values())
