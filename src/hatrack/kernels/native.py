"""Compiles the C++ kernels for this CPU, once, and calls them.

The shared library is cached; its file name has a hash of the sources, the compiler and the CPU. It depends only on the
OpenMP runtime that torch has loaded, and runs on torch's threads. If it cannot be compiled, torch does the work.
`HATRACK_NATIVE=0` turns the kernels off; `HATRACK_CPU` compiles them for an older CPU (`cpu.py`).
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
DTYPES = (torch.float32, torch.bfloat16)
SIGNATURES = {
    "down": (*[c_void_p] * 3, *[c_int64] * 4, c_float, c_uint32, c_void_p, c_int),
    "up": (*[c_void_p] * 3, *[c_int64] * 4, c_float, c_uint32, c_void_p, c_int),
    "outer": (*[c_void_p] * 4, *[c_int64] * 4, c_uint32, c_void_p, c_int),
    "drop": (c_void_p, c_void_p, c_int64, c_int64, c_float, c_uint32, c_uint64, c_int),
    "rms_norm": (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int),
    "rms_norm_backward": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int),
    "gelu": (c_void_p, c_void_p, c_int64, c_int),
    "gelu_backward": (c_void_p, c_void_p, c_int64, c_int),
    "softmax": (c_void_p, c_void_p, c_void_p, *[c_int64] * 7, c_int),
    "softmax_backward": (c_void_p, c_void_p, c_int64, c_int64, c_int),
    "softmax_loss": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int),
}
FLOAT_SIGNATURES = {
    "attention": (*[c_void_p] * 8, c_float, c_int64, c_uint32, c_float, c_uint64, c_int),
    "attention_backward": (*[c_void_p] * 11, c_float, c_int64, c_uint32, c_float, c_uint64, c_int),
}
"""Kernels that exist for float32 only."""
INTEGER_SIGNATURES = {"int_matmul": (*[c_void_p] * 4, *[c_int64] * 6, c_int, c_int, c_int)}
"""Kernels that compute in integers, on CPUs with AVX2."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if they are turned off, or cannot be compiled, which is reported in one line."""
    if os.environ.get("HATRACK_NATIVE", "1") == "0" or platform.system() != "Linux":
        return None
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        say("no C++ compiler found: training runs without hatrack's kernels, slower (install g++ for them)")
        return None
    try:
        loaded = ctypes.CDLL(str(_compile(compiler)))
    except (OSError, MachineError, subprocess.SubprocessError) as error:
        say(f"hatrack's kernels could not be compiled; training runs without them, slower ({_reason(error)})")
        return None
    kernels = [(SIGNATURES, ["float32", "bfloat16"]), (FLOAT_SIGNATURES, ["float32"])]
    if loaded.integers_supported():
        kernels.append((INTEGER_SIGNATURES, ["int16", "int8"]))
        loaded.int_matmul_workspace.argtypes, loaded.int_matmul_workspace.restype = (c_int64, c_int64, c_int), c_int64
    for signatures, endings in kernels:
        for name, arguments in signatures.items():
            for ending in endings:
                function = getattr(loaded, f"{name}_{ending}")
                function.argtypes, function.restype = arguments, None
    loaded.attention_workspace.argtypes, loaded.attention_workspace.restype = (c_int64, c_int64, c_int64), c_int64
    return loaded


def _compile(compiler: str) -> Path:
    """The path of the shared library, compiled now if it is not cached."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    source = b"".join(path.read_bytes() for path in SOURCES + INCLUDED)
    flags = (*FLAGS, *cpu.compiler_flags())
    key = hashlib.sha256(source + version + " ".join(flags).encode() + cpu.identity().encode())
    path = cache_dir("native") / f"kernels-{key.hexdigest()[:16]}.so"
    if not path.exists():
        say("compiling kernels for this CPU (once)")
        with machine_errors(path), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [compiler, *flags, "-o", str(built), *map(str, SOURCES)]
            subprocess.run(command, capture_output=True, check=True, timeout=300)
            built.replace(path)
    return path


def _reason(error: Exception) -> str:
    output = getattr(error, "stderr", None)
    lines = output.decode(errors="replace").strip().splitlines() if output else []
    return next((line for line in lines if "error" in line), str(error))


def supports(x: torch.Tensor, columns: int = 32) -> bool:
    """Whether the kernels support x (..., d): on a CPU, of one of `DTYPES`, d a multiple of `columns`."""
    return x.device.type == "cpu" and x.dtype in DTYPES and x.shape[-1] % columns == 0 and library() is not None


def call(name: str, dtype: torch.dtype, *arguments: object) -> None:
    """Calls a kernel for elements of `dtype`. Tensors are passed as addresses; the number of threads is appended."""
    loaded = library()
    assert loaded is not None
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(loaded, f"{name}_{dtype_name(dtype)}")(*values, torch.get_num_threads())


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
