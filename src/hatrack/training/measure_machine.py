"""Measures this machine for plans: how fast its products are, what a step costs beside them, how fast its disk is.

Small models of the two makes there are take real training steps with hatrack's own layers and kernels, so what is
measured gets better when these do. Takes some seconds; knows nothing of any base or data.
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

ENOUGH = 0.4
"""Seconds that one thing is timed for at least."""
DISK_BYTES = 2**27
SIZES = ((1, 16), (4, 64), (8, 128))
"""Rows and tokens of the steps that are timed: from nearly all calls to nearly all products."""


def measure() -> Probe:
    """This machine's prices in each number format. To be called in a process that has just imported all of training."""
    memory = psutil.Process().memory_info().rss
    start = time.time() - psutil.Process().create_time()
    disk = _disk_speed()
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    operation = {name: _seconds_per_operation(dtype) for name, dtype in dtypes.items()}
    fast = "bfloat16" if cpu.has_fast_bfloat16() else "float32"
    steps = _timed_steps(dtypes[fast])
    operation[fast] = min(operation[fast], _seconds_per_operation(dtypes[fast]))  # again: others may use the machine
    number, call = _beside_products(steps, operation[fast])
    rounded = {name: _seconds_per_operation(torch.float32, name) for name in int8.BITS} if int8.is_available() else {}
    prices = {name: MachineSpeed(operation[name], number, call, disk, start, "probe", rounded) for name in dtypes}
    return Probe(cpu_name(), prices, memory)


def _seconds(run: Callable[[], Any]) -> float:
    """The fastest of several runs, after one that is not counted: what disturbs only ever adds."""
    run()
    times: list[float] = []
    while sum(times) < ENOUGH or len(times) < 3:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def _seconds_per_operation(dtype: torch.dtype, rounding: str | None = None) -> float:
    """Of the products of a layer of middling size, there and back; `rounding` as in `kernels/frozen_linear.py`."""
    x, W, V = (torch.randn(shape).to(dtype) for shape in ((512, 768), (2048, 768), (768, 2048)))
    return _seconds(lambda: matmul(matmul(x, W, None, rounding), V, None, rounding)) / (2 * 2 * 512 * 768 * 2048)


def _timed_steps(dtype: torch.dtype) -> list[tuple[OpCounts, float]]:
    """What steps of several sizes consist of, and the seconds each took."""
    found = []
    for model, shape, task in (_decoder(dtype), _encoder(dtype)):
        for rows, tokens in SIZES:
            batch = _batch(rows, tokens, task)
            effort = step_counts(
                shape, Method(), MicroBatch(rows, tokens, rows * (tokens - 1) if task == "chat" else 0)
            )
            found.append((effort, _seconds(functools.partial(_step, model, batch, task))))
    return found


def _beside_products(steps: list[tuple[OpCounts, float]], operation: float) -> tuple[float, float]:
    """Seconds for a number passed over and for a call: what is left of the steps, by least squares."""
    parts = [[effort.elements / seconds, effort.calls / seconds] for effort, seconds in steps]  # relative errors
    left = [1 - effort.operations * operation / seconds for effort, seconds in steps]
    return not_negative(np.array(parts), np.array(left))


def not_negative(parts: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """The two prices p >= 0 for which `parts` (n, 2) times p come closest to `wanted` (n,)."""
    both = np.linalg.lstsq(parts, wanted, rcond=None)[0]
    alone = [max(float(part @ wanted / (part @ part)), 0.0) for part in parts.T]
    tried = [(alone[0], 0.0), (0.0, alone[1])]
    if (both >= 0).all():
        tried.append((float(both[0]), float(both[1])))
    return min(tried, key=lambda prices: float(np.square(parts @ np.array(prices) - wanted).sum()))


def _step(model: Any, batch: dict[str, torch.Tensor], task: str) -> None:
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
    peeked = BaseDescription("", Path(), model.config.to_dict(), shapes)
    shape = describe_model(peeked, recipe, task=task, labels=2)
    speed_up(model)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".layer" in name]
    adapted = get_peft_model(model, LoraConfig(r=recipe.r, lora_dropout=recipe.dropout, target_modules=names))
    return adapted.train(), shape, task


def _batch(rows: int, tokens: int, task: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 2000, (rows, tokens))
    labels = ids if task == "chat" else torch.randint(2, (rows,))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _disk_speed() -> float:
    """Bytes a second that a file in the cache is read at, from the disk and not from memory."""
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
