"""Finds an adapter's task and base, even without a hatrack.json."""

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
HEAD_PARTS = (".score.", ".classifier.", ".classification_head.")


def card_of(files: AdapterFiles, base: str | None = None) -> AdapterCard:
    """The adapter's hatrack.json, or a card made from peft's config if it has none.

    `base`: its base, if the config does not name one. Raises AdapterError if neither does.
    """
    if files.card is not None:
        return files.card
    task = TASKS[files.config["task_type"]]  # read_adapter refuses others
    source, revision = files.config.get("base_model_name_or_path"), files.config.get("revision")
    named = isinstance(source, str) and source.strip() != ""
    if not named and base is None:
        raise AdapterError(
            f"{files.folder} does not name its base",
            got=f"base_model_name_or_path {source!r} in {CONFIG}",
            fix=f"name it with {flag('base')}",
        )
    labels = [f"LABEL_{index}" for index in range(_label_count(files))] if task == "classify" else []
    base_entry = {"source": source if named else base, "revision": revision if isinstance(revision, str) else None}
    return AdapterCard(name="", base=base_entry | {"named": named}, task=task, labels=labels)


def find_base_of(files: AdapterFiles, base: str | None = None, *, trust: str | None = None) -> BaseDescription:
    """Finds an adapter's base: `base` if given, else the base it was trained on.

    `trust`: the base whose own code may run. Raises AdapterError if the adapter names no base; ModelError or
    MachineError, which suggest `--base`, if that base is not available.
    """
    if base is not None:
        return find_base(base, trust=trust)
    card = card_of(files)
    source, revision = str(card.base["source"]), card.base.get("revision") or None
    snapshot = Path(str(card.recipe.get("base", ""))).expanduser()
    if revision is not None and snapshot.name == revision and snapshot.is_dir():  # a folder of the hub's cache
        return find_base(str(snapshot), trust=trust)
    if revision is not None and (wheels.is_pypi(source) or Path(source).expanduser().exists()):
        say_once(f"{files.folder / CONFIG}: revision {revision} is ignored: {source} is not on the hub")
        revision = None
    try:
        return find_base(source, revision, trust=trust)
    except (ModelError, MachineError) as error:
        suggests_base = re.search(r"--base\b|\bwith base\b|\bbase=", error.fix or "")  # as a flag, or as in Python
        fix = "; or ".join(filter(None, (error.fix, "" if suggests_base else f"say where it is with {flag('base')}")))
        what = f"the base of {files.folder} is not available: {error.what}"
        raise type(error)(what, got=error.got, fix=fix, gotcha=error.gotcha) from error


def _label_count(files: AdapterFiles) -> int:
    """The number of labels of a classifier, from the shapes of its head."""
    matrices = {name: shape for name, shape in files.shapes.items() if len(shape) == 2 and ".lora_" not in name}
    heads = [shape[0] for name, shape in matrices.items() if any(head in name for head in HEAD_PARTS)]
    return min(heads or [shape[0] for shape in matrices.values()], default=0)
