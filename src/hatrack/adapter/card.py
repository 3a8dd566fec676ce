"""hatrack.json and the model card: what an adapter was made from and how well it does."""

import dataclasses
import json
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hatrack.errors import AdapterError, RecipeError, join_first
from hatrack.file_kind import wrong_kind_error
from hatrack.recipe import Recipe, flag
from hatrack.storage import write_file
from hatrack.wheels import is_pypi

HATRACK_JSON, CONFIG = "hatrack.json", "adapter_config.json"
FORMAT = 1
VALID_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Valid names of adapters."""
MAX_JSON_BYTES = 16 * 2**20


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("hatrack", "torch", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


@dataclass(frozen=True)
class AdapterCard:
    """The content of hatrack.json: what peft's config cannot hold.

    `base` has at least `source`; `metrics` has `before` and `after`; `proof` is a `proof.Proof` as JSON; `cost` has
    the `planned` and the `actual` cost. An answer ends after one of `end_tokens` or before one of `stop_strings`.
    """

    name: str
    base: dict[str, Any]
    task: str
    labels: list[str] = field(default_factory=list)
    multi_label: bool = False
    template: str | None = None
    end_tokens: list[int] = field(default_factory=list)
    stop_strings: list[str] = field(default_factory=list)
    max_length: int | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    proof: dict[str, Any] | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=_now)
    versions: dict[str, str] = field(default_factory=_versions)
    format: int = FORMAT

    def to_json(self) -> str:
        """The content of hatrack.json."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "base": dict,
    "task": str,
    "labels": list,
    "multi_label": bool,
    "template": (str, type(None)),
    "end_tokens": list,
    "stop_strings": list,
    "max_length": (int, type(None)),
    "recipe": dict,
    "data": dict,
    "metrics": dict,
    "proof": (dict, type(None)),
    "cost": dict,
    "created": str,
    "versions": dict,
    "format": int,
}


def _is_text_or_none(value: Any) -> bool:
    return isinstance(value, str | None)


def _is_recipe(value: dict[str, Any]) -> bool:
    """Whether the options that this version has are valid; options of later versions are ignored."""
    try:
        Recipe.make(**{name: option for name, option in value.items() if name in Recipe.model_fields})
    except RecipeError:
        return False
    return True


_IS_VALID: dict[str, Callable[[Any], bool]] = {
    "name": lambda value: value == "" or VALID_NAME.fullmatch(value) is not None,
    "task": lambda value: value in ("classify", "chat", "complete"),
    "base": lambda value: (
        isinstance(value.get("source"), str)
        and value["source"] != ""
        and all(_is_text_or_none(value.get(field)) for field in ("revision", "fingerprint", "model_type", "form"))
        and type(value.get("fingerprint_kind", 0)) is int
    ),
    "labels": lambda value: all(isinstance(label, str) for label in value) and len(set(value)) == len(value),
    "end_tokens": lambda value: all(type(token) is int and token >= 0 for token in value),
    "stop_strings": lambda value: all(isinstance(text, str) and text for text in value),
    "max_length": lambda value: value is None or (type(value) is int and value > 0),
    "recipe": _is_recipe,
    "data": lambda value: _is_text_or_none(value.get("source")),
    "metrics": lambda value: all(
        isinstance(scores, dict | None) and all(type(number) in (int, float) for number in (scores or {}).values())
        for scores in (value.get("before"), value.get("after"))
    ),
}
"""Field -> check of its value, beyond its type: for fields that are used as names, paths, options or numbers."""


def read_card(folder: Path) -> AdapterCard | None:
    """Reads an adapter's hatrack.json; None if there is none. Keys of later versions are ignored.

    Raises AdapterError if the file is malformed.
    """
    path = folder / HATRACK_JSON
    if not path.exists() and not path.is_symlink():
        return None
    content = read_json_object(path)
    wrong = [name for name, kind in FIELD_TYPES.items() if name in content and not isinstance(content[name], kind)]
    wrong += [name for name in ("name", "base", "task") if name not in content]
    if not wrong:
        wrong = [name for name, fits in _IS_VALID.items() if name in content and not fits(content[name])]
    if wrong:
        raise AdapterError(f"{path} is malformed", got=f"no valid {', '.join(wrong)}", fix="copy the adapter again")
    return AdapterCard(**{name: value for name, value in content.items() if name in FIELD_TYPES})


def valid_name(text: str) -> str:
    """Turns any text into a valid adapter name.

    >>> valid_name("my adapter (2)")
    'my-adapter--2-'
    """
    return re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip("._-")[:64] or "hat"


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object. Raises AdapterError if it does not."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe or a device could block
            raise AdapterError(f"{path} is not a regular file", fix="copy the adapter again")
        if path.exists() and path.stat().st_size > MAX_JSON_BYTES:
            raise AdapterError(f"{path} is too large", got=f"{path.stat().st_size:,} bytes", fix="copy it again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{path.parent} has no {path.name}", fix="give the folder of an adapter") from error
    except OSError as error:
        raise AdapterError(f"{path} cannot be read", got=error.strerror, fix="check its permissions") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise wrong_kind_error(path, "a JSON file", AdapterError) or AdapterError(
            f"{path} is not valid JSON", got=error, fix="copy the adapter again"
        ) from error
    if not isinstance(content, dict):
        got = type(content).__name__
        raise AdapterError(f"{path} must hold one JSON object", got=got, fix="copy the adapter again")
    return content


def not_an_adapter(folder: Path) -> AdapterError:
    """The error for a path that is not an adapter's folder. It says what is there, and lists adapters in it."""
    if folder.is_file():
        parent = f": {folder.parent}" if (folder.parent / CONFIG).is_file() else ""
        return AdapterError(f"{folder} is a file", fix=f"give the adapter's folder{parent}")
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return AdapterError(f"{folder} cannot be read", got=error.strerror, fix="check its permissions")
    got = join_first(names, 6) or "nothing in it"
    adapter_folders = sorted({path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{CONFIG}")})
    if adapter_folders:
        fix = f"give one of the folders in it: {join_first(adapter_folders, 5)}"
        return AdapterError(f"{folder} is not an adapter's folder", got=got, fix=fix)
    if "config.json" in names:
        return AdapterError(f"{folder} is a model, not an adapter", got=got, fix=f"use it with {flag('base')}")
    return AdapterError(f"{folder} has no {CONFIG}", got=got, fix="give the folder of an adapter")


def rename_in_files(folder: Path, new: str) -> None:
    """Writes an adapter's new name into its hatrack.json and model card; does nothing if there is no hatrack.json.

    Raises AdapterError or MachineError if they cannot be read or written.
    """
    if not (folder / HATRACK_JSON).is_file():
        return
    content = read_json_object(folder / HATRACK_JSON)
    old, recipe = content.get("name"), content.get("recipe")
    if isinstance(recipe, dict) and "name" in recipe:
        recipe["name"] = new
    write_file(folder / HATRACK_JSON, json.dumps(content | {"name": new}, indent=2, ensure_ascii=False) + "\n")
    readme = folder / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="surrogateescape")
        text = text.replace(f"\n# {old}\n", f"\n# {new}\n", 1).replace(
            f'hatrack.load("{old}")', f'hatrack.load("{new}")'
        )
        write_file(readme, text.encode("utf-8", errors="surrogateescape"))


def _from_pretrained_arguments(source: str) -> str:
    """The arguments of `from_pretrained` that load this base."""
    path = Path(source)
    folder = "path/of/the/base" if is_pypi(source) else str(path.parent)
    if path.suffix.lower() == ".gguf":
        return f"{json.dumps(folder)}, gguf_file={json.dumps(path.name)}"
    return json.dumps(folder if is_pypi(source) else source)


def model_card(card: AdapterCard, config: Mapping[str, Any]) -> str:
    """An adapter's README.md: what it is, its scores, and how to use it with and without hatrack."""
    source = card.base["source"]
    front_matter = f"---\nbase_model: {json.dumps(source)}\nlibrary_name: peft\ntags:\n- lora\n- hatrack\n---\n"
    lines = [f"# {card.name}", "", f"A LoRA adapter for `{source}`, made with hatrack. Task: {card.task}.", ""]
    if card.labels:
        lines += [f"Labels: {', '.join(card.labels)}" + (" (several at once)." if card.multi_label else "."), ""]
    before, after = card.metrics.get("before") or {}, card.metrics.get("after") or {}
    if after:
        rows = card.data.get("held_out")
        lines += [f"On {rows} held-out rows:", "", "| metric | base | with the adapter |", "| --- | --- | --- |"]
        lines += [f"| {name} | {before.get(name, float('nan')):.4f} | {value:.4f} |" for name, value in after.items()]
        lines += [""]
    lines += [
        f"r {config.get('r')}, alpha {config.get('lora_alpha')}, made {card.created}.",
        "",
        "```python",
        "import hatrack",
    ]
    lines += ["", f'hat = hatrack.load("{card.name}")  # or the path of this folder', 'hat.predict(["..."])', "```", ""]
    kind = "SequenceClassification" if card.task == "classify" else "CausalLM"
    classes = {"id2label": dict(enumerate(card.labels)), "label2id": {label: n for n, label in enumerate(card.labels)}}
    labels = "".join(f", {name}={table!r}" for name, table in classes.items()) if card.labels else ""
    lines += [
        "Without hatrack:",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import AutoModelFor{kind}" + ("" if card.task == "classify" else ", GenerationConfig"),
        "",
    ]
    lines += [f"# path/of/the/base: unpacked from {source}"] if is_pypi(source) else []
    lines += [f"base = AutoModelFor{kind}.from_pretrained({_from_pretrained_arguments(source)}{labels})"]
    lines += ['model = PeftModel.from_pretrained(base, "path/of/this/folder")']
    if card.task != "classify":
        lines += [
            'model.generation_config = GenerationConfig.from_pretrained("path/of/this/folder")  # where answers end'
        ]
    lines += ["```", ""]
    return "\n".join([front_matter, *lines])
