"""A run on disk: its folders, lock, saved values (for --resume) and final move to the rack.

The finished adapter goes to `OUTPUT`; until then everything is in `OUTPUT.run`, so OUTPUT is never incomplete. One
process at a time may use them. Knows nothing of models or data.
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
"""Options that may change when a run is resumed. Base and data may have moved; digests detect whether they changed."""

LOCK, ADAPTER, METRICS, REPLACED = "lock", "adapter", "metrics.jsonl", "replaced"
RUN_FILES = re.compile(r"lock$|\.?(run\.json|metrics\.jsonl|adapter|replaced|checkpoint-\d+)($|\.)")
"""Names that a run writes in its folder. A folder with other names and no `run.json` is not a run's: refused."""


@dataclass(frozen=True)
class Run:
    """The folders of one run and the name of its adapter.

    `resumed`: it continues from its last checkpoint. `overwrite`: it may replace an adapter in `output`.
    """

    output: Path
    folder: Path
    name: str
    resumed: bool = False
    overwrite: bool = False

    @property
    def metrics(self) -> Path:
        """A JSON-lines file: one object per logged step and evaluation."""
        return self.folder / METRICS

    @property
    def adapter_folder(self) -> Path:
        """The adapter's folder until its proof has passed."""
        return self.folder / ADAPTER

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint, or None. Damaged checkpoints were removed when the run was resumed."""
        return next(
            (checkpoint.folder_of_step(self.folder, step) for step in checkpoint.saved_steps(self.folder)), None
        )

    def save_values(self, recipe: Recipe, values: dict[str, Any]) -> None:
        """Writes the recipe and `values` (digests of data and base, schedule) to run.json.

        Raises RecipeError if the run is resumed and the values differ from the interrupted run's.
        """
        path = self.folder / RUN
        stored = json.loads(path.read_text()) if self.resumed else {"recipe": {}, "facts": {}}
        options, before, values = recipe.explicit_options(), stored["facts"], json.loads(json.dumps(values))
        changed = sorted(name for name in before if values.get(name) != before[name])
        if changed:
            raise RecipeError(
                f"{' and '.join(changed)} changed since the interrupted run in {self.folder} was started",
                got="; ".join(
                    f"{_describe_value(name, options, values)}, then {_describe_value(name, stored['recipe'], before)}"
                    for name in changed
                ),
                fix="give it what it was started with, or start a new run without --resume",
            )
        content = {"recipe": options | {"resume": False, "name": self.name}, "facts": values}
        write_file(path, json.dumps(content, indent=2))

    def resumed_value(self, name: str) -> Any:
        """Returns a value that the interrupted run saved. None if it saved no such value, or if no run is resumed."""
        path = self.folder / RUN
        return json.loads(path.read_text())["facts"].get(name) if self.resumed and path.exists() else None

    def interrupted(self) -> Interrupted:
        """Makes the error for a run that the user stopped: what is saved, and how to resume."""
        step = next(iter(checkpoint.saved_steps(self.folder)), None)
        if not (self.folder / RUN).exists():
            return Interrupted(f"stopped at the very end: the adapter in {self.output} is finished")
        if step is None:
            return Interrupted("stopped before anything was learned", fix="start it again as before")
        return Interrupted(
            f"stopped; step {step:,} is saved in {self.folder}, which stays",
            fix=f"go on with: {self._resume_command()}",
        )

    def saved_progress(self) -> str | None:
        """The message about the newest checkpoint of a failed run. None if there is no checkpoint."""
        step = next(iter(checkpoint.saved_steps(self.folder)), None)
        return f"step {step:,} is saved in {self.folder}; go on with: {self._resume_command()}" if step else None

    def _resume_command(self) -> str:
        return f"hatrack train --resume --output {self.output}"

    def finish(self) -> None:
        """Moves the verified adapter to `output`, registers its name, and removes the run's folder.

        Raises RecipeError if `output` was created meanwhile, AdapterError if the name was taken meanwhile.
        """
        if self.output.exists() and self.overwrite:
            _check_replaceable(self.output)
            with machine_errors(self.output):
                move(self.output, self.folder / REPLACED)
        if not self.output.exists():
            with machine_errors(self.output):
                move(self.adapter_folder, self.output)
        elif not filecmp.cmp(self.adapter_folder / WEIGHTS, self.output / WEIGHTS, shallow=False):
            raise RecipeError("the output exists already", got=self.output, fix="move it away, and --resume")
        try:
            registry.register(self.name, self.output, replace=self.overwrite)
        except AdapterError as error:
            self._remove_folder()
            raise AdapterError(
                f"the adapter is saved in {self.output}, but the name {self.name} was taken meanwhile",
                got=error.got,
                fix=f"hatrack add {self.output} --name ANOTHER",
            ) from error
        self._remove_folder()

    def _remove_folder(self) -> None:
        (self.folder / RUN).unlink()  # first: the next run treats a folder without it as left over and removes it
        shutil.rmtree(self.folder, ignore_errors=True)


def _describe_value(name: str, options: dict[str, Any], values: dict[str, Any]) -> str:
    """Formats a saved value after its option: `bases/small (0f3a...)`."""
    source = options.get({"rows": "data"}.get(name, name))
    return f"{source} ({short_repr(values.get(name))})" if source else short_repr(values.get(name))


@contextlib.contextmanager
def open_run(recipe: Recipe) -> Iterator[tuple[Run, Recipe]]:
    """Yields a new run and its recipe, or with `resume` the interrupted run and its recipe. Locks the run's folder.

    If a folder or name that hatrack derived is taken, it derives another and says so. If the block fails, the newest
    checkpoint is kept and a message says how to resume; without a checkpoint, the run's folder is removed.

    Raises RecipeError if the output exists, the name is taken, the folder is used by another process or holds an
    interrupted run, or if there is nothing to resume. Raises Interrupted on Ctrl-C.
    """
    with contextlib.ExitStack() as claimed:
        run, recipe = _resume(recipe, claimed) if recipe.resume else (_begin(recipe, claimed), recipe)
        try:
            yield run, recipe
        except KeyboardInterrupt:
            raise run.interrupted() from None
        except (Interrupted, Diverged):  # their messages say what is saved
            raise
        except BaseException:
            if saved := run.saved_progress():
                say(saved)
            raise


def _begin(recipe: Recipe, claimed: contextlib.ExitStack) -> Run:
    """Makes a new run and locks its folder. `claimed` releases the lock."""
    for option in ("base", "data"):
        if getattr(recipe, option) is None:
            raise RecipeError(
                f"{flag(option)} is missing", fix=f"add {flag(option)} or a line '{option}:' to the recipe"
            )
    first_reason: OutputTaken | None = None
    for output in output_candidates(recipe):
        with contextlib.ExitStack() as tried:
            try:
                _claim(recipe, output, tried)
            except OutputTaken as reason:
                if reason.part not in output.derived:
                    raise
                first_reason = first_reason or reason
                continue
            claimed.push(tried.pop_all())
            break
    if first_reason is not None:
        say(f"{first_reason.what} ({first_reason.got}): this run makes {output.name}")
    _remove_leftovers(output.run_folder)
    run = Run(output.folder, output.run_folder, output.name, overwrite=recipe.overwrite)
    run.save_values(recipe, {})  # from here on --resume finds it
    return run


class OutputTaken(RecipeError):
    """The folder or the name of a run is taken; `part` says which, `folder` or `name`."""

    def __init__(self, part: str, what: str, *, got: object, fix: str) -> None:
        super().__init__(what, got=got, fix=fix)
        self.part = part


def _claim(recipe: Recipe, output: Output, claimed: contextlib.ExitStack) -> None:
    """Locks the folder of a free output; `claimed` releases the lock. Raises OutputTaken if the output is not free."""
    if output.folder.exists() and not recipe.overwrite:
        raise OutputTaken(
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
        raise OutputTaken("name", error.what, got=error.got, fix=str(error.fix)) from error
    claimed.enter_context(_lock_folder(output.run_folder))
    if (output.run_folder / RUN).exists() and checkpoint.saved_steps(output.run_folder) and not recipe.overwrite:
        raise OutputTaken(
            "folder",
            "the folder holds an interrupted run",
            got=output.run_folder,
            fix=f"continue it with --resume, or remove {output.run_folder}",
        )


def _check_replaceable(output: Path) -> None:
    """Raises RecipeError if a folder is not an adapter's, as --overwrite must remove nothing else."""
    if not (output / CONFIG).is_file():
        raise RecipeError(
            "--overwrite replaces adapters only", got=f"{output}, which is not one", fix="choose another --output"
        )


def _resume(recipe: Recipe, claimed: contextlib.ExitStack) -> tuple[Run, Recipe]:
    """Finds the interrupted run that the recipe means and locks its folder. `claimed` releases the lock."""
    output = find_interrupted(recipe)
    folder = run_folder(output)
    claimed.enter_context(_lock_folder(folder))
    recipe = _merge_recipes(recipe, folder, output)
    checkpoint.remove_damaged(folder)
    shutil.rmtree(folder / ADAPTER, ignore_errors=True)  # saved, but not verified yet
    name = recipe.name or name_from_data(recipe.data)
    registry.check_free(name, output, replace=recipe.overwrite)
    return Run(output, folder, name, resumed=True, overwrite=recipe.overwrite), recipe


@contextlib.contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Makes a run's folder and locks it. Removes it afterwards unless the run can be resumed."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, made)
        _make_folder(folder)
        try:
            stack.enter_context(locked(folder / LOCK, wait=False))
        except BlockingIOError as error:
            holder = (folder / LOCK).read_text() if (folder / LOCK).exists() else ""
            raise OutputTaken(
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


def _remove_leftovers(folder: Path) -> None:
    """Removes the files of an earlier run that finished, or was killed before its first checkpoint."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _make_folder(folder: Path) -> None:
    """Makes a run's folder. Raises RecipeError if that is impossible, or if it holds files that are not a run's."""
    try:
        with machine_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError) as error:
        file = next(path for path in (folder, *folder.parents) if path.exists() and not path.is_dir())
        raise RecipeError(
            "the output cannot be a folder", got=f"{file} is a file", fix="choose another --output"
        ) from error
    if (folder / RUN).exists():
        return
    others = [path.name for path in folder.iterdir() if not RUN_FILES.match(path.name)]
    if others:
        raise RecipeError(
            f"{folder}, the folder for this run, has other files", got=min(others), fix="choose another --output"
        )


def _merge_recipes(recipe: Recipe, folder: Path, output: Path) -> Recipe:
    """Returns the interrupted run's recipe with the options given now. Raises RecipeError if they contradict it."""
    path = folder / RUN
    if not path.exists():
        is_adapter = (output / HATRACK_JSON).exists()
        found = f"{output} is {'finished' if is_adapter else 'not a run of hatrack'}"
        raise RecipeError(
            "there is no interrupted run to resume",
            got=found if output.exists() else f"there is no {path}",
            fix="name its folder with --output, or leave out --resume",
        )
    before = json.loads(path.read_text())["recipe"]
    given = recipe.explicit_options()
    if given.get("layers") == "auto":
        del given["layers"]  # the run has chosen layers, or will
    for name, value in given.items():
        if name not in MAY_CHANGE and before.get(name) != value:
            raise RecipeError(
                f"{flag(name)} differs from the interrupted run",
                got=f"{value} (then: {before.get(name)})",
                fix="leave it out",
            )
    return Recipe.make(**(before | given | {"trust_remote_code": recipe.trust_remote_code}))
