"""Saves adapters as plain peft folders with a hatrack.json, and reads and checks such folders."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hatrack.adapter.card import (
    CONFIG,
    HATRACK_JSON,
    AdapterCard,
    model_card,
    not_an_adapter,
    read_card,
    read_json_object,
)
from hatrack.adapter.config import check_config, plain_config
from hatrack.adapter.place import PISSA_START
from hatrack.base.header import read_file_header
from hatrack.console import say_once
from hatrack.errors import AdapterError, ModelError
from hatrack.file_kind import PICKLE, SAFETENSORS, wrong_kind_error
from hatrack.storage import new_folder, write_file

WEIGHTS, PICKLED_WEIGHTS, README = "adapter_model.safetensors", "adapter_model.bin", "README.md"
MAX_HEADER_BYTES = 16 * 2**20
"""Room for 100,000 tensors."""
FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class AdapterFiles:
    """A checked adapter folder. `config`: peft's; `card`: hatrack.json, if there is one; `shapes`: tensor shapes by
    peft's names; `names`: peft's name -> name in the file."""

    folder: Path
    config: dict[str, Any]
    card: AdapterCard | None
    shapes: dict[str, tuple[int, ...]]
    names: dict[str, str]

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.folder / WEIGHTS


def save_adapter(
    model: Any, folder: Path, card: AdapterCard, *, base: str, extra_files: Mapping[str, bytes | str] | None = None
) -> None:
    """Writes the adapter in use as a folder, all or nothing: peft's two files, hatrack.json, a model card.

    `base`: the base's name for other machines: a hub id, a `pypi:` name, or a path. `extra_files`: name -> content.
    Raises AdapterError if `folder` is not empty, or if a tensor of the adapter was not saved.
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
        config = _normalize_config(working / CONFIG, base)
        if hasattr(model, PISSA_START):
            config = _pissa_to_lora(working, config, getattr(model, PISSA_START))
        saved = read_file_header(working / WEIGHTS)
        if set(saved) != placed:
            wrong = sorted(set(saved) ^ placed)
            raise AdapterError(
                "the tensors saved are not those placed", got=", ".join(wrong[:5]), fix="please report it"
            )
        write_file(working / HATRACK_JSON, card.to_json())
        write_file(working / README, model_card(card, config))
        for file, content in (extra_files or {}).items():
            write_file(working / file, content)


def placed_tensors(model: Any, name: str) -> set[str]:
    """The names that an adapter's tensors get in its file, from the model's parameters, independently of peft."""
    paths = (path for path, _ in model.named_parameters() if f".{name}." in f"{path}.")
    saved = (path for path in paths if ".lora_" in path or f".modules_to_save.{name}." in path)
    names = (path.replace(f".modules_to_save.{name}.", ".").replace(f".{name}", "") for path in saved)
    return {path.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector") for path in names}


def read_adapter(folder: Path) -> AdapterFiles:
    """Reads and checks an adapter's folder: config, hatrack.json, and names, dtypes and shapes of the tensors, but no
    weights.

    Raises AdapterError, naming the file, for what is missing, damaged or not LoRA.
    """
    if not folder.exists():
        raise AdapterError(
            "there is no such adapter folder", got=folder, fix="hatrack list shows the adapters there are"
        )
    if not folder.is_dir() or not (folder / CONFIG).exists():
        raise not_an_adapter(folder)
    config, card = plain_config(read_json_object(folder / CONFIG)), read_card(folder)
    check_config(folder / CONFIG, config)
    if card is not None and (card.task == "classify") != (config.get("task_type") == "SEQ_CLS"):
        raise AdapterError(
            f"{folder / CONFIG} and {HATRACK_JSON} contradict each other",
            got=f"task_type {config.get('task_type')!r} and task {card.task}",
            fix="copy the adapter again",
        )
    _check_weights_file(folder)
    try:
        header = read_file_header(folder / WEIGHTS, MAX_HEADER_BYTES)
    except ModelError as error:
        raise wrong_kind_error(folder / WEIGHTS, SAFETENSORS, AdapterError) or AdapterError(
            f"{folder / WEIGHTS} is damaged or not a safetensors file", got=error.got, fix="copy the adapter again"
        ) from error
    if not header:
        raise AdapterError(f"{folder / WEIGHTS} holds no tensors", got="0 tensors", fix="train it again")
    not_float = [f"{name} {info.dtype}" for name, info in header.items() if info.dtype not in FLOATS]
    if not_float:
        raise AdapterError(
            f"{folder / WEIGHTS} holds tensors that are not floating-point",
            got=", ".join(not_float[:5]),
            fix="copy the adapter again",
        )
    names = _peft_names(folder / WEIGHTS, header)
    shapes = {name: header[stored].shape for name, stored in names.items()}
    return AdapterFiles(folder, config, card, shapes, names)


WRAPPER_NAMES = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^(module\.)+")
"""The parts that torch.compile, FSDP, checkpointing and DDP add to parameter names."""


def _peft_names(path: Path, stored: Iterable[str]) -> dict[str, str]:
    """peft's name -> name in the file, which may have parts that a trainer added."""
    by_stored = {name: WRAPPER_NAMES.sub("", name) for name in stored}
    prefix = "base_model.model."
    if not any(name.startswith(prefix) for name in by_stored.values()):
        by_stored = {name: prefix + rest for name, rest in by_stored.items()}
    by_stored = {name: re.sub(r"^(base_model\.model\.){2,}", prefix, rest) for name, rest in by_stored.items()}
    by_stored = {name: _without_adapter_name(rest) for name, rest in by_stored.items()}
    found = {rest: name for name, rest in by_stored.items()}
    changed = [name for name, rest in by_stored.items() if name != rest]
    if len(found) < len(by_stored):
        repeated = next(name for name, rest in by_stored.items() if found[rest] != name)
        raise AdapterError(f"{path} holds a tensor twice", got=repeated, fix="save the adapter again with peft")
    if changed:
        say_once(f"{path}: names that a trainer changed, such as {changed[0]}, are read as {by_stored[changed[0]]}")
    return found


def _without_adapter_name(name: str) -> str:
    """Removes the adapter's name, which peft leaves out of its files and a model's state_dict has."""
    name = re.sub(r"(\.lora_[AB])\.[^.]+\.(weight|bias)$", r"\1.\2", name)
    name = re.sub(r"(\.lora_embedding_[AB]|\.trainable_tokens_delta)\.[^.]+$", r"\1", name)
    name = re.sub(r"(\.lora_magnitude_vector)(\.[^.]+){1,2}$", r"\1", name)
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)


def _check_weights_file(folder: Path) -> None:
    if (folder / WEIGHTS).is_file():
        return
    if (folder / PICKLED_WEIGHTS).is_file():
        raise wrong_kind_error(folder / PICKLED_WEIGHTS, PICKLE, AdapterError) or AdapterError(
            f"{folder / PICKLED_WEIGHTS} is a pickle, which can run code when it is opened",
            got=f"no {WEIGHTS}",
            fix="ask for safetensors, or convert it with torch.load(weights_only=True) and safetensors.torch.save_file",
        )
    shards = sorted(path.name for path in folder.glob("adapter_model*-of-*"))
    if shards:
        raise AdapterError(
            f"{folder} has its weights in {len(shards)} files, which neither peft nor hatrack joins",
            got=", ".join(shards[:3]),
            fix=f"join them into one {WEIGHTS} with safetensors.torch.load_file and save_file",
        )
    raise AdapterError(
        f"{folder} has no {WEIGHTS}",
        got=", ".join(sorted(p.name for p in folder.iterdir())),
        fix="copy the adapter again",
    )


def _pissa_to_lora(folder: Path, config: dict[str, Any], initial: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Turns a saved PiSSA adapter into plain LoRA for the original base.

    PiSSA (Meng et al. 2024, section 3) subtracts s B0 A0 from each weight before training. What it learns is therefore
    s (B A - B0 A0) = s [B, -B0] [A; A0]: LoRA of twice the rank, and of twice the alpha so that s stays the same.
    """
    tensors = load_file(folder / WEIGHTS)
    for key, tensor in initial.items():
        if ".lora_A." in key:
            tensors[key] = torch.cat([tensors[key], tensor.to(tensors[key])], dim=0)  # (2r, d_in)
        elif ".lora_B." in key:
            tensors[key] = torch.cat([tensors[key], -tensor.to(tensors[key])], dim=1)  # (d_out, 2r)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"], "init_lora_weights": True}
    write_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return config


def _normalize_config(path: Path, base: str) -> dict[str, Any]:
    """Makes the saved config the same on every run: sorted names, and a base that plain peft can load."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    for field in ("target_modules", "modules_to_save"):
        if isinstance(config.get(field), list):
            config[field] = sorted(set(config[field]))
    write_file(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return config
