"""Places a new adapter on a base model."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from hatrack.adapter.count import joined_experts
from hatrack.adapter.targets import ModelLayers, TargetChoice, check_rank, choose_targets, last_parts
from hatrack.console import say
from hatrack.errors import AdapterError, TargetError
from hatrack.recipe import Recipe
from hatrack.upstream.peft import use_layers

TASK_TYPES = {"classify": "SEQ_CLS", "chat": "CAUSAL_LM", "complete": "CAUSAL_LM"}
PISSA_START = "_hatrack_start"
"""Attribute of a model with a PiSSA adapter: the adapter's initial tensors. The difference from them is saved."""


def place(
    model: Any, recipe: Recipe, *, task: str, layer_classes: Mapping[type, Any] | None = None, name: str = "default"
) -> PeftModel:
    """Wraps a frozen base with a new adapter as `recipe` says. Only adapter and head are trainable; both are float32.

    `task`: classify, chat or complete. `layer_classes`: layer class -> adapted layer class to use in place of peft's.
    Raises TargetError for layer names that match nothing, RecipeError for a rank that does not fit, AdapterError if
    the base already has an adapter.
    """
    if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
        raise AdapterError("the base already has an adapter", got=type(model).__name__, fix="start from the bare base")
    linears = linear_layers(model)
    heads = head_modules(model) if task == "classify" else []
    modules = [module_name for module_name, _ in model.named_modules() if module_name]
    outputs = heads or output_modules(model)
    shapes = {parameter: tuple(weight.shape) for parameter, weight in model.named_parameters()}
    experts = joined_experts(shapes, str(model.config.model_type))
    choice = choose_targets(
        ModelLayers(linears, heads=outputs, modules=modules, experts=experts),
        recipe.targets,
        recipe.top_layers,
        r=recipe.r,
    )
    check_rank(recipe.r, choice, linears)
    config = LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.effective_alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(choice.target_modules),
        modules_to_save=heads or None,
        task_type=TASK_TYPES[task],
        use_dora=recipe.variant == "dora",
        use_rslora=recipe.variant == "rslora",
        init_lora_weights="pissa" if recipe.variant == "pissa" else True,
        fan_in_fan_out=all(isinstance(model.get_submodule(layer), Conv1D) for layer in choice.names),
    )
    if layer_classes:
        use_layers(config, layer_classes)
    if recipe.variant == "pissa":
        say("pissa: decomposing the adapted weights")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft uses the old name
        wrapped = get_peft_model(model, config, adapter_name=name)
    _check_placed(wrapped, choice)
    cast_head_to_float32(wrapped, name)
    if recipe.variant == "pissa":
        _store_initial_tensors(wrapped, name)
    say(f"adapters on {len(choice.names)} layers: {choice.why} ({', '.join(last_parts(choice.names))})")
    for note in choice.notes:
        say(note)
    return wrapped


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Full name -> (d_in, d_out) of every layer that can carry an adapter."""
    linears: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linears[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            d_in, d_out = module.weight.shape
            linears[name] = (d_in, d_out)
    return linears


def head_modules(model: Any) -> list[str]:
    """The names of the task's head modules: those with parameters, outside the base model."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def output_modules(model: Any) -> list[str]:
    """The full name of the module that turns a language model's hidden states into logits, in a list."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [name for name, module in model.named_modules() if module is output]


def module_copies(model: Any, name: str) -> dict[str, nn.Module]:
    """Full name -> the adapter's own copy of each module in `modules_to_save`."""
    return {
        path: module.modules_to_save[name]
        for path, module in model.named_modules()
        if hasattr(module, "modules_to_save")
        and isinstance(module.modules_to_save, nn.ModuleDict)
        and name in module.modules_to_save
    }


def cast_head_to_float32(model: Any, name: str) -> None:
    """Casts the adapter's head to float32, and its inputs by a hook (docs/decisions/0004).

    Other modules that an adapter has a copy of (an embedding, a norm) stay in the base's dtype, because the modules
    after them compute in it. A head whose weight is tied to an embedding stays in it, too.
    """
    if getattr(model.peft_config[name], "ensure_weight_tying", False):
        return
    task_heads = tuple(f"base_model.model.{module}." for module in head_modules(model.get_base_model()))
    for path, head in module_copies(model, name).items():
        if f"{path}.".startswith(task_heads):
            head.float()
            head.register_forward_pre_hook(_inputs_to_float32)


def _inputs_to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def _check_placed(model: Any, choice: TargetChoice) -> None:
    """Raises TargetError unless peft put adapters on exactly the chosen layers."""
    prefix = "base_model.model."
    placed = {name.removeprefix(prefix) for name, module in model.named_modules() if hasattr(module, "lora_A")}
    wrong = sorted(placed ^ set(choice.names))
    if wrong:
        raise TargetError("adapters were not placed as chosen", got=", ".join(wrong[:5]), fix="name layers in full")


def _store_initial_tensors(model: Any, name: str) -> None:
    """Stores a PiSSA adapter's initial tensors in the model until it is saved: peft subtracted them from the base."""
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    setattr(model, PISSA_START, {key: tensor.detach().clone() for key, tensor in state.items() if ".lora_" in key})
