"""Checkpoints: whole or not there, found out when they are not, and never more than are needed."""

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hatrack.errors import MachineError
from hatrack.training import checkpoint


def _write(run: Path, step: int, best: int | None = None) -> Path:
    with checkpoint.write_checkpoint(run, step) as folder:
        (folder / "optimizer.pt").write_bytes(b"moments" * 100)
        (folder / checkpoint.STATE).write_text(json.dumps({"best_global_step": best}))
    return checkpoint.folder_of_step(run, step)


def test_a_checkpoint_appears_whole(tmp_path: Path) -> None:
    with checkpoint.write_checkpoint(tmp_path, 3) as folder:
        (folder / checkpoint.STATE).write_text('{"best_global_step": null}')
        assert checkpoint.saved_steps(tmp_path) == []
    assert checkpoint.saved_steps(tmp_path) == [3]
    checkpoint.remove_damaged(tmp_path)
    assert checkpoint.saved_steps(tmp_path) == [3]


def test_the_newest_is_the_one_with_most_steps(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        _write(tmp_path, step)
    (tmp_path / "checkpoint-of-mine").mkdir()
    assert checkpoint.saved_steps(tmp_path) == [100, 20, 9]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: os.truncate(folder / "optimizer.pt", 12), "optimizer.pt has 12 bytes of 700"),
        (
            lambda folder: (folder / "optimizer.pt").write_bytes(b"Moments" * 100),
            "optimizer.pt has changed since it was written",
        ),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: (folder / checkpoint.MANIFEST).unlink(), "manifest.json is missing"),
        (lambda folder: (folder / checkpoint.MANIFEST).write_text('{"optim'), "manifest.json cannot be read"),
        (lambda folder: (folder / checkpoint.MANIFEST).write_text("{}"), "trainer_state.json is missing"),
    ],
)
def test_a_damaged_one_is_not_gone_on_from(
    tmp_path: Path, damage: object, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path, 10)
    assert callable(damage)
    damage(_write(tmp_path, 20))
    checkpoint.remove_damaged(tmp_path)
    assert checkpoint.saved_steps(tmp_path) == [10]
    assert f"checkpoint-20 is not used: {said}" in capsys.readouterr().err


def test_one_without_its_best_epoch_is_not_gone_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (_write(tmp_path, 10, best=10) / "optimizer.pt").unlink()
    _write(tmp_path, 20, best=10)
    checkpoint.remove_damaged(tmp_path)
    assert checkpoint.saved_steps(tmp_path) == []
    assert "the best epoch's checkpoint, of step 10, is missing" in capsys.readouterr().err


def test_the_newest_two_and_the_best_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        _write(tmp_path, step, best=10)
        checkpoint.prune(tmp_path, best=10)
    assert checkpoint.saved_steps(tmp_path) == [40, 30, 10]
    checkpoint.remove_damaged(tmp_path)
    assert checkpoint.saved_steps(tmp_path) == [40, 30, 10]


def test_what_a_killed_process_began_goes(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-9.x1").mkdir()
    (tmp_path / ".run.json.x2").write_text("{")
    checkpoint.remove_damaged(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True).returncode:
        pytest.skip("a small disk takes the right to mount one")
    yield folder
    subprocess.run(["umount", folder], check=True)


def _by_torch(path: Path) -> None:
    torch.save({"x": torch.zeros(2**20)}, path)


def _by_safetensors(path: Path) -> None:
    save_file({"x": torch.zeros(2**20)}, path)


def _by_python(path: Path) -> None:
    path.write_bytes(bytes(2**22))


@pytest.mark.parametrize("write", [_by_torch, _by_safetensors, _by_python])
def test_a_full_disk_is_said_and_costs_no_checkpoint(small_disk: Path, write: object) -> None:
    _write(small_disk, 10)
    assert callable(write)
    said = r"the disk is full while writing .*checkpoint-20; fix: free some space"
    with pytest.raises(MachineError, match=said), checkpoint.write_checkpoint(small_disk, 20) as folder:
        write(folder / "file")
    assert [path.name for path in small_disk.iterdir()] == ["checkpoint-10"]
    checkpoint.remove_damaged(small_disk)
    assert checkpoint.saved_steps(small_disk) == [10]


@pytest.mark.parametrize("write", [_by_torch, _by_safetensors, _by_python])
def test_a_file_that_may_not_grow_is_a_failure_of_the_machine(tmp_path: Path, write: object) -> None:
    _write(tmp_path, 10)
    assert callable(write)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with (
            pytest.raises(MachineError, match=r"checkpoint-20.* written"),
            checkpoint.write_checkpoint(tmp_path, 20) as folder,
        ):
            write(folder / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_a_mistake_of_ours_is_not_blamed_on_the_machine(tmp_path: Path) -> None:
    with pytest.raises(TypeError), checkpoint.write_checkpoint(tmp_path, 1):
        raise TypeError("ours")
    assert list(tmp_path.iterdir()) == []
