"""Reads config.json and tensor headers of a base on the hub, without its weights; plain hub errors.

Needs no torch. config.json is downloaded and the headers of the safetensors files are read by HTTP range requests,
unless the weights are in the hub's cache already. Not part of `description.py`, as importing huggingface_hub takes a
quarter of a second.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

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

from hatrack.base.description import BaseDescription, describe_folder
from hatrack.base.header import (
    CONFIG,
    INDEX,
    TOKENIZER_CONFIG,
    WEIGHTS,
    WRAPPERS,
    TensorInfo,
    check_trainable,
    read_config,
    read_json,
    read_optional_json,
    weight_bytes,
)
from hatrack.base.locate import ADAPTER_CONFIG
from hatrack.base.not_a_base import adapter_error
from hatrack.errors import HatrackError, MachineError, ModelError
from hatrack.storage import machine_errors

CONFIG_FILES = ("*.json", "*.jinja", "tokenizer.model")
"""The files that are downloaded to describe a base: all but its weights."""


def describe_on_hub(source: str, revision: str | None = None) -> BaseDescription:
    """Describes a base on the hub, from the hub's cache or over the network.

    Raises ModelError if there is no such base, MachineError if the hub does not answer.
    """
    cached = _cached_snapshot(source, revision)
    if cached is not None:
        return describe_folder(cached, source)
    disable_progress_bars()
    with hub_errors(source, revision):
        folder = Path(
            snapshot_download(source, revision=revision, allow_patterns=list(CONFIG_FILES), ignore_patterns="*/*")
        )
        if not (folder / CONFIG).is_file():
            raise _no_config_error(source, folder)
        found = HfApi().get_safetensors_metadata(source, revision=folder.name)
    tensors = {
        WRAPPERS.sub("", name): TensorInfo(
            tuple(info.shape), info.dtype, Path(file), info.data_offsets[0], info.data_offsets[1] - info.data_offsets[0]
        )
        for file, part in found.files_metadata.items()
        for name, info in part.tensors.items()
    }
    config = read_config(folder)
    check_trainable(source, config, tensors)
    settings = read_optional_json(folder / TOKENIZER_CONFIG)
    return BaseDescription(source, folder, config, tensors, settings, to_download=weight_bytes(tensors))


def _cached_snapshot(source: str, revision: str | None) -> Path | None:
    """The snapshot of a base whose weights are all in the hub's cache; None if there is none."""
    try:
        folder = Path(snapshot_download(source, revision=revision, local_files_only=True))
    except Exception:  # not cached; whatever the reason, asking the hub will say it
        return None
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).exists():
        return folder
    if not (folder / CONFIG).is_file() or not (folder / INDEX).is_file():
        return None
    names = read_json(folder / INDEX).get("weight_map")
    whole = isinstance(names, dict) and all((folder / str(file)).exists() for file in set(names.values()))
    return folder if whole else None


def _no_config_error(source: str, folder: Path) -> ModelError:
    if (folder / ADAPTER_CONFIG).is_file():
        return adapter_error(source, folder)
    return ModelError(f"{source} on the hub has no {CONFIG}", fix="use another repository")


@contextlib.contextmanager
def hub_errors(source: str, revision: str | None) -> Iterator[None]:
    """Turns huggingface_hub's errors into one-line ModelErrors and MachineErrors."""
    try:
        with machine_errors("the hub's cache"):
            yield
    except HFValidationError as error:
        raise ModelError("neither a folder nor a hub id", got=source, fix="check the name") from error
    except GatedRepoError as error:
        raise ModelError(f"{source} is gated", fix="accept its terms on the hub, then: hf auth login") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{source} has no such revision", got=revision, fix="check --revision") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder {source} here and no public model {source} on the hub",
            fix="check the spelling; for a private model: hf auth login",
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"there is no folder {source} here, and the hub cannot be asked for it",
            got="no answer, and nothing in its cache",
            fix="check the name and the network (and HF_HUB_OFFLINE), or give a folder",
        ) from error
    except (NotASafetensorsRepoError, SafetensorsParsingError, EntryNotFoundError) as error:
        raise ModelError(
            f"{source} on the hub has no safetensors weights whose headers could be read",
            fix="use another repository, or download it and give its folder",
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, HatrackError):
            raise
        raise MachineError(
            f"the download of {source} broke off",
            got=str(error).split("\n")[0][:160],
            fix="run the same again: it resumes",
        ) from error
