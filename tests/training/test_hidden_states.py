"""The store of hidden states: what is read is what was kept, and anything else is not there."""

import errno
import fcntl  # what filelock locks with here
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hatrack import storage
from hatrack.storage import ABOUT
from hatrack.training import hidden_states
from hatrack.training.hidden_states import (
    INDEX_SUFFIX,
    STATES_SUFFIX,
    HiddenStateCache,
    list_entries,
    open_hidden_state_cache,
    remove_entry,
    row_key,
)

MADE_BY: dict[str, Any] = {"fingerprint": "abc", "layers": 4, "dtype": "float32"}
PLENTY = 2**20


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "cache"))


def _open(limit: int | None = PLENTY, **made_by: Any) -> HiddenStateCache:
    found = open_hidden_state_cache(MADE_BY | made_by, "a-base", limit)
    assert found is not None
    return found


def _key(number: int) -> bytes:
    return row_key(np.array([number, 7]))


def _data(number: int, count: int = 64) -> memoryview:
    return memoryview(np.random.default_rng(number).bytes(count))


def _read(kept: HiddenStateCache, number: int, count: int = 64) -> bytes | None:
    into = bytearray(count)
    return bytes(into) if kept.read(_key(number), memoryview(into)) else None


def _filled(*numbers: int, **made_by: Any) -> Path:
    kept = _open(**made_by)
    for number in numbers:
        kept.add(_key(number), _data(number))
    kept.close()
    return kept.folder


def test_what_was_kept_is_read_in_this_run_and_in_later_ones() -> None:
    kept = _open()
    kept.add(_key(1), _data(1))
    kept.add(_key(2), _data(2, 12))
    assert _read(kept, 1) == bytes(_data(1)) and _read(kept, 2, 12) == bytes(_data(2, 12)) and _read(kept, 3) is None
    kept.close()
    later = _open()
    assert len(later) == 2 and _read(later, 2, 12) == bytes(_data(2, 12)) and _read(later, 1) == bytes(_data(1))
    later.close()


def test_runs_at_the_same_time_keep_rows_side_by_side() -> None:
    one, other = _open(), _open()
    one.add(_key(1), _data(1))
    other.add(_key(2), _data(2))
    one.close()
    other.close()
    later = _open()
    assert [_read(later, number) for number in (1, 2)] == [bytes(_data(1)), bytes(_data(2))]
    later.close()


@pytest.mark.parametrize("other", [{"fingerprint": "abd"}, {"layers": 3}, {"dtype": "bfloat16"}, {"pad": 1}])
def test_what_another_base_depth_or_format_made_is_not_found(other: dict[str, Any]) -> None:
    _filled(1)
    kept = _open(**other)
    assert _read(kept, 1) is None and len(kept) == 0
    kept.close()


def test_rows_are_told_by_all_their_tokens() -> None:
    rows = [[1, 2, 3], [1, 2], [3, 2, 1], [1, 2, 4], [1, 2, 3, 0]]
    assert len({row_key(np.array(row)) for row in rows}) == len(rows)
    assert row_key(np.array([1, 2, 3], dtype=np.int32)) == row_key(np.array([9, 1, 2, 3], dtype=np.int64)[1:])


def test_what_was_not_flushed_when_a_run_was_killed_is_not_there() -> None:
    killed = _open()
    killed.add(_key(1), _data(1))
    killed.flush()
    killed.add(_key(2), _data(2))
    killed._open.close()  # without a flush
    later = _open()
    assert len(later) == 1 and _read(later, 1) == bytes(_data(1)) and _read(later, 2) is None
    assert [path.stat().st_size for path in later.folder.glob(f"*{STATES_SUFFIX}")] == [64]  # and takes no room
    later.close()


def test_what_a_run_without_an_index_left_is_removed() -> None:
    killed = _open()
    killed.add(_key(1), _data(1))
    killed._open.close()
    later = _open()
    assert len(later) == 0 and not list(later.folder.glob(f"*{STATES_SUFFIX}"))
    later.close()


def test_a_running_writers_files_are_left_alone() -> None:
    running = _open()
    running.add(_key(1), _data(1))
    _open().close()
    assert _read(running, 1) == bytes(_data(1))
    running.close()
    assert len(list(running.folder.glob(f"*{INDEX_SUFFIX}"))) == 1


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "index cut", "index of something else", "about gone"])
def test_damaged_files_are_not_trusted(damage: str) -> None:
    folder = _filled(1, 2)
    (data,), (index,) = folder.glob(f"*{STATES_SUFFIX}"), folder.glob(f"*{INDEX_SUFFIX}")
    whole = data.read_bytes()
    if damage == "flipped":
        data.write_bytes(whole[:70] + bytes([whole[70] ^ 1]) + whole[71:])
    elif damage == "cut":
        os.truncate(data, 100)
    elif damage == "gone":
        data.unlink()
    elif damage == "index cut":
        os.truncate(index, index.stat().st_size - 20)
    elif damage == "index of something else":
        with index.open("wb") as file:
            np.save(file, np.arange(4))
    else:
        (folder / ABOUT).write_text("{}")
    kept = _open()
    first = bytes(_data(1)) if damage in ("flipped", "cut") else None
    assert _read(kept, 1) == first and _read(kept, 2) is None
    kept.add(_key(2), _data(2))  # what was lost is kept anew
    kept.close()
    later = _open()
    assert _read(later, 1) == first and _read(later, 2) == bytes(_data(2))
    later.close()


def test_an_index_beside_another_writers_states_is_found_out() -> None:
    """Right sizes, wrong rows: the checksum holds a row's tokens and its states together."""
    first, second = _filled(1), _filled(2, layers=5)
    (taken,), (index,) = second.glob(f"*{STATES_SUFFIX}"), first.glob(f"*{INDEX_SUFFIX}")
    shutil.copy(taken, index.with_suffix(STATES_SUFFIX))
    kept = _open()
    assert _read(kept, 1) is None
    kept.close()


def test_the_limit_holds_for_all_entries_together(capsys: pytest.CaptureFixture[str]) -> None:
    _filled(1, 2, layers=3)
    taken = storage.folder_size(hidden_states.root())
    kept = _open(limit=taken + 64 * 3 + 63)
    for number in range(10, 20):
        kept.add(_key(number), _data(number))
    assert len(kept) == 3 and _read(kept, 12) == bytes(_data(12)) and _read(kept, 13) is None
    kept.close()
    assert capsys.readouterr().err.count("the cache of hidden states is full") == 1


def test_by_default_half_of_the_disk_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 700, 300))
    kept = _open(limit=None)
    assert kept.room == 150
    kept.close()


@pytest.mark.parametrize("when", ["write", "flush"])
def test_a_full_disk_is_said_once_and_its_room_given_back(
    when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = _open()
    kept.add(_key(1), _data(1))
    kept.flush()
    kept.add(_key(2), _data(2))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if when == "write":
            patch.setattr(kept, "_write", full)
            kept.add(_key(3), _data(3))
        else:
            patch.setattr(os, "fsync", full)
            kept.flush()
    kept.add(_key(4), _data(4))
    kept.flush()
    assert [_read(kept, number) for number in (1, 2, 3, 4)] == [bytes(_data(1)), None, None, None]
    (data,) = kept.folder.glob(f"*{STATES_SUFFIX}")
    assert data.stat().st_size == 64
    assert capsys.readouterr().err.count("no more hidden states are cached: the disk is full") == 1
    kept.close()


def test_a_cache_that_cannot_be_made_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "file"))
    assert open_hidden_state_cache(MADE_BY, "a-base", None) is None
    assert "hidden states are not cached" in capsys.readouterr().err


def test_entries_tell_what_is_there_and_go_unless_used() -> None:
    _filled(1, 2, 3)
    folder = _filled(4, layers=5)
    os.utime(folder / ABOUT, (1000, 1000))
    newest, oldest = list_entries()
    assert (hidden_states.count_rows(newest), hidden_states.count_rows(oldest), oldest.used) == (3, 1, 1000)
    assert newest.about == {"format": hidden_states.FORMAT, **MADE_BY, "base": "a-base"} and newest.bytes > 3 * 64
    using = _open()
    assert not remove_entry(newest) and remove_entry(oldest)
    assert _read(using, 1) == bytes(_data(1))
    using.close()
    assert remove_entry(newest) and list_entries() == []


def test_a_disk_without_locks_keeps_and_reads_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    _filled(1)
    kept = _open()
    assert _read(kept, 1) == bytes(_data(1))
    kept.close()
