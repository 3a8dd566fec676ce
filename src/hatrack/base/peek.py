"""A base's config.json and tensor headers from its name, without its weights. Knows no torch.

Of a hub base that is not on this machine, config.json is downloaded and the headers of its safetensors files are read
by HTTP range requests. A base that has to be unpacked or converted first is left to `sources.py`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of whichever HTTP library it uses
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from hatrack import wheels
from hatrack.base.header import CONFIG, INDEX, WEIGHTS, TensorInfo, read_config, read_header, read_json, weight_bytes
from hatrack.base.locate import ADAPTER_CONFIG, gguf_folder, in_wheel, looks_like_path
from hatrack.errors import BaseError, HatrackError, MachineError, RecipeError
from hatrack.storage import machine_errors

SMALL = ("*.json", "tokenizer.model")
"""What is fetched of a hub base: everything about it but its weights."""


@dataclass(frozen=True)
class Peek:
    """What is known of a base from its small files: its config, the tensors it has, and where the small files lie.

    `to_download`: bytes of weights that this machine does not have yet.
    """

    source: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    to_download: int = 0


def peek_folder(folder: Path, source: str | None = None) -> Peek:
    """The same of a folder with config.json and safetensors. Raises BaseError where it is not one."""
    return Peek(source or str(folder), folder, read_config(folder), read_header(folder))


def peek(source: str, revision: str | None = None) -> Peek | None:
    """The base of a name as `find_base` takes it; None where it must first be unpacked or converted to be known.

    Raises BaseError where there is no such base, RecipeError where the name is malformed, MachineError where the hub
    does not answer.
    """
    path = Path(source).expanduser()
    local = wheels.is_pypi(source) or path.exists()
    if revision is not None and local:
        raise RecipeError("--revision is for bases on the hub", got=f"{revision} for {source}", fix="leave it out")
    if not local:
        return None if looks_like_path(source) else _on_hub(source, revision)
    if wheels.is_pypi(source):
        path = in_wheel(source)
    if path.suffix.lower() == ".gguf" and path.is_file():
        path = gguf_folder(path)
    known = path.is_dir() and (path / CONFIG).is_file() and ((path / WEIGHTS).exists() or (path / INDEX).exists())
    return peek_folder(path, source) if known else None


def _on_hub(source: str, revision: str | None) -> Peek:
    """From the hub's cache, or over the network."""
    cached = _cached(source, revision)
    if cached is not None:
        return peek_folder(cached, source)
    disable_progress_bars()
    with hub_errors(source, revision):
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(SMALL), ignore_patterns="*/*"))
        if not (folder / CONFIG).is_file():
            raise _no_base(source, folder)
        found = HfApi().get_safetensors_metadata(source, revision=folder.name)
    tensors = {
        name: TensorInfo(
            tuple(info.shape), info.dtype, Path(file), info.data_offsets[0], info.data_offsets[1] - info.data_offsets[0]
        )
        for file, part in found.files_metadata.items()
        for name, info in part.tensors.items()
    }
    return Peek(source, folder, read_config(folder), tensors, weight_bytes(tensors))


def _cached(source: str, revision: str | None) -> Path | None:
    """The snapshot of a base whose weights are in the hub's cache already."""
    try:
        folder = Path(snapshot_download(source, revision=revision, local_files_only=True))
    except Exception:  # nothing of it is there: whatever the reason, the hub will tell
        return None
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).exists():
        return folder
    if not (folder / CONFIG).is_file() or not (folder / INDEX).is_file():
        return None
    names = read_json(folder / INDEX).get("weight_map")
    whole = isinstance(names, dict) and all((folder / str(file)).exists() for file in set(names.values()))
    return folder if whole else None


def _no_base(source: str, folder: Path) -> BaseError:
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        return BaseError(f"{source} is an adapter, not a base", fix=f"use its base: {base}" if base else "use its base")
    return BaseError(f"{source} on the hub has no {CONFIG}", fix="use another repository")


@contextlib.contextmanager
def hub_errors(source: str, revision: str | None) -> Iterator[None]:
    """Says in one line whatever stands between this machine and a base on the hub."""
    try:
        with machine_errors("the hub's cache"):
            yield
    except HFValidationError as error:
        raise BaseError("neither a folder nor a hub id", got=source, fix="check the name") from error
    except GatedRepoError as error:
        raise BaseError(f"{source} is gated", fix="accept its terms on the hub, then: hf auth login") from error
    except RevisionNotFoundError as error:
        raise BaseError(f"{source} has no such revision", got=revision, fix="check --revision") from error
    except RepositoryNotFoundError as error:
        raise BaseError(
            f"there is no folder {source} here and no public model {source} on the hub",
            fix="check the spelling; for a private model: hf auth login",
        ) from error
    except LocalEntryNotFoundError as error:
        raise BaseError(
            f"there is no folder {source} here, and the hub cannot be asked for it",
            got="no answer, and nothing in its cache",
            fix="check the name and the network (and HF_HUB_OFFLINE), or give a folder",
        ) from error
    except (NotASafetensorsRepoError, SafetensorsParsingError, EntryNotFoundError) as error:
        raise BaseError(
            f"{source} on the hub has no safetensors weights whose headers could be read",
            fix="use another repository, or download it and give its folder",
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, HatrackError):
            raise
        raise MachineError(
            f"the download of {source} broke off",
            got=str(error).split("\n")[0][:160],
            fix="run the same again: it goes on",
        ) from error
