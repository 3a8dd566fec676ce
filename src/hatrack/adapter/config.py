"""Checks any adapter_config.json and makes peft's LoraConfig of it for one base.

Only known fields are passed on: a config cannot name code to run, a path, a slow regular expression, or a change to
the base.
"""

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig

from hatrack.adapter.targets import matches
from hatrack.errors import AdapterError, short_repr
from hatrack.recipe import flag

UNCHANGED_BASE_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base's weights as they are; others change them before training."""
PATTERN_SECONDS = 2.0
"""Time limit for all regular expressions of one adapter."""
MAX_PATTERN_LENGTH = 2000
CORRECT_FIELDS = "correct these fields in the file"
PEFT_ITSELF = "use it with peft itself"

UNSUPPORTED_TASKS = {
    "SEQ_2_SEQ_LM": "an encoder-decoder",
    "FEATURE_EXTRACTION": "a model that embeds texts",
    "TOKEN_CLS": "a tagger of words",
    "QUESTION_ANS": "a model that finds answers in a text",
}
"""Values of task_type that hatrack does not support."""
SUPPORTED_TASKS = ("CAUSAL_LM", "SEQ_CLS")


def _is_positive_int(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e9


def _is_name_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_layer_choice(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and all(type(number) is int for number in value))


def _is_token_ids(value: Any) -> bool:
    """Token ids, or lists of them by the embedding's name."""
    id_lists = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids) for ids in id_lists)


def _is_plain_name(value: Any) -> bool:
    """Whether names hold only letters, digits, `_` and dots: peft puts them into a regular expression."""
    names = [value] if isinstance(value, str) else value
    return _is_name_list(names) and all(name.replace("_", "").replace(".", "").isalnum() for name in names)


def _is_table_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(check(entry) for entry in value.values())


USED_FIELDS: dict[str, Callable[[Any], bool]] = {
    "r": _is_positive_int,
    "lora_alpha": _is_number,
    "target_modules": lambda value: (isinstance(value, str) and value != "") or (_is_name_list(value) and value != []),
    "target_parameters": _is_name_list,
    "exclude_modules": lambda value: isinstance(value, str) or _is_name_list(value),
    "lora_dropout": lambda value: _is_number(value) and 0 <= value <= 1,
    "fan_in_fan_out": lambda value: isinstance(value, bool),
    "use_rslora": lambda value: isinstance(value, bool),
    "use_dora": lambda value: isinstance(value, bool),
    "lora_bias": lambda value: isinstance(value, bool),
    "modules_to_save": _is_name_list,
    "trainable_token_indices": _is_token_ids,
    "ensure_weight_tying": lambda value: isinstance(value, bool),
    "layers_to_transform": _is_layer_choice,
    "layers_pattern": _is_plain_name,
    "rank_pattern": _is_table_of(_is_positive_int),
    "alpha_pattern": _is_table_of(_is_number),
    "task_type": lambda value: isinstance(value, str),
}
"""Fields that decide what an adapter computes -> check of the value. The first three are required, or
`target_parameters` in place of `target_modules`."""

IGNORED_FIELDS = {"peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "bias"}
IGNORED_FIELDS |= {"init_lora_weights", "runtime_config", "ephemeral_gpu_offload", "qalora_group_size"}
IGNORED_FIELDS |= {"auto_mapping", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"}
IGNORED_FIELDS |= {"lora_ga_config", "merge_weights"}
"""Fields about how and where an adapter was made, and fields that name code or files: never passed on to peft. Trained
biases of the base (`bias`) are found by the tensors in the file."""
DEFAULTS = {option.name: option.default for option in fields(LoraConfig) if option.default is not MISSING}
"""Field of peft's config -> its default."""


MAY_BE_EMPTY = ("exclude_modules", "layers_pattern", "modules_to_save", "target_parameters", "trainable_token_indices")


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with 8.0 as 8, and None for empty texts and lists."""
    plain = {field: _floats_to_ints(value) if field in USED_FIELDS else value for field, value in config.items()}
    for field in ("target_modules", *MAY_BE_EMPTY):
        if field in plain and plain[field] in ("", [], {}):
            plain[field] = None
    return plain


def _floats_to_ints(value: Any) -> Any:
    """8 for 8.0, in lists and tables too."""
    if isinstance(value, dict):
        return {key: _floats_to_ints(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_floats_to_ints(entry) for entry in value]
    return int(value) if type(value) is float and value.is_integer() else value


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raises AdapterError, naming `path`, for a config that is malformed, of another tool or adapter type, or needs
    features that hatrack does not load."""
    _check_format(path, config)
    required = ["r", "lora_alpha"] if config.get("target_parameters") else ["r", "lora_alpha", "target_modules"]
    wrong = [
        f"{field} {short_repr(config.get(field))}"
        for field, is_valid in USED_FIELDS.items()
        if (field in required or config.get(field) is not None) and not is_valid(config.get(field))
    ]
    if wrong:
        raise AdapterError(f"{path} is malformed", got=", ".join(wrong), fix=CORRECT_FIELDS)
    if config["lora_alpha"] == 0:
        raise AdapterError(f"{path} turns its adapter off", got="lora_alpha 0", fix="train it with another --alpha")
    init = config.get("init_lora_weights")
    if not any(init is plain or (isinstance(plain, str) and init == plain) for plain in UNCHANGED_BASE_INITS):
        raise AdapterError(
            f"{path} was trained on a base whose weights were changed first",
            got=f"init_lora_weights {short_repr(init)}",
            fix="convert it with peft's path_initial_model_for_weight_conversion",
        )
    unknown = [f"{field} {short_repr(value)}" for field, value in config.items() if _is_unknown(field, value)]
    if unknown:
        got = ", ".join(sorted(unknown)[:5])
        raise AdapterError(f"{path} needs what hatrack does not load", got=got, fix=PEFT_ITSELF)
    _check_task(path, config)


def _check_format(path: Path, config: Mapping[str, Any]) -> None:
    """Raises AdapterError for a file that does not hold peft's LoraConfig, and says what it holds."""
    kind = config.get("peft_type")
    if kind == "LORA":
        return
    if kind is None and ("fine_tune_type" in config or "lora_parameters" in config):
        raise AdapterError(
            f"{path} is in mlx-lm's format, which is not peft's",
            got=f"fine_tune_type {short_repr(config.get('fine_tune_type'))}, no peft_type",
            fix="merge it into its base with mlx_lm.fuse and use that as --base, or train it again with hatrack",
        )
    if kind is None and "model_type" in config and ("architectures" in config or "hidden_size" in config):
        raise AdapterError(
            f"{path} is a model's config.json, not an adapter's",
            got=f"model_type {short_repr(config['model_type'])}, no peft_type",
            fix="copy adapter_config.json from where the adapter was trained",
        )
    if kind is None:
        raise AdapterError(
            f"{path} does not say what kind of adapter it is",
            got="no peft_type",
            fix='if it is a LoRA adapter, set "peft_type": "LORA" in it',
        )
    raise AdapterError(
        f"{path} is not the config of a LoRA adapter",
        got=f"peft_type {kind!r}",
        fix=f"hatrack loads LoRA and its variants; {PEFT_ITSELF}",
    )


def _check_task(path: Path, config: Mapping[str, Any]) -> None:
    """Raises AdapterError if hatrack does not support the task, or the config has none."""
    task, base = config.get("task_type"), config.get("base_model_name_or_path")
    if task in SUPPORTED_TASKS:
        return
    if task in UNSUPPORTED_TASKS:
        raise AdapterError(f"{path} is for {UNSUPPORTED_TASKS[task]}", got=f"task_type {task}", fix=PEFT_ITSELF)
    fix = 'set "task_type" in it: "CAUSAL_LM" for a generator, "SEQ_CLS" for a classifier'
    got = f"task_type {short_repr(task)}"
    if not base:
        got += f", base_model_name_or_path {short_repr(base)}"
        fix += f'; and "base_model_name_or_path", or give {flag("base")}'
    if task is not None:
        raise AdapterError(f"{path} has a task_type that peft does not know", got=got, fix=fix)
    raise AdapterError(f"{path} does not say what the adapter is for", got=got, fix=fix, gotcha="head-not-saved")


def lora_config(path: Path, config: Mapping[str, Any], layers: Sequence[str]) -> LoraConfig:
    """Makes peft's config for a base, with each regular expression replaced by the names it matches.

    `layers`: the names of the base's modules and parameters.

    Raises AdapterError, naming `path`, if a regular expression is malformed or takes too long, or no layer matches.
    """
    given = {field: config[field] for field in USED_FIELDS if config.get(field) is not None}
    patterns = {field: given[field] for field in ("target_modules", "exclude_modules") if _is_pattern(given.get(field))}
    pattern_keys = [(field, key) for field in ("rank_pattern", "alpha_pattern") for key in given.get(field, {})]
    regexes = [*patterns.values(), *(rf"(.*\.)?({key})" for _, key in pattern_keys)]  # as peft reads such a key
    found = match_patterns(path, regexes, layers) if regexes else []
    for field, names in zip(patterns, found, strict=False):
        given[field] = names
    targets = given.get("target_modules")
    if isinstance(targets, list) and not any(matches(layer, target) for target in targets for layer in layers):
        leaves = sorted(
            {layer.removesuffix(".weight").rpartition(".")[2] for layer in layers if layer.endswith(".weight")}
        )
        raise AdapterError(
            f"{path} names no layer of this base",
            got=f"target_modules {short_repr(config['target_modules'])}; the base has {', '.join(leaves[:12])}",
            fix="give it the base it was trained on",
        )
    for table in ("rank_pattern", "alpha_pattern"):
        given.pop(table, None)
    for (table, key), names in zip(pattern_keys, found[len(patterns) :], strict=True):
        for name in names:  # of several keys that match, the first counts
            given.setdefault(table, {}).setdefault(name, config[table][key])
    if "modules_to_save" in given:
        given["modules_to_save"] = sorted(set(given["modules_to_save"])) or None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LoraConfig(**given, inference_mode=True)
    except (TypeError, ValueError) as error:
        got = " ".join(str(error).split())[:200]
        raise AdapterError(f"{path} is malformed", got=got, fix=CORRECT_FIELDS) from error


_MATCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
print(json.dumps([[name for name in names if re.fullmatch(pattern, name)] for pattern in patterns]))
"""


def match_patterns(path: Path, patterns: Sequence[str], names: Iterable[str]) -> list[list[str]]:
    """The names that each regular expression matches, found in a child process with a time limit.

    Raises AdapterError, naming `path`, if a regular expression is malformed, too long or takes too long.
    """
    longest = max(patterns, key=len)
    if len(longest) > MAX_PATTERN_LENGTH:
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
            f"{path} has a regular expression that takes too long",
            got=f"{short_repr(longest)} after {PATTERN_SECONDS:g} s",
            fix="name the layers in full",
        ) from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it failed"])[-1][:200]
        raise AdapterError(
            f"{path} has a malformed regular expression", got=f"{short_repr(longest)}: {reason}", fix="name the layers"
        )
    found: list[list[str]] = json.loads(done.stdout)
    return found


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value != "all-linear"


def _is_unknown(field: str, value: Any) -> bool:
    """Whether a field is set, and neither used nor ignored here."""
    empty: Collection[Any] = (None, False, 0, "", [], {}, DEFAULTS.get(field))
    return field not in USED_FIELDS and field not in IGNORED_FIELDS and value not in empty
