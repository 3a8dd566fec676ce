"""Writes, checks and removes a run's checkpoints. Each is complete or absent.

A manifest lists the files of transformers' Trainer. Knows nothing of what the files hold, except the step of the best
epoch, whose checkpoint a later one needs.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from hatrack.console import say
from hatrack.errors import MachineError
from hatrack.storage import new_folder, write_file

MANIFEST, STATE = "manifest.json", "trainer_state.json"
NEWEST = 2
"""Number of newest checkpoints that `prune` keeps, besides the best epoch's."""


def folder_of_step(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / f"checkpoint-{step}"


def saved_steps(run: Path) -> list[int]:
    """The steps with a checkpoint, newest first."""
    numbers = (path.name.removeprefix("checkpoint-") for path in run.glob("checkpoint-*"))
    return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)


@contextlib.contextmanager
def write_checkpoint(run: Path, step: int) -> Iterator[Path]:
    """Yields a folder to fill. It becomes the checkpoint of `step` once all its files are on disk.

    Raises MachineError if it could not be written; earlier checkpoints are unchanged.
    """
    final = folder_of_step(run, step)
    try:
        with new_folder(final) as working:
            yield working
            write_file(working / MANIFEST, json.dumps(_list_files(working), indent=2))
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors raise their own for a failed write
        if isinstance(error, MachineError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise MachineError(f"{final} could not be written", got=reason, fix="check the disk") from error


def prune(run: Path, best: int | None) -> None:
    """Removes all checkpoints except the newest ones and that of step `best`."""
    for step in saved_steps(run)[NEWEST:]:
        if step != best:
            shutil.rmtree(folder_of_step(run, step), ignore_errors=True)


def remove_damaged(run: Path) -> None:
    """Removes damaged checkpoints, and those whose best epoch's checkpoint is missing or damaged; says which."""
    for path in run.glob(".*"):  # left by a killed process
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    damaged = {step: problem for step in saved_steps(run) if (problem := _find_damage(folder_of_step(run, step)))}
    for step in saved_steps(run):
        problem = damaged.get(step) or _find_missing_best(folder_of_step(run, step), damaged)
        if problem:
            say(f"{folder_of_step(run, step)} is not used: {problem}")
            shutil.rmtree(folder_of_step(run, step))


def _find_missing_best(checkpoint: Path, damaged: dict[int, str]) -> str | None:
    """Returns a message if the best epoch's checkpoint is missing or damaged, else None."""
    best = json.loads((checkpoint / STATE).read_text())["best_global_step"]
    is_missing = best is not None and (best in damaged or not folder_of_step(checkpoint.parent, best).exists())
    return f"the best epoch's checkpoint, of step {best}, is missing" if is_missing else None


def _find_damage(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files; None if they match the manifest."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text())
        for name, (size, digest) in listed.items():
            path = checkpoint / name
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes of {size:,}"
            if _sha256(path) != digest:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None if STATE in listed else f"{STATE} is missing"


def _list_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Returns the size in bytes and the SHA-256 of each file: name -> (size, digest)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, _sha256(path)) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
