"""Benchmarks this machine for plans: matmuls, other operations of a step, and the disk.

A small decoder and a small encoder take real training steps with hatrack's own layers and kernels, so the measurements
follow when these get faster. Takes a few seconds. Knows nothing of any base or data.
"""

import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hatrack import cpu
from hatrack.base.description import BaseDescription
from hatrack.base.header import TensorInfo
from hatrack.evaluate.loss import losses
from hatrack.kernels import int8
from hatrack.kernels.frozen_linear import matmul
from hatrack.layers.fast_base import speed_up
from hatrack.layers.fast_lora import get_peft_model
from hatrack.planning.machine import Probe, cpu_name
from hatrack.planning.memory import Method, MicroBatch
from hatrack.planning.model_shape import ModelShape, describe_model
from hatrack.planning.time import MachineSpeed, OpCounts, step_counts
from hatrack.recipe import Recipe
from hatrack.storage import cache_dir

MIN_SECONDS = 0.4
"""Minimum time that each operation is timed for."""
DISK_BYTES = 2**27
"""Bytes that are read to measure the disk."""
SIZES = ((1, 16), (4, 64), (8, 128))
"""Rows and tokens of the timed steps. In the first, calling operations takes most of the time; in the last, matmuls
do."""


def measure() -> Probe:
    """Measures what operations cost on this machine in each dtype. To be called in a process that has just imported
    training, as it measures the start of such a process too."""
    memory = psutil.Process().memory_info().rss
    start = time.time() - psutil.Process().create_time()
    disk = _disk_speed()
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    operation = {name: _seconds_per_operation(dtype) for name, dtype in dtypes.items()}
    fast = "bfloat16" if cpu.has_fast_bfloat16() else "float32"
    steps = _timed_steps(dtypes[fast])
    operation[fast] = min(
        operation[fast], _seconds_per_operation(dtypes[fast])
    )  # measured again, because other processes may use the machine
    element, call = _fit_other_costs(steps, operation[fast])
    rounded = {name: _seconds_per_operation(torch.float32, name) for name in int8.BITS} if int8.is_available() else {}
    prices = {name: MachineSpeed(operation[name], element, call, disk, start, "probe", rounded) for name in dtypes}
    return Probe(cpu_name(), prices, memory)


def _seconds(run: Callable[[], Any]) -> float:
    """The fastest of several runs, after one warm-up: other processes can only slow a run down."""
    run()
    times: list[float] = []
    while sum(times) < MIN_SECONDS or len(times) < 3:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def _seconds_per_operation(dtype: torch.dtype, int_format: str | None = None) -> float:
    """Seconds per operation in the matmuls of a medium layer; `int_format` as in `kernels/frozen_linear.py`."""
    x, W, V = (torch.randn(shape).to(dtype) for shape in ((512, 768), (2048, 768), (768, 2048)))
    return _seconds(lambda: matmul(matmul(x, W, None, int_format), V, None, int_format)) / (2 * 2 * 512 * 768 * 2048)


def _timed_steps(dtype: torch.dtype) -> list[tuple[OpCounts, float]]:
    """The operations of steps of several sizes, with the seconds that each step took."""
    found = []
    for model, shape, task in (_decoder(dtype), _encoder(dtype)):
        for rows, tokens in SIZES:
            batch = _batch(rows, tokens, task)
            counts = step_counts(
                shape, Method(), MicroBatch(rows, tokens, rows * (tokens - 1) if task == "chat" else 0)
            )
            found.append((counts, _seconds(functools.partial(_train_step, model, batch, task))))
    return found


def _fit_other_costs(steps: list[tuple[OpCounts, float]], operation: float) -> tuple[float, float]:
    """Seconds per element that is read or written and per call: fitted by least squares to the steps' time without
    matmuls."""
    parts = [[counts.elements / seconds, counts.calls / seconds] for counts, seconds in steps]  # relative errors
    rest = [1 - counts.operations * operation / seconds for counts, seconds in steps]
    return fit_not_negative(np.array(parts), np.array(rest))


def fit_not_negative(parts: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """The two costs c >= 0 that minimize |parts c - wanted|; `parts` is (n, 2), `wanted` (n,)."""
    both = np.linalg.lstsq(parts, wanted, rcond=None)[0]
    alone = [max(float(part @ wanted / (part @ part)), 0.0) for part in parts.T]
    tried = [(alone[0], 0.0), (0.0, alone[1])]
    if (both >= 0).all():
        tried.append((float(both[0]), float(both[1])))
    return min(tried, key=lambda costs: float(np.square(parts @ np.array(costs) - wanted).sum()))


def _train_step(model: Any, batch: dict[str, torch.Tensor], task: str) -> None:
    losses(model, batch, task)[0].mean().backward()  # type: ignore[no-untyped-call]
    model.zero_grad()


def _decoder(dtype: torch.dtype) -> tuple[Any, ModelShape, str]:
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    return _adapted(LlamaForCausalLM(config), dtype, "chat")


def _encoder(dtype: torch.dtype) -> tuple[Any, ModelShape, str]:
    config = BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=12, vocab_size=2048
    )
    return _adapted(BertForSequenceClassification(config), dtype, "classify")


def _adapted(model: Any, dtype: torch.dtype, task: str) -> tuple[Any, ModelShape, str]:
    model = model.to(dtype).requires_grad_(False)
    shapes = {
        name: TensorInfo(tuple(tensor.shape), "F32", Path(), 0, 4 * tensor.numel())
        for name, tensor in model.named_parameters()
    }
    recipe = Recipe.make(dropout=0.05)
    description = BaseDescription("", Path(), model.config.to_dict(), shapes)
    shape = describe_model(description, recipe, task=task, labels=2)
    speed_up(model)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".layer" in name]
    adapted = get_peft_model(model, LoraConfig(r=recipe.r, lora_dropout=recipe.dropout, target_modules=names))
    return adapted.train(), shape, task


def _batch(rows: int, tokens: int, task: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 2000, (rows, tokens))
    labels = ids if task == "chat" else torch.randint(2, (rows,))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _disk_speed() -> float:
    """Bytes per second at which a file in hatrack's cache is read from disk, not from the page cache."""
    with tempfile.NamedTemporaryFile(dir=cache_dir("probe")) as file:
        for _ in range(DISK_BYTES // 2**20):
            file.write(os.urandom(2**20))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(2**22):
            pass
        return DISK_BYTES / max(time.perf_counter() - began, 1e-6)
