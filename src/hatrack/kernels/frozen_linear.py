"""Matmuls with a frozen weight that is stored in another dtype, or in 4 bits.

For x (n, d_in), W (d_out, d_in), b (d_out,), and the gradient g (n, d_out) of y:

    y = x W^T + b                         (n, d_out)
    g_x = g W                             (n, d_in)

On a CPU, W is converted to the dtype of x a few rows at a time, right before the matmul with these rows, so that they
are still in the CPU's cache. This is as fast as a matmul with a converted copy of W, without the memory for the copy
(docs/log.md).

If asked, both matmuls are rounded to integers (`int8.py`), in training only: evaluation is exact.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hatrack.errors import ModelError
from hatrack.kernels import int8
from hatrack.kernels.limits import WEIGHT_CHUNK
from hatrack.upstream.bitsandbytes import dequantize, four_bit_layers, is_repacked, never_repack, quant_state

MIN_ROUNDED_ROWS = 64
"""The fewest input rows for which a matmul is rounded: with fewer, rounding W takes more time than it saves."""


class FrozenLinear(nn.Linear):
    """A frozen linear layer, computed in the dtype of its input.

    If its parameters require gradients, or under autocast, it computes as nn.Linear. `int_format`: what its matmuls
    are rounded to in training, a key of `int8.BITS`; None for exact matmuls.
    """

    int_format: str | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trained = any(parameter.requires_grad for parameter in self.parameters(recurse=False))
        if trained or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return linear(x, self.weight, self.bias, active_int_format(self))


def active_int_format(layer: nn.Module) -> str | None:
    """The integer format that a layer's matmuls are rounded to now: None outside training."""
    return getattr(layer, "int_format", None) if layer.training else None


def linear(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, int_format: str | None = None) -> torch.Tensor:
    """x (..., d_in) -> (..., d_out) in the dtype of x, by the formulas above. W and b get no gradient."""
    return _Linear.apply(x, W, b, int_format)  # type: ignore[no-any-return,no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, int_format: str | None
    ) -> torch.Tensor:
        ctx.W = W  # the object itself, which carries a 4-bit weight's quant_state
        ctx.int_format = int_format
        return matmul(x.reshape(-1, x.shape[-1]), W, b, int_format).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (
            matmul_backward(g.reshape(-1, g.shape[-1]), ctx.W, ctx.int_format).view(*g.shape[:-1], -1),
            None,
            None,
            None,
        )


def matmul(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, int_format: str | None = None) -> torch.Tensor:
    """y = x W^T + b, (n, d_out) in the dtype of x."""
    b = None if b is None else b.to(x.dtype)
    int_format = _usable_int_format(x, int_format)
    if int_format is None and _is_whole(x, W):
        return F.linear(x, W.to(x.dtype), b)
    y = x.new_empty(len(x), weight_shape(W)[0])
    for rows, part in _converted_rows(x, W):
        _multiply(x, part.t(), y[:, rows], int_format)
    return y if b is None else y.add_(b)


def matmul_backward(
    g: torch.Tensor, W: torch.Tensor, int_format: str | None = None, *, add_to: torch.Tensor | None = None
) -> torch.Tensor:
    """g W, (n, d_in) in the dtype of g. If `add_to` (n, d_in) is given, adds to it in place and returns it.

    Rows of g that are all zeros are skipped if there are many. In the last layer of a classifier that pools one token
    per text, the rows of all other tokens are zero; in that of a generator, the rows of the question.
    """
    nonzero = _nonzero_rows(g)
    if nonzero is not None:
        total = g.new_zeros(len(g), weight_shape(W)[1]) if add_to is None else add_to
        return total.index_add_(0, nonzero, matmul_backward(g[nonzero], W, int_format)) if len(nonzero) else total
    int_format = _usable_int_format(g, int_format)
    if int_format is None and _is_whole(g, W):
        return g @ W.to(g.dtype) if add_to is None else add_to.addmm_(g, W.to(g.dtype))
    if g.dtype != torch.float32:
        total = torch.zeros(len(g), weight_shape(W)[1])  # in float32, however many parts it is a sum of
        for rows, part in _converted_rows(g, W):
            total.add_(g[:, rows] @ part)
        return total.to(g.dtype) if add_to is None else add_to.add_(total)
    add = add_to is not None
    total = g.new_empty(len(g), weight_shape(W)[1]) if add_to is None else add_to
    for rows, part in _converted_rows(g, W):
        _multiply(g[:, rows], part, total, int_format, add=add)
        add = True
    return total


def _usable_int_format(x: torch.Tensor, int_format: str | None) -> str | None:
    """`int_format`, or None if the kernels do not support x, or if x has too few rows for rounding W to pay off."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and len(x) >= MIN_ROUNDED_ROWS
    return int_format if fits else None


def _multiply(
    x: torch.Tensor, W: torch.Tensor, out: torch.Tensor, int_format: str | None, *, add: bool = False
) -> None:
    """out (n, d) = x (n, k) W (k, d), or += if `add`."""
    if int_format is not None:
        int8.int_matmul(x if x.stride(1) == 1 else x.contiguous(), W, out, int_format, add=add)
    elif add:
        out.addmm_(x, W)
    else:
        torch.mm(x, W, out=out)


def _nonzero_rows(g: torch.Tensor) -> torch.Tensor | None:
    """The numbers of the rows of g (n, d) that are not all zeros; None if more than three in four are not, and on an
    accelerator, where counting would wait for the device."""
    if g.device.type != "cpu" or 4 * int(torch.count_nonzero(g[:, 0])) > 3 * len(g):
        return None
    found = g.abs().amax(1).nonzero().squeeze(1)
    return found if 4 * len(found) <= 3 * len(g) else None


def weight_shape(W: torch.Tensor) -> tuple[int, int]:
    """(d_out, d_in), also for a 4-bit weight."""
    state = quant_state(W)
    d_out, d_in = W.shape if state is None else state.shape
    return d_out, d_in


def can_unpack(W: Any) -> bool:
    """Whether W is a 4-bit weight of bitsandbytes, in an order in which single rows can be unpacked."""
    state = quant_state(W)
    return (
        state is not None
        and not state.nested
        and not is_repacked(state)
        and len(state.shape) == 2
        and state.shape[1] % state.blocksize == 0
    )


def prevent_repacking(base: nn.Module) -> None:
    """Stops bitsandbytes from repacking the 4-bit weights of a base for inference.

    On a CPU with AVX512-BF16, bitsandbytes' layers repack at their first evaluation. Then no gradient flows through
    them, without any message, and reading or saving the weights restores them wrongly (`is_repacked`): a model that was
    evaluated before training would not learn.

    Raises ModelError if a weight has been repacked already.
    """
    for name, layer in four_bit_layers(base):
        never_repack(layer)
        state = quant_state(layer.weight)
        if state is not None and is_repacked(state):
            raise _repacked_error(name)


def _repacked_error(name: str) -> ModelError:
    return ModelError(
        "a 4-bit weight was repacked by bitsandbytes for inference, and cannot be trained on",
        got=name,
        fix="load the base again, and wrap it or speed it up before its first evaluation",
    )


def _is_whole(x: torch.Tensor, W: torch.Tensor) -> bool:
    """Whether W is multiplied in one matmul. On an accelerator it is: many launches would cost more than a copy."""
    return quant_state(W) is None and (x.dtype == W.dtype or x.device.type != "cpu")


def _converted_rows(x: torch.Tensor, W: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields chunks of W: the slice of rows, and their values (rows, d_in) in the dtype of x. The next chunk overwrites
    them."""
    d_out, d_in = weight_shape(W)
    if _is_whole(x, W):
        yield slice(0, d_out), W
        return
    count = max(WEIGHT_CHUNK // d_in // 128 * 128, 128)
    convert = _unpack(W, x.dtype) if quant_state(W) is not None else _cast(W, x.dtype, count)
    for start in range(0, d_out, count):
        rows = slice(start, min(start + count, d_out))
        yield rows, convert(rows)


def _cast(W: torch.Tensor, dtype: torch.dtype, count: int) -> Callable[[slice], torch.Tensor]:
    """A function that casts at most `count` rows of W into a buffer, which each call overwrites."""
    buffer = W.new_empty(min(count, len(W)), W.shape[1], dtype=dtype)
    return lambda rows: buffer[: rows.stop - rows.start].copy_(W[rows])


def _unpack(W: torch.Tensor, dtype: torch.dtype) -> Callable[[slice], torch.Tensor]:
    """A function that unpacks rows of a 4-bit W."""
    state: Any = quant_state(W)
    if is_repacked(state):
        raise _repacked_error(f"one of {tuple(state.shape)}")
    bits, width, size = W.detach().view(torch.uint8).view(-1), state.shape[1], state.blocksize

    def unpack(rows: slice) -> torch.Tensor:
        packed = bits[rows.start * width // 2 : rows.stop * width // 2, None]
        scales = state.absmax[rows.start * width // size : rows.stop * width // size]
        return dequantize(packed, scales, state, rows.stop - rows.start, dtype)

    return unpack
