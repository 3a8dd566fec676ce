"""A run on disk: one process at a time, nothing lost when it stops, and found again by its output's name.

The finished adapter goes to `OUTPUT`; until then everything is in `OUTPUT.run`, so OUTPUT never exists half-made.
Knows nothing of models or data.
"""

import contextlib
import filecmp
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hatrack.adapter import registry
from hatrack.adapter.card import CONFIG, HATRACK_JSON
from hatrack.adapter.files import WEIGHTS
from hatrack.console import say
from hatrack.errors import AdapterError, Diverged, Interrupted, RecipeError, short_repr
from hatrack.recipe import Recipe, flag
from hatrack.storage import locked, machine_errors, move, write_file
from hatrack.training import checkpoint
from hatrack.training.output import RUN, Output, find_interrupted, name_from_data, output_candidates, run_folder

MAY_CHANGE = {"resume", "output", "name", "device", "report_to", "memory", "force", "data", "eval_data", "base"}
MAY_CHANGE |= {"cache_limit", "overwrite"}
"""Options that a resumed run may be given anew. Moved files are told apart from changed ones by their digests."""

LOCK, ADAPTER, METRICS, REPLACED = "lock", "adapter", "metrics.jsonl", "replaced"
OURS = re.compile(r"lock$|\.?(run\.json|metrics\.jsonl|adapter|replaced|checkpoint-\d+)($|\.)")
"""What a run's folder has; anything else in a folder without `run.json` is somebody's, and stays."""


@dataclass(frozen=True)
class Run:
    """The folders of one run and the name of its adapter.

    `resumed`: it goes on from its last checkpoint. `overwrite`: it may replace an adapter in `output`.
    """

    output: Path
    folder: Path
    name: str
    resumed: bool = False
    overwrite: bool = False

    @property
    def metrics(self) -> Path:
        """One JSON object a line, for every logged step and evaluation."""
        return self.folder / METRICS

    @property
    def adapter(self) -> Path:
        """Where the adapter is saved until it is proven."""
        return self.folder / ADAPTER

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint. All that are there are whole: they are looked through when a run is resumed."""
        return next(
            (checkpoint.folder_of_step(self.folder, step) for step in checkpoint.saved_steps(self.folder)), None
        )

    def remember(self, recipe: Recipe, facts: dict[str, Any]) -> None:
        """Keeps the recipe and what it was applied to; a resumed run must find the same facts.

        Raises RecipeError where they differ from what the interrupted run saw.
        """
        path = self.folder / RUN
        then = json.loads(path.read_text()) if self.resumed else {"recipe": {}, "facts": {}}
        options, before, facts = recipe.explicit_options(), then["facts"], json.loads(json.dumps(facts))
        changed = sorted(name for name in before if facts.get(name) != before[name])
        if changed:
            raise RecipeError(
                f"the interrupted run in {self.folder} saw another {' and '.join(changed)}",
                got="; ".join(
                    f"{_told(name, options, facts)}, then {_told(name, then['recipe'], before)}" for name in changed
                ),
                fix="give it what it was started with, or start anew without --resume",
            )
        content = {"recipe": options | {"resume": False, "name": self.name}, "facts": facts}
        write_file(path, json.dumps(content, indent=2))

    def interrupted(self) -> Interrupted:
        """What to say when the person stops the run."""
        step = next(iter(checkpoint.saved_steps(self.folder)), None)
        if not (self.folder / RUN).exists():
            return Interrupted(f"stopped at the very end: the adapter in {self.output} is finished")
        if step is None:
            return Interrupted("stopped before anything was learned", fix="start it again as before")
        return Interrupted(
            f"stopped; step {step:,} is saved in {self.folder}, which stays", fix=f"go on with: {self._go_on()}"
        )

    def kept(self) -> str | None:
        """What is left of a run that failed."""
        step = next(iter(checkpoint.saved_steps(self.folder)), None)
        return f"step {step:,} is saved in {self.folder}; go on with: {self._go_on()}" if step else None

    def _go_on(self) -> str:
        return f"hatrack train --resume --output {self.output}"

    def recall(self, fact: str) -> Any:
        """What the interrupted run remembered under this name; None where none is resumed."""
        path = self.folder / RUN
        return json.loads(path.read_text())["facts"].get(fact) if self.resumed and path.exists() else None

    def finish(self) -> None:
        """Moves the proven adapter to its place, hangs it on the rack and removes the checkpoints.

        Raises RecipeError where something else came to lie in its place, AdapterError where its name was taken.
        """
        if self.output.exists() and self.overwrite:
            _check_replaceable(self.output)
            with machine_errors(self.output):
                move(self.output, self.folder / REPLACED)
        if not self.output.exists():
            with machine_errors(self.output):
                move(self.adapter, self.output)
        elif not filecmp.cmp(self.adapter / WEIGHTS, self.output / WEIGHTS, shallow=False):
            raise RecipeError("the output exists already", got=self.output, fix="move it away, and --resume")
        try:
            registry.register(self.name, self.output, replace=self.overwrite)
        except AdapterError as error:
            self._remove()
            raise AdapterError(
                f"the adapter is saved in {self.output}, but the name {self.name} was taken meanwhile",
                got=error.got,
                fix=f"hatrack add {self.output} --name ANOTHER",
            ) from error
        self._remove()

    def _remove(self) -> None:
        (self.folder / RUN).unlink()  # first of all: a folder without it is nobody's, and goes the next time it is met
        shutil.rmtree(self.folder, ignore_errors=True)


def _told(fact: str, options: dict[str, Any], facts: dict[str, Any]) -> str:
    """A fact with the option it came from: `bases/small (0f3a...)`."""
    source = options.get({"rows": "data"}.get(fact, fact))
    return f"{source} ({short_repr(facts.get(fact))})" if source else short_repr(facts.get(fact))


@contextlib.contextmanager
def open_run(recipe: Recipe) -> Iterator[tuple[Run, Recipe]]:
    """Yields a new run, or with `resume` the interrupted one, whose recipe goes on; no other process may have it.

    A folder or name that is derived steps aside for what is there, which is said. Whatever stops the block, the newest
    checkpoint stays, and how to go on from it is said. Where there is none, nothing is left behind.
    Raises RecipeError where the output exists, the name is taken, another process or an interrupted run is in the way,
    or there is nothing to resume; Interrupted for Ctrl-C.
    """
    with contextlib.ExitStack() as claimed:
        run, recipe = _resume(recipe, claimed) if recipe.resume else (_begin(recipe, claimed), recipe)
        try:
            yield run, recipe
        except KeyboardInterrupt:
            raise run.interrupted() from None
        except (Interrupted, Diverged):  # these say themselves what is kept
            raise
        except BaseException:
            if kept := run.kept():
                say(kept)
            raise


def _begin(recipe: Recipe, claimed: contextlib.ExitStack) -> Run:
    """A new run in a folder that `claimed` keeps others out of."""
    for option in ("base", "data"):
        if getattr(recipe, option) is None:
            raise RecipeError(
                f"{flag(option)} is missing", fix=f"add {flag(option)} or a line '{option}:' to the recipe"
            )
    first: InTheWay | None = None
    for output in output_candidates(recipe):
        with contextlib.ExitStack() as tried:
            try:
                _claim(recipe, output, tried)
            except InTheWay as reason:
                if reason.part not in output.derived:
                    raise
                first = first or reason
                continue
            claimed.push(tried.pop_all())
            break
    if first is not None:
        say(f"{first.what} ({first.got}): this run makes {output.name}")
    _clear(output.run_folder)
    run = Run(output.folder, output.run_folder, output.name, overwrite=recipe.overwrite)
    run.remember(recipe, {})  # from here on --resume finds it
    return run


class InTheWay(RecipeError):
    """Something has a run's folder or name already; `part` says which of the two, `folder` or `name`."""

    def __init__(self, part: str, what: str, *, got: object, fix: str) -> None:
        super().__init__(what, got=got, fix=fix)
        self.part = part


def _claim(recipe: Recipe, output: Output, claimed: contextlib.ExitStack) -> None:
    """Has `claimed` keep others out of an output that is free. Raises InTheWay where it is not."""
    if output.folder.exists() and not recipe.overwrite:
        raise InTheWay(
            "folder",
            "the output exists already",
            got=output.folder,
            fix="--overwrite replaces it when the new one is finished; or choose another --output or --name",
        )
    if output.folder.exists():
        _check_replaceable(output.folder)
    try:
        registry.check_free(output.name, output.folder, replace=recipe.overwrite)
    except AdapterError as error:
        raise InTheWay("name", error.what, got=error.got, fix=str(error.fix)) from error
    claimed.enter_context(_own_folder(output.run_folder))
    if (output.run_folder / RUN).exists() and checkpoint.saved_steps(output.run_folder) and not recipe.overwrite:
        raise InTheWay(
            "folder",
            "an interrupted run is in the way",
            got=output.run_folder,
            fix=f"go on with it by --resume, or remove {output.run_folder}",
        )


def _check_replaceable(output: Path) -> None:
    """Raises RecipeError for a folder that is not an adapter's: --overwrite removes nothing else."""
    if not (output / CONFIG).is_file():
        raise RecipeError(
            "--overwrite replaces adapters only", got=f"{output}, which is none", fix="choose another --output"
        )


def _resume(recipe: Recipe, claimed: contextlib.ExitStack) -> tuple[Run, Recipe]:
    """The interrupted run that is meant, in a folder that `claimed` keeps others out of."""
    output = find_interrupted(recipe)
    folder = run_folder(output)
    claimed.enter_context(_own_folder(folder))
    recipe = _resumed(recipe, folder, output)
    checkpoint.remove_damaged(folder)
    shutil.rmtree(folder / ADAPTER, ignore_errors=True)  # saved, but not yet proven
    name = recipe.name or name_from_data(recipe.data)
    registry.check_free(name, output, replace=recipe.overwrite)
    return Run(output, folder, name, resumed=True, overwrite=recipe.overwrite), recipe


@contextlib.contextmanager
def _own_folder(folder: Path) -> Iterator[None]:
    """Makes a run's folder and keeps others out of it. Afterwards it goes, where nothing in it can be gone on from."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, made)
        _make(folder)
        try:
            stack.enter_context(locked(folder / LOCK, wait=False))
        except BlockingIOError as error:
            holder = (folder / LOCK).read_text() if (folder / LOCK).exists() else ""
            raise InTheWay(
                "folder",
                f"another run is writing to {folder}",
                got=f"process {holder or 'unknown'}",
                fix="wait for it, or choose another --output",
            ) from error
        try:
            yield
        finally:
            if not (folder / RUN).exists() or (folder in made and not checkpoint.saved_steps(folder)):
                shutil.rmtree(folder, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Removes what is left of a run that ended, or was killed before its first checkpoint."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _make(folder: Path) -> None:
    """Makes a run's folder, or refuses: before hours of work, not after them, and before touching what is not ours."""
    try:
        with machine_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError) as error:
        file = next(path for path in (folder, *folder.parents) if path.exists() and not path.is_dir())
        raise RecipeError(
            "the output cannot be a folder", got=f"{file} is a file", fix="choose another --output"
        ) from error
    theirs = [] if (folder / RUN).exists() else [path for path in folder.iterdir() if not OURS.match(path.name)]
    if theirs:
        raise RecipeError(
            f"{folder}, where the run would lie, has other files", got=min(theirs).name, fix="choose another --output"
        )


def _resumed(recipe: Recipe, folder: Path, output: Path) -> Recipe:
    """The interrupted run's recipe; options given now must not contradict it."""
    path = folder / RUN
    if not path.exists():
        ours = (output / HATRACK_JSON).exists()
        there = (
            f"{output} is {'finished' if ours else 'not a run of hatrack'}"
            if output.exists()
            else f"there is no {path}"
        )
        raise RecipeError(
            "there is no interrupted run to resume",
            got=there,
            fix="name its folder with --output, or leave out --resume",
        )
    before = json.loads(path.read_text())["recipe"]
    given = recipe.explicit_options()
    if given.get("layers") == "auto":
        del given["layers"]  # decided already, or still to be
    for name, value in given.items():
        if name not in MAY_CHANGE and before.get(name) != value:
            raise RecipeError(
                f"{flag(name)} differs from the interrupted run",
                got=f"{value} (then: {before.get(name)})",
                fix="leave it out",
            )
    return Recipe.make(**(before | given | {"trust_remote_code": recipe.trust_remote_code}))
