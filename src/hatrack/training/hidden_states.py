"""Hidden states of rows, kept on disk between runs: what layers that never change made of a row's tokens.

A folder (an entry) for each thing that made them, told by `about.json`: which base, how many layers, which number
format. In it each writer has two files of its own: `NAME.states`, one row behind the other, and `NAME.index`, where
each row lies. An index is replaced whole, and only after what it tells of is on the disk, so what a killed process
leaves is either used rightly or not at all; a checksum over a row's tokens and states finds whatever else went wrong.

Rows are read by position, not through a mapping: a batch's rows have to be copied side by side in any case, and of a
file that was cut short or a failing disk a mapping tells by SIGBUS, which ends the process.

Knows nothing of models, and needs no torch.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hatrack import storage
from hatrack.console import say_once
from hatrack.errors import HatrackError, MachineError
from hatrack.storage import (
    ABOUT,
    CacheEntry,
    cache_dir,
    folder_size,
    in_use,
    is_in_use,
    read_about,
    remove_unused,
    write_file,
)

FORMAT = 1
STATES, INDEX = ".states", ".index"
RECORD = np.dtype([("row", "V16"), ("start", "<i8"), ("bytes", "<i8"), ("check", "<u4")])
"""What an index tells of a row: its key, where its states begin in the file, how many bytes they are, a checksum."""


class _Place(NamedTuple):
    file: io.FileIO
    start: int
    bytes: int
    check: int


def root() -> Path:
    """Where all entries lie."""
    return cache_dir("states")


def entries() -> list[CacheEntry]:
    """Every entry, the one last used first; damaged ones as well."""
    return storage.list_entries(root())


def count_rows(entry: CacheEntry) -> int:
    """How many rows an entry has; those that two runs at the same time both kept count twice."""
    return sum(len(_told(index)) for index in entry.folder.glob(f"*{INDEX}"))


def remove(entry: CacheEntry) -> bool:
    """Removes an entry's files, unless a run is using them; returns whether it did."""
    return remove_unused(entry.folder)


def row_key(ids: np.ndarray) -> bytes:
    """16 bytes that tell a row by its tokens (T,)."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i8").tobytes(), digest_size=16).digest()


def open_hidden_state_cache(made_by: Mapping[str, Any], source: str, limit: int | None) -> "HiddenStateCache | None":
    """The states of rows that `made_by` made; `source` is what people call the base.

    All entries together stay below `limit` bytes; None stands for half of the disk's free space more than there are.
    None where nothing can be kept, which is said once.
    """
    about = json.loads(json.dumps({"format": FORMAT, **made_by}))
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    try:
        folder, taken = root() / key, folder_size(root())
        room = shutil.disk_usage(root()).free // 2 if limit is None else max(0, limit - taken)
        written = read_about(folder)
        if written is None or {name: written.get(name) for name in about} != about:
            shutil.rmtree(folder, ignore_errors=True)
            write_file(folder / ABOUT, json.dumps({**about, "base": source}, indent=2))
        return HiddenStateCache(folder, room)
    except (OSError, MachineError) as error:
        say_once(f"hidden states are not kept for the next epoch: {error}")
        return None


class HiddenStateCache:
    """Hidden states of rows by their key, of one entry. No method raises for what the disk does: a row that cannot be
    read is not there, and where one cannot be written no more are kept, which is said once."""

    def __init__(self, folder: Path, room: int) -> None:
        """`room` is how many bytes may be added. Raises OSError where the folder cannot be read."""
        self.folder, self.room = folder, room
        self._open = contextlib.ExitStack()
        own = self._open.enter_context(in_use(folder))
        self._places: dict[bytes, _Place] = {}
        for index in sorted(folder.glob(f"*{INDEX}"), key=lambda path: path.stat().st_mtime_ns):
            self._take(index)  # the newest last: it has the rows anew that were found damaged
        if own is not None and not is_in_use(folder, own):
            self._tidy()
        with contextlib.suppress(OSError):
            os.utime(folder / ABOUT)
        self._file: io.FileIO | None = None
        self._added: list[tuple[bytes, int, int, int]] = []
        self._end = self._safe = self._safe_rows = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def read(self, key: bytes, into: memoryview) -> bool:
        """Fills `into` with a row's states, and says whether they were there, whole and of this size."""
        place = self._places.get(key)
        if place is None:
            return False
        try:
            place.file.seek(place.start)
            whole = place.bytes == len(into) and place.file.readinto(into) == len(into)
        except OSError:
            whole = False
        if not whole or _check(key, into) != place.check:
            say_once("some hidden states in the cache are damaged: they are computed again")
            del self._places[key]
            return False
        return True

    def add(self, key: bytes, states: memoryview) -> None:
        """Keeps a row's states; those of a row that is there already are let go."""
        if key in self._places or not self.room:
            return
        if len(states) > self.room:
            say_once(
                "the cache of hidden states is full: other rows are computed anew in each epoch "
                "(--cache-limit lets it grow, hatrack cache clear empties it)"
            )
            self.room = 0
            return
        try:
            self._write(states)
        except OSError as error:
            self._give_up(error)
            return
        assert self._file is not None
        check = _check(key, states)
        self._places[key] = _Place(self._file, self._end, len(states), check)
        self._added.append((key, self._end, len(states), check))
        self._end += len(states)
        self.room -= len(states)

    def flush(self) -> None:
        """Makes what was added so far last: it is there for later runs, whatever becomes of this process."""
        if self._file is None or self._safe_rows == len(self._added):
            return
        content = io.BytesIO()
        try:
            os.fsync(self._file.fileno())
            np.save(content, np.array(self._added, dtype=RECORD), allow_pickle=False)
            write_file(Path(self._file.name).with_suffix(INDEX), content.getvalue())
        except (OSError, HatrackError) as error:
            self._give_up(error)
            return
        self._safe, self._safe_rows = self._end, len(self._added)

    def close(self) -> None:
        """Lets go of the files, after a flush."""
        self.flush()
        self._places.clear()
        self._open.close()

    def _write(self, states: memoryview) -> None:
        if self._file is None:
            path = self.folder / f"{secrets.token_hex(8)}{STATES}"
            self._file = self._open.enter_context(path.open("xb+", buffering=0))
        self._file.seek(self._end)
        while states:
            states = states[self._file.write(states) :]

    def _give_up(self, error: Exception) -> None:
        """Adds nothing from now on, and hands back the disk space of what is not safe yet: a checkpoint may need it."""
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "disk is full" in str(error)
        why = "the disk is full" if full else str(error)
        say_once(f"no more hidden states are kept: {why}; training goes on, and computes the others in each epoch")
        self.room = 0
        for key, *_ in self._added[self._safe_rows :]:
            self._places.pop(key, None)
        del self._added[self._safe_rows :]
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(self._safe)
        self._end = self._safe

    def _take(self, index: Path) -> None:
        """Adds the rows of one writer's files, but for those that its states are too short for."""
        try:
            file = self._open.enter_context(index.with_suffix(STATES).open("rb", buffering=0))
        except OSError:
            return
        there = os.fstat(file.fileno()).st_size
        for row, start, count, check in _told(index).tolist():
            if 0 <= start <= start + count <= there:
                self._places[bytes(row)] = _Place(file, start, count, check)

    def _tidy(self) -> None:
        """Removes what killed writers left that no index tells of. Nobody else may have the entry open."""
        ends: dict[str, int] = {}
        for place in self._places.values():
            ends[place.file.name] = max(ends.get(place.file.name, 0), place.start + place.bytes)
        for path in self.folder.iterdir():
            kept = str(path if path.suffix != INDEX else path.with_suffix(STATES)) in ends
            with contextlib.suppress(OSError):
                if path.name != ABOUT and not kept:
                    path.unlink()
                elif path.suffix == STATES and path.stat().st_size > ends[str(path)]:
                    os.truncate(path, ends[str(path)])


def _told(index: Path) -> np.ndarray:
    """What an index says, (rows,) records; none where it is damaged."""
    try:
        told = np.load(io.BytesIO(index.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return np.empty(0, RECORD)
    return told if told.dtype == RECORD and told.ndim == 1 else np.empty(0, RECORD)


def _check(key: bytes, states: memoryview) -> int:
    return zlib.crc32(states, zlib.crc32(key))
