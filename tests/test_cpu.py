"""What the CPU can do, and how a lesser one is played."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hatrack import cpu
from hatrack.errors import RecipeError

ZEN4 = "fma avx2 vaes avx512f avx512bw avx512vl avx512dq avx512cd avx512_vnni avx512_bf16"
MILAN = "fma avx2 vaes"


def _has(monkeypatch: pytest.MonkeyPatch, features: str, asked: str | None = None) -> None:
    monkeypatch.setattr(cpu, "_features", lambda: frozenset(features.split()))
    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    if asked is not None:
        monkeypatch.setenv(cpu.VARIABLE, asked)


@pytest.mark.parametrize(
    ("features", "fast"),
    [(ZEN4, True), (f"{ZEN4} amx_bf16", True), (MILAN, False), ("asimd bf16", True), ("asimd fp", False), ("", False)],
)
def test_features_decide_on_bfloat16(features: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _has(monkeypatch, features)
    assert cpu.has_fast_bfloat16() is fast
    assert cpu.compiler_flags() == ("-march=native",)


@pytest.mark.parametrize(
    ("asked", "left", "gone", "flags"),
    [
        ("avx2", "avx2 fma vaes", "avx512f avx512_bf16 avx512_vnni amx_bf16", "-march=x86-64-v3 -maes -mvaes"),
        ("avx512", "avx2 avx512f", "avx512_bf16 avx512_vnni amx_bf16", "-march=x86-64-v4 -maes -mvaes"),
        ("avx512_bf16", "avx512f avx512_bf16", "amx_bf16", "-march=x86-64-v4 -mavx512bf16 -maes -mvaes"),
    ],
)
def test_a_lesser_cpu_lacks_what_it_lacks(
    asked: str, left: str, gone: str, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _has(monkeypatch, f"{ZEN4} amx_bf16", asked)
    assert set(left.split()) <= cpu.features() and not cpu.features() & set(gone.split())
    assert cpu.compiler_flags() == tuple(flags.split())
    assert cpu.has_fast_bfloat16() is (asked == "avx512_bf16")


@pytest.mark.parametrize(("features", "asked", "can"), [(MILAN, "avx512", "avx2"), (ZEN4, "sse9", "avx2, avx512")])
def test_a_cpu_that_cannot_be_played_is_refused(
    features: str, asked: str, can: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _has(monkeypatch, features, asked)
    with pytest.raises(RecipeError, match=f"HATRACK_CPU={asked} is not possible on this CPU; fix: use {can}"):
        cpu.features()


@pytest.mark.parametrize("asked", list(cpu.LEVELS))
def test_torch_plays_along(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    if not cpu.LEVELS[asked].needs <= cpu.features():
        pytest.skip("more than this CPU is")
    code = "from hatrack import cpu; cpu.limit_torch(); import torch; print(torch.backends.cpu.get_cpu_capability())"
    monkeypatch.setenv(cpu.VARIABLE, asked)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == asked.removesuffix("_bf16").upper()


def test_linux_tells_what_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: absent from some torch versions
    seen = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    if not Path("/proc/cpuinfo").exists() or "bf16" in cpu.features():
        pytest.skip("needs Linux on x86")
    assert cpu.has_fast_bfloat16() is seen


@pytest.mark.parametrize("name", ["Hat", "get_peft_model"])
def test_bitsandbytes_says_nothing_of_its_kernels(name: str) -> None:
    """On a CPU with AVX512-BF16 it warns, when imported, that a kernel could not be downloaded."""
    pytest.importorskip("bitsandbytes")
    code = f"""import logging
logging.basicConfig(level=logging.WARNING)
import hatrack
hatrack.{name}
import bitsandbytes
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward from %s", "there")
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("something else")"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gemm_4bit_forward" not in found.stdout + found.stderr and "something else" in found.stderr
