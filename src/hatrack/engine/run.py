"""A run on disk: where its checkpoints lie until the adapter is finished, and how an interrupted one is found again.

The finished adapter goes to `OUTPUT`; until then everything is in `OUTPUT.run`, so OUTPUT never exists half-made.
Knows nothing of models or data.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hatrack.adapter.rack import check_free
from hatrack.errors import RecipeError
from hatrack.recipe import Recipe, flag
from hatrack.storage import machine_errors, write_file

MAY_CHANGE = {"resume", "output", "name", "device", "report_to", "memory", "data", "eval_data", "base"}
"""Options that a resumed run may be given anew. Moved files are told apart from changed ones by their digests."""


@dataclass(frozen=True)
class Run:
    """The folders of one run, the name its adapter gets, and the recipe it follows."""

    output: Path
    folder: Path
    name: str
    recipe: Recipe

    @property
    def metrics(self) -> Path:
        """One JSON object a line, for every logged step and evaluation."""
        return self.folder / "metrics.jsonl"

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint: its state file is written last."""
        found = {int(path.name.rpartition("-")[2]): path for path in self.folder.glob("checkpoint-*")}
        for _, path in sorted(found.items(), reverse=True):
            if (path / "trainer_state.json").is_file():
                return path
        return None

    def remember(self, facts: dict[str, Any]) -> None:
        """Keeps the recipe and what it was applied to; a resumed run must find the same facts.

        Raises RecipeError where they differ from what the interrupted run saw.
        """
        path = self.folder / "run.json"
        if self.recipe.resume and path.exists():
            before = json.loads(path.read_text())["facts"]
            facts = json.loads(json.dumps(facts))
            changed = sorted(name for name in facts if facts[name] != before.get(name))
            if changed:
                raise RecipeError(
                    f"the interrupted run in {self.folder} saw another {' and '.join(changed)}",
                    fix="give it what it was started with, or start anew without --resume",
                )
        content = {"recipe": self.recipe.set_options() | {"resume": False}, "facts": facts}
        write_file(path, json.dumps(content, indent=2))

    def finish(self) -> None:
        """Removes the checkpoints, once the adapter is saved."""
        shutil.rmtree(self.folder, ignore_errors=True)


def open_run(recipe: Recipe) -> Run:
    """Finds the folders of a new run, or with `resume` of the interrupted one, whose recipe goes on.

    Raises RecipeError where the output exists, the name is taken, an interrupted run is in the way, or there is
    nothing to resume.
    """
    name = recipe.name or _derived_name(recipe)
    output = Path(recipe.output or name)
    folder = output.with_name(output.name + ".run")
    if recipe.resume:
        return Run(output, folder, name, _resumed(recipe, folder, output))
    for option in ("base", "data"):
        if getattr(recipe, option) is None:
            raise RecipeError(
                f"{flag(option)} is missing", fix=f"add {flag(option)} or a line '{option}:' to the recipe"
            )
    if output.exists():
        raise RecipeError(
            "the output exists already", got=output, fix="choose another --output or --name, or remove it"
        )
    run = Run(output, folder, name, recipe)
    if run.last_checkpoint() is not None:
        raise RecipeError(
            "an interrupted run is in the way", got=folder, fix=f"go on with it by --resume, or remove {folder}"
        )
    check_free(name, output)
    _check_writable(output)
    return run


def _resumed(recipe: Recipe, folder: Path, output: Path) -> Recipe:
    """The interrupted run's recipe; options given now must not contradict it."""
    path = folder / "run.json"
    if not path.exists():
        there = f"{output} is finished" if output.exists() else f"there is no {path}"
        raise RecipeError(
            "there is no interrupted run to resume",
            got=there,
            fix="name its folder with --output, or leave out --resume",
        )
    before = json.loads(path.read_text())["recipe"]
    given = recipe.set_options()
    for name, value in given.items():
        if name not in MAY_CHANGE and before.get(name) != value:
            raise RecipeError(
                f"{flag(name)} differs from the interrupted run",
                got=f"{value} (then: {before.get(name)})",
                fix="leave it out",
            )
    return Recipe.make(**(before | given))


def _check_writable(output: Path) -> None:
    """Finds out before hours of work, not after, that the adapter could not be written. Leaves nothing behind."""
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    with machine_errors(output):
        if not existing.is_dir():
            raise RecipeError(
                "the output cannot be a folder", got=f"{existing} is a file", fix="choose another --output"
            )
        tempfile.TemporaryFile(dir=existing).close()


def _derived_name(recipe: Recipe) -> str:
    """The data file's name without its endings: `reviews` for data/reviews.csv.gz."""
    stem = Path((recipe.data or "adapter").partition("#")[0]).name.partition(".")[0]
    safe = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in stem).strip("-_")
    return safe[:60] or "adapter"
