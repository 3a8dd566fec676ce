"""The instruction sets of this CPU, by Linux's names. Imports no torch.

For tests, `HATRACK_CPU` limits them to those of an older CPU: `avx2`, `avx512` (Skylake's, without VNNI or bfloat16) or
`avx512_bf16` (without AMX). hatrack's choices and its compiled kernels follow it; for torch, `limit_torch` sets torch's
own variables.
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
    """A level of CPUs. `needs`: features that every such CPU has. `lacks`: prefixes of the features that it does not
    have. `torch` and `onednn`: the names of the level in these libraries."""

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
    """The CPU's instruction sets by Linux's names; empty on other systems."""
    chosen = chosen_level()
    return _features() if chosen is None else frozenset(f for f in _features() if not f.startswith(chosen.lacks))


def has_fast_bfloat16() -> bool:
    """Whether the CPU has bfloat16 matmul instructions: AMX, AVX512-BF16, or Arm's bf16 instructions."""
    return bool(features() & {"amx_bf16", "avx512_bf16", "bf16", "svebf16"})


def compiler_flags() -> tuple[str, ...]:
    """The C++ compiler flags for this CPU."""
    chosen = chosen_level()
    if chosen is None:
        return ("-march=native",)
    return (*chosen.compiler_flags, *(("-maes", "-mvaes") if "vaes" in features() else ()))


def chosen_level() -> Level | None:
    """The level that `HATRACK_CPU` asks for; None if it is not set.

    Raises RecipeError for an invalid value, or a level that this CPU does not reach.
    """
    asked = os.environ.get(VARIABLE)
    if not asked:
        return None
    if asked not in LEVELS or not LEVELS[asked].needs <= _features():
        possible = [name for name, each in LEVELS.items() if each.needs <= _features()]
        fix = f"use {', '.join(possible)}, or unset it" if possible else "unset it"
        raise RecipeError(f"{VARIABLE}={asked} is not possible on this CPU", fix=fix)
    return LEVELS[asked]


def limit_torch() -> None:
    """Limits torch to the level of `HATRACK_CPU`, in this process and its children. Call it before importing torch."""
    chosen = chosen_level()
    if chosen is not None:
        os.environ["ATEN_CPU_CAPABILITY"] = chosen.torch
        os.environ["ONEDNN_MAX_CPU_ISA"] = chosen.onednn


def cpuinfo(*keys: str) -> list[str]:
    """The values in Linux's /proc/cpuinfo of keys that begin with one of `keys`, for each CPU; empty on
    other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(keys)]


def identity() -> str:
    """A string that is the same for CPUs that run the same compiled code."""
    return "".join([platform.machine(), *sorted(set(cpuinfo("model name", "flags", "Features", "CPU part")))])


@functools.cache
def _features() -> frozenset[str]:
    found = cpuinfo("flags", "Features")
    return frozenset(found[0].split()) if found else frozenset()
