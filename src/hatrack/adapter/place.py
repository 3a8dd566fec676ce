"""Puts a new adapter on a base. Knows nothing of training, files or data."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from hatrack.adapter.count import joined_experts
from hatrack.adapter.targets import TargetChoice, check_rank, choose_targets
from hatrack.console import say
from hatrack.errors import AdapterError, TargetError
from hatrack.recipe import Recipe

TASK_TYPES = {"classify": "SEQ_CLS", "chat": "CAUSAL_LM", "complete": "CAUSAL_LM"}
PISSA_START = "_hatrack_start"
"""Attribute of a PiSSA model that keeps where its adapter started: what is saved is the difference from there."""


def place(
    model: Any, recipe: Recipe, *, task: str, layer_classes: Mapping[type, Any] | None = None, name: str = "default"
) -> PeftModel:
    """Wraps a frozen base with a new adapter as `recipe` says; adapter and head are float32 and alone trainable.

    `layer_classes` maps a layer's class to the adapted layer to use for it, in place of peft's. Raises TargetError for
    layer names that match nothing, RecipeError for a rank that does not fit, AdapterError where the base carries an
    adapter already.
    """
    if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
        raise AdapterError(
            "the base already carries an adapter", got=type(model).__name__, fix="start from the bare base"
        )
    linears = linear_layers(model)
    heads = head_modules(model) if task == "classify" else []
    modules = [module_name for module_name, _ in model.named_modules() if module_name]
    outputs = heads or output_modules(model)
    shapes = {parameter: tuple(weight.shape) for parameter, weight in model.named_parameters()}
    experts = joined_experts(shapes, str(model.config.model_type))
    choice = choose_targets(
        linears, recipe.targets, recipe.top_layers, r=recipe.r, heads=outputs, modules=modules, experts=experts
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
        config._register_custom_module(dict(layer_classes))
    if recipe.variant == "pissa":
        say("pissa: decomposing the adapted weights; the base keeps the rest until the adapter is saved")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks by the old name
        wrapped = get_peft_model(model, config, adapter_name=name)
    _check_placed(wrapped, choice)
    keep_head_in_float32(wrapped, name)
    if recipe.variant == "pissa":
        _remember_start(wrapped, name)
    say(f"adapters on {len(choice.names)} layers: {choice.why} ({', '.join(_leaves(choice.names))})")
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
    """The modules with parameters that a task's model adds to its base: its head."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def output_modules(model: Any) -> list[str]:
    """The module that turns a language model's hidden states into logits, by full name."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [name for name, module in model.named_modules() if module is output]


def heads_of(model: Any, name: str) -> dict[str, nn.Module]:
    """Full name -> the adapter's own copy of each head module."""
    return {
        full: module.modules_to_save[name]
        for full, module in model.named_modules()
        if hasattr(module, "modules_to_save")
        and isinstance(module.modules_to_save, nn.ModuleDict)
        and name in module.modules_to_save
    }


def keep_head_in_float32(model: Any, name: str) -> None:
    """Casts the adapter's head to float32, and what goes into it by a hook (docs/decisions/0004).

    Other modules that an adapter has a copy of (an embedding, a norm) stay in the base's dtype, as what follows them
    computes in it; so does a head whose weight is tied to an embedding.
    """
    if getattr(model.peft_config[name], "ensure_weight_tying", False):
        return
    outer = [f"base_model.model.{module}" for module in head_modules(model.get_base_model())]
    heads = {
        full: head
        for full, head in heads_of(model, name).items()
        if f"{full}.".startswith(tuple(f"{o}." for o in outer))
    }
    for head in heads.values():
        head.float()
        if not head._forward_pre_hooks:
            head.register_forward_pre_hook(_inputs_to_float32)


def _inputs_to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def _check_placed(model: Any, choice: TargetChoice) -> None:
    """peft must have put adapters on the chosen layers, all of them and no others."""
    prefix = "base_model.model."
    placed = {name.removeprefix(prefix) for name, module in model.named_modules() if hasattr(module, "lora_A")}
    wrong = sorted(placed ^ set(choice.names))
    if wrong:
        raise TargetError("adapters were not placed as chosen", got=", ".join(wrong[:5]), fix="name layers in full")


def _remember_start(model: Any, name: str) -> None:
    """Keeps the starting values of a PiSSA adapter, which the base's weights have lost, until it is saved."""
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    setattr(model, PISSA_START, {key: tensor.detach().clone() for key, tensor in state.items() if ".lora_" in key})


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
