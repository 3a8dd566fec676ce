"""Puts saved adapters on a base and takes them off again. What an adapter brings of the base itself (embeddings, output
heads, biases) is a copy that only it uses: the base never changes. Knows nothing of training.
"""

import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from hatrack.adapter.card import CONFIG
from hatrack.adapter.config import PEFT_ITSELF, lora_config
from hatrack.adapter.files import AdapterFiles, read_adapter
from hatrack.adapter.place import head_modules, keep_head_in_float32, saved_copies
from hatrack.errors import AdapterError
from hatrack.recipe import flag
from hatrack.upstream.peft import convert_names, use_layers

NAME = re.compile(r"[A-Za-z0-9_-]{1,140}")
"""What an adapter may be called inside a model: it becomes part of parameter names, where peft allows no dots."""
PREFIX = "base_model.model."
"""What peft puts before the base's own names."""
COPIES = re.compile(r"\.(original_module|modules_to_save)\.")
"""Second copies of what is saved under its own name, which some of peft's ways to save leave in the file."""
TRAINED_ON = "give it the base it was trained on"


def attach(model: Any, folder: Path, name: str, *, layer_classes: Mapping[type, Any] | None = None) -> PeftModel:
    """Puts a saved adapter on a bare base, or beside those a wrapped one already has. It is frozen, for use only.

    A classifier's head takes the shapes the file has, whatever the base's own. Raises AdapterError, with everything
    that does not fit at once, and leaves the model as it was.
    """
    files = read_adapter(folder)
    _check_name(model, name)
    _check_kind(model, files)
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    own = base_modules(bare)
    _check_vocabulary(bare, own, files)
    names = [
        *own,
        *(f"{full}.{part}" for full, module in own.items() for part, _ in module.named_parameters(recurse=False)),
    ]
    config = lora_config(folder / CONFIG, files.config, names)
    use_layers(config, layer_classes or {})
    _check_ranks(files, config)
    _check_saved_modules(own, files, config)
    wrapped = isinstance(model, PeftModel)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft would warn of is refused, or harmless
            if wrapped:
                model.add_adapter(name, config, low_cpu_mem_usage=True)
            else:
                model = get_peft_model(model, config, adapter_name=name, low_cpu_mem_usage=True)
            _fill(model, own, files, name)
    except (AdapterError, ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError) as error:
        _undo(model, name, wrapped)
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            f"{folder} does not fit this base",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            fix=f"load it by itself, not beside other adapters; else {TRAINED_ON}" if wrapped else TRAINED_ON,
        ) from error
    for full, parameter in model.named_parameters():
        if f".{name}." in f"{full}.":
            parameter.requires_grad_(False)
    model.eval()
    return model


def name_in_model(name: str) -> str:
    """What an adapter of this name is called inside a model, where it is a key of torch's containers and a part of
    parameter names: no attribute of a container (`train`, `pop`), no dot, and neither a part of the base's own names
    nor ending like one (peft compares endings). Each name has its own.

    >>> name_in_model("train"), name_in_model("tickets-v1.5")
    ('hat-train-', 'hat-tickets--v1-_5-')
    """
    return f"hat-{name.replace('-', '--').replace('.', '-_')}-"


def detach(model: Any, name: str) -> Any:
    """Takes an adapter and its head off, and gives the model to go on with: the bare base after the last adapter.

    The base's weights were never touched.
    """
    if set(model.peft_config) != {name}:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that another one is in use now
            model.delete_adapter(name)
        return model
    for full, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # peft would leave the adapter's head in its place
            parent, _, leaf = full.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.original_module)
    return model.unload()


def _check_name(model: Any, name: str) -> None:
    """A name is a name, free, and no part of the base's own: peft finds an adapter's parameters by it."""
    if not NAME.fullmatch(name):
        raise AdapterError("invalid adapter name", got=repr(name), fix="use letters, digits, '_' and '-'")
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise AdapterError("an adapter of that name is attached already", got=name, fix="give it another name")
    if is_part_of(model, name):
        raise AdapterError("an adapter cannot be named like a part of its base", got=name, fix="give it another name")


def is_part_of(model: Any, name: str) -> bool:
    """Whether `name` stands between the dots of a parameter's name, the base's or peft's own."""
    taken = {"base_model", "lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save", "original_module"}
    parts = {part for full, _ in model.named_parameters() for part in full.split(".")}
    attached = set(model.peft_config) if isinstance(model, PeftModel) else set()
    return name in (parts | taken | {"base_layer"}) - attached


def _check_kind(model: Any, files: AdapterFiles) -> None:
    """A classifier's adapter needs a base with a classification head, and one of the same kind; others a generator."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    kind, loaded = files.config.get("task_type"), f"a base loaded as {type(bare).__name__}"
    classifies = "ForSequenceClassification" in type(bare).__name__
    if kind == "SEQ_CLS" and not classifies:
        raise AdapterError(f"{files.folder} is a classifier's adapter", got=loaded, fix="load the base to classify")
    if kind in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(bare, "prepare_inputs_for_generation"):
        raise AdapterError(f"{files.folder} is a generator's adapter", got=loaded, fix="load the base to generate")
    if kind == "SEQ_CLS" and not any(f".{head}." in name for head in head_modules(bare) for name in files.shapes):
        raise AdapterError(
            f"{files.weights} has no classification head",
            got=f"no {' or '.join(head_modules(bare))}",
            fix="train it with a task type",
        )


def base_modules(bare: Any) -> dict[str, nn.Module]:
    """Full name -> module as the base has it, whatever adapters have put round or beside it."""
    theirs = {"base_layer", "modules_to_save", "original_module", "token_adapter"}
    found: dict[str, nn.Module] = {}
    for full, module in bare.named_modules():
        parts = full.split(".")
        if full and not theirs & set(parts) and not any(part.startswith("lora_") for part in parts):
            found[full] = _unwrapped(module)
    return found


def _unwrapped(module: Any) -> nn.Module:
    """The base's own module within what adapters have put round it."""
    while (inner := getattr(module, "original_module", getattr(module, "base_layer", None))) is not None:
        module = inner
    return module  # type: ignore[no-any-return]


def _check_vocabulary(bare: Any, own: Mapping[str, nn.Module], files: AdapterFiles) -> None:
    """The rows of embeddings and output head in the file are as many as the base has."""
    tables = [table for table in (bare.get_input_embeddings(), bare.get_output_embeddings()) if table is not None]
    names: dict[str, Any] = {
        full: module for full, module in own.items() if any(module is _unwrapped(table) for table in tables)
    }
    for full, module in names.items():
        rows, width = module.weight.shape[:2]
        start = f"{PREFIX}{full}."
        whole = (files.shapes.get(start + "weight"), files.shapes.get(start + "base_layer.weight"))
        found = {shape[0] for shape in whole if shape is not None and shape[1:] == (width,)}
        found |= {shape[1] for shape in (files.shapes.get(start + "lora_embedding_A"),) if shape and len(shape) == 2}
        found |= {shape[0] for shape in (files.shapes.get(start + "lora_B.weight"),) if shape} if not found else set()
        indices = files.config.get("trainable_token_indices") or []
        several = indices.values() if isinstance(indices, dict) else [indices]
        largest = max((index for ids in several for index in ids), default=-1)
        other = next((count for count in sorted(found) if count != rows), None)
        if other is None and largest < rows:
            continue
        told = f"{other:,} tokens" if other is not None else f"at least {largest + 1:,} tokens"
        raise AdapterError(
            f"{files.folder} was trained on a vocabulary of {told}, and this base has {rows:,}",
            got=f"{full} of {told.removeprefix('at ')}" if other is not None else f"row {largest:,} in {CONFIG}",
            fix=f"give the base with the resized vocabulary with {flag('base')}, as model.resize_token_embeddings made"
            " it; an adapter whose embeddings were not trained can be saved with save_embedding_layers=False",
            gotcha="vocabulary-resized",
        )


def _check_ranks(files: AdapterFiles, config: LoraConfig) -> None:
    """No rank is larger than the file's own, before peft makes matrices of that size."""
    pairs = (shape for name, shape in files.shapes.items() if ".lora_A" in name or ".lora_embedding_A" in name)
    largest = max((shape[0] for shape in pairs if shape), default=0)
    asked = max([config.r, *config.rank_pattern.values()])
    if asked > largest:
        raise AdapterError(
            f"{files.folder / CONFIG} asks for a larger rank than {files.weights.name} has",
            got=f"{asked} and {largest}",
            fix="copy the adapter again",
        )


def _check_saved_modules(own: Mapping[str, nn.Module], files: AdapterFiles, config: LoraConfig) -> None:
    """A module is copied for an adapter only where the file has every tensor of that copy."""
    misfit = Misfit(files, own)
    for leaf in (config.modules_to_save or []) if not config.ensure_weight_tying else []:
        for full, module in own.items():
            if full == leaf or full.endswith(f".{leaf}"):
                keys = [f"{PREFIX}{full}.{part}" for part, _ in module.named_parameters()]
                misfit.missing += [key for key in keys if key not in files.shapes]
    misfit.refuse()


def _fill(model: Any, own: Mapping[str, nn.Module], files: AdapterFiles, name: str) -> None:
    """Loads the numbers, once every one of them is known to have a place and every place a number."""
    if files.config["task_type"] == "SEQ_CLS":
        for full, head in saved_copies(model, name).items():
            _shape_head(head, full, files.shapes)
    keep_head_in_float32(model, name)
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = _read(files, str(model.device))
    # experts that transformers joins are joined here too
    tensors = convert_names(model, model.peft_config[name], tensors, name)
    misfit = Misfit(files, own)
    brought: dict[str, dict[str, nn.Parameter]] = {}
    for key in [key for key in tensors if key not in expected and COPIES.sub(".", key) not in expected]:
        full, _, part = re.sub(r"(\.token_adapter)?\.base_layer\.", ".", key.removeprefix(PREFIX)).rpartition(".")
        theirs = dict(own[full].named_parameters(recurse=False)).get(part) if full in own else None
        if theirs is None:
            misfit.homeless.append(key)
        elif theirs.shape != tensors[key].shape:
            misfit.shapes[key] = tuple(theirs.shape)
        elif torch.equal(tensors[key].to(theirs), theirs):
            continue
        elif ".token_adapter." in key:
            misfit.other_numbers.append(key)
        else:
            brought.setdefault(full, {})[part] = nn.Parameter(tensors[key].to(theirs), requires_grad=False)
    misfit.missing = [key for key in expected if key not in tensors]
    misfit.shapes |= {
        key: tuple(place.shape)
        for key, place in expected.items()
        if key in tensors and tensors[key].shape != place.shape
    }
    misfit.not_finite = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    misfit.refuse()
    placed = {key: tensors[key].to(place.dtype) for key, place in expected.items()}
    set_peft_model_state_dict(model, placed, adapter_name=name, low_cpu_mem_usage=True)
    for full, parts in brought.items():
        _bring(model, name, full, parts)
    tokens = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    if any(isinstance(module.base_layer, ModulesToSaveWrapper) for module in tokens):
        raise ValueError("one adapter trains rows of an embedding that another has a copy of")


def _read(files: AdapterFiles, device: str) -> dict[str, torch.Tensor]:
    """The file's tensors under the names that peft gives them."""
    try:
        with safe_open(files.weights, framework="pt", device=device) as file:
            return {name: file.get_tensor(stored) for name, stored in files.names.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{files.weights} is damaged or no safetensors file", got=str(error)[:200], fix="copy the adapter again"
        ) from error


def _bring(model: Any, name: str, full: str, parts: Mapping[str, nn.Parameter]) -> None:
    """Gives an adapter its own copy of one of the base's modules, with these parameters in place of the base's."""
    parent, _, leaf = full.rpartition(".")
    bare = model.get_base_model()
    holder, module = bare.get_submodule(parent), bare.get_submodule(full)
    module = getattr(module, "token_adapter", module)
    while isinstance(module, BaseTunerLayer):
        holder, leaf, module = module, "base_layer", module.base_layer
    if isinstance(module, ModulesToSaveWrapper):
        module.update(name)
    else:
        module = ModulesToSaveWrapper(module, name)
        setattr(holder, leaf, module)
        if name not in model.active_adapters:
            module.set_adapter([])
    copied = module.modules_to_save[name]
    shared = dict(module.original_module.named_parameters(recurse=False))  # what it does not bring is the base's
    for part, weight in (shared | dict(parts)).items():
        setattr(copied, part, weight)


@dataclass
class Misfit:
    """What does not fit of an adapter on a base, by the names of its tensors: `missing` in the file, `homeless` in the
    model, of other `shapes` than the model's, of `other_numbers` than the base's where it cannot have its own,
    `not_finite`."""

    files: AdapterFiles
    own: Mapping[str, nn.Module]
    missing: list[str] = field(default_factory=list)
    homeless: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    other_numbers: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)

    def refuse(self) -> None:
        """Raises AdapterError with everything that does not fit, if anything does not, and what it comes from."""
        problems = [f"{key}: missing from the file" for key in self.missing]
        problems += [f"{key}: no place in the model" for key in self.homeless]
        problems += [f"{key}: file {self.files.shapes.get(key)}, model {shape}" for key, shape in self.shapes.items()]
        problems += [f"{key}: other numbers than the base's" for key in self.other_numbers]
        problems += [f"{key}: holds numbers that are not finite" for key in self.not_finite]
        if not problems:
            return
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        count = f"{len(problems)} tensors do" if len(problems) > 1 else "a tensor does"
        raise AdapterError(f"{count} not fit in {self.files.weights}", got=shown, fix=self._fix())

    def _fix(self) -> str:
        unnamed = {_module_of(key) for key in self.homeless} & set(self.own)
        if self.shapes or self.other_numbers or set(map(_module_of, self.homeless)) - unnamed - _experts(self.homeless):
            return TRAINED_ON
        if _experts(self.homeless):
            return f"this version of transformers joins a layer's experts; {PEFT_ITSELF}, as it was when it was trained"
        if unnamed:
            leaves = sorted({full.rpartition(".")[2] for full in unnamed})
            return f"name these layers in target_modules of {CONFIG}: {', '.join(leaves[:8])}"
        if self.missing and min(map(_layer_of, self.missing)) > max(map(_layer_of, self.files.shapes)):
            return TRAINED_ON  # it has more layers
        if self.not_finite and not self.missing:
            return f"copy the adapter again, or train it again with a lower {flag('lr')}"
        return "copy the adapter again: its file is not whole"


def _module_of(key: str) -> str:
    """The base's module that a tensor of an adapter belongs to."""
    return re.sub(r"\.(lora_.*|token_adapter\..*|base_layer\..*|[^.]+)$", "", key.removeprefix(PREFIX))


def _experts(keys: list[str]) -> set[str]:
    """The modules among those of `keys` that are single experts."""
    return {_module_of(key) for key in keys if re.search(r"\.experts\.\d+\.", key)}


def _layer_of(key: str) -> int:
    """The number of the layer that a tensor is in; -1 outside of all."""
    number = re.search(r"\.(\d+)\.", key)
    return int(number[1]) if number else -1


def _shape_head(head: nn.Module, full: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Gives the adapter's copy of a head the output size its file has; other differences are found later."""
    for part, module in head.named_modules():
        if isinstance(module, nn.Linear):
            found = shapes.get(".".join(piece for piece in (full, part, "weight") if piece))
            if (
                found is not None
                and len(found) == 2
                and found[1] == module.in_features
                and found[0] != module.out_features
            ):
                device, dtype = module.weight.device, module.weight.dtype
                fresh = nn.Linear(found[1], found[0], bias=module.bias is not None, device=device, dtype=dtype)
                module.weight, module.bias, module.out_features = fresh.weight, fresh.bias, found[0]


def _undo(model: Any, name: str, wrapped: bool) -> None:
    """Takes off whatever a failed attach had put on."""
    with suppress(ValueError, KeyError, AttributeError):
        if wrapped or isinstance(model, PeftModel):
            detach(model, name)
