"""What a model's memory and time depend on: its widths, its products, and what an adapter makes it keep. No torch.

Everything comes from config.json and the tensors' shapes, under whichever names an architecture has for them.
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
"""Last names of the projection that follows attention; the other projections of attention come before it."""
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Dimensions:
    """The few numbers of a model that its memory and time depend on.

    Widths are those of a token: `query` of all heads together, `key` of all key heads (values the same). `gated`: two
    projections into the MLP rather than one.
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
    """A base with the adapter of a recipe. Counts are numbers, not bytes.

    `dense` are the weights multiplied with every token, `largest` the most of them in one layer; `head` is the output
    head's, `outside` all that is in no product within the layers (embeddings, norms, heads). `inputs` is what is kept
    of each token for the adapted layers, `dropped` the inputs of the other products in the layers that a gradient
    passes through (`reach` of them), `own_copies` what peft's own layers would keep besides; `adapted` sums d_in and
    d_out of the adapted layers, `again` the weights that DoRA multiplies with twice and `scaled` the outputs it scales
    by what it learns, `below` the layers below all adapters whose results are kept. `stored` is the checkpoint's number
    format, `disk` its bytes.
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
    cached_layers: int
    stored_dtype: str
    disk_bytes: int

    @property
    def frozen(self) -> int:
        """Numbers of the base, its own head included."""
        return self.matmul_weights + self.other_weights


def dimensions_of(config: Mapping[str, Any], linears: Mapping[str, tuple[int, int]] | None = None) -> Dimensions:
    """The numbers from a config.json, under whichever name its architecture has for them; 0 where it has none."""
    config = config.get("text_config", config)

    def number(*names: str) -> int:
        return next((int(config[name]) for name in names if isinstance(config.get(name), int)), 0)

    hidden = number("hidden_size", "n_embd", "dim", "d_model")
    heads = number("num_attention_heads", "n_head", "n_heads", "num_heads") or 1
    width = number("head_dim", "d_kv") or hidden // heads
    intermediate = number("intermediate_size", "n_inner", "hidden_dim", "d_ff", "ffn_dim") or 4 * hidden
    into = [name for name, sides in (linears or {}).items() if sides == (hidden, intermediate)]
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
        gated=fused or len(into) >= 2 * max(layers, 1),
    )


def describe_model(peeked: BaseDescription, recipe: Recipe, *, task: str, labels: int) -> ModelShape:
    """The base behind `peeked` with the adapter that `recipe` puts on it.

    Raises TargetError or RecipeError where the recipe does not fit the base.
    """
    config = peeked.config
    shapes = task_shapes(config, peeked.tensors, task, labels)
    linears = linear_layers_from_shapes(shapes, str(config.get("model_type")))
    heads = sorted({name.rpartition(".")[0] for name in head_shapes(config, labels)}) if task == "classify" else []
    experts = joined_experts(shapes, str(config.get("model_type")))
    choice = choose_targets(
        ModelLayers(linears, heads=heads, experts=experts), recipe.targets, recipe.top_layers, r=recipe.r
    )
    check_rank(recipe.r, choice, linears)
    adapted = [linears[name] for name in choice.names]
    shape = dimensions_of(config, linears)
    inside = _inside(linears)
    dense = sum(d_in * d_out for d_in, d_out in inside.values())
    dora = recipe.variant == "dora"
    inputs, reach = _inputs(choice.names, linears, shape), _reach(choice, linears)
    all_inputs = _inputs(inside, linears, shape) * reach // max(shape.layers, 1)
    return ModelShape(
        dims=shape,
        counts=count_parameters(shapes, adapted, r=recipe.r, variant=recipe.variant, heads=heads),
        decoder=task != "classify",
        matmul_weights=dense,
        linear_layers=len(inside),
        largest_matrix=max((d_in * d_out for d_in, d_out in inside.values()), default=0),
        head_weights=shape.vocabulary * shape.hidden if task != "classify" else 0,
        other_weights=parameter_count(shapes) - dense,
        adapter_inputs=inputs,
        other_inputs=max(0, all_inputs - inputs),
        peft_copies=sum(d_in for d_in, _ in adapted),
        adapted_width=sum(d_in + d_out for d_in, d_out in adapted),
        adapted_layers=len(adapted),
        dora_weights=sum(d_in * d_out for d_in, d_out in adapted) if dora else 0,
        dora_outputs=2 * sum(d_out for _, d_out in adapted) if dora else 0,
        backward_layers=reach,
        cached_layers=max(0, shape.layers - (recipe.top_layers or shape.layers)) if recipe.cache_limit != 0 else 0,
        stored_dtype=STORED.get(peeked.stored_dtype, "other"),
        disk_bytes=weight_bytes(peeked.tensors),
    )


def _place(name: str) -> tuple[int, ...]:
    """The numbers in a module's name: the index of its layer first."""
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _inside(linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The linear layers of the repeated stack."""
    return {name: sides for name, sides in linears.items() if _place(name)}


def _reach(choice: TargetChoice, linears: Collection[str]) -> int:
    """How many layers a gradient passes through: those from the lowest adapted one up."""
    depths = [place[0] for place in map(_place, linears) if place]
    lowest = min((place[0] for place in map(_place, choice.names) if place), default=0)
    return max(depths, default=-1) + 1 - lowest


def _inputs(names: Collection[str], linears: Mapping[str, tuple[int, int]], shape: Dimensions) -> int:
    """Numbers a token that the adapted layers keep: each distinct input once, however many layers read it."""
    distinct: dict[tuple[tuple[int, ...], str], int] = {}
    for name in names:
        d_in, d_out = linears[name]
        if d_out in (shape.intermediate, 2 * shape.intermediate) and d_in == shape.hidden:
            kind = "into the MLP"
        elif d_in == shape.intermediate:
            kind = "out of the MLP"
        elif name.rpartition(".")[2] in AFTER_ATTENTION and d_out == shape.hidden:
            kind = "out of attention"
        else:
            kind = "into attention"
        distinct[_place(name), kind] = d_in
    return sum(distinct.values())
