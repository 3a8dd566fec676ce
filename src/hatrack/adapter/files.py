"""Saves and loads adapters: plain peft folders with hatrack.json beside them, checked both ways.

Knows nothing of training.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hatrack.adapter.config import CONFIG, check_config, lora_config
from hatrack.adapter.hatfile import HATRACK_JSON, HatFile, model_card, read_hat_file, read_object
from hatrack.adapter.place import START, head_modules, heads_of, keep_head_in_float32
from hatrack.base.header import read_file_header
from hatrack.errors import AdapterError, BaseError
from hatrack.first_bytes import PICKLE as PICKLED
from hatrack.first_bytes import SAFETENSORS, other_kind
from hatrack.storage import new_folder, write_file

WEIGHTS, PICKLE, CARD = "adapter_model.safetensors", "adapter_model.bin", "README.md"
NAME = re.compile(r"[A-Za-z0-9_-]{1,140}")
"""What an adapter may be called inside a model: it becomes part of parameter names, where peft allows no dots."""
LARGEST_HEADER = 16 * 2**20
"""Bytes: room for 100,000 tensors."""
FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class AdapterFiles:
    """A checked adapter folder: peft's config, hatrack.json if there is one, and each tensor's shape by name."""

    folder: Path
    config: dict[str, Any]
    hat: HatFile | None
    shapes: dict[str, tuple[int, ...]]

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.folder / WEIGHTS


def save_adapter(
    model: Any, folder: Path, hat: HatFile, *, base: str, extra_files: Mapping[str, bytes | str] | None = None
) -> None:
    """Writes the adapter in use as a folder: peft's two files, hatrack.json and a model card, all or nothing.

    `base` is what plain peft can load the base from: a hub id or a folder. Raises AdapterError where `folder` exists,
    or where a tensor that was placed would not be saved.
    """
    if folder.exists() and any(folder.iterdir()):
        raise AdapterError("the adapter's folder exists already", got=folder, fix="choose another one")
    name = model.active_adapter
    placed = placed_tensors(model, name)
    with new_folder(folder) as working:
        model.save_pretrained(working, selected_adapters=[name], save_embedding_layers=False)
        if name != "default":
            for path in (working / name).iterdir():
                path.rename(working / path.name)
            (working / name).rmdir()
        config = _tidy_config(working / CONFIG, base)
        if hasattr(model, START):
            config = _as_plain_lora(working, config, getattr(model, START))
        saved = read_file_header(working / WEIGHTS)
        if set(saved) != placed:
            wrong = sorted(set(saved) ^ placed)
            raise AdapterError(
                "what would be saved is not what was placed", got=", ".join(wrong[:5]), fix="please report it"
            )
        write_file(working / HATRACK_JSON, hat.to_json())
        write_file(working / CARD, model_card(hat, config))
        for file, content in (extra_files or {}).items():
            write_file(working / file, content)


def placed_tensors(model: Any, name: str) -> set[str]:
    """The names in a file of everything an adapter put into a model, by the model's own parameters, not by peft."""
    parameters = (full for full, _ in model.named_parameters() if f".{name}." in f"{full}.")
    ours = (full for full in parameters if ".lora_" in full or f".modules_to_save.{name}." in full)
    names = (full.replace(f".modules_to_save.{name}.", ".").replace(f".{name}", "") for full in ours)
    return {full.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector") for full in names}


def read_adapter(folder: Path) -> AdapterFiles:
    """Reads and checks everything but the numbers. Nothing is allocated for a file that lies about itself.

    Raises AdapterError, naming the file, for whatever is missing, damaged or not LoRA.
    """
    if not folder.is_dir():
        raise AdapterError(
            "there is no such adapter folder", got=folder, fix="hatrack list shows the adapters there are"
        )
    config, hat = read_object(folder / CONFIG), read_hat_file(folder)
    check_config(folder / CONFIG, config)
    if hat is not None and (hat.task == "classify") != (config.get("task_type") == "SEQ_CLS"):
        raise AdapterError(
            f"{folder / CONFIG} and {HATRACK_JSON} contradict each other",
            got=f"task_type {config.get('task_type')!r} and task {hat.task}",
            fix="copy the adapter again",
        )
    _check_weights_file(folder)
    try:
        header = read_file_header(folder / WEIGHTS, LARGEST_HEADER)
    except BaseError as error:
        raise other_kind(folder / WEIGHTS, SAFETENSORS, AdapterError) or AdapterError(
            f"{folder / WEIGHTS} is damaged or no safetensors file", got=error.got, fix="copy the adapter again"
        ) from error
    if not header:
        raise AdapterError(f"{folder / WEIGHTS} holds no tensors", got="0 tensors", fix="train it again")
    other = [f"{name} {info.dtype}" for name, info in header.items() if info.dtype not in FLOATS]
    if other:
        raise AdapterError(
            f"{folder / WEIGHTS} holds tensors that are no weights", got=", ".join(other[:5]), fix="copy it again"
        )
    shapes = {name: info.shape for name, info in header.items()}
    return AdapterFiles(folder, config, hat, shapes)


def attach(model: Any, folder: Path, name: str, *, layer_classes: Mapping[type, Any] | None = None) -> PeftModel:
    """Puts a saved adapter on a bare base, or beside those a wrapped one already has. It is frozen, for use only.

    Its head takes the shapes the file has, whatever the base's own. Raises AdapterError, with everything that does not
    fit at once, and leaves the model as it was.
    """
    files = read_adapter(folder)
    _check_name(model, name)
    _check_kind(model, files)
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    config = lora_config(folder / CONFIG, files.config, list(_own_modules(bare)))
    config._register_custom_module(dict(layer_classes or {}))
    _check_ranks(files, config)
    _check_saved_modules(bare, files, config)
    wrapped = isinstance(model, PeftModel)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft would warn of is refused, or harmless
            if wrapped:
                model.add_adapter(name, config, low_cpu_mem_usage=True)
            else:
                model = get_peft_model(model, config, adapter_name=name, low_cpu_mem_usage=True)
        _fill(model, files, name)
    except (AdapterError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        _undo(model, name, wrapped)
        if isinstance(error, AdapterError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(
            f"{folder} does not fit this base", got=reason, fix="give it the base it was trained on"
        ) from error
    keep_head_in_float32(model, name)
    for full, parameter in model.named_parameters():
        if f".{name}." in f"{full}.":
            parameter.requires_grad_(False)
    model.eval()
    return model


def name_inside(name: str) -> str:
    """What an adapter of this name is called inside a model, where it is a key of torch's containers and a part of
    parameter names: no attribute of a container (`train`, `pop`), no dot, and neither a part of the base's own names
    nor ending like one (peft compares endings). Each name has its own.

    >>> name_inside("train"), name_inside("tickets-v1.5")
    ('hat-train-', 'hat-tickets--v1-_5-')
    """
    return f"hat-{name.replace('-', '--').replace('.', '-_')}-"


def detach(model: Any, name: str) -> Any:
    """Takes an adapter and its head off, and gives the model to go on with: the bare base after the last adapter.

    The base's weights were never touched.
    """
    if set(model.peft_config) != {name}:
        model.delete_adapter(name)
        return model
    for full, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # peft would leave the adapter's head in its place
            parent, _, leaf = full.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.original_module)
    return model.unload()


def _check_weights_file(folder: Path) -> None:
    if (folder / WEIGHTS).is_file():
        return
    if (folder / PICKLE).is_file():
        raise other_kind(folder / PICKLE, PICKLED, AdapterError) or AdapterError(
            f"{folder / PICKLE} is a pickle, which can run code when it is opened",
            got=f"no {WEIGHTS}",
            fix="ask for safetensors, or convert it with torch.load(weights_only=True) and safetensors.torch.save_file",
        )
    raise AdapterError(
        f"{folder} has no {WEIGHTS}",
        got=", ".join(sorted(p.name for p in folder.iterdir())),
        fix="copy the adapter again",
    )


def _check_name(model: Any, name: str) -> None:
    """A name is a name, free, and no part of the base's own: peft finds an adapter's parameters by it."""
    if not NAME.fullmatch(name):
        raise AdapterError("that is no name for an adapter", got=repr(name), fix="letters, digits, '_' and '-'")
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
            f"{files.folder / WEIGHTS} has no classification head",
            got=f"no {' or '.join(head_modules(bare))}",
            fix="train it with a task type",
        )


def _own_modules(bare: Any) -> dict[str, nn.Module]:
    """Full name -> module as the base has it, whatever adapters have put round or beside it."""
    theirs = {"base_layer", "modules_to_save", "original_module"}
    found: dict[str, nn.Module] = {}
    for full, module in bare.named_modules():
        parts = full.split(".")
        if full and not theirs & set(parts) and not any(part.startswith("lora_") for part in parts):
            found[full] = getattr(module, "original_module", getattr(module, "base_layer", module))
    return found


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


def _check_saved_modules(bare: Any, files: AdapterFiles, config: LoraConfig) -> None:
    """A module is copied for an adapter only where the file has every tensor of that copy."""
    for leaf in config.modules_to_save or []:
        for full, module in _own_modules(bare).items():
            if full == leaf or full.endswith(f".{leaf}"):
                keys = (f"base_model.model.{full}.{part}" for part, _ in module.named_parameters())
                missing = [key for key in keys if key not in files.shapes]
                if missing:
                    raise _misfit(files, [f"{key}: missing from the file" for key in missing])


def _fill(model: Any, files: AdapterFiles, name: str) -> None:
    """Loads the numbers, once every one of them is known to have a place and every place a number."""
    for full, head in heads_of(model, name).items():
        _shape_head(head, full, files.shapes)
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    wanted = {key: tuple(tensor.shape) for key, tensor in expected.items()}
    problems = [f"{key}: missing from the file" for key in wanted if key not in files.shapes]
    problems += [f"{key}: no place in the model" for key in files.shapes if key not in wanted]
    problems += [
        f"{key}: file {files.shapes[key]}, model {shape}"
        for key, shape in wanted.items()
        if key in files.shapes and files.shapes[key] != shape
    ]
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(files.weights, framework="pt", device=str(model.device)) as file:
            tensors = {key: file.get_tensor(key) for key, shape in wanted.items() if files.shapes.get(key) == shape}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{files.weights} is damaged or no safetensors file", got=str(error)[:200], fix="copy the adapter again"
        ) from error
    problems += [
        f"{key}: holds numbers that are not finite" for key, tensor in tensors.items() if not tensor.isfinite().all()
    ]
    if problems:
        raise _misfit(files, problems)
    set_peft_model_state_dict(model, tensors, adapter_name=name, low_cpu_mem_usage=True)


def _misfit(files: AdapterFiles, problems: Sequence[str]) -> AdapterError:
    """Everything that does not fit, in one error."""
    shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
    count = f"{len(problems)} tensors do" if len(problems) > 1 else "a tensor does"
    return AdapterError(f"{count} not fit in {files.weights}", got=shown, fix="give it the base it was trained on")


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


def _as_plain_lora(folder: Path, config: dict[str, Any], start: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Turns a saved PiSSA adapter into plain LoRA for the original base.

    PiSSA (Meng et al. 2024, section 3) took s B0 A0 out of each weight before training. What it learned is therefore
    s (B A - B0 A0) = s [B, -B0] [A; A0]: LoRA of twice the rank, with twice the alpha so that s stays the same.
    """
    tensors = load_file(folder / WEIGHTS)
    for key, first in start.items():
        if ".lora_A." in key:
            tensors[key] = torch.cat([tensors[key], first.to(tensors[key])], dim=0)  # (2r, d_in)
        elif ".lora_B." in key:
            tensors[key] = torch.cat([tensors[key], -first.to(tensors[key])], dim=1)  # (d_out, 2r)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"], "init_lora_weights": True}
    write_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return config


def _tidy_config(path: Path, base: str) -> dict[str, Any]:
    """A config that says the same on every run: sorted names, a base that plain peft can load."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    for field in ("target_modules", "modules_to_save"):
        if isinstance(config.get(field), list):
            config[field] = sorted(set(config[field]))
    write_file(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return config
