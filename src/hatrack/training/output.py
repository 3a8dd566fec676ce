"""Finds a run's folder, its adapter's name, and the interrupted run to resume.

A folder or name given by the user is used as it is. A derived one (from the data file) gets a number if it is taken:
`reviews`, `reviews-2`, `reviews-3`. Knows nothing of a run's folder besides `run.json`.
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
MAX_LENGTH = 50
"""Maximum characters of a derived name. A name may have 64, so this leaves room for `-2`."""


@dataclass(frozen=True)
class Output:
    """The folder and the name of an adapter that a run will make. `derived` lists those of "folder" and "name" that
    the user did not give."""

    folder: Path
    name: str
    derived: frozenset[str]

    @property
    def run_folder(self) -> Path:
        """The run's folder, used until its adapter is finished."""
        return run_folder(self.folder)


def run_folder(output: Path) -> Path:
    """The folder of the run that makes the adapter in `output`: `reviews.run` beside `reviews`."""
    return output.with_name(output.name + ".run")


def output_candidates(recipe: Recipe) -> Iterator[Output]:
    """Yields the outputs that a run may use, the preferred one first; only one if the user gave both parts."""
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
    """Derives an adapter's name from its data file: drops known suffixes, replaces characters not allowed in names.

    >>> name_from_data("data/reviews.v2.csv.gz"), name_from_data("Größen.jsonl"), name_from_data("acme/tickets")
    ('reviews.v2', 'Grossen', 'tickets')
    """
    path = PurePath((data or "").partition("#")[0])
    while path.suffix.lower() in SUFFIXES:
        path = path.with_suffix("")
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", anyascii(path.name)).strip("-_.")
    return safe[:MAX_LENGTH].rstrip("-_.") or "adapter"


def find_interrupted(recipe: Recipe) -> Path:
    """Returns the output folder of the run to resume: the one given by the user, or the only interrupted run in the
    current folder (with --data, the only one on a file of that name).

    Raises RecipeError if there is none, or more than one.
    """
    if recipe.output or recipe.name:
        return Path(str(recipe.output or recipe.name))
    runs = {path.parent: _data_of(path) for path in sorted(Path().glob(f"*.run/{RUN}"))}
    runs = {folder: data for folder, data in runs.items() if data}
    if recipe.data is not None:
        name = PurePath(recipe.data).name
        runs = {folder: data for folder, data in runs.items() if PurePath(data).name == name}
    outputs = [folder.with_name(folder.name.removesuffix(".run")) for folder in runs]
    if not outputs:
        about = f" on {recipe.data}" if recipe.data else ""
        raise RecipeError(
            "there is no interrupted run to resume",
            got=f"no *.run folder of an interrupted run{about} in {Path().resolve()}",
            fix="name its folder with --output FOLDER, or leave out --resume",
        )
    if len(outputs) > 1:
        listed = ", ".join(f"{output} ({data})" for output, data in zip(outputs, runs.values(), strict=True))
        raise RecipeError(
            f"{len(outputs)} runs were interrupted here",
            got=listed,
            fix=f"name one, such as {flag('output', outputs[0])}",
        )
    return outputs[0]


def _data_of(run: Path) -> str:
    """Returns the data file that a run's `run.json` names; empty if it cannot be read."""
    try:
        return str(json.loads(run.read_text(encoding="utf-8"))["recipe"].get("data", ""))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return ""
