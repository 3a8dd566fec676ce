"""Attaches saved adapters to a base and detaches them.

An adapter's own embeddings, output head and biases are copies that only it uses: the base never changes.
"""

import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
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
from hatrack.adapter.config import lora_config
from hatrack.adapter.files import AdapterFiles, read_adapter
from hatrack.adapter.mismatch import GIVE_ITS_BASE, PREFIX, Mismatches
from hatrack.adapter.place import head_modules, keep_head_in_float32, saved_copies
from hatrack.adapter.targets import matches
from hatrack.errors import AdapterError
from hatrack.recipe import flag
from hatrack.upstream.peft import convert_names, use_layers

NAME_IN_MODEL = re.compile(r"[A-Za-z0-9_-]{1,140}")
"""An adapter's name becomes part of parameter names, where peft allows no dots."""
COPIES = re.compile(r"\.(original_module|modules_to_save)\.")
"""In the names of second copies of tensors, which some ways to save with peft leave in the file."""


def attach(model: Any, folder: Path, name: str, *, layer_classes: Mapping[type, Any] | None = None) -> PeftModel:
    """Attaches a saved adapter, frozen, to a bare base or to one that has adapters already; returns the wrapped model.

    `name`: letters, digits, `_` and `-`. `layer_classes`: class of a layer -> adapted layer to use in place of peft's.
    A classifier's head gets the shapes in the file. Raises AdapterError with everything that does not fit, and leaves
    the model as it was.
    """
    files = read_adapter(folder)
    _check_name(model, name)
    _check_kind(model, files)
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = base_modules(bare)
    _check_vocabulary(bare, modules, files)
    names = [*modules, *(f"{full}.{part}" for full, module in modules.items() for part in _parameters(module))]
    config = lora_config(folder / CONFIG, files.config, names)
    use_layers(config, layer_classes or {})
    _check_ranks(files, config)
    _check_saved_modules(modules, files, config)
    wrapped = isinstance(model, PeftModel)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns of is refused below, or harmless
            if wrapped:
                model.add_adapter(name, config, low_cpu_mem_usage=True)
            else:
                model = get_peft_model(model, config, adapter_name=name, low_cpu_mem_usage=True)
            _load_tensors(model, modules, files, name)
    except (AdapterError, ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError) as error:
        _detach_failed(model, name, wrapped)
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            f"{folder} does not fit this base",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            fix=f"load it by itself, not beside other adapters; else {GIVE_ITS_BASE}" if wrapped else GIVE_ITS_BASE,
        ) from error
    for full, parameter in model.named_parameters():
        if f".{name}." in f"{full}.":
            parameter.requires_grad_(False)
    model.eval()
    return model


def name_in_model(name: str) -> str:
    """An adapter's name inside a model, where it is a key of torch's containers and a part of parameter names: no
    attribute of a container (`train`, `pop`), no dots, no part or ending of the base's names. One to one.

    >>> name_in_model("train"), name_in_model("tickets-v1.5")
    ('hat-train-', 'hat-tickets--v1-_5-')
    """
    return f"hat-{name.replace('-', '--').replace('.', '-_')}-"


def detach(model: Any, name: str) -> Any:
    """Removes an adapter and its head; returns the model without it: the bare base after the last adapter."""
    if set(model.peft_config) != {name}:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # another adapter is in use now
            model.delete_adapter(name)
        return model
    for full, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # peft would leave the adapter's head there
            parent, _, leaf = full.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.original_module)
    return model.unload()


def _check_name(model: Any, name: str) -> None:
    """Raises AdapterError for a name that is invalid, taken, or part of the base's names."""
    if not NAME_IN_MODEL.fullmatch(name):
        raise AdapterError("invalid adapter name", got=repr(name), fix="use letters, digits, '_' and '-'")
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise AdapterError("an adapter of that name is attached already", got=name, fix="give it another name")
    if _is_part_of(model, name):
        raise AdapterError("an adapter cannot be named like a part of its base", got=name, fix="give it another name")


def _is_part_of(model: Any, name: str) -> bool:
    """Whether `name` is a whole part of a parameter's name, the base's or peft's own."""
    pefts = {"base_model", "lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save", "original_module"}
    parts = {part for full, _ in model.named_parameters() for part in full.split(".")}
    attached = set(model.peft_config) if isinstance(model, PeftModel) else set()
    return name in (parts | pefts | {"base_layer"}) - attached


def _check_kind(model: Any, files: AdapterFiles) -> None:
    """Raises AdapterError for a classifier's adapter on a generator, the reverse, or a classifier's without a head."""
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
    """Full name -> the base's own module, without what adapters added around or beside it."""
    pefts = {"base_layer", "modules_to_save", "original_module", "token_adapter"}
    found: dict[str, nn.Module] = {}
    for full, module in bare.named_modules():
        parts = full.split(".")
        if full and not pefts & set(parts) and not any(part.startswith("lora_") for part in parts):
            found[full] = _unwrap(module)
    return found


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of a module itself, without those of its children."""
    return dict(module.named_parameters(recurse=False))


def _unwrap(module: Any) -> nn.Module:
    """The base's own module inside the wrappers of adapters."""
    while (inner := getattr(module, "original_module", getattr(module, "base_layer", None))) is not None:
        module = inner
    return module  # type: ignore[no-any-return]


def _check_vocabulary(bare: Any, modules: Mapping[str, nn.Module], files: AdapterFiles) -> None:
    """Raises AdapterError where embeddings or output head in the file have other numbers of rows than the base."""
    tables = [table for table in (bare.get_input_embeddings(), bare.get_output_embeddings()) if table is not None]
    bases: dict[str, Any] = {
        full: module for full, module in modules.items() if any(module is _unwrap(table) for table in tables)
    }
    for full, module in bases.items():
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
        vocabulary = f"{other:,} tokens" if other is not None else f"at least {largest + 1:,} tokens"
        raise AdapterError(
            f"{files.folder} was trained on a vocabulary of {vocabulary}, and this base has {rows:,}",
            got=f"{full} of {vocabulary}" if other is not None else f"row {largest:,} in {CONFIG}",
            fix=f"give the base with the resized vocabulary with {flag('base')}, as model.resize_token_embeddings made"
            " it; an adapter whose embeddings were not trained can be saved with save_embedding_layers=False",
            gotcha="vocabulary-resized",
        )


def _check_ranks(files: AdapterFiles, config: LoraConfig) -> None:
    """Raises AdapterError where the config has larger ranks than the file, which peft would allocate."""
    pairs = (shape for name, shape in files.shapes.items() if ".lora_A" in name or ".lora_embedding_A" in name)
    largest = max((shape[0] for shape in pairs if shape), default=0)
    configured = max([config.r, *config.rank_pattern.values()])
    if configured > largest:
        raise AdapterError(
            f"{files.folder / CONFIG} asks for a larger rank than {files.weights.name} has",
            got=f"{configured} and {largest}",
            fix="copy the adapter again",
        )


def _check_saved_modules(modules: Mapping[str, nn.Module], files: AdapterFiles, config: LoraConfig) -> None:
    """Raises AdapterError where the file lacks a tensor of a module in `modules_to_save`."""
    mismatches = Mismatches(files, modules)
    for target in (config.modules_to_save or []) if not config.ensure_weight_tying else []:
        for full, module in modules.items():
            if matches(full, target):
                keys = [f"{PREFIX}{full}.{part}" for part, _ in module.named_parameters()]
                mismatches.missing += [key for key in keys if key not in files.shapes]
    mismatches.refuse()


def _load_tensors(model: Any, modules: Mapping[str, nn.Module], files: AdapterFiles, name: str) -> None:
    """Loads the file's tensors, once each of them has a place in the model and each place a tensor."""
    if files.config["task_type"] == "SEQ_CLS":
        for full, head in saved_copies(model, name).items():
            _resize_head(head, full, files.shapes)
    keep_head_in_float32(model, name)
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = _read_tensors(files, str(model.device))
    # transformers joins the experts of some models into one tensor: so must the adapter's
    tensors = convert_names(model, model.peft_config[name], tensors, name)
    mismatches = Mismatches(files, modules)
    copies = _own_copies(tensors, expected, mismatches)
    mismatches.missing = [key for key in expected if key not in tensors]
    mismatches.shapes |= {
        key: tuple(place.shape)
        for key, place in expected.items()
        if key in tensors and tensors[key].shape != place.shape
    }
    mismatches.not_finite = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    mismatches.refuse()
    placed = {key: tensors[key].to(place.dtype) for key, place in expected.items()}
    set_peft_model_state_dict(model, placed, adapter_name=name, low_cpu_mem_usage=True)
    for full, parameters in copies.items():
        _give_own_copy(model, name, full, parameters)
    tokens = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    if any(isinstance(module.base_layer, ModulesToSaveWrapper) for module in tokens):
        raise ValueError("one adapter trains rows of an embedding that another has a copy of")


def _own_copies(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], mismatches: Mismatches
) -> dict[str, dict[str, nn.Parameter]]:
    """Module -> its parameters that differ from the base's, where the file has some besides the `expected` tensors.

    What does not fit the base is noted in `mismatches`.
    """
    copies: dict[str, dict[str, nn.Parameter]] = {}
    for key in [key for key in tensors if key not in expected and COPIES.sub(".", key) not in expected]:
        full, _, part = re.sub(r"(\.token_adapter)?\.base_layer\.", ".", key.removeprefix(PREFIX)).rpartition(".")
        bases = _parameters(mismatches.modules[full]).get(part) if full in mismatches.modules else None
        if bases is None:
            mismatches.unexpected.append(key)
        elif bases.shape != tensors[key].shape:
            mismatches.shapes[key] = tuple(bases.shape)
        elif torch.equal(tensors[key].to(bases), bases):
            continue
        elif ".token_adapter." in key:
            mismatches.unlike_base.append(key)
        else:
            copies.setdefault(full, {})[part] = nn.Parameter(tensors[key].to(bases), requires_grad=False)
    return copies


def _read_tensors(files: AdapterFiles, device: str) -> dict[str, torch.Tensor]:
    """The file's tensors by peft's names."""
    try:
        with safe_open(files.weights, framework="pt", device=device) as file:
            return {name: file.get_tensor(stored) for name, stored in files.names.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{files.weights} is damaged or not a safetensors file", got=str(error)[:200], fix="copy the adapter again"
        ) from error


def _give_own_copy(model: Any, name: str, full: str, parameters: Mapping[str, nn.Parameter]) -> None:
    """Gives an adapter its own copy of one of the base's modules, with `parameters` in place of the base's."""
    parent, _, attribute = full.rpartition(".")
    bare = model.get_base_model()
    holder, module = bare.get_submodule(parent), bare.get_submodule(full)
    module = getattr(module, "token_adapter", module)
    while isinstance(module, BaseTunerLayer):
        holder, attribute, module = module, "base_layer", module.base_layer
    if isinstance(module, ModulesToSaveWrapper):
        module.update(name)
    else:
        module = ModulesToSaveWrapper(module, name)
        setattr(holder, attribute, module)
        if name not in model.active_adapters:
            module.set_adapter([])
    copied = module.modules_to_save[name]
    for part, parameter in {**_parameters(module.original_module), **parameters}.items():
        setattr(copied, part, parameter)  # the base's own tensors are shared, not copied


def _resize_head(head: nn.Module, full: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Gives the adapter's copy of a head as many outputs as the file has; other differences are found later."""
    for part, module in head.named_modules():
        if isinstance(module, nn.Linear):
            shape = shapes.get(".".join(filter(None, (full, part, "weight"))))
            if shape is None or len(shape) != 2 or shape[1] != module.in_features or shape[0] == module.out_features:
                continue
            device, dtype = module.weight.device, module.weight.dtype
            fresh = nn.Linear(shape[1], shape[0], bias=module.bias is not None, device=device, dtype=dtype)
            module.weight, module.bias, module.out_features = fresh.weight, fresh.bias, shape[0]


def _detach_failed(model: Any, name: str, wrapped: bool) -> None:
    """Removes what a failed `attach` had added."""
    with suppress(ValueError, KeyError, AttributeError):
        if wrapped or isinstance(model, PeftModel):
            detach(model, name)
