"""The memory and speed of a machine: this one, or another by name.

For this machine they are read from the system, its control groups (a container's limit is below the machine's) and a
cached measurement; for others, from data sheets, or a given amount of memory. Imports no torch.
"""

import dataclasses
import functools
import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hatrack import cpu
from hatrack.base.free_memory import available_memory, missing_device_error
from hatrack.console import format_size
from hatrack.errors import RecipeError
from hatrack.planning.time import MachineSpeed
from hatrack.recipe import nearest, parse_size
from hatrack.storage import cache_dir, write_file

GIB = 2**30
DRIVER_FRACTION = 0.07
"""Fraction of an accelerator's memory that its driver and libraries take."""
REACHED_FRACTION = 0.35
"""Fraction of an accelerator's peak operations per second that training reaches: 0.3 to 0.5 are usual."""
ACCELERATORS = {
    "t4": (16, 65, 320, "float16"),
    "v100": (16, 112, 900, "float16"),
    "p100": (16, 19, 732, "float16"),
    "gtx1080ti": (11, 11, 484, "float32"),
    "rtx2060": (6, 52, 336, "float16"),
    "rtx2070": (8, 60, 448, "float16"),
    "rtx2080": (8, 80, 448, "float16"),
    "rtx2080ti": (11, 108, 616, "float16"),
    "rtx3050": (8, 36, 224, "bfloat16"),
    "rtx3060": (12, 51, 360, "bfloat16"),
    "rtx3060ti": (8, 65, 448, "bfloat16"),
    "rtx3070": (8, 81, 448, "bfloat16"),
    "rtx3080": (10, 59, 760, "bfloat16"),
    "rtx3090": (24, 71, 936, "bfloat16"),
    "rtx4050": (6, 36, 192, "bfloat16"),
    "rtx4060": (8, 60, 272, "bfloat16"),
    "rtx4060ti": (8, 88, 288, "bfloat16"),
    "rtx4070": (12, 117, 504, "bfloat16"),
    "rtx4070ti": (12, 160, 504, "bfloat16"),
    "rtx4080": (16, 195, 717, "bfloat16"),
    "rtx4090": (24, 165, 1008, "bfloat16"),
    "rtx5060": (8, 77, 448, "bfloat16"),
    "rtx5070": (12, 123, 672, "bfloat16"),
    "rtx5080": (16, 225, 960, "bfloat16"),
    "rtx5090": (32, 209, 1792, "bfloat16"),
    "a2000": (12, 64, 288, "bfloat16"),
    "a4000": (16, 153, 448, "bfloat16"),
    "a5000": (24, 222, 768, "bfloat16"),
    "a6000": (48, 310, 768, "bfloat16"),
    "l4": (24, 121, 300, "bfloat16"),
    "a10": (24, 125, 600, "bfloat16"),
    "a10g": (24, 70, 600, "bfloat16"),
    "l40": (48, 181, 864, "bfloat16"),
    "l40s": (48, 362, 864, "bfloat16"),
    "a100": (80, 312, 2039, "bfloat16"),
    "a100-40gb": (40, 312, 1555, "bfloat16"),
    "h100": (80, 989, 3350, "bfloat16"),
    "h200": (141, 989, 4800, "bfloat16"),
    "b200": (180, 2250, 8000, "bfloat16"),
}
"""Name -> memory (GiB), dense 16-bit matmuls (TFLOP/s) and memory bandwidth (GB/s) of the data sheet, and the dtype to
train in. If a card is sold with several memory sizes, the smallest."""
LAPTOPS = {
    "m1": (8, 5.2, 68),
    "m1-pro": (16, 10, 200),
    "m1-max": (32, 21, 400),
    "m2": (8, 7.2, 100),
    "m2-pro": (16, 13, 200),
    "m2-max": (32, 27, 400),
    "m3": (8, 8.2, 100),
    "m3-pro": (18, 14, 150),
    "m3-max": (36, 28, 400),
    "m4": (16, 8.5, 120),
    "m4-pro": (24, 18, 273),
    "m4-max": (36, 37, 546),
}
"""Apple's chips with an accelerator (mps) -> the smallest memory they are sold with (GiB, shared with the system),
16-bit matmuls (TFLOP/s) and memory bandwidth (GB/s)."""
SAVED_AS = {
    "seconds_per_operation": "operation",
    "seconds_per_element": "number",
    "seconds_per_call": "call",
    "disk_bytes_per_second": "disk",
    "start_seconds": "start",
    "source": "source",
    "rounded": "rounded",
}
"""Fields of `MachineSpeed` -> their keys in a probe's file."""
LAPTOP_FRACTION = 0.7
"""Fraction of a laptop's memory that its accelerator may take."""


@dataclass(frozen=True)
class Machine:
    """The machine of a run. `memory`: bytes the run may take; `reason` says what limits them.

    `dtype`: the fastest dtype on this machine. `speed`: None if unknown. `imported_bytes`: resident bytes after the
    imports, None if not measured. `can_stream`: whether a base can be streamed layer by layer.
    """

    name: str
    memory: int
    reason: str
    dtype: str
    accelerator: bool = False
    speed: MachineSpeed | None = None
    imported_bytes: int | None = None
    can_stream: bool = True


@dataclass(frozen=True)
class Probe:
    """A measurement of this machine: its speed by dtype, and the resident bytes after the imports."""

    cpu: str
    speeds: dict[str, MachineSpeed]
    imported_bytes: int


def machine_named(name: str) -> Machine:
    """Another machine: an accelerator or laptop by name, or a CPU with an amount of memory (`16GiB`).

    Raises RecipeError for an unknown name.
    """
    key = _key(name)
    if key in ACCELERATORS:
        gib, teraflops, bandwidth, dtype = ACCELERATORS[key]
        memory = int(gib * GIB * (1 - DRIVER_FRACTION))
        speed = _data_sheet_speed(teraflops, bandwidth)
        return Machine(key, memory, f"{gib} GiB less the driver's", dtype, accelerator=True, speed=speed)
    if key in LAPTOPS:
        gib, speed_16bit, bandwidth = LAPTOPS[key]
        reason = f"{LAPTOP_FRACTION:.0%} of {gib} GiB, the smallest it is sold with"
        speed = _data_sheet_speed(speed_16bit, bandwidth)
        return Machine(
            key, int(gib * GIB * LAPTOP_FRACTION), reason, "bfloat16", accelerator=True, speed=speed, can_stream=False
        )
    if key.isdigit():
        raise RecipeError(f"--on {name}: a size has a unit", got=name, fix=f"--on {name}GiB, or a GPU's name")
    try:
        memory = parse_size(key)
    except ValueError:
        guess = nearest(key, [*ACCELERATORS, *LAPTOPS])
        known = f"{', '.join(ACCELERATORS)}, {', '.join(LAPTOPS)}"
        hint = f"did you mean {guess}?" if guess else f"use {known}, or a size such as 16GiB"
        raise RecipeError(f"--on does not know {name}", fix=hint) from None
    return Machine(f"a CPU with {format_size(memory)} free for the run", memory, "as asked", "float32")


def _key(name: str) -> str:
    """`NVIDIA GeForce RTX 4090`, `rtx-4090` and `4090` are rtx4090; `Apple M2 Pro` and `m2pro` are m2-pro."""
    words = re.sub(r"[\s_-]+", "", name.strip().lower())
    words = re.sub(r"^(nvidia|apple|geforce|quadro|tesla|rtx(?=a\d))+", "", words)
    words = words.removesuffix("laptopgpu").removesuffix("gpu")
    if f"rtx{words}" in ACCELERATORS:
        return f"rtx{words}"
    return next((key for key in (*ACCELERATORS, *LAPTOPS) if key.replace("-", "") == words), words)


def _data_sheet_speed(teraflops: float, bandwidth: float) -> MachineSpeed:
    """The speed of an accelerator by its data sheet; each element is read and written, often in float32."""
    return MachineSpeed(
        1 / (teraflops * 1e12 * REACHED_FRACTION), 6 / (bandwidth * 1e9), 8e-6, 2e9, 15.0, "data sheet, a rough guess"
    )


def this_machine(device: str = "auto", dtype: str = "auto") -> Machine:
    """This machine: its accelerator if it has one and `device` is auto or cuda, else its CPU.

    `dtype`: the dtype of the speed; auto is the fastest on this machine.
    """
    if device in ("auto", "cuda") and (found := _accelerator()) is not None:
        return found
    fast = "bfloat16" if cpu.has_fast_bfloat16() else "float32"
    memory, reason = available_memory()
    probe = load_probe()
    speed = probe.speeds.get(fast if dtype == "auto" else dtype) if probe else None
    return Machine(
        cpu_name(),
        memory,
        reason,
        fast,
        speed=speed or _guess_speed(),
        imported_bytes=probe.imported_bytes if probe else None,
    )


def check_device(asked: str) -> None:
    """Raises RecipeError if this machine lacks the device of `--device`, as far as can be told without torch."""
    available = [*(["cuda"] if _accelerator() else []), *(["mps"] if _is_apple() else []), "cpu"]
    if asked.partition(":")[0] not in ("auto", "xpu", *available):
        raise missing_device_error(asked, available)


def _is_apple() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def check_compute(compute: str, device: str) -> None:
    """Raises RecipeError if matmuls cannot be rounded as `--compute` asks, as far as can be told without torch."""
    if compute != "auto" and (device != "cpu" or "avx2" not in cpu.features()):
        raise RecipeError(
            f"--compute {compute} is for CPUs with AVX2",
            got=device if device != "cpu" else cpu_name(),
            fix="leave --compute out",
        )


@functools.cache
def cpu_name() -> str:
    """The CPU's name and the number of CPUs that this process may use: `AMD EPYC x 2`."""
    models = cpu.cpuinfo("model name")
    return f"{models[0] if models else platform.processor() or platform.machine()} x {cpu_count()}"


def cpu_count() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_probe() -> Probe | None:
    """The cached measurement of this CPU with this number of threads; None if there is none, or its file is damaged."""
    try:
        content = json.loads(_probe_file().read_text())
        speeds = {
            dtype: MachineSpeed(**{field: values[saved] for field, saved in SAVED_AS.items()})
            for dtype, values in content["prices"].items()
        }
        return Probe(content["processor"], speeds, int(content["framework"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save_probe(probe: Probe) -> None:
    """Caches a measurement for later plans on the same CPU."""
    speeds = {
        dtype: {saved: getattr(speed, field) for field, saved in SAVED_AS.items()}
        for dtype, speed in probe.speeds.items()
    }
    content = {"processor": probe.cpu, "prices": speeds, "framework": probe.imported_bytes}
    write_file(_probe_file(), json.dumps(content, indent=1))


def _probe_file() -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in cpu_name())
    return cache_dir("probe") / f"{name}-{os.environ.get('OMP_NUM_THREADS', 'all')}.json"


def _guess_speed() -> MachineSpeed:
    """The speed of a CPU that was not measured, from its number of cores and its widest instructions."""
    lanes = 32 if "avx512f" in cpu.features() else 16 if "avx2" in cpu.features() else 8
    operation = 1 / (cpu_count() * 2.5e9 * lanes * 0.8)
    rounded = {"int16": operation / 1.4, "int8": operation / 2} if lanes == 16 else {}
    return MachineSpeed(
        operation, 1.2e-9 / cpu_count(), 3e-5, 5e8, 8.0, "a guess from the processor, not measured", rounded
    )


def _accelerator() -> Machine | None:
    """The first accelerator that nvidia-smi lists."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()[0]
        name, _, free = (part.strip() for part in line.split(","))
        memory = int(free) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    words = name.lower().replace("-", " ").split()
    key = next((key for key in (_key(name), *ACCELERATORS) if key in ACCELERATORS and key in (*words, _key(name))), "")
    base = machine_named(key) if key else Machine(name, memory, "", "bfloat16", accelerator=True)
    return dataclasses.replace(base, name=name, memory=int(memory * 0.97), reason="free on this accelerator")
