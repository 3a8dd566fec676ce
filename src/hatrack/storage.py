"""Where things are kept between runs, and how they get there whole or not at all.

Knows nothing of models, data or adapters.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hatrack.errors import MachineError


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
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"the disk is full while writing {path}", fix="free some space, or choose another folder"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise MachineError(
                f"writing {path} is not allowed", got=error.strerror, fix="choose a folder you may write to"
            ) from error
        raise


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yields an empty folder beside `final`, and renames it to `final` once the block ends without an error.

    `final` therefore never exists half-written. If another process made `final` meanwhile, theirs stays.
    """
    with machine_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        try:
            yield working
            _sync(working)
            working.chmod(0o755)
            try:
                working.rename(final)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not any(final.iterdir()):
                    raise
        finally:
            shutil.rmtree(working, ignore_errors=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a whole file, or leaves the one that was there."""
    data = content.encode() if isinstance(content, str) else content
    with machine_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, working = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(working).chmod(0o644)
            Path(working).replace(path)
        except BaseException:
            Path(working).unlink(missing_ok=True)
            raise


def folder_size(folder: Path) -> int:
    """Bytes in all files under `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sync(folder: Path) -> None:
    """Makes sure the bytes are on disk before a rename makes them visible."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
