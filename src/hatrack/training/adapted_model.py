"""Loads the base of a run and adds its adapter, for training and for checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import set_seed

from hatrack.adapter.place import place
from hatrack.base.layer_stack import LayerStack, find_layer_stack
from hatrack.base.load import Base
from hatrack.base.mapped_layers import NON_LAYER_WEIGHTS, find_mappings, release_pages
from hatrack.base.offload import move_all_but_layers, open_layers, placeholders_if_streamed
from hatrack.check.prepared import Prepared
from hatrack.console import say
from hatrack.errors import ModelError
from hatrack.layers.fast_base import speed_up
from hatrack.layers.fast_lora import LAYER_CLASSES
from hatrack.training.hidden_states import HiddenStateCache
from hatrack.training.layer_streaming import LayerInputs, LayerStreaming
from hatrack.training.load import load_run_base
from hatrack.training.prefix_cache import FrozenPrefix

CHECKPOINTING = {"use_reentrant": False}
"""Torch's reentrant form loses the gradients of adapters over frozen inputs."""


class LayerRunners(NamedTuple):
    """Objects that run layers in place of the model's own forward pass; None where they are not needed.

    `streaming` runs whole steps over a base on disk. `prefix` runs the frozen layers below the adapters.
    """

    streaming: LayerStreaming | None
    prefix: FrozenPrefix | None


@dataclass(frozen=True)
class AdaptedModel:
    """`model` is `base.model` with a new adapter. `stack` holds its layers; None if the base is in memory and all its
    layers are adapted, or if its layers are not a single stack."""

    base: Base
    model: Any
    stack: LayerStack | None


def load_adapted_model(prepared: Prepared) -> AdaptedModel:
    """Loads the base, speeds it up and adds a new adapter, as the recipe and the plan say.

    Raises ModelError if the base must be streamed but its layers are not a single stack.
    """
    recipe = prepared.recipe
    base = load_run_base(prepared)
    set_seed(recipe.seed)
    stack = _find_stack(base, recipe.top_layers)
    if base.streamed and stack is not None:
        move_all_but_layers(base.model, stack, base.dtype, base.device)
    speed_up(base.model, stack if base.streamed or prepared.cached_fraction == 1 else None, recipe.compute)
    with placeholders_if_streamed(base):
        model = place(base.model, recipe, task=prepared.task, layer_classes=LAYER_CLASSES)
    if prepared.plan.method.checkpointing:
        base.model.config.use_cache = False
        base.model.activation_checkpointing_enable(CHECKPOINTING)
    return AdaptedModel(base, model, stack)


def open_layer_runners(
    adapted: AdaptedModel, prepared: Prepared, cache: HiddenStateCache | None, folder: Path
) -> LayerRunners:
    """Opens layer streaming if the base is on disk (`folder` takes the hidden states that do not fit in memory), and
    the frozen prefix if there are layers below the adapters (`cache` stores its output)."""
    base, stack = adapted.base, adapted.stack
    if stack is None or not base.streamed:
        return LayerRunners(None, _open_prefix(adapted, prepared, cache))
    mapped_layers = open_layers(base.model, stack, base.dtype, base.description.folder, base.device)
    mapped_layers.load(NON_LAYER_WEIGHTS)
    prefix = _open_prefix(adapted, prepared, cache)
    streaming = LayerStreaming(adapted.model, mapped_layers, prepared.task, LayerInputs(folder), prefix)
    mapped_layers.stream()
    return LayerRunners(streaming, prefix)


def _find_stack(base: Base, top_layers: int | None) -> LayerStack | None:
    """Returns the stack of layers if the run needs it."""
    if not base.streamed and top_layers is None:
        return None
    try:
        stack = find_layer_stack(base.model)
        if base.streamed:
            release_pages(find_mappings(base.description.folder))
        return stack
    except ModelError as error:
        if base.streamed:
            raise
        say(f"the layers below the adapters are computed again in each epoch: {error}")
        return None


def _open_prefix(adapted: AdaptedModel, prepared: Prepared, cache: HiddenStateCache | None) -> FrozenPrefix | None:
    """Returns the frozen prefix if there are layers below the adapters and their output is deterministic."""
    top, stack = prepared.recipe.top_layers, adapted.stack
    if stack is None or top is None or len(stack.layers) == top:
        return None
    try:
        prefix = FrozenPrefix(adapted.model, stack, len(stack.layers) - top, task=prepared.task, states=cache)
    except ValueError as error:
        say(f"the layers below the adapters are computed again in each epoch: {error}")
        return None
    cached = prepared.cached_fraction
    once = "" if cache is None else " and are computed once per row"
    earlier = f" ({cached:.0%} of the rows were, by earlier runs)" if cached else ""
    say(f"the first {prefix.depth} of {len(stack.layers)} layers are frozen, run without dropout{once}{earlier}")
    return prefix
