"""Collects every tensor of an adapter that does not fit a base, and reports them all at once."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from hatrack.adapter.card import CONFIG
from hatrack.adapter.config import PEFT_ITSELF
from hatrack.adapter.files import AdapterFiles
from hatrack.errors import AdapterError
from hatrack.recipe import flag

PREFIX = "base_model.model."
"""The prefix that peft puts before the base's parameter names."""
GIVE_ITS_BASE = "give it the base it was trained on"


@dataclass
class Mismatches:
    """The names of an adapter's tensors that do not fit a base.

    `missing`: not in the file; `unexpected`: not in the model; `shapes`: name -> the model's shape, if the file has
    another; `unlike_base`: with other values than the base's, in a module that the adapter cannot have a copy of;
    `not_finite`: with inf or nan.
    """

    files: AdapterFiles
    modules: Mapping[str, nn.Module]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unlike_base: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)

    def raise_if_any(self) -> None:
        """Raises AdapterError with all mismatches and the fix, if there are any."""
        problems = [f"{key}: missing from the file" for key in self.missing]
        problems += [f"{key}: no place in the model" for key in self.unexpected]
        problems += [f"{key}: file {self.files.shapes.get(key)}, model {shape}" for key, shape in self.shapes.items()]
        problems += [f"{key}: other values than the base's" for key in self.unlike_base]
        problems += [f"{key}: holds values that are not finite" for key in self.not_finite]
        if not problems:
            return
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        count = f"{len(problems)} tensors do" if len(problems) > 1 else "a tensor does"
        raise AdapterError(f"{count} not fit in {self.files.weights}", got=shown, fix=self._fix())

    def _fix(self) -> str:
        """The fix for the most likely cause of the mismatches."""
        experts = _single_experts(self.unexpected)
        not_targeted = {_module_of(key) for key in self.unexpected} & set(self.modules)
        if self.shapes or self.unlike_base or set(map(_module_of, self.unexpected)) - not_targeted - experts:
            return GIVE_ITS_BASE
        if experts:
            return f"this version of transformers joins a layer's experts; {PEFT_ITSELF}, as it was when it was trained"
        if not_targeted:
            names = sorted({path.rpartition(".")[2] for path in not_targeted})
            return f"name these layers in target_modules of {CONFIG}: {', '.join(names[:8])}"
        if self.missing and min(map(_layer_number, self.missing)) > max(map(_layer_number, self.files.shapes)):
            return GIVE_ITS_BASE  # the model has more layers than the adapter
        if self.not_finite and not self.missing:
            return f"copy the adapter again, or train it again with a lower {flag('lr')}"
        return "copy the adapter again: its file is incomplete"


def _module_of(key: str) -> str:
    """The base's module that an adapter's tensor belongs to."""
    return re.sub(r"\.(lora_.*|token_adapter\..*|base_layer\..*|[^.]+)$", "", key.removeprefix(PREFIX))


def _single_experts(keys: Iterable[str]) -> set[str]:
    """The modules of `keys` that are single experts."""
    return {_module_of(key) for key in keys if re.search(r"\.experts\.\d+\.", key)}


def _layer_number(key: str) -> int:
    """The number of the layer that a tensor is in; -1 outside the layers."""
    number = re.search(r"\.(\d+)\.", key)
    return int(number[1]) if number else -1
