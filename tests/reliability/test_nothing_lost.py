"""Runs that are killed, stopped, shut out or out of disk: nothing is lost, and what happened is said."""

import contextlib
import importlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hatrack.training import callbacks
from hatrack.training.trainer import HatTrainer
from tests.reliability.child import Child

DEADLINE = 120
"""Seconds that a test waits for a run at most."""
ADAPTER = "adapter_model.safetensors"
OWN = re.compile(r"/hat(?![a-z]|\.cpython)|/rack/")
"""A path of the run itself, in its folders or on the rack: not of the cache, nor what Python compiles of hatrack."""


@pytest.fixture(scope="module")
def straight(
    tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[object], dict[str, bytes], int]:
    """What every run here is started with, what an uninterrupted one ends with, and its number of file operations."""
    here = tmp_path_factory.mktemp("straight")
    words = ("good", "bad", "fine", "poor", "great", "awful")
    data = here / "reviews.csv"
    data.write_text(
        "text,label\n"
        + "".join(
            f"it was {w} {f} .,{'no' if w in words[1::2] else 'yes'}\n"
            for w in words
            for f in ("film", "plot", "actor")
        )
    )
    arguments = ["train", "--base", tiny_encoder, "--data", data, "--device", "cpu", "--dtype", "float32"]
    arguments += ["--lr", "0.02", "--batch-size", "4", "--steps", "7"]  # ends within an epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HATRACK_HOME", str(here / "home"))
        child = Child([*arguments, "--output", here / "hat"], here / "said", _count_operations, (here / "count",))
    assert child.end() == 0, child.said
    return arguments, _ended_with(here / "hat"), int((here / "count").read_text())


def _ended_with(output: Path) -> dict[str, bytes]:
    metrics = json.loads((output / "hatrack.json").read_text())["metrics"]
    return {ADAPTER: (output / ADAPTER).read_bytes(), "metrics": json.dumps(metrics).encode()}


def _operations(act: Callable[[int], None]) -> None:
    """Calls `act` with a running number before each change of a name or a file that this process makes for its run."""
    number = 0

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        changes = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree")
        if event == "open":
            changes = isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and any(OWN.search(str(argument)) for argument in arguments):
            number += 1
            act(number)

    callbacks.SAVE_EVERY_SECONDS = 0
    sys.addaudithook(before)


def _count_operations(path: Path) -> None:
    _operations(lambda number: _write_number(path, number))


def _write_number(path: Path, number: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(handle, str(number).encode())
    os.close(handle)


def _die_at(number: int) -> None:
    _operations(lambda now: os.kill(os.getpid(), signal.SIGKILL) if now == number else None)


@pytest.mark.parametrize("part", ["few", pytest.param("many", marks=pytest.mark.slow)])
def test_a_run_killed_at_any_file_operation_ends_the_same(straight: Any, tmp_path: Path, part: str) -> None:
    arguments, expected, operations = straight
    assert operations > 100
    numbers = [1, *range(5, operations - 12, operations // 20), *range(operations - 12, operations + 1)]
    for number in numbers if part == "many" else random.Random(0).sample(numbers, 4):
        output = tmp_path / str(number) / "hat"
        output.parent.mkdir()
        killed = Child(
            [*arguments, "--output", output, "--name", f"hat-{number}"], output.parent / "said", _die_at, (number,)
        )
        assert killed.end() == -signal.SIGKILL
        begun = output.with_name("hat.run").joinpath("run.json").exists()
        finished = output.exists() and not begun  # it was about to remove what it no longer needs
        again = ["train", "--resume"] if begun or finished else arguments
        resumed = Child([*again, "--output", output, "--name", f"hat-{number}"], output.parent / "said again")
        assert resumed.end() == (2 if finished else 0), (number, resumed.said)
        assert _ended_with(output) == expected, number
        assert sorted(path.name for path in output.parent.iterdir()) == ["hat", "said", "said again"], number


def _stop_in(module: str, function: str, number: int) -> None:
    """Sends this process a signal when it comes to `function`."""
    place = importlib.import_module(module)
    holder, _, name = function.rpartition(".")
    place = getattr(place, holder) if holder else place
    original = getattr(place, name)

    def stopped(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*arguments, **options)

    setattr(place, name, stopped)


@pytest.mark.parametrize(
    ("module", "function", "number", "saved"),
    [
        ("hatrack.training.prepare", "read_recipe_examples", signal.SIGTERM, False),
        ("hatrack.training.load", "load_base", signal.SIGHUP, False),
        ("hatrack.data.tokens", "render_cached", signal.SIGINT, False),
        ("hatrack.training.trainer", "HatTrainer.score_held_out", signal.SIGTERM, False),
        ("hatrack.training.trainer", "HatTrainer.training_step", signal.SIGHUP, True),
        ("hatrack.training.trainer", "HatTrainer.save_model", signal.SIGTERM, True),
        ("hatrack.training.train", "save_adapter", signal.SIGINT, True),
        ("hatrack.training.train", "read_back", signal.SIGTERM, True),
    ],
)
def test_a_stopped_run_says_so_and_goes_on_the_same(
    straight: Any, tmp_path: Path, module: str, function: str, number: int, saved: bool
) -> None:
    arguments, expected, _ = straight
    output = tmp_path / "hat"
    child = Child([*arguments, "--output", output], tmp_path / "said", _stop_in, (module, function, number))
    assert child.end() == 130, child.said
    last = child.said.splitlines()[-1]
    assert not output.exists()
    if not saved:
        assert last == "hatrack: stopped before anything was learned; fix: start it again as before"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["said"]
        return
    assert last.startswith("hatrack: stopped; step ") and last.endswith(
        f"is saved in {output}.run, which stays; fix: go on with: hatrack train --resume --output {output}"
    )
    again = Child(["train", "--resume", "--output", output], tmp_path / "said again")
    assert again.end() == 0, again.said
    assert _ended_with(output) == expected


def test_other_commands_end_with_a_word_as_well(tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        child = Child(["list"], tmp_path / "said", _stop_in, ("hatrack.adapter.registry", "list_adapters", number))
        assert child.end() == 130
    assert child.said == "hatrack: interrupted\n" * 3


def test_a_closed_terminal_saves_first(straight: Any, tmp_path: Path) -> None:
    """The signal comes, and whatever is said from then on goes nowhere: neither may cost the checkpoint."""
    arguments, expected, _ = straight
    output = tmp_path / "hat"
    ours, theirs = os.openpty()
    child = Child([*arguments, "--output", output], tmp_path / "said", _slow_steps, terminal=os.ttyname(theirs))
    seen, deadline = b"", time.monotonic() + DEADLINE
    while b"/7" not in seen:  # the bar
        shown = _shown_next(ours, deadline)
        assert shown, seen
        seen += shown
    os.close(theirs)
    os.close(ours)
    assert child.end() == 130
    assert list((tmp_path / "hat.run").glob("checkpoint-*"))
    again = Child(["train", "--resume", "--output", output], tmp_path / "said again")
    assert again.end() == 0, again.said
    assert _ended_with(output) == expected


def test_an_interrupted_progress_bar_leaves_the_terminal_in_order(straight: Any, tmp_path: Path) -> None:
    arguments, _, _ = straight
    ours, theirs = os.openpty()
    child = Child(
        [*arguments, "--output", tmp_path / "hat"], tmp_path / "said", _slow_steps, terminal=os.ttyname(theirs)
    )
    seen, deadline = b"", time.monotonic() + DEADLINE
    while shown := _shown_next(ours, deadline):
        seen += shown
        if b"/7" in seen and not child.sent:
            os.close(theirs)
            child.send(signal.SIGINT)
    assert child.end() == 130
    text = seen.decode()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    lines = [re.sub(r"\x1b\[[0-9?;]*[a-zA-Z]", "", line.rpartition("\x1b[2K")[2]) for line in text.splitlines()]
    assert "stopping: this step is finished and saved first (again to stop at once)" in lines
    assert lines[-1].startswith("hatrack: stopped; step ")


def _shown_next(terminal: int, deadline: float) -> bytes:
    """What a terminal shows next; nothing once nobody writes to it any more. Fails at the deadline."""
    readable, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
    assert readable, "nothing was shown in time"
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        return os.read(terminal, 1000)
    return b""


def _slow_steps() -> None:
    original = HatTrainer.training_step

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return original(*arguments, **options)

    HatTrainer.training_step = slow  # type: ignore[method-assign]


def test_a_reader_that_goes_away_does_not_end_a_run(straight: Any, tmp_path: Path) -> None:
    """As in `hatrack train ... 2>&1 | head -1`."""
    arguments, expected, _ = straight
    child = Child([*arguments, "--output", tmp_path / "hat"], tmp_path / "said", _close_the_pipe)
    assert child.end() == 0
    assert _ended_with(tmp_path / "hat") == expected


def test_a_reader_of_both_outputs_that_goes_away_is_no_failure(straight: Any, tmp_path: Path) -> None:
    """The adapter is finished when the result has nobody to print it for."""
    arguments, expected, _ = straight
    child = Child([*arguments, "--output", tmp_path / "hat"], tmp_path / "said", _close_both_pipes)
    assert child.end() == 0
    assert _ended_with(tmp_path / "hat") == expected


def _close_both_pipes() -> None:
    _close_the_pipe()
    os.dup2(2, 1)


def _close_the_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 2)


def test_two_runs_into_one_folder(straight: Any, tmp_path: Path) -> None:
    arguments, expected, _ = straight
    output = tmp_path / "hat"
    first = Child([*arguments, "--output", output], tmp_path / "said", _slow_steps)
    deadline = time.monotonic() + DEADLINE
    while not (tmp_path / "hat.run/run.json").exists():
        assert time.monotonic() < deadline and first.process.is_alive(), first.said
        time.sleep(0.01)
    for words in (arguments, ["train", "--resume"]):
        second = Child([*words, "--output", output], tmp_path / f"said {len(words)}")
        assert second.end() == 2
        assert second.said.strip() == (
            f"hatrack: another run is writing to {output}.run; got process {first.process.pid}; "
            "fix: wait for it, or choose another --output"
        )
    assert first.end() == 0, first.said
    assert _ended_with(output) == expected


@pytest.fixture
def stopped(straight: Any, tmp_path: Path) -> tuple[Path, Path]:
    """An interrupted run's output, and its data file."""
    arguments, _, _ = straight
    data = tmp_path / "mine.csv"
    shutil.copy(arguments[arguments.index("--data") + 1], data)
    given = [data if word == arguments[arguments.index("--data") + 1] else word for word in arguments]
    child = Child(
        [*given, "--output", tmp_path / "hat"],
        tmp_path / "said",
        _stop_in,
        ("hatrack.training.trainer", "HatTrainer.training_step", signal.SIGTERM),
    )
    assert child.end() == 130, child.said
    return tmp_path / "hat", data


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def test_a_vanished_data_file_costs_nothing(stopped: tuple[Path, Path], straight: Any, tmp_path: Path) -> None:
    output, data = stopped
    before = _files(tmp_path / "hat.run")
    data.rename(tmp_path / "moved.csv")
    child = Child(["train", "--resume", "--output", output], tmp_path / "said 2")
    assert child.end() == 2
    assert (
        str(data) in child.said and f"step 1 is saved in {output}.run; go on with: hatrack train --resume" in child.said
    )
    assert _files(tmp_path / "hat.run") == before
    child = Child(["train", "--resume", "--output", output, "--data", tmp_path / "moved.csv"], tmp_path / "said 3")
    assert child.end() == 0, child.said
    assert _ended_with(output) == straight[1]


def test_a_changed_data_file_is_refused(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    output, data = stopped
    before = _files(tmp_path / "hat.run")
    data.write_text(data.read_text() + "a very different film,yes\n")
    child = Child(["train", "--resume", "--output", output], tmp_path / "said 2")
    assert child.end() == 2
    assert "rows and schedule changed since the interrupted run" in child.said and child.said.count(f"{data} (") == 2
    assert _files(tmp_path / "hat.run") == before


def test_a_changed_base_is_refused_by_both_names(
    stopped: tuple[Path, Path], tiny_encoder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_encoder, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    child = Child(["train", "--resume", "--output", stopped[0], "--base", other], tmp_path / "said 2")
    assert child.end() == 2
    assert (
        "base changed since" in child.said
        and f"was started; got {other} ('" in child.said
        and f", then {tiny_encoder} ('" in child.said
    )


def test_a_moved_run_goes_on(stopped: tuple[Path, Path], straight: Any, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "hat.run").rename(tmp_path / "elsewhere/cap.run")
    child = Child(["train", "--resume", "--output", tmp_path / "elsewhere/cap"], tmp_path / "said 2")
    assert child.end() == 0, child.said
    assert _ended_with(tmp_path / "elsewhere/cap") == straight[1]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True).returncode:
        pytest.skip("a disk of its own takes the right to mount one")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_costs_no_checkpoint(straight: Any, tmp_path: Path, disk: Path) -> None:
    arguments, expected, _ = straight
    child = Child([*arguments, "--output", disk / "hat"], tmp_path / "said", _fill_after_a_step, (disk,))
    assert child.end() == 1, child.said
    assert "the disk is full while writing" in child.said.splitlines()[-1] and "Traceback" not in child.said
    assert f"step 1 is saved in {disk}/hat.run; go on with: hatrack train --resume --output {disk}/hat" in child.said
    assert [path.name for path in (disk / "hat.run").glob("*checkpoint*")] == ["checkpoint-1"]
    (disk / "other").unlink()
    again = Child(["train", "--resume", "--output", disk / "hat"], tmp_path / "said again")
    assert again.end() == 0, again.said
    assert _ended_with(disk / "hat") == expected


def _fill_after_a_step(disk: Path) -> None:
    """Another program takes all that is left after the first checkpoint."""
    callbacks.SAVE_EVERY_SECONDS = 0
    original = HatTrainer.training_step

    def filling(*arguments: Any, **options: Any) -> Any:
        if (disk / "hat.run/checkpoint-1").exists() and not (disk / "other").exists():
            with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return original(*arguments, **options)

    HatTrainer.training_step = filling  # type: ignore[method-assign]


def test_a_read_only_folder_is_refused_at_once(straight: Any, tmp_path: Path, disk: Path) -> None:
    arguments, _, _ = straight
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    child = Child([*arguments, "--output", disk / "hat"], tmp_path / "said")
    assert child.end() == 1
    refused = f"writing {disk}/hat.run is not allowed; got Read-only file system; fix: choose a folder you may write to"
    assert child.said.strip() == f"hatrack: {refused}"


def test_a_read_only_rack_is_refused_at_once(
    straight: Any, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, _, _ = straight
    monkeypatch.setenv("HATRACK_HOME", str(disk))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    child = Child([*arguments, "--output", tmp_path / "hat"], tmp_path / "said")
    assert child.end() == 1
    assert child.said.startswith("hatrack: writing ") and "is not allowed" in child.said
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("hat")] == []
