"""Where a run writes, what its adapter is called, and which interrupted run is meant.

What the user typed is taken as it is. What is derived from the data file's name steps aside for whatever has it
already: `reviews`, `reviews-2`, `reviews-3`. Knows nothing of what a run's folder holds besides `run.json`.
"""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from anyascii import anyascii

from hatrack.errors import RecipeError
from hatrack.recipe import Recipe, flag

RUN = "run.json"
SUFFIXES = (".gz", ".bz2", ".xz", ".zip", ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")
LONGEST = 50
"""Characters of a derived name, with room for `-2` below the 64 that a name may have."""


@dataclass(frozen=True)
class Output:
    """The folder and the name of an adapter to be; `derived` says which of the two the user did not type."""

    folder: Path
    name: str
    derived: frozenset[str]

    @property
    def run_folder(self) -> Path:
        """Where the run keeps everything until its adapter is finished."""
        return run_folder(self.folder)


def run_folder(output: Path) -> Path:
    """The folder of the run that makes the adapter in `output`: `reviews.run` beside `reviews`."""
    return output.with_name(output.name + ".run")


def output_candidates(recipe: Recipe) -> Iterator[Output]:
    """The outputs a run may have, the preferred one first; only one where the user typed both folder and name."""
    derived = frozenset(
        part for part, typed in (("folder", recipe.output or recipe.name), ("name", recipe.name)) if not typed
    )
    stem = name_from_data(recipe.data)
    for number in itertools.count(1):
        name = recipe.name or (stem if number == 1 else f"{stem}-{number}")
        yield Output(Path(recipe.output or name), name, derived)
        if not derived:
            return


def name_from_data(data: str | None) -> str:
    """A name for what is learned from a data file: its own, without known suffixes, in the letters names may have.

    >>> name_from_data("data/reviews.v2.csv.gz"), name_from_data("Größen.jsonl"), name_from_data("acme/tickets")
    ('reviews.v2', 'Grossen', 'tickets')
    """
    path = PurePath((data or "").partition("#")[0])
    while path.suffix.lower() in SUFFIXES:
        path = path.with_suffix("")
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", anyascii(path.name)).strip("-_.")
    return safe[:LONGEST].rstrip("-_.") or "adapter"


def find_interrupted(recipe: Recipe) -> Path:
    """The output folder of the run that `--resume` means: as typed, or else the only one interrupted here.

    Where a data file is typed, only runs on a file of its name count. Raises RecipeError where there is none, or more
    than one.
    """
    if recipe.output or recipe.name:
        return Path(str(recipe.output or recipe.name))
    found = {path.parent: _data_of(path) for path in sorted(Path().glob(f"*.run/{RUN}"))}
    there = {folder: data for folder, data in found.items() if data}
    if recipe.data is not None:
        name = PurePath(recipe.data).name
        there = {folder: data for folder, data in there.items() if PurePath(data).name == name}
    outputs = [folder.with_name(folder.name.removesuffix(".run")) for folder in there]
    if not outputs:
        about = f" on {recipe.data}" if recipe.data else ""
        raise RecipeError(
            "there is no interrupted run to resume",
            got=f"no *.run folder of one{about} in {Path().resolve()}",
            fix="name its folder with --output FOLDER, or leave out --resume",
        )
    if len(outputs) > 1:
        listed = ", ".join(f"{output} ({data})" for output, data in zip(outputs, there.values(), strict=True))
        raise RecipeError(
            f"{len(outputs)} runs were interrupted here",
            got=listed,
            fix=f"name one, such as {flag('output', outputs[0])}",
        )
    return outputs[0]


def _data_of(run: Path) -> str:
    """The data that a run's `run.json` names; empty where it cannot be read."""
    try:
        return str(json.loads(run.read_text(encoding="utf-8"))["recipe"].get("data", ""))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return ""
