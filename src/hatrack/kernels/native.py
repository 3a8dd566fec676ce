"""Compiles the kernels for the processor it runs on, once, and calls them. Where that fails, torch does the work.

The shared library lies in the cache under a name made of its sources, the compiler and the processor. It has no
dependency but the OpenMP runtime, of which torch has loaded one already: the same threads do both works.
`HATRACK_NATIVE=0` leaves it out; `HATRACK_CPU` compiles them for a lesser CPU (`cpu.py`).
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

import torch

from hatrack import cpu
from hatrack.console import say
from hatrack.errors import MachineError
from hatrack.storage import cache_dir, machine_errors

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
INCLUDED = sorted(Path(__file__).parent.glob("*.h"))
FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-fno-math-errno")
FORMATS = (torch.float32, torch.bfloat16)
SIGNATURES = {
    "down": (*[c_void_p] * 3, *[c_int64] * 4, c_float, c_uint32, c_void_p, c_int),
    "up": (*[c_void_p] * 3, *[c_int64] * 4, c_float, c_uint32, c_void_p, c_int),
    "outer": (*[c_void_p] * 4, *[c_int64] * 4, c_uint32, c_void_p, c_int),
    "drop": (c_void_p, c_void_p, c_int64, c_int64, c_float, c_uint32, c_uint64, c_int),
    "rms_norm": (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int),
    "rms_norm_back": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int),
    "gelu": (c_void_p, c_void_p, c_int64, c_int),
    "gelu_back": (c_void_p, c_void_p, c_int64, c_int),
    "softmax": (c_void_p, c_void_p, c_void_p, *[c_int64] * 7, c_int),
    "softmax_back": (c_void_p, c_void_p, c_int64, c_int64, c_int),
    "softmax_loss": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int),
}
FLOAT_SIGNATURES = {
    "attention": (*[c_void_p] * 8, c_float, c_int64, c_uint32, c_float, c_uint64, c_int),
    "attention_back": (*[c_void_p] * 11, c_float, c_int64, c_uint32, c_float, c_uint64, c_int),
}
"""Kernels for float32 alone."""
INTEGER_SIGNATURES = {"product": (*[c_void_p] * 4, *[c_int64] * 6, c_int, c_int, c_int)}
"""Kernels for integers, where the processor is one that they are written for."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no compiler for them, with one line that says so."""
    if os.environ.get("HATRACK_NATIVE", "1") == "0" or platform.system() != "Linux":
        return None
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        say("no C++ compiler found: training goes without hatrack's own kernels, slower (install g++ for them)")
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, MachineError, subprocess.SubprocessError) as error:
        say(f"hatrack's own kernels could not be compiled; training goes without them, slower ({_reason(error)})")
        return None
    signatures_of = [(SIGNATURES, ["float32", "bfloat16"]), (FLOAT_SIGNATURES, ["float32"])]
    if loaded.integers_covered():
        signatures_of.append((INTEGER_SIGNATURES, ["int16", "int8"]))
        loaded.product_space.argtypes, loaded.product_space.restype = (c_int64, c_int64, c_int), c_int64
    for signatures, endings in signatures_of:
        for name, arguments in signatures.items():
            for ending in endings:
                function = getattr(loaded, f"{name}_{ending}")
                function.argtypes, function.restype = arguments, None
    loaded.attention_space.argtypes, loaded.attention_space.restype = (c_int64, c_int64, c_int64), c_int64
    return loaded


def _compiled(compiler: str) -> Path:
    """The library's file, made now if it is not in the cache."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    source = b"".join(path.read_bytes() for path in SOURCES + INCLUDED)
    flags = (*FLAGS, *cpu.compiler_flags())
    key = hashlib.sha256(source + version + " ".join(flags).encode() + cpu.kind().encode())
    path = cache_dir("native") / f"kernels-{key.hexdigest()[:16]}.so"
    if not path.exists():
        say("compiling kernels for this processor (once)")
        with machine_errors(path), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler, *flags, "-o", str(made), *map(str, SOURCES)]
            subprocess.run(command, capture_output=True, check=True, timeout=300)
            made.replace(path)
    return path


def _reason(error: Exception) -> str:
    output = getattr(error, "stderr", None)
    lines = output.decode(errors="replace").strip().splitlines() if output else []
    return next((line for line in lines if "error" in line), str(error))


def supports(x: torch.Tensor, columns: int = 32) -> bool:
    """Whether the kernels take a matrix like x (..., d): on a processor, of their formats, d in blocks of `columns`."""
    return x.device.type == "cpu" and x.dtype in FORMATS and x.shape[-1] % columns == 0 and library() is not None


def call(name: str, dtype: torch.dtype, *arguments: object) -> None:
    """Calls a kernel for numbers of `dtype`: tensors by where they lie, numbers as they are, threads last."""
    loaded = library()
    assert loaded is not None
    plain = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(loaded, f"{name}_{dtype_name(dtype)}")(*plain, torch.get_num_threads())


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
