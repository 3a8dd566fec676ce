"""Files and folders that appear whole or not at all, locks between processes, and the cache folder.

Knows nothing of models, data or adapters.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir, user_data_dir

from hatrack.errors import HatrackError, MachineError

FULL_BELOW = 2**20
"""A disk with fewer free bytes than this counts as full."""

ABANDONED_AFTER = 60
"""An unfinished folder that is not in use counts as left by a killed process after this many seconds."""

LOCK = ".lock"
"""Suffix of lock files. While a process has one locked, the folder beside it is in use."""

ABOUT = "about.json"
"""The file in a cache entry that says what made it. Its modification time is when the entry was last used."""


@dataclass(frozen=True)
class CacheEntry:
    """A folder of the cache. `about`: the content of its about.json, empty if that is damaged. `used`: when a
    run last used it, in seconds since 1970."""

    folder: Path
    about: dict[str, Any]
    bytes: int
    used: float


def cache_dir(*parts: str) -> Path:
    """A folder in the cache: `$HATRACK_CACHE`, an existing `~/.cache/hatrack`, or else the system's folder for caches.

    Everything in it can be recreated.
    """
    root = os.environ.get("HATRACK_CACHE") or _prefer_existing("~/.cache/hatrack", user_cache_dir("hatrack", False))
    folder = Path(root).expanduser().joinpath(*parts)
    with machine_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def data_dir() -> Path:
    """Where the rack is: `$HATRACK_HOME`, an existing `~/.hatrack`, or else the system's folder for a user's data."""
    root = os.environ.get("HATRACK_HOME") or _prefer_existing("~/.hatrack", user_data_dir("hatrack", False))
    return Path(root).expanduser()


def _prefer_existing(old: str, new: str) -> str:
    return old if Path(old).expanduser().is_dir() else new


@contextlib.contextmanager
def machine_errors(path: Path | str) -> Iterator[None]:
    """Turns the errors of a full disk or a forbidden folder into a `MachineError` that names `path`."""
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
                f"{path} cannot be written", got=os.strerror(number), fix="check that disk, or choose another one"
            ) from error
        raise


def _error_number(error: Exception) -> int | None:
    """The errno of a failed call; libraries in Rust (safetensors, tokenizers) only write it in their message."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Locks a file while the block runs, and writes this process's number into it. The system releases the lock when
    the process ends, however it ends.

    Raises BlockingIOError if another process has the lock and `wait` is off.
    """
    with machine_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, thread_local=False)
        try:
            lock.acquire(blocking=wait)
        except Timeout as error:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process has this lock", str(path)) from error
    try:
        with machine_errors(path), contextlib.suppress(PermissionError):  # on Windows nobody can write a locked file
            path.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yields an empty folder beside `final`, and renames it to `final` once the block ends without an error.

    `final` is therefore never incomplete. If another process made `final` meanwhile, that one stays. Folders that a
    killed process left unfinished are removed.
    """
    with machine_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{final.name}.hatrack-"
        _remove_abandoned(final.parent, prefix)
        working = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
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
def in_use(folder: Path) -> Iterator[Path | None]:
    """Protects a folder from `remove_unused` in any process while the block runs, by locking a file beside it.

    Yields that file, or None if it could not be locked.
    """
    path = folder.with_name(f"{folder.name}.{os.getpid()}-{secrets.token_hex(4)}{LOCK}")
    lock = FileLock(path, thread_local=False)
    try:
        with contextlib.suppress(OSError):  # the disk may be full, read-only, or a network disk without locks
            lock.acquire(timeout=1)
        yield path if lock.is_locked else None
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def is_in_use(folder: Path, own: Path | None = None) -> bool:
    """Whether a folder is in use, or may be, as on a disk without locks. `own`: a lock file to ignore."""
    return any(path != own and _is_locked(path) for path in _lock_files(folder))


def remove_unused(folder: Path) -> bool:
    """Removes a folder unless it is in use; returns whether it did."""
    if is_in_use(folder):
        return False
    shutil.rmtree(folder)
    for path in _lock_files(folder):  # left by killed processes
        path.unlink(missing_ok=True)
    return True


def _lock_files(folder: Path) -> list[Path]:
    names = re.compile(re.escape(folder.name) + r"\.[0-9]+-[0-9a-f]+" + re.escape(LOCK))
    return [path for path in folder.parent.iterdir() if names.fullmatch(path.name)]


def _is_locked(path: Path) -> bool:
    try:
        with FileLock(path, thread_local=False).acquire(blocking=False):
            return False
    except OSError:  # filelock's Timeout is one
        return True


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Removes unfinished folders that no living process uses; the newest stay, as they may not be locked yet."""
    for path in parent.iterdir():
        if path.name.startswith(prefix) and path.is_dir():
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                    remove_unused(path)


def move(source: Path, target: Path) -> None:
    """Renames within one disk; returns once the rename would survive a power failure."""
    source.rename(target)
    _sync_entries(target.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file as a whole, or leaves the one that was there."""
    with new_file(path) as file:  # file names contain surrogates if the locale cannot decode them
        file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[BinaryIO]:
    """Yields a file to write, which replaces `final` once the block ends without an error."""
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
    """Every folder in `root`, most recently used first; `about` is empty for unfinished and damaged ones."""
    found = []
    for folder in (path for path in root.iterdir() if path.is_dir()):
        about = folder / ABOUT
        with contextlib.suppress(OSError):
            used = (about if about.exists() else folder).stat().st_mtime
            found.append(CacheEntry(folder, read_about(folder) or {}, folder_size(folder), used))
    return sorted(found, key=lambda entry: -entry.used)


def read_about(folder: Path) -> dict[str, Any] | None:
    """The about.json of an entry; None if it is missing or not a JSON object."""
    try:
        found = json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def folder_size(folder: Path) -> int:
    """Bytes in all files under `folder`; a file that is removed meanwhile counts as 0."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _sync(folder: Path) -> None:
    """Writes a folder's files through to the disk, before a rename makes them visible."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            _sync_entries(path)
    _sync_entries(folder)


def _sync_entries(folder: Path) -> None:
    """Writes the names in a folder through to the disk. Windows, which cannot open folders, does that itself."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
