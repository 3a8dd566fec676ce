"""A run that is held to its memory from its first step on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import load_file

from hatrack.planning import fit
from hatrack.training import callbacks
from hatrack.training.callbacks import MemoryWatch, TooMuchMemory

RUN = {"device": "cpu", "dtype": "float32", "lr": 0.02, "batch_size": 8, "steps": 4}
GIB = 2**30


def test_fewer_rows_at_a_time_where_the_first_step_takes_too_much(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run starts over with half of them, twice, and ends with the adapter of a run of so many from the start."""
    with pytest.MonkeyPatch.context() as patch:
        original = fit.plan_run
        patch.setattr(fit, "plan_run", lambda where, method=None, rows=None: original(where, method, 2))
        wanted = train("wanted", batch_size=8, memory="8GiB")
    held = iter([9 * GIB, 9 * GIB])
    monkeypatch.setattr(callbacks, "resident_bytes", lambda: next(held, GIB // 2))
    hat = train("fewer", batch_size=8, memory="8GiB")
    told = capsys.readouterr().err
    assert "a micro-batch of 8 rows took 9.0 GiB of 8.0 GiB: starting over with 4 of the 8 rows per step" in told
    assert "a micro-batch of 4 rows took 9.0 GiB of 8.0 GiB: starting over with 2 of the 8 rows per step" in told
    assert hat.result["planned"]["micro_batch"] == 2 and hat.result["steps"] == wanted.result["steps"] == 4
    assert hat.result["before"] == wanted.result["before"]
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("wanted", "fewer"))
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def step(watch: MemoryWatch, number: int, rows: int = 8, cpu: bool = True) -> None:
    arguments = SimpleNamespace(use_cpu=cpu, per_device_train_batch_size=rows)
    watch.on_step_end(arguments, SimpleNamespace(global_step=number), None)


def test_memory_is_given_back_only_above_plan_and_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    held = {"bytes": 1000}
    monkeypatch.setattr(callbacks, "resident_bytes", lambda: held["bytes"])
    monkeypatch.setattr(callbacks, "trim_heap", lambda: given.append(held["bytes"]))
    watch = MemoryWatch(planned=980, limit=None)
    for number, now in enumerate((1000, 1029, 1031, 1035, 1045), start=1):
        held["bytes"] = now
        step(watch, number)
    assert given == [1031, 1045]  # more than 3% above the first step, then 4%


def test_a_single_row_or_a_run_that_goes_on_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callbacks, "resident_bytes", lambda: 9 * GIB)
    step(MemoryWatch(GIB, GIB), 1, rows=1)
    assert "took 9.0 GiB: more than the 1.0 GiB planned" in capsys.readouterr().err
    step(MemoryWatch(GIB, GIB), 7)
    step(MemoryWatch(GIB, GIB), 1, cpu=False)
    with pytest.raises(TooMuchMemory):
        step(MemoryWatch(GIB, GIB), 1, rows=2)
