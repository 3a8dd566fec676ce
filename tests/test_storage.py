"""Files and folders appear whole or not at all, and a failing disk is said plainly."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hatrack.console import format_size
from hatrack.errors import MAX_COMPLAINTS, DataError, HatrackError, MachineError
from hatrack.storage import cache_dir, data_dir, folder_size, locked, machine_errors, new_folder, write_file


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "hat"
    with new_folder(final) as working:
        (working / "a").write_bytes(b"12345")
        assert not final.exists()
    assert folder_size(final) == 5
    assert [path.name for path in final.parent.iterdir()] == ["hat"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half-way"), new_folder(tmp_path / "hat") as working:
        (working / "a").write_text("x")
        raise ValueError("half-way")
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_writers_stays(tmp_path: Path) -> None:
    with new_folder(tmp_path / "hat") as working:
        (working / "a").write_text("second")
        (tmp_path / "hat").mkdir()
        (tmp_path / "hat" / "a").write_text("first")
    assert (tmp_path / "hat" / "a").read_text() == "first"


def test_what_killed_processes_began_goes(tmp_path: Path) -> None:
    holding = (
        "import sys, time; from pathlib import Path; from hatrack.storage import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as working: print(working, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", holding, str(tmp_path / "hat")]
    (tmp_path / ".hat.of-mine").mkdir()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        begun = Path(other.stdout.readline().strip())
        os.utime(begun, (0, 0))
        with new_folder(tmp_path / "hat"):
            assert begun.exists()  # its process lives
        other.kill()
    (tmp_path / "hat").rmdir()
    with new_folder(tmp_path / "hat"):
        assert not begun.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hat.of-mine", "hat"]


def test_a_file_is_replaced_whole_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_file(path, "one")
    write_file(path, b"two")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full while writing"),
        (errno.EACCES, "is not allowed"),
        (errno.EROFS, "is not allowed"),
        (errno.ENOLCK, "cannot be written"),
    ],
)
def test_a_failing_disk_is_a_failure_of_the_machine(number: int, message: str) -> None:
    with pytest.raises(MachineError, match=message) as caught, machine_errors("/there/hat"):
        raise OSError(number, "no")
    assert caught.value.exit_code == 1 and "/there/hat" in str(caught.value) and caught.value.fix


def test_other_errors_pass_through() -> None:
    with pytest.raises(FileNotFoundError), machine_errors("x"):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_what_a_rust_library_says_of_the_disk_is_understood() -> None:
    with pytest.raises(MachineError, match="the disk is full while writing x"), machine_errors("x"):
        raise ValueError("I/O error: No space left on device (os error 28)")


def test_one_at_a_time_has_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lock"
    with locked(path):
        assert path.read_text() == str(os.getpid())
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            pass
    with locked(path, wait=False):
        pass


def test_a_removed_lock_file_locks_nobody_out_and_nobody_in(tmp_path: Path) -> None:
    """Whoever waited for a file that its holder removed takes the new one, as everybody after it."""
    path, order = tmp_path / "lock", []

    def wait() -> None:
        with locked(path):
            order.append("second")
            with pytest.raises(BlockingIOError), locked(path, wait=False):
                pass

    with locked(path):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.1)
        path.unlink()
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"] and path.exists()


def test_a_file_that_goes_while_we_look_counts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    monkeypatch.setattr(Path, "rglob", lambda self, _: iter([self / "a", self / "gone"]))
    assert folder_size(tmp_path) == 5


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "c"))
    assert cache_dir("a", "b") == tmp_path / "c" / "a" / "b"


def test_folders_of_earlier_versions_go_on_being_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HATRACK_CACHE", "HATRACK_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert (cache_dir(), data_dir()) == (tmp_path / "caches" / "hatrack", tmp_path / "data" / "hatrack")
    for name in (".cache/hatrack", ".hatrack"):
        (tmp_path / name).mkdir(parents=True)
    assert (cache_dir(), data_dir()) == (tmp_path / ".cache" / "hatrack", tmp_path / ".hatrack")
    monkeypatch.setenv("HATRACK_HOME", str(tmp_path / "home"))
    assert data_dir() == tmp_path / "home"


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 bytes"), (1023, "1,023 bytes"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB")]
)
def test_sizes_for_people(count: int, shown: str) -> None:
    assert format_size(count) == shown


def test_one_complaint_stays_on_one_line() -> None:
    assert (
        str(DataError("rows are wrong", complaints=["row 3: empty"], fix="mend it"))
        == "rows are wrong: row 3: empty; fix: mend it"
    )


def test_many_complaints_show_ten_and_count_the_rest() -> None:
    error = DataError("rows are wrong", complaints=[f"row {n}" for n in range(25)])
    lines = str(error).splitlines()
    assert len(lines) == 1 + MAX_COMPLAINTS + 1 and lines[-1].strip() == "... and 15 more"
    assert len(error.complaints) == 25


def test_exit_codes() -> None:
    assert HatrackError("x").exit_code == 2 and MachineError("x").exit_code == 1
