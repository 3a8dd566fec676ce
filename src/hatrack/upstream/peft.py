"""Private and undocumented names of peft: layers of one's own, and the names of joined experts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig

from hatrack.upstream.names import find, require

NAMES = (
    "peft.LoraConfig._register_custom_module(mapping)",
    "peft.utils.transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers"
    "(model, peft_config, adapter_state_dict, adapter_name)",
)
require("peft", *NAMES)

convert_names: Callable[..., dict[str, torch.Tensor]] = find(NAMES[1].partition("(")[0])
"""Joins experts' tensors of an adapter as transformers joins its model's: (model, config, tensors, adapter's name)."""


def use_layers(config: LoraConfig, classes: Mapping[type, Any]) -> None:
    """Has peft make the adapted layers by `classes`: type of the base's layer -> class or function."""
    config._register_custom_module(dict(classes))
