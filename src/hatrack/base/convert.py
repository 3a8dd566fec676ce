"""Converts GGUF files and pickled checkpoints, once, to a folder of safetensors in the cache.

Knows nothing of where a base came from or what it is used for.
"""

import contextlib
import io
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hatrack.base.header import INDEX, WEIGHTS, read_json
from hatrack.base.locate import PICKLE, PICKLE_INDEX, files_digest, gguf_folder
from hatrack.base.quiet import quiet
from hatrack.console import format_size, say
from hatrack.errors import HatrackError, MachineError, ModelError
from hatrack.file_kind import GGUF, wrong_kind_error
from hatrack.file_kind import PICKLE as PICKLED
from hatrack.storage import cache_dir, folder_size, machine_errors, new_folder

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Configuration and tokenizer files, which are copied to a converted base."""
CODE = "*.py"
"""Downloaded only if it may run."""


def from_gguf(file: Path) -> Path:
    """Converts a GGUF file to a folder: bfloat16 safetensors, tokenizer, chat template.

    Converted once; the folder's name carries the sha256 of the file. Raises ModelError if the file is no GGUF, is
    damaged, or holds an architecture that cannot be converted; MachineError if the disk is full.
    """
    _check_magic(file)
    final = gguf_folder(file)
    if final.exists():
        return final
    say(f"converting {file.name} to bfloat16 safetensors, once")
    with new_folder(final) as working, _full_disk(final):
        try:
            with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off
                _convert_gguf(file, working)
        except (HatrackError, MemoryError, OSError, SafetensorError):
            raise
        except Exception as error:  # the parsers raise all kinds of errors for a damaged file
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise ModelError(
                f"{file} cannot be converted", got=reason, fix="download it again, or use a safetensors base"
            ) from error
    say(f"converted: {final} ({format_size(folder_size(final))})")
    return final


def from_pickle(folder: Path) -> Path:
    """Converts a base with only `pytorch_model.bin` to a folder with safetensors; tensor names and dtypes stay.

    Only plain tensors are unpickled (`weights_only`). Converted once. Raises ModelError if a file is damaged or
    holds anything else, MachineError if the disk is full.
    """
    files = _pickles(folder)
    small = sorted(
        path for pattern in (*SMALL_FILES, CODE) for path in folder.glob(pattern) if path.name != PICKLE_INDEX
    )
    final = cache_dir("bases") / f"{folder.resolve().name}-{files_digest([*files, *small], 'pickle')[:16]}"
    if final.exists():
        return final
    say(f"converting {', '.join(file.name for file in files[:2])} in {folder} to safetensors, once")
    with new_folder(final) as working, _full_disk(final):
        for path in small:
            shutil.copyfile(path, working / path.name)
        weight_map: dict[str, str] = {}
        for number, file in enumerate(files, 1):
            name = WEIGHTS if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
            tensors = _unpickle(file)
            save_file(tensors, working / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
        if len(files) > 1:
            (working / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    say(f"converted: {final} ({format_size(folder_size(final))})")
    return final


def has_pickle(folder: Path) -> bool:
    """Whether a folder has a pickled checkpoint under one of transformers' names for it."""
    return (folder / PICKLE).is_file() or (folder / PICKLE_INDEX).is_file()


@contextlib.contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    """Turns safetensors' own error for a full disk into the usual one."""
    try:
        yield
    except SafetensorError as error:
        if "os error 28" not in str(error) and "No space left" not in str(error):
            raise
        raise MachineError(
            f"the disk is full while writing {folder}", fix="free some space, or set HATRACK_CACHE"
        ) from error


def _check_magic(file: Path) -> None:
    with machine_errors(file), file.open("rb") as content:
        start = content.read(4)
    if start != b"GGUF":
        raise wrong_kind_error(file, GGUF, ModelError) or ModelError(
            f"{file} is not a GGUF file", got=f"it starts with {start!r}", fix="check the path or download it again"
        )


def _convert_gguf(file: Path, working: Path) -> None:
    """Dequantizes the weights and writes them beside tokenizer and chat template."""
    location = {"gguf_file": file.name, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **location
    )
    # save_pretrained refuses a model that still counts as quantized, and readers would take the weights for packed
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(working)
    AutoTokenizer.from_pretrained(file.parent, **location).save_pretrained(working)


def _pickles(folder: Path) -> list[Path]:
    """The checkpoint's files, in the order of its index."""
    if (folder / PICKLE).is_file():
        return [folder / PICKLE]
    names = read_json(folder / PICKLE_INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise ModelError(f"{folder / PICKLE_INDEX} has no weight_map", fix="copy or download the base again")
    files = [folder / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{len(missing)} weight files of {folder} are missing", got=", ".join(missing[:3]))
    return files


def _unpickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, none of which share memory, as safetensors requires."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise wrong_kind_error(file, PICKLED, ModelError) or ModelError(
            f"{file} is damaged, or holds more than tensors",
            got=str(error).split("\n")[0][:120],
            fix="use a base with safetensors",
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ModelError(f"{file} is not a checkpoint of named tensors", fix="use a base with safetensors")
    return {str(name): tensor.detach().clone().contiguous() for name, tensor in content.items()}
