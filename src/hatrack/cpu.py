"""What this CPU can do: its instruction sets, by Linux's names. Imports no torch.

`HATRACK_CPU` makes it a lesser one, for tests: `avx2`, `avx512` (Skylake's, without VNNI or bfloat16) or `avx512_bf16`
(without AMX). It rules hatrack's choices and its compiled kernels; torch is told by variables of its own, which
`limit_torch` sets.
"""

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from hatrack.errors import RecipeError

VARIABLE = "HATRACK_CPU"


@dataclass(frozen=True)
class Level:
    """A kind of CPU: the features it needs and those it has not (by how their names begin), what the compiler is told
    for it, and how torch and oneDNN call it."""

    needs: frozenset[str]
    lacks: tuple[str, ...]
    compiler_flags: tuple[str, ...]
    torch: str
    onednn: str


_BEYOND_BF16 = ("amx", "avx512_fp16", "avx10")
LEVELS = {
    "avx2": Level(
        frozenset({"avx2", "fma"}),
        ("avx512", "avx_vnni", *_BEYOND_BF16),
        ("-march=x86-64-v3",),
        "avx2",
        "AVX2",
    ),
    "avx512": Level(
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}),
        ("avx512_bf16", "avx512_vnni", "avx_vnni", *_BEYOND_BF16),
        ("-march=x86-64-v4",),
        "avx512",
        "AVX512_CORE",
    ),
    "avx512_bf16": Level(
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd", "avx512_bf16"}),
        _BEYOND_BF16,
        ("-march=x86-64-v4", "-mavx512bf16"),
        "avx512",
        "AVX512_CORE_BF16",
    ),
}


def features() -> frozenset[str]:
    """The CPU's instruction sets in Linux's words; none where they are not told."""
    chosen = level()
    return _features() if chosen is None else frozenset(f for f in _features() if not f.startswith(chosen.lacks))


def has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself: AMX, AVX512-BF16, or Arm's bf16 instructions."""
    return bool(features() & {"amx_bf16", "avx512_bf16", "bf16", "svebf16"})


def compiler_flags() -> tuple[str, ...]:
    """What has a compiler write for this CPU."""
    chosen = level()
    if chosen is None:
        return ("-march=native",)
    return (*chosen.compiler_flags, *(("-maes", "-mvaes") if "vaes" in features() else ()))


def level() -> Level | None:
    """The kind of CPU that `HATRACK_CPU` asks for; None without it.

    Raises RecipeError for one that is not known, or more than this CPU is.
    """
    asked = os.environ.get(VARIABLE)
    if not asked:
        return None
    if asked not in LEVELS or not LEVELS[asked].needs <= _features():
        can = [name for name, each in LEVELS.items() if each.needs <= _features()]
        fix = f"use {', '.join(can)}, or unset it" if can else "unset it"
        raise RecipeError(f"{VARIABLE}={asked} cannot be played here", fix=fix)
    return LEVELS[asked]


def limit_torch() -> None:
    """Has torch be what `HATRACK_CPU` asks for, in this process and those it starts. Before torch is imported."""
    chosen = level()
    if chosen is not None:
        os.environ["ATEN_CPU_CAPABILITY"] = chosen.torch
        os.environ["ONEDNN_MAX_CPU_ISA"] = chosen.onednn


def cpuinfo(*keys: str) -> list[str]:
    """Linux's /proc/cpuinfo: the values of the keys that begin so, one CPU after the other; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(keys)]


def kind() -> str:
    """What tells whether code that was compiled for the CPU runs here."""
    return "".join([platform.machine(), *sorted(set(cpuinfo("model name", "flags", "Features", "CPU part")))])


@functools.cache
def _features() -> frozenset[str]:
    found = cpuinfo("flags", "Features")
    return frozenset(found[0].split()) if found else frozenset()
