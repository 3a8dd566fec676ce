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
from hatrack.adapter.place import cast_head_to_float32, head_modules, module_copies
from hatrack.adapter.targets import matches
from hatrack.errors import AdapterError
from hatrack.recipe import flag
from hatrack.upstream.peft import convert_names, use_layers

VALID_PEFT_NAME = re.compile(r"[A-Za-z0-9_-]{1,140}")
"""Names that peft takes: they become parts of parameter names, so dots are not allowed."""
DUPLICATE_PART = re.compile(r"\.(original_module|modules_to_save)\.")
"""Part of the names of duplicate tensors, which some ways of saving with peft leave in the file."""


def attach(model: Any, folder: Path, name: str, *, layer_classes: Mapping[type, Any] | None = None) -> PeftModel:
    """Attaches a saved adapter, frozen, to a base, with or without other adapters; returns the wrapped model.

    `name`: letters, digits, `_` and `-`. `layer_classes`: layer class -> adapted layer class to use in place of peft's.
    The classification head is resized to the number of labels in the file. If anything does not fit, the model stays
    unchanged and AdapterError lists it all.
    """
    files = read_adapter(folder)
    _check_name(model, name)
    _check_kind(model, files)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = base_modules(base)
    _check_vocabulary(base, modules, files)
    names = [*modules, *(f"{path}.{part}" for path, module in modules.items() for part in _parameters(module))]
    config = lora_config(folder / CONFIG, files.config, names)
    use_layers(config, layer_classes or {})
    _check_ranks(files, config)
    _check_saved_modules(modules, files, config)
    wrapped = isinstance(model, PeftModel)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns about is checked below, or harmless
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
    for path, parameter in model.named_parameters():
        if f".{name}." in f"{path}.":
            parameter.requires_grad_(False)
    model.eval()
    return model


def peft_adapter_name(name: str) -> str:
    """Escapes an adapter's name so that peft can use it as a module name; different names stay different.

    The result has no dots, and is never an attribute of a torch container (`train`, `pop`) or part of a parameter name.

    >>> peft_adapter_name("train"), peft_adapter_name("tickets-v1.5")
    ('hat-train-', 'hat-tickets--v1-_5-')
    """
    return f"hat-{name.replace('-', '--').replace('.', '-_')}-"


def detach(model: Any, name: str) -> Any:
    """Removes an adapter and its head. Returns the model without it, or the bare base if it was the last adapter."""
    if set(model.peft_config) != {name}:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns that it switches to another adapter
            model.delete_adapter(name)
        return model
    for path, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # peft would leave the adapter's head there
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.original_module)
    return model.unload()


def _check_name(model: Any, name: str) -> None:
    """Raises AdapterError if a name is invalid, taken, or collides with a module name of the base."""
    if not VALID_PEFT_NAME.fullmatch(name):
        raise AdapterError("invalid adapter name", got=repr(name), fix="use letters, digits, '_' and '-'")
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise AdapterError("an adapter of that name is attached already", got=name, fix="give it another name")
    if _is_part_of(model, name):
        raise AdapterError("the name collides with a module name of the base", got=name, fix="give it another name")


def _is_part_of(model: Any, name: str) -> bool:
    """Whether `name` is one of the dotted parts of a parameter name, the base's or peft's."""
    peft_parts = {"base_model", "lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save", "original_module"}
    parts = {part for path, _ in model.named_parameters() for part in path.split(".")}
    attached = set(model.peft_config) if isinstance(model, PeftModel) else set()
    return name in (parts | peft_parts | {"base_layer"}) - attached


def _check_kind(model: Any, files: AdapterFiles) -> None:
    """Raises AdapterError for a SEQ_CLS adapter on a generator, or without a head; or a CAUSAL_LM adapter on a
    classifier."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    task_type, loaded = files.config.get("task_type"), f"a base loaded as {type(base).__name__}"
    if task_type == "SEQ_CLS" and "ForSequenceClassification" not in type(base).__name__:
        raise AdapterError(f"{files.folder} is a classifier's adapter", got=loaded, fix="load the base to classify")
    if task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(base, "prepare_inputs_for_generation"):
        raise AdapterError(f"{files.folder} is a generator's adapter", got=loaded, fix="load the base to generate")
    heads = head_modules(base)
    if task_type == "SEQ_CLS" and not any(f".{head}." in name for head in heads for name in files.shapes):
        raise AdapterError(
            f"{files.weights} has no classification head",
            got=f"no {' or '.join(heads)}",
            fix="train it again with the head in modules_to_save",
        )


def base_modules(base: Any) -> dict[str, nn.Module]:
    """Full name -> module of the base, unwrapped; without the modules that adapters added."""
    peft_parts = {"base_layer", "modules_to_save", "original_module", "token_adapter"}
    modules: dict[str, nn.Module] = {}
    for path, module in base.named_modules():
        parts = path.split(".")
        if path and not peft_parts & set(parts) and not any(part.startswith("lora_") for part in parts):
            modules[path] = _unwrap(module)
    return modules


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of the module itself; those of its children are not included."""
    return dict(module.named_parameters(recurse=False))


def _unwrap(module: Any) -> nn.Module:
    """The base's module inside peft's wrappers."""
    while (inner := getattr(module, "original_module", getattr(module, "base_layer", None))) is not None:
        module = inner
    return module  # type: ignore[no-any-return]


def _check_vocabulary(base: Any, modules: Mapping[str, nn.Module], files: AdapterFiles) -> None:
    """Raises AdapterError if embeddings or the output head in the file have a different vocabulary size."""
    tables = (base.get_input_embeddings(), base.get_output_embeddings())
    embeddings = [_unwrap(table) for table in tables if table is not None]
    indices = files.config.get("trainable_token_indices") or []
    index_lists = indices.values() if isinstance(indices, dict) else [indices]
    largest_index = max((index for ids in index_lists for index in ids), default=-1)
    for path, module in modules.items():
        if not any(module is each for each in embeddings):
            continue
        weight: Any = module.weight
        size, width = weight.shape[:2]
        other_size = next((found for found in sorted(_vocabulary_sizes(path, width, files)) if found != size), None)
        if other_size is None and largest_index < size:
            continue
        vocabulary = f"{other_size:,} tokens" if other_size is not None else f"at least {largest_index + 1:,} tokens"
        raise AdapterError(
            f"{files.folder} was trained on a vocabulary of {vocabulary}, and this base has {size:,}",
            got=f"{path} of {vocabulary}" if other_size is not None else f"row {largest_index:,} in {CONFIG}",
            fix=f"use {flag('base')} with the folder of the base saved after model.resize_token_embeddings; if the "
            "embeddings were not trained, save the adapter again with save_embedding_layers=False instead",
            gotcha="vocabulary-resized",
        )


def _vocabulary_sizes(path: str, width: int, files: AdapterFiles) -> set[int]:
    """The vocabulary sizes in the file's tensors of one embedding or output head, `width` wide."""
    start = f"{PREFIX}{path}."
    weights = (files.shapes.get(start + "weight"), files.shapes.get(start + "base_layer.weight"))
    sizes = {shape[0] for shape in weights if shape is not None and shape[1:] == (width,)}
    sizes |= {shape[1] for shape in (files.shapes.get(start + "lora_embedding_A"),) if shape and len(shape) == 2}
    return sizes or {shape[0] for shape in (files.shapes.get(start + "lora_B.weight"),) if shape}


def _check_ranks(files: AdapterFiles, config: LoraConfig) -> None:
    """Raises AdapterError if the config has larger ranks than the file: peft would allocate them."""
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
    """Raises AdapterError if the file lacks a tensor of a module in `modules_to_save`."""
    mismatches = Mismatches(files, modules)
    for target in (config.modules_to_save or []) if not config.ensure_weight_tying else []:
        for path, module in modules.items():
            if matches(path, target):
                keys = [f"{PREFIX}{path}.{part}" for part, _ in module.named_parameters()]
                mismatches.missing += [key for key in keys if key not in files.shapes]
    mismatches.raise_if_any()


def _load_tensors(model: Any, modules: Mapping[str, nn.Module], files: AdapterFiles, name: str) -> None:
    """Loads the file's tensors, after checking that file and model have exactly the same tensors."""
    if files.config["task_type"] == "SEQ_CLS":
        for path, head in module_copies(model, name).items():
            _resize_head(head, path, files.shapes)
    cast_head_to_float32(model, name)
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = _read_tensors(files, str(model.device))
    # transformers joins the experts of some models into one tensor; join the adapter's in the same way
    tensors = convert_names(model, model.peft_config[name], tensors, name)
    mismatches = Mismatches(files, modules)
    copies = _own_copies(tensors, expected, mismatches)
    mismatches.missing = [key for key in expected if key not in tensors]
    mismatches.shapes |= {
        key: tuple(parameter.shape)
        for key, parameter in expected.items()
        if key in tensors and tensors[key].shape != parameter.shape
    }
    mismatches.not_finite = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    mismatches.raise_if_any()
    state = {key: tensors[key].to(parameter.dtype) for key, parameter in expected.items()}
    set_peft_model_state_dict(model, state, adapter_name=name, low_cpu_mem_usage=True)
    for path, parameters in copies.items():
        _give_own_copy(model, name, path, parameters)
    token_layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    if any(isinstance(layer.base_layer, ModulesToSaveWrapper) for layer in token_layers):
        # a ValueError: `attach` adds the adapter's folder and the fix
        raise ValueError("of two adapters, one trains single tokens of an embedding and the other all of it")


def _own_copies(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], mismatches: Mismatches
) -> dict[str, dict[str, nn.Parameter]]:
    """Finds parameters of the base for which the file has other values: module -> parameter name -> the file's values.

    Looks at the file's tensors that are not `expected`. Those that do not fit the base are added to `mismatches`.
    """
    copies: dict[str, dict[str, nn.Parameter]] = {}
    for key in [key for key in tensors if key not in expected and DUPLICATE_PART.sub(".", key) not in expected]:
        path, _, part = re.sub(r"(\.token_adapter)?\.base_layer\.", ".", key.removeprefix(PREFIX)).rpartition(".")
        base_parameter = _parameters(mismatches.modules[path]).get(part) if path in mismatches.modules else None
        if base_parameter is None:
            mismatches.unexpected.append(key)
        elif base_parameter.shape != tensors[key].shape:
            mismatches.shapes[key] = tuple(base_parameter.shape)
        elif torch.equal(tensors[key].to(base_parameter), base_parameter):
            continue
        elif ".token_adapter." in key:
            mismatches.unlike_base.append(key)
        else:
            copies.setdefault(path, {})[part] = nn.Parameter(tensors[key].to(base_parameter), requires_grad=False)
    return copies


def _read_tensors(files: AdapterFiles, device: str) -> dict[str, torch.Tensor]:
    """peft's name -> tensor, of all tensors in the file."""
    try:
        with safe_open(files.weights, framework="pt", device=device) as file:
            return {name: file.get_tensor(stored) for name, stored in files.names.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{files.weights} is damaged or not a safetensors file", got=str(error)[:200], fix="copy the adapter again"
        ) from error


def _give_own_copy(model: Any, name: str, path: str, parameters: Mapping[str, nn.Parameter]) -> None:
    """Gives an adapter its own copy of one of the base's modules, with `parameters` in place of the base's."""
    parent, _, attribute = path.rpartition(".")
    base = model.get_base_model()
    holder, module = base.get_submodule(parent), base.get_submodule(path)
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
        setattr(copied, part, parameter)  # the base's other tensors are shared, not copied


def _resize_head(head: nn.Module, path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Resizes the adapter's copy of a head to the number of outputs in the file; other mismatches are found later."""
    for part, module in head.named_modules():
        if isinstance(module, nn.Linear):
            shape = shapes.get(".".join(filter(None, (path, part, "weight"))))
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
