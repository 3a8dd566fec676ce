"""Machines by the names that people call them."""

import pytest

from hatrack.base.free_memory import missing_device_error
from hatrack.errors import RecipeError
from hatrack.planning import machine
from hatrack.planning.machine import ACCELERATORS, GIB, LAPTOPS, check_device, machine_named


@pytest.mark.parametrize(
    ("told", "key"),
    [
        ("rtx4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4070 Ti", "rtx4070ti"),
        ("4080", "rtx4080"),
        ("rtx-3060", "rtx3060"),
        ("RTX A6000", "a6000"),
        ("Tesla T4", "t4"),
        ("NVIDIA H100", "h100"),
        ("Apple M2 Pro", "m2-pro"),
        ("m4max", "m4-max"),
        ("M1", "m1"),
        ("A100-40GB", "a100-40gb"),
    ],
)
def test_a_name_in_any_spelling(told: str, key: str) -> None:
    found = machine_named(told)
    assert found.name == key and found.accelerator and found.speed is not None


@pytest.mark.parametrize("name", [*ACCELERATORS, *LAPTOPS])
def test_each_machine_has_memory_and_a_speed(name: str) -> None:
    found = machine_named(name)
    gib = (ACCELERATORS.get(name) or LAPTOPS[name])[0]
    assert 0.6 * gib * GIB < found.memory < gib * GIB
    assert found.speed is not None and 1e-16 < found.speed.seconds_per_operation < 1e-12


def test_a_size_needs_its_unit() -> None:
    with pytest.raises(RecipeError, match="--on 16: a size has a unit; got 16; fix: --on 16GiB"):
        machine_named("16")
    assert machine_named("16GiB").name == "a CPU with 16.0 GiB free for the run"


def test_a_device_that_is_not_there_is_refused_in_the_words_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_accelerator", lambda: None)
    monkeypatch.setattr(machine, "_is_apple", lambda: False)
    for there in ("auto", "cpu", "xpu"):
        check_device(there)
    with pytest.raises(RecipeError) as refused:
        check_device("cuda")
    assert str(refused.value) == str(missing_device_error("cuda", ["cpu"]))
