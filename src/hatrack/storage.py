"""Where things are kept between runs, and how they get there whole or not at all.

Knows nothing of models, data or adapters.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hatrack.errors import HatrackError, MachineError

FULL_BELOW = 2**20
"""A disk with less than a MiB left is full."""

ABANDONED_AFTER = 60
"""Seconds after which an unfinished folder that nobody holds is a killed process's."""

ABOUT = "about.json"
"""In a folder of the cache: what made it. Its time of change is when it was last used."""


@dataclass(frozen=True)
class CacheEntry:
    """A folder of the cache: what made it (nothing where that is damaged), bytes on disk, when a run last used it
    (seconds since 1970)."""

    folder: Path
    about: dict[str, Any]
    bytes: int
    used: float


def cache_dir(*parts: str) -> Path:
    """A folder under the cache: `$HATRACK_CACHE`, or `~/.cache/hatrack`. Everything in it can be made again."""
    root = os.environ.get("HATRACK_CACHE") or Path.home() / ".cache" / "hatrack"
    folder = Path(root).expanduser().joinpath(*parts)
    with machine_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def machine_errors(path: Path | str) -> Iterator[None]:
    """Says a full disk or a forbidden folder plainly, as a `MachineError` that names `path`."""
    try:
        yield
    except MachineError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"the disk is full while writing {path}", fix="free some space, or choose another folder"
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise MachineError(
                f"writing {path} is not allowed", got=os.strerror(number), fix="choose a folder you may write to"
            ) from error
        if number in (errno.EIO, errno.EFBIG, errno.ENOLCK, errno.ENOTSUP):
            raise MachineError(
                f"{path} cannot be written", got=os.strerror(number), fix="look after that disk, or choose another one"
            ) from error
        raise


def _error_number(error: Exception) -> int | None:
    """The system's number of a failed call; libraries in Rust (safetensors, tokenizers) only write it in their text."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Keeps other processes out of the block that lock the same file. The lock goes with the process, however it ends.

    Raises BlockingIOError where another one has it and `wait` is off; the file then holds that process's number.
    """
    with machine_errors(path):
        handle = _lock(path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    try:
        with machine_errors(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def _lock(path: Path, how: int) -> int:
    """Opens and locks a file. One that its last holder removed meanwhile would lock nobody out: then once more."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            opened.callback(os.close, handle)
            fcntl.flock(handle, how)
            if os.path.samestat(os.fstat(handle), path.stat()):
                opened.pop_all()
                return handle


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yields an empty folder beside `final`, and renames it to `final` once the block ends without an error.

    `final` therefore never exists half-written. If another process made `final` meanwhile, theirs stays. What a killed
    process had begun of it is removed.
    """
    with machine_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        begun = f".{final.name}.hatrack-"
        _remove_abandoned(final.parent, begun)
        working = Path(tempfile.mkdtemp(prefix=begun, dir=final.parent))
        try:
            with in_use(working):
                yield working
                _sync(working)
                working.chmod(0o755)
                try:
                    move(working, final)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not any(final.iterdir()):
                        raise
        except HatrackError:
            raise
        except Exception as error:
            if shutil.disk_usage(final.parent).free < FULL_BELOW:  # torch does not say why it could not write
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise
        finally:
            shutil.rmtree(working, ignore_errors=True)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keeps `remove_unused` from a folder while the block runs, also in other processes."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a network's disk may lock no folders
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def remove_unused(folder: Path) -> bool:
    """Removes a folder, unless somebody holds it (or may: some disks lock nothing); says whether it did."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        shutil.rmtree(folder)
        return True
    finally:
        os.close(handle)


def _remove_abandoned(parent: Path, begun: str) -> None:
    """Removes unfinished folders that no living process holds; the newest may not have been locked yet, and stay."""
    for path in parent.iterdir():
        if path.name.startswith(begun):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                    remove_unused(path)


def move(source: Path, target: Path) -> None:
    """Renames on one disk, and returns when a power cut can no longer undo it."""
    source.rename(target)
    _sync_entries(target.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a whole file, or leaves the one that was there."""
    with new_file(path) as file:  # names of files hold surrogates where the locale knows too few letters
        file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[BinaryIO]:
    """Yields a file to write, which takes the place of `final` once the block ends without an error."""
    with machine_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, working = tempfile.mkstemp(prefix=f".{final.name}.", dir=final.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(working).chmod(0o644)
            Path(working).replace(final)
            _sync_entries(final.parent)
        except BaseException:
            Path(working).unlink(missing_ok=True)
            raise


def list_entries(root: Path) -> list[CacheEntry]:
    """Every folder under `root`, the one last used first; of unfinished and damaged ones nothing is told."""
    found = []
    for folder in root.iterdir():
        about = folder / ABOUT
        with contextlib.suppress(OSError):
            used = (about if about.exists() else folder).stat().st_mtime
            found.append(CacheEntry(folder, read_about(folder) or {}, folder_size(folder), used))
    return sorted(found, key=lambda entry: -entry.used)


def read_about(folder: Path) -> dict[str, Any] | None:
    """What an entry tells of itself; None where it is not there, or is no JSON object."""
    try:
        found = json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def folder_size(folder: Path) -> int:
    """Bytes in all files under `folder`; a file that goes while we look counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _sync(folder: Path) -> None:
    """Makes sure the bytes are on disk before a rename makes them visible."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            _sync_entries(path)
    _sync_entries(folder)


def _sync_entries(folder: Path) -> None:
    """The same for the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
