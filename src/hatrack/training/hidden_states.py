"""Caches hidden states of rows on disk, between epochs and between runs.

With `--layers top-N`, saves about a third of each epoch after the first, and of every epoch of later runs on the same
rows (docs/log.md: MiniLM 36%, SmolLM2 27%), because the layers below the adapters are not computed again.

The cache has one folder (an entry) per base, depth and dtype, described in its `about.json`. Each process that writes
has two files there: `NAME.states` holds the rows one after the other, `NAME.index` says where each row begins. An index
is replaced as a whole, and only after the rows it lists are on disk, so a killed process leaves only rows that are
complete or not listed. A checksum over a row's tokens and states finds other damage.

Rows are read with system calls, not from mapped memory, where a truncated file or a failing disk would end the process
by SIGBUS. Knows nothing of models, and needs no torch.
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
STATES_SUFFIX, INDEX_SUFFIX = ".states", ".index"
RECORD = np.dtype([("row", "V16"), ("start", "<i8"), ("bytes", "<i8"), ("check", "<u4")])
"""A row in an index: its key, the offset of its states in the file, their size in bytes, and a checksum."""


class _Location(NamedTuple):
    """The location of a row's states: file, offset, size in bytes, checksum."""

    file: io.FileIO
    start: int
    bytes: int
    checksum: int


def root() -> Path:
    """Returns the folder of all entries."""
    return cache_dir("states")


def list_entries() -> list[CacheEntry]:
    """Returns all entries, damaged ones included, the most recently used first."""
    return storage.list_entries(root())


def count_rows(entry: CacheEntry) -> int:
    """Counts an entry's rows. A row that two runs cached at the same time counts twice."""
    return sum(len(_read_index(index)) for index in entry.folder.glob(f"*{INDEX_SUFFIX}"))


def remove_entry(entry: CacheEntry) -> bool:
    """Removes an entry's files. Returns False if a run is using them."""
    return remove_unused(entry.folder)


def row_key(ids: np.ndarray) -> bytes:
    """16 bytes that identify a row by its tokens (T,)."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i8").tobytes(), digest_size=16).digest()


def open_hidden_state_cache(made_by: Mapping[str, Any], source: str, limit: int | None) -> "HiddenStateCache | None":
    """Opens the entry of the states that `made_by` describes. `source` is the base's name, for `hatrack cache`.

    `limit` is the maximum total size of all entries in bytes; None allows adding half of the disk's free space. Returns
    None if nothing can be cached, and says so once.
    """
    about = json.loads(json.dumps({"format": FORMAT, **made_by}))
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    try:
        folder, used = root() / key, folder_size(root())
        room = shutil.disk_usage(root()).free // 2 if limit is None else max(0, limit - used)
        written = read_about(folder)
        if written is None or {name: written.get(name) for name in about} != about:
            shutil.rmtree(folder, ignore_errors=True)
            write_file(folder / ABOUT, json.dumps({**about, "base": source}, indent=2))
        return HiddenStateCache(folder, room)
    except (OSError, MachineError) as error:
        say_once(f"hidden states are not cached for the next epoch: {error}")
        return None


class HiddenStateCache:
    """One entry: hidden states of rows by key. `len` is the number of rows.

    No method raises for a disk error: an unreadable row counts as missing, and after a failed write no more rows are
    added, which is reported once.
    """

    def __init__(self, folder: Path, room: int) -> None:
        """`room` is the number of bytes that may be added. Raises OSError if the folder cannot be read."""
        self.folder, self.room = folder, room
        self._open = contextlib.ExitStack()
        own = self._open.enter_context(in_use(folder))
        self._locations: dict[bytes, _Location] = {}
        for index in sorted(folder.glob(f"*{INDEX_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns):
            self._load(index)  # the newest last: it has new copies of rows that were found damaged
        if own is not None and not is_in_use(folder, own):
            self._remove_unlisted()
        with contextlib.suppress(OSError):
            os.utime(folder / ABOUT)
        self._file: io.FileIO | None = None
        self._added: list[tuple[bytes, int, int, int]] = []  # records of the index
        self._end = 0  # of the file, in bytes
        self._flushed_end = self._flushed_rows = 0

    def __len__(self) -> int:
        return len(self._locations)

    def __contains__(self, key: bytes) -> bool:
        return key in self._locations

    def read(self, key: bytes, into: memoryview) -> bool:
        """Fills `into` with a row's states. Returns False if they are missing, damaged or of another size."""
        found = self._locations.get(key)
        if found is None:
            return False
        try:
            found.file.seek(found.start)
            is_complete = found.bytes == len(into) and found.file.readinto(into) == len(into)
        except OSError:
            is_complete = False
        if not is_complete or _checksum(key, into) != found.checksum:
            say_once("some hidden states in the cache are damaged: they are computed again")
            del self._locations[key]
            return False
        return True

    def add(self, key: bytes, states: memoryview) -> None:
        """Adds a row's states, unless the row is cached already."""
        if key in self._locations or not self.room:
            return
        if len(states) > self.room:
            say_once(
                "the cache of hidden states is full: the other rows are computed again in each epoch "
                "(--cache-limit lets it grow, hatrack cache clear empties it)"
            )
            self.room = 0
            return
        try:
            self._write(states)
        except OSError as error:
            self._stop_adding(error)
            return
        assert self._file is not None
        checksum = _checksum(key, states)
        self._locations[key] = _Location(self._file, self._end, len(states), checksum)
        self._added.append((key, self._end, len(states), checksum))
        self._end += len(states)
        self.room -= len(states)

    def flush(self) -> None:
        """Writes the index, so that later runs find the rows added so far even if this process is killed."""
        if self._file is None or self._flushed_rows == len(self._added):
            return
        content = io.BytesIO()
        try:
            os.fsync(self._file.fileno())
            np.save(content, np.array(self._added, dtype=RECORD), allow_pickle=False)
            write_file(Path(self._file.name).with_suffix(INDEX_SUFFIX), content.getvalue())
        except (OSError, HatrackError) as error:
            self._stop_adding(error)
            return
        self._flushed_end, self._flushed_rows = self._end, len(self._added)

    def close(self) -> None:
        """Flushes and closes the files."""
        self.flush()
        self._locations.clear()
        self._open.close()

    def _write(self, states: memoryview) -> None:
        if self._file is None:
            path = self.folder / f"{secrets.token_hex(8)}{STATES_SUFFIX}"
            self._file = self._open.enter_context(path.open("xb+", buffering=0))
        self._file.seek(self._end)
        while states:
            states = states[self._file.write(states) :]

    def _stop_adding(self, error: Exception) -> None:
        """Stops adding rows, and removes rows that are not flushed, because a checkpoint may need the disk space."""
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "disk is full" in str(error)
        why = "the disk is full" if is_full else str(error)
        say_once(
            f"no more hidden states are cached: {why}; training goes on, and computes the other rows in each epoch"
        )
        self.room = 0
        for key, *_ in self._added[self._flushed_rows :]:
            self._locations.pop(key, None)
        del self._added[self._flushed_rows :]
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(self._flushed_end)
        self._end = self._flushed_end

    def _load(self, index: Path) -> None:
        """Loads an index, except rows that end beyond the end of its states file."""
        try:
            file = self._open.enter_context(index.with_suffix(STATES_SUFFIX).open("rb", buffering=0))
        except OSError:
            return
        size = os.fstat(file.fileno()).st_size
        for row, start, count, checksum in _read_index(index).tolist():
            if 0 <= start <= start + count <= size:
                self._locations[bytes(row)] = _Location(file, start, count, checksum)

    def _remove_unlisted(self) -> None:
        """Removes states that killed processes left without an index. No other process may have the entry open."""
        ends: dict[str, int] = {}
        for found in self._locations.values():
            ends[found.file.name] = max(ends.get(found.file.name, 0), found.start + found.bytes)
        for path in self.folder.iterdir():
            is_listed = str(path if path.suffix != INDEX_SUFFIX else path.with_suffix(STATES_SUFFIX)) in ends
            with contextlib.suppress(OSError):
                if path.name != ABOUT and not is_listed:
                    path.unlink()
                elif path.suffix == STATES_SUFFIX and path.stat().st_size > ends[str(path)]:
                    os.truncate(path, ends[str(path)])


def _read_index(index: Path) -> np.ndarray:
    """Reads the records (rows,) of an index; none if it is damaged."""
    try:
        records = np.load(io.BytesIO(index.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return np.empty(0, RECORD)
    return records if records.dtype == RECORD and records.ndim == 1 else np.empty(0, RECORD)


def _checksum(key: bytes, states: memoryview) -> int:
    return zlib.crc32(states, zlib.crc32(key))
