"""Explains why a path is not a base, and what to give instead, by file names. Needs no torch."""

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path

from hatrack.base.header import CONFIG, INDEX, WEIGHTS, read_json
from hatrack.base.locate import ADAPTER_CONFIG, PICKLE, PICKLE_INDEX, is_hub_id
from hatrack.errors import ModelError, join_first
from hatrack.recipe import flag

SUBFOLDERS = ("*", "*/*", "models--*/snapshots/*", "*/models--*/snapshots/*")
"""Where models are in a folder of models, in the hub's cache, and in that cache's parent."""
WEIGHT_FILES = (WEIGHTS, INDEX, PICKLE, PICKLE_INDEX)
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.pt", "*.pth", "*.ckpt", "*.onnx", "*.distcp")
OTHER_FORMATS = (
    (
        ("zero_to_fp32.py", "global_step*", "*_optim_states.pt", "*_model_states.pt"),
        "was saved in parts by DeepSpeed",
        "join them: python zero_to_fp32.py . pytorch_model.bin",
    ),
    (
        ("*.distcp", "pytorch_model_fsdp*"),
        "was saved in parts by FSDP",
        "join them: accelerate merge-weights FOLDER_OF_PARTS THIS_FOLDER",
    ),
    (
        ("params.json", "consolidated.*"),
        "is in its maker's own format",
        "use the version for transformers (on the hub its name often ends in -hf)",
    ),
)
"""Formats that transformers does not read: patterns of file names, a description, a fix."""


def no_model_error(path: Path, names: Collection[str], source: str) -> ModelError:
    """The error for a folder without a model, with files of these `names`, given as `source`."""
    if ADAPTER_CONFIG in names:
        return adapter_error(str(path), path)
    return (
        _models_below(path) or _other_format(path, names) or _adapters_below(path) or _no_weights(path, names, source)
    )


def adapter_error(source: str, folder: Path) -> ModelError:
    """The error for an adapter's `folder`, given as `source`: it names the adapter's base."""
    return ModelError(f"{source} is an adapter, not a base", got=ADAPTER_CONFIG, fix=_use_base_fix(folder))


def _use_base_fix(folder: Path, whose: str = "its") -> str:
    """The fix text that names an adapter's base, for which peft and mlx-lm have different keys."""
    config = read_json(folder / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path") or config.get("model")
    return f"use {whose} base: {base}" if base else f"use {whose} base, which {ADAPTER_CONFIG} does not name"


def missing_path_error(source: str) -> ModelError:
    """The error for a path that does not exist."""
    fix = "give its path on this machine with --base FOLDER, or its hub id"
    hub_id = _hub_id_in(source)
    if hub_id:
        fix = f"give its hub id: {flag('base', hub_id)}"
    if re.match(r"[a-z][a-z0-9+.-]+://", source):
        return ModelError(f"{source} is an address, not a folder or a hub id", fix=fix)
    path = Path(source.replace("\\", "/")).expanduser()
    if re.match(r"[A-Za-z]:[\\/]", source) or "\\" in source:
        if path.exists():
            return ModelError(f"there is no base at {source}", fix=f"did you mean {path}?")
        return ModelError(f"there is no base at {source}", got="a Windows path", fix=fix)
    missing = next((folder for folder in [*reversed(path.parents)] if not folder.exists()), None)
    if missing is None:
        nearby = f"{path.parent} has {list_names(entry.name for entry in _entries(path.parent))}"
        return ModelError(f"there is no base at {source}", got=nearby, fix=fix if hub_id else "check the path")
    other = ": a path of another machine" if path.is_absolute() and len(missing.parts) == 2 else ""
    return ModelError(f"there is no base at {source}", got=f"no folder {missing} here{other}", fix=fix)


def list_names(names: Iterable[str], most: int = 6) -> str:
    """The first few names in order; `nothing in it` for none."""
    ordered = sorted(names, key=_natural_order)
    return join_first(ordered, most) or "nothing in it"


def _models_below(path: Path) -> ModelError | None:
    """The error for a folder around models: checkpoints, a folder of models, the hub's cache; None for others."""
    models = _find_below(path, CONFIG, WEIGHT_FILES)
    if not models:
        return None
    chosen = _main_model(models)
    what = "the hub's cache, not a model" if "snapshots" in chosen.relative_to(path).parts else "a folder of models"
    inside = list_names(str(model.relative_to(path)) for model in models)
    fix = f"give {'' if len(models) == 1 else 'one of them: '}{flag('base', chosen)}"
    return ModelError(f"{path} is {what}", got=inside, fix=fix, gotcha="base-folder-around")


def _adapters_below(path: Path) -> ModelError | None:
    adapters = _find_below(path, ADAPTER_CONFIG, (ADAPTER_CONFIG,))
    if not adapters:
        return None
    inside = list_names(str(adapter.relative_to(path)) for adapter in adapters)
    return ModelError(f"{path} holds adapters, not a base", got=inside, fix=_use_base_fix(adapters[0], "their"))


def _other_format(path: Path, names: Collection[str]) -> ModelError | None:
    for patterns, what, fix in OTHER_FORMATS:
        found = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
        if found:
            return ModelError(f"{path} {what}", got=list_names(found), fix=fix, gotcha="base-saved-in-parts")
    return None


def _no_weights(path: Path, names: Collection[str], source: str) -> ModelError:
    """The error for a folder without config or weights, or one that only has a model's name."""
    weights = [name for name in names if any(fnmatch(name, pattern) for pattern in OTHER_WEIGHTS)]
    if CONFIG in names:
        return ModelError(
            f"{path} has no weights that can be used",
            got=f"{', '.join(sorted(weights)[:4])} but no {WEIGHTS}" if weights else f"no {WEIGHTS}",
            fix="copy the weights into it, or use another base",
        )
    if not weights and is_hub_id(source.rstrip("/")):
        return ModelError(
            f"the folder {source} here has no model in it, and hides the one of that name on the hub",
            got=list_names(names),
            fix="rename or remove the folder, or give another one with --base FOLDER",
            gotcha="base-hidden-by-a-folder",
        )
    return ModelError(f"{path} has no {CONFIG}", got=list_names(names), fix="give the folder of a whole model")


def _find_below(path: Path, needed: str, any_of: tuple[str, ...]) -> list[Path]:
    """The subfolders that have the `needed` file and one of `any_of`, at the smallest depth that has any."""
    for pattern in SUBFOLDERS:
        files = path.glob(f"{pattern}/{needed}")
        found = [file.parent for file in files if any((file.parent / name).exists() for name in any_of)]
        if found:
            return sorted(found, key=lambda folder: _natural_order(str(folder)))
    return []


def _main_model(models: list[Path]) -> Path:
    """The model to suggest: of snapshots the hub's `main`, of checkpoints the last, else the first."""
    for model in models:
        main = model.parent.parent / "refs" / "main"
        if model.parent.name == "snapshots" and main.is_file() and main.read_text().strip() == model.name:
            return model
    return models[-1] if all(model.name.startswith("checkpoint-") for model in models) else models[0]


def _hub_id_in(source: str) -> str | None:
    """The hub id in a web address or in a path into another machine's hub cache."""
    match = re.search(r"(?:huggingface\.co|hf\.co|hf:/)/([\w.-]+/[\w.-]+)", source)
    if match:
        return match[1]
    match = re.search(r"models--([\w.-]+?)--([\w.-]+)", source)
    return f"{match[1]}/{match[2]}" if match else None


def _entries(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return []


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    """`checkpoint-9` before `checkpoint-10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
