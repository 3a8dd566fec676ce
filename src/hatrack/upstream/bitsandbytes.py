"""Internals of bitsandbytes: how it keeps a matrix in four bits, and when it repacks one.

Imports it only where a model has such matrices.
"""

import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hatrack.upstream.names import require

NAMES = (
    "bitsandbytes.nn.Linear4bit.__init__.support_avx512bf16_for_cpu",
    "bitsandbytes.nn.Params4bit.__new__.quant_state",
    "bitsandbytes.functional._convert_weight_packed_for_cpu.packing_format_for_cpu",
    "torch.ops.bitsandbytes.dequantize_4bit",
)
STATE = ("absmax", "blocksize", "nested", "quant_type", "shape")


@functools.cache
def check() -> None:
    """Raises MachineError where the installed bitsandbytes lacks a name that hatrack uses."""
    require("bitsandbytes", *NAMES, *(f"bitsandbytes.functional.QuantState.__init__.{name}" for name in STATE))


def quant_state(W: torch.Tensor) -> Any | None:
    """How bitsandbytes keeps a matrix in four bits (its `QuantState`); None for any other matrix."""
    state = getattr(W, "quant_state", None)
    if state is not None:
        check()
    return state


def is_repacked(state: Any) -> bool:
    """Whether a matrix in four bits was put into the order for AVX512-BF16, or was and has been put back: that turns
    the bits back and leaves the scales, one a block (blocks,) before, as they are (d_in / blocksize, d_out)."""
    return bool(getattr(state, "packing_format_for_cpu", False)) or (not state.nested and state.absmax.dim() != 1)


def four_bit_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Full name and layer of each of a model's linear layers in four bits."""
    loaded = sys.modules.get("bitsandbytes")
    if loaded is not None:
        check()
        yield from ((name, layer) for name, layer in model.named_modules() if isinstance(layer, loaded.nn.Linear4bit))


def never_repack(layer: Any) -> None:
    """Has a layer in four bits keep its order: on a CPU with AVX512-BF16 it would be repacked when first evaluated."""
    layer.support_avx512bf16_for_cpu = False


def dequantize(packed: torch.Tensor, scales: torch.Tensor, state: Any, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows (rows, d_in) of a matrix from their bits (bytes, 1) uint8 and their blocks' scales."""
    shape = [rows, state.shape[1]]
    return torch.ops.bitsandbytes.dequantize_4bit(packed, scales, state.blocksize, state.quant_type, shape, dtype)  # type: ignore[no-any-return]
