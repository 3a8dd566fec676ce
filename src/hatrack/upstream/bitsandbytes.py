"""Internals of bitsandbytes: how it stores 4-bit weights, and when it repacks them.

Imports it only if a model has such weights.
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
    """How bitsandbytes stores a 4-bit weight (its `QuantState`); None for any other weight."""
    state = getattr(W, "quant_state", None)
    if state is not None:
        check()
    return state


def is_repacked(state: Any) -> bool:
    """Whether bitsandbytes has repacked a 4-bit weight. Undoing it restores the bits but not the scales: (blocks,)
    before, (d_in / blocksize, d_out) afterwards."""
    return bool(getattr(state, "packing_format_for_cpu", False)) or (not state.nested and state.absmax.dim() != 1)


def four_bit_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Full name and layer of each 4-bit linear layer of a model."""
    loaded = sys.modules.get("bitsandbytes")
    if loaded is not None:
        check()
        yield from ((name, layer) for name, layer in model.named_modules() if isinstance(layer, loaded.nn.Linear4bit))


def never_repack(layer: Any) -> None:
    """Stops a 4-bit layer from repacking its weight at its first evaluation, on a CPU with AVX512-BF16."""
    layer.support_avx512bf16_for_cpu = False


def dequantize(packed: torch.Tensor, scales: torch.Tensor, state: Any, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Some rows (rows, d_in) of a 4-bit weight, from their bits (bytes, 1) uint8 and the scales of their blocks."""
    shape = [rows, state.shape[1]]
    return torch.ops.bitsandbytes.dequantize_4bit(packed, scales, state.blocksize, state.quant_type, shape, dtype)  # type: ignore[no-any-return]
