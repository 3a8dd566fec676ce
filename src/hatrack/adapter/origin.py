"""What an adapter says of its task and its base, and where that base lies now. Knows nothing of tensors."""

import re
from pathlib import Path

from hatrack import wheels
from hatrack.adapter.card import CONFIG, AdapterCard
from hatrack.adapter.files import AdapterFiles
from hatrack.base.description import BaseDescription
from hatrack.base.sources import find_base
from hatrack.console import say_once
from hatrack.errors import AdapterError, MachineError, ModelError
from hatrack.recipe import flag

TASKS = {"SEQ_CLS": "classify", "CAUSAL_LM": "chat"}
HEADS = (".score.", ".classifier.", ".classification_head.")


def card_of(files: AdapterFiles, base: str | None = None) -> AdapterCard:
    """hatrack.json, or for an adapter made elsewhere what its own config tells; `base` is its base where it names none.

    Raises AdapterError where neither names one.
    """
    if files.card is not None:
        return files.card
    task = TASKS[files.config["task_type"]]  # no other is read
    source, revision = files.config.get("base_model_name_or_path"), files.config.get("revision")
    named = isinstance(source, str) and source.strip() != ""
    if not named and base is None:
        raise AdapterError(
            f"{files.folder} does not name its base",
            got=f"base_model_name_or_path {source!r} in {CONFIG}",
            fix=f"name it with {flag('base')}",
        )
    labels = [f"LABEL_{index}" for index in range(_outputs(files))] if task == "classify" else []
    told = {"source": source if named else base, "revision": revision if isinstance(revision, str) else None}
    return AdapterCard(name="", base=told | {"named": named}, task=task, labels=labels)


def find_base_of(files: AdapterFiles, base: str | None = None, *, trust: str | None = None) -> BaseDescription:
    """An adapter's base: of `base` where that names where it lies now, else of the one it was made from.

    Raises AdapterError where it names none; ModelError or MachineError, with `--base` as a way on, where that one
    cannot be had.
    """
    if base is not None:
        return find_base(base, trust=trust)
    made = card_of(files)
    source, revision = str(made.base["source"]), made.base.get("revision") or None
    snapshot = Path(str(made.recipe.get("base", ""))).expanduser()
    if revision is not None and snapshot.name == revision and snapshot.is_dir():  # in a hub's cache, given as a folder
        return find_base(str(snapshot), trust=trust)
    if revision is not None and (wheels.is_pypi(source) or Path(source).expanduser().exists()):
        say_once(f"{files.folder / CONFIG}: revision {revision} is passed over, as {source} is not on the hub")
        revision = None
    try:
        return find_base(source, revision, trust=trust)
    except (ModelError, MachineError) as error:
        offered = re.search(r"--base\b|\bwith base\b|\bbase=", error.fix or "")  # as it is typed, or in Python's words
        way_on = "" if offered else f"name where it lies now with {flag('base')}"
        fix = "; or ".join(part for part in (error.fix, way_on) if part)
        what = f"the base of {files.folder} cannot be had: {error.what}"
        raise type(error)(what, got=error.got, fix=fix, gotcha=error.gotcha) from error


def _outputs(files: AdapterFiles) -> int:
    """How many labels a classifier's adapter tells apart, by the shapes of its head."""
    whole = {name: shape for name, shape in files.shapes.items() if len(shape) == 2 and ".lora_" not in name}
    heads = [shape[0] for name, shape in whole.items() if any(head in name for head in HEADS)]
    return min(heads or [shape[0] for shape in whole.values()], default=0)
