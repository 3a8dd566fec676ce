"""adapter_config.json of whoever wrote it -> peft's LoraConfig for one base, with nothing in it that can do harm.

Fields are let through by name: no field can name code to run, a path, a pattern that hangs, or a change to the base.
Knows nothing of tensors.
"""

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig

from hatrack.errors import AdapterError, short

CONFIG = "adapter_config.json"
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` of adapters that belong on the base as it is; others changed the base's weights first."""
PATTERN_SECONDS = 2.0
"""How long all regular expressions of an adapter together may take."""
LONGEST_PATTERN = 2000
AGAIN = "copy the adapter again"


def _whole(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e9


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _layers(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and all(type(number) is int for number in value))


def _plain_name(value: Any) -> bool:
    """peft builds a regular expression around it: it must be none itself."""
    several = [value] if isinstance(value, str) else value
    return _names(several) and all(name.replace("_", "").replace(".", "").isalnum() for name in several)


def _table(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(check(entry) for entry in value.values())


USED: dict[str, Callable[[Any], bool]] = {
    "r": _whole,
    "lora_alpha": _number,
    "target_modules": lambda value: (isinstance(value, str) and value != "") or (_names(value) and value != []),
    "exclude_modules": lambda value: isinstance(value, str) or _names(value),
    "lora_dropout": lambda value: _number(value) and 0 <= value <= 1,
    "fan_in_fan_out": lambda value: isinstance(value, bool),
    "use_rslora": lambda value: isinstance(value, bool),
    "use_dora": lambda value: isinstance(value, bool),
    "lora_bias": lambda value: isinstance(value, bool),
    "modules_to_save": _names,
    "layers_to_transform": _layers,
    "layers_pattern": _plain_name,
    "rank_pattern": _table(_whole),
    "alpha_pattern": _table(_number),
    "task_type": lambda value: isinstance(value, str),
}
"""The fields that decide what an adapter computes, each with what it must hold. The first three must be there."""

PASSED_OVER = {"peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "bias"}
PASSED_OVER |= {"init_lora_weights", "runtime_config", "ephemeral_gpu_offload", "qalora_group_size"}
PASSED_OVER |= {"auto_mapping", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"}
PASSED_OVER |= {"lora_ga_config"}
"""Fields that say how it was made or where it came from, or name code and files; those peft never gets to see."""


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raises AdapterError, naming `path`, for a config that is malformed, no LoRA, or needs what is not loaded here."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"{path} is not of a LoRA adapter", got=f"peft_type {kind!r}", fix="hatrack loads LoRA and its variants"
        )
    must = list(USED)[:3]
    wrong = [
        f"{field} {short(config.get(field))}"
        for field, fits in USED.items()
        if (field in must or config.get(field) is not None) and not fits(config.get(field))
    ]
    if wrong:
        raise AdapterError(f"{path} is malformed", got=", ".join(wrong), fix=AGAIN)
    if config["lora_alpha"] == 0:
        raise AdapterError(f"{path} turns its adapter off", got="lora_alpha 0", fix="train it with another --alpha")
    start = config.get("init_lora_weights")
    if not any(start is plain or (isinstance(plain, str) and start == plain) for plain in PLAIN_STARTS):
        raise AdapterError(
            f"{path} belongs on a base whose weights were changed first",
            got=f"init_lora_weights {short(start)}",
            fix="convert it with peft's path_initial_model_for_weight_conversion",
        )
    if config.get("bias") not in (None, "none"):
        raise AdapterError(
            f"{path} replaces biases of the base itself", got=f"bias {short(config['bias'])}", fix="train without bias"
        )
    more = [f"{field} {short(value)}" for field, value in config.items() if _unknown(field, value)]
    if more:
        raise AdapterError(
            f"{path} needs what hatrack does not load", got=", ".join(sorted(more)[:5]), fix="use it with peft itself"
        )


def lora_config(path: Path, config: Mapping[str, Any], layers: Sequence[str]) -> LoraConfig:
    """peft's config for a base with these module names; every pattern in it replaced by the names it matches.

    Raises AdapterError, naming `path`, where a pattern is no pattern, takes too long, or matches nothing.
    """
    given = {field: config[field] for field in USED if config.get(field) is not None}
    patterns = {field: given[field] for field in ("target_modules", "exclude_modules") if _is_pattern(given.get(field))}
    tables = [(field, key) for field in ("rank_pattern", "alpha_pattern") for key in given.get(field, {})]
    whole = [*patterns.values(), *(rf"(.*\.)?({key})" for _, key in tables)]  # peft's own reading of such a key
    found = matching(path, whole, layers) if whole else []
    for field, names in zip(patterns, found, strict=False):
        given[field] = names
    if not given["target_modules"]:
        raise AdapterError(
            f"{path} names no layer of this base",
            got=f"target_modules {short(config['target_modules'])}",
            fix="give it the base it was trained on",
        )
    for table in ("rank_pattern", "alpha_pattern"):
        given.pop(table, None)
    for (table, key), names in zip(tables, found[len(patterns) :], strict=True):
        for name in names:  # the first key that matches a layer counts
            given.setdefault(table, {}).setdefault(name, config[table][key])
    if "modules_to_save" in given:
        given["modules_to_save"] = sorted(set(given["modules_to_save"])) or None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LoraConfig(**given, inference_mode=True)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{path} is malformed", got=" ".join(str(error).split())[:200], fix=AGAIN) from error


_MATCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
print(json.dumps([[name for name in names if re.fullmatch(pattern, name)] for pattern in patterns]))
"""


def matching(path: Path, patterns: Sequence[str], names: Iterable[str]) -> list[list[str]]:
    """For each regular expression the names it matches, found by a process that is ended when it takes too long.

    Raises AdapterError, naming `path`, where it does, or where one is no regular expression.
    """
    longest = max(patterns, key=len)
    if len(longest) > LONGEST_PATTERN:
        raise AdapterError(f"{path} has a pattern of {len(longest):,} characters", fix="name the layers in full")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([list(patterns), list(names)]),
            capture_output=True,
            text=True,
            timeout=PATTERN_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AdapterError(
            f"{path} has a regular expression that does not come to an end",
            got=f"{short(longest)} after {PATTERN_SECONDS:g} s",
            fix="name the layers in full",
        ) from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it failed"])[-1][:200]
        raise AdapterError(
            f"{path} has a malformed regular expression", got=f"{short(longest)}: {reason}", fix="name the layers"
        )
    found: list[list[str]] = json.loads(done.stdout)
    return found


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value != "all-linear"


def _unknown(field: str, value: Any) -> bool:
    """Whether a field is none of those above and is not at rest."""
    empty: Collection[Any] = (None, False, 0, "")
    return field not in USED and field not in PASSED_OVER and value not in empty and value not in ([], {})
