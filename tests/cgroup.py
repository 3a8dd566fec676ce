"""A memory control group to run a command in, where this machine lets one be made."""

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOTS = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max"))
"""Where control groups of version 1 and 2 are, and the file that takes the limit."""


@contextlib.contextmanager
def group(limit: int) -> Iterator[Path | None]:
    """A group that may take `limit` bytes, page cache included; None where none can be made."""
    for root, file in ROOTS:
        folder = Path(root) / f"hatrack-{uuid.uuid4().hex[:8]}"
        if not (Path(root) / "cgroup.procs").exists():
            continue
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / file).write_text(str(limit))
            yield folder
            return
        except OSError:
            pass
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()
    yield None


def run_in(folder: Path, command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """Runs a command with all its memory charged to the group."""
    procs = folder / "cgroup.procs"
    return subprocess.run(command, preexec_fn=lambda: procs.write_text(str(os.getpid())) and None, **options)


def forget(folder: Path) -> None:
    """Has the system drop what it keeps of the files under `folder`, so that they are read from the disk again."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
