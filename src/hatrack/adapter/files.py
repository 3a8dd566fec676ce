"""Saves and loads adapters: plain peft folders with hatrack.json beside them, checked both ways.

Knows nothing of training.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from hatrack.adapter.hatfile import HATRACK_JSON, HatFile, model_card, read_hat_file, read_object
from hatrack.adapter.place import START, head_modules, heads_of, keep_head_in_float32
from hatrack.base.header import read_file_header
from hatrack.errors import AdapterError, BaseError
from hatrack.storage import new_folder, write_file

CONFIG, WEIGHTS, PICKLE, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` of adapters that belong on the base as it is; others changed the base's weights first."""


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
    placed = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
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
        if set(saved) != set(placed):
            wrong = sorted(set(saved) ^ set(placed))
            raise AdapterError(
                "what would be saved is not what was placed", got=", ".join(wrong[:5]), fix="please report it"
            )
        write_file(working / HATRACK_JSON, hat.to_json())
        write_file(working / CARD, model_card(hat, config))
        for file, content in (extra_files or {}).items():
            write_file(working / file, content)


def read_adapter(folder: Path) -> AdapterFiles:
    """Reads and checks everything but the numbers. Nothing is allocated for a file that lies about itself.

    Raises AdapterError, naming the file, for whatever is missing, damaged or not LoRA.
    """
    if not folder.is_dir():
        raise AdapterError(
            "there is no such adapter folder", got=folder, fix="hatrack list shows the adapters there are"
        )
    config = read_object(folder / CONFIG)
    path = folder / CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"{path} is not of a LoRA adapter", got=f"peft_type {kind!r}", fix="hatrack loads LoRA and its variants"
        )
    wrong = [
        f"{field} {config.get(field)!r}"
        for field, kinds in _CONFIG_KINDS.items()
        if not isinstance(config.get(field), kinds)
    ]
    if wrong or isinstance(config["r"], bool) or config["r"] < 1:
        raise AdapterError(
            f"{path} is malformed", got=", ".join(wrong) or f"r {config['r']!r}", fix="copy the adapter again"
        )
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        raise AdapterError(
            f"{path} belongs on a base whose weights were changed first",
            got=f"init_lora_weights {config['init_lora_weights']!r}",
            fix="convert it with peft's path_initial_model_for_weight_conversion",
        )
    _check_weights_file(folder)
    try:
        header = read_file_header(folder / WEIGHTS)
    except BaseError as error:
        raise AdapterError(
            f"{folder / WEIGHTS} is damaged or no safetensors file", got=error.got, fix="copy the adapter again"
        ) from error
    if not header:
        raise AdapterError(f"{folder / WEIGHTS} holds no tensors", got="0 tensors", fix="train it again")
    shapes = {name: info.shape for name, info in header.items()}
    return AdapterFiles(folder, config, read_hat_file(folder), shapes)


def attach(model: Any, folder: Path, name: str, *, layer_classes: Mapping[type, Any] | None = None) -> PeftModel:
    """Puts a saved adapter on a bare base, or beside those a wrapped one already has. It is frozen, for use only.

    Its head takes the shapes the file has, whatever the base's own. Raises AdapterError, with everything that does not
    fit at once, and leaves the model as it was.
    """
    files = read_adapter(folder)
    config = _lora_config(files)
    config._register_custom_module(dict(layer_classes or {}))
    if config.task_type == "SEQ_CLS":
        _check_head(model, files)
    wrapped = isinstance(model, PeftModel)
    if wrapped and name in model.peft_config:
        raise AdapterError("an adapter of that name is attached already", got=name, fix="give it another name")
    try:
        if wrapped:
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
        _fill(model, files, name)
    except (AdapterError, ValueError, TypeError, KeyError, RuntimeError) as error:
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


_CONFIG_KINDS: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "target_modules": (list, str),
    "task_type": (str, type(None)),
    "modules_to_save": (list, type(None)),
}


def _check_weights_file(folder: Path) -> None:
    if (folder / WEIGHTS).is_file():
        return
    if (folder / PICKLE).is_file():
        raise AdapterError(
            f"{folder / PICKLE} is a pickle, which can run code when it is opened",
            fix="ask for safetensors, or convert it with torch.load(weights_only=True) and safetensors.torch.save_file",
        )
    raise AdapterError(
        f"{folder} has no {WEIGHTS}",
        got=", ".join(sorted(p.name for p in folder.iterdir())),
        fix="copy the adapter again",
    )


def _lora_config(files: AdapterFiles) -> LoraConfig:
    """peft's config from the file, with the fields this version of peft knows and none that names code to run."""
    known = set(LoraConfig.__dataclass_fields__) - {
        "auto_mapping",
        "megatron_config",
        "megatron_core",
        "runtime_config",
    }
    try:
        config = LoraConfig(
            **{key: value for key, value in files.config.items() if key in known and key != "peft_type"}
        )
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{files.folder / CONFIG} is malformed", got=error, fix="copy the adapter again") from error
    config.inference_mode = True
    config.init_lora_weights = True
    config.base_model_name_or_path = None  # peft takes the name of the base it is put on, and warns of another one
    config.modules_to_save = sorted(set(config.modules_to_save)) if config.modules_to_save else None
    return config


def _check_head(model: Any, files: AdapterFiles) -> None:
    """A classifier's adapter needs a base with a classification head, and one of the same kind."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    if "ForSequenceClassification" not in type(bare).__name__:
        raise AdapterError(
            f"{files.folder} is a classifier's adapter",
            got=f"a base loaded as {type(bare).__name__}",
            fix="load the base to classify",
        )
    if not any(f".{head}." in name for head in head_modules(bare) for name in files.shapes):
        raise AdapterError(
            f"{files.folder / WEIGHTS} has no classification head",
            got=f"no {' or '.join(head_modules(bare))}",
            fix="train it with a task type",
        )


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
    if not problems:
        tensors = load_file(files.weights)
        problems = [
            f"{key}: holds numbers that are not finite"
            for key, tensor in tensors.items()
            if not tensor.isfinite().all()
        ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        count = f"{len(problems)} tensors do" if len(problems) > 1 else "a tensor does"
        raise AdapterError(f"{count} not fit in {files.weights}: {shown}", fix="give it the base it was trained on")
    set_peft_model_state_dict(model, tensors, adapter_name=name)


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
