"""The memory that is really there, other machines by name, and what a probe leaves behind."""

from pathlib import Path

import psutil
import pytest

from hatrack import cpu
from hatrack.base.free_memory import available_memory
from hatrack.errors import RecipeError
from hatrack.planning import machine
from hatrack.planning.machine import (
    ACCELERATORS,
    GIB,
    Probe,
    check_compute,
    load_probe,
    machine_named,
    save_probe,
    this_machine,
)
from hatrack.planning.time import MachineSpeed

SPEED = MachineSpeed(
    seconds_per_operation=1e-11,
    seconds_per_element=1e-9,
    seconds_per_call=1e-5,
    disk_bytes_per_second=1e9,
    start_seconds=5.0,
    source="probe",
)


def group(root: Path, line: str, folder: str, **files: str) -> None:
    """A control group as the kernel shows it under `root`."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(line)
    place = root / "sys/fs/cgroup" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (place / name.replace("__", ".")).write_text(content)


def test_without_control_groups_the_system_decides(tmp_path: Path) -> None:
    free, why = available_memory(tmp_path)
    assert why == "free on this machine" and 0 < free <= psutil.virtual_memory().total


def test_a_limit_of_version_2_less_what_is_used(tmp_path: Path) -> None:
    """Cached files that can be dropped do not count as used."""
    used = {"memory__current": "40000000", "memory__stat": "anon 10000000\ninactive_file 30000000\n"}
    group(tmp_path, "0::/box/job\n", "box/job", memory__max="max", **used)
    group(tmp_path, "0::/box/job\n", "box", memory__max="64000000", **used)
    assert available_memory(tmp_path) == (54_000_000, "left of the control group's 61.0 MiB")


def test_a_limit_of_version_1(tmp_path: Path) -> None:
    files = {"memory__limit_in_bytes": "50000000", "memory__usage_in_bytes": "20000000"}
    group(tmp_path, "4:memory:/job\n0::/\n", "memory/job", memory__stat="total_inactive_file 5000000\n", **files)
    assert available_memory(tmp_path)[0] == 35_000_000
    group(tmp_path, "4:memory:/job\n", "memory/job", memory__limit_in_bytes="9223372036854771712")
    assert available_memory(tmp_path)[1] == "free on this machine"


def test_machines_by_name() -> None:
    assert machine_named("T4").memory < 16 * GIB and machine_named("T4").dtype == "float16"
    assert machine_named("NVIDIA A100").name == "a100" and machine_named("h100").accelerator
    assert (
        machine_named("16GiB").memory == 16 * GIB
        and machine_named("16GiB").speed is None
        and not machine_named("16GiB").accelerator
    )
    assert all(machine_named(name).speed is not None for name in ACCELERATORS)
    with pytest.raises(RecipeError, match=r"--on does not know a10O; fix: did you mean a10"):
        machine_named("a10O")
    with pytest.raises(RecipeError, match="or a size such as 16GiB"):
        machine_named("?")


@pytest.mark.parametrize(("features", "there"), [("fma avx2", True), ("fma avx2 avx512f", False), ("sse4_2", False)])
def test_rounded_products_are_guessed_where_they_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: str, there: bool
) -> None:
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "features", lambda: frozenset(features.split()))
    speed = this_machine("cpu").speed
    assert speed is not None and (list(speed.rounded) == ["int16", "int8"]) is there
    if there:
        assert speed.rounded["int8"] < speed.rounded["int16"] < speed.seconds_per_operation


def test_a_processor_without_avx2_cannot_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"sse4_2"}))
    check_compute("auto", "cpu")
    with pytest.raises(RecipeError, match="--compute int8 is for CPUs with AVX2"):
        check_compute("int8", "cpu")
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx2"}))
    check_compute("int8", "cpu")
    with pytest.raises(RecipeError, match="got cuda"):
        check_compute("int8", "cuda")


def test_a_probe_is_kept_for_this_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path))
    assert load_probe() is None
    guessed = this_machine("cpu").speed
    assert guessed is not None and "not measured" in guessed.source
    save_probe(Probe(machine.cpu_name(), {"float32": SPEED, "bfloat16": SPEED}, 600 * 2**20))
    assert this_machine("cpu").speed == SPEED and this_machine("cpu").imported_bytes == 600 * 2**20
    (file,) = (tmp_path / "probe").iterdir()
    for damaged in ("", "[]", '{"speed": {"float32": {}}}', '{"speed": 3}'):
        file.write_text(damaged)
        assert load_probe() is None
