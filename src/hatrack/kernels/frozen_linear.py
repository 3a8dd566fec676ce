"""Products with a frozen matrix that is kept in another format than theirs: wider or narrower numbers, or four bits.

For x (n, d_in), W (d_out, d_in), b (d_out,), and the gradient g (n, d_out) of y:

    y = x W^T + b                         (n, d_out)
    g_x = g W                             (n, d_in)

On a processor W is never there as a whole in the products' format. A few of its rows at a time are brought into it
right before they are multiplied, so few that the processor's cache still holds them then: main memory gives the narrow
numbers and never sees the wide ones. That is as fast as a product with a wide copy, and needs no room for one
(docs/log.md).

On request both products are rounded to integers (`int8.py`), in training alone: what is scored is exact. Knows
nothing of models, files or adapters.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hatrack.errors import ModelError
from hatrack.kernels import int8
from hatrack.kernels.limits import WEIGHT_CHUNK

WORTH_ROUNDING = 64
"""Rows of an input from which on a product is faster with W rounded first."""


class FrozenLinear(nn.Linear):
    """A linear layer without gradients of its own, computed in its input's format, in whichever it is kept itself.

    One that is trained after all, or used under autocast, is torch's. `rounding`: a name in `int8.BITS`, or None.
    """

    rounding: str | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trained = any(parameter.requires_grad for parameter in self.parameters(recurse=False))
        if trained or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return linear(x, self.weight, self.bias, active_rounding(self))


def active_rounding(layer: nn.Module) -> str | None:
    """What a layer's products are rounded to as it stands: nothing while it is scored."""
    return getattr(layer, "rounding", None) if layer.training else None


def linear(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, rounding: str | None = None) -> torch.Tensor:
    """x (..., d_in) -> (..., d_out) in the format of x, by the formulas above. W and b get no gradient."""
    return _Linear.apply(x, W, b, rounding)  # type: ignore[no-any-return,no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, rounding: str | None
    ) -> torch.Tensor:
        ctx.W = W  # as it is, with what tells how its bits are to be read
        ctx.rounding = rounding
        return matmul(x.reshape(-1, x.shape[-1]), W, b, rounding).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (
            matmul_backward(g.reshape(-1, g.shape[-1]), ctx.W, None, ctx.rounding).view(*g.shape[:-1], -1),
            None,
            None,
            None,
        )


def matmul(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, rounding: str | None = None) -> torch.Tensor:
    """y (n, d_out) in the format of x."""
    b = None if b is None else b.to(x.dtype)
    rounding = _worth_it(x, rounding)
    if rounding is None and _as_it_is(x, W):
        return F.linear(x, W.to(x.dtype), b)
    y = x.new_empty(len(x), weight_shape(W)[0])
    for rows, part in _parts(x, W):
        _multiply(x, part.t(), y[:, rows], rounding)
    return y if b is None else y.add_(b)


def matmul_backward(
    g: torch.Tensor, W: torch.Tensor, g_x: torch.Tensor | None = None, rounding: str | None = None
) -> torch.Tensor:
    """g_x (n, d_in) in the format of g; added to the one that is given.

    Rows of g that are all zeros are left out where they are many. A classifier that reads one token of each text has
    such rows at all others, in most of its last layer; an answer's loss has them in the last layer at the question's.
    """
    some = _rows_not_zero(g)
    if some is not None:
        total = g.new_zeros(len(g), weight_shape(W)[1]) if g_x is None else g_x
        return total.index_add_(0, some, matmul_backward(g[some], W, None, rounding)) if len(some) else total
    rounding = _worth_it(g, rounding)
    if rounding is None and _as_it_is(g, W):
        return g @ W.to(g.dtype) if g_x is None else g_x.addmm_(g, W.to(g.dtype))
    if g.dtype != torch.float32:
        total = torch.zeros(len(g), weight_shape(W)[1])  # in float32, however many parts it is a sum of
        for rows, part in _parts(g, W):
            total.add_(g[:, rows] @ part)
        return total.to(g.dtype) if g_x is None else g_x.add_(total)
    add = g_x is not None
    total = g.new_empty(len(g), weight_shape(W)[1]) if g_x is None else g_x
    for rows, part in _parts(g, W):
        _multiply(g[:, rows], part, total, rounding, add=add)
        add = True
    return total


def _worth_it(x: torch.Tensor, rounding: str | None) -> str | None:
    """The rounding asked for, where the kernels have it for x and rounding W pays for so many rows of x."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and len(x) >= WORTH_ROUNDING
    return rounding if fits else None


def _multiply(x: torch.Tensor, W: torch.Tensor, out: torch.Tensor, rounding: str | None, *, add: bool = False) -> None:
    """out (n, d) becomes x (n, k) W (k, d), or has it added."""
    if rounding is not None:
        int8.int_matmul(x if x.stride(1) == 1 else x.contiguous(), W, out, rounding, add=add)
    elif add:
        out.addmm_(x, W)
    else:
        torch.mm(x, W, out=out)


def _rows_not_zero(g: torch.Tensor) -> torch.Tensor | None:
    """Which rows of g (n, d) have anything but zeros, in order; None where these are more than three in four. An
    accelerator would have to be waited for, so there it is None."""
    if g.device.type != "cpu" or 4 * int(torch.count_nonzero(g[:, 0])) > 3 * len(g):
        return None
    found = g.abs().amax(1).nonzero().squeeze(1)
    return found if 4 * len(found) <= 3 * len(g) else None


def weight_shape(W: torch.Tensor) -> tuple[int, int]:
    """(d_out, d_in), of a matrix in four bits as well."""
    d_out, d_in = W.quant_state.shape if hasattr(W, "quant_state") else W.shape
    return d_out, d_in


def can_unpack(W: Any) -> bool:
    """Whether bitsandbytes keeps W in four bits, in an order whose rows can be taken one by one."""
    state = getattr(W, "quant_state", None)
    return (
        state is not None
        and not state.nested
        and not _repacked(state)
        and len(state.shape) == 2
        and state.shape[1] % state.blocksize == 0
    )


def _repacked(state: Any) -> bool:
    """Whether bitsandbytes has put a matrix in four bits into another order, or did and put it back: that turns the
    bits back and leaves the scales, one a block (blocks,) before, as they are (d_in / blocksize, d_out)."""
    return bool(getattr(state, "packing_format_for_cpu", False)) or (not state.nested and state.absmax.dim() != 1)


def prevent_repacking(base: nn.Module) -> None:
    """Has bitsandbytes leave matrices in four bits in the order they are in.

    On a CPU with AVX512-BF16 its layers repack theirs at the first evaluation. No gradient flows back through that
    form, without a word, and reading or saving the weights puts them back wrongly (`_repacked`): a model that was
    evaluated before it is trained would not learn.

    Raises ModelError where one has been repacked already.
    """
    for name, layer in base.named_modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
            state = getattr(layer.weight, "quant_state", None)
            if state is not None and _repacked(state):
                raise _repacked_error(name)


def _repacked_error(name: str) -> ModelError:
    return ModelError(
        "a matrix in four bits was repacked by bitsandbytes for inference, and cannot be trained on",
        got=name,
        fix="load the base again, and wrap it or speed it up before it answers anything",
    )


def _as_it_is(x: torch.Tensor, W: torch.Tensor) -> bool:
    """Whether W goes into the product as a whole. On an accelerator it does: launching many products costs more."""
    return not hasattr(W, "quant_state") and (x.dtype == W.dtype or x.device.type != "cpu")


def _parts(x: torch.Tensor, W: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """W's rows, a few at a time: which they are, and (rows, d_in) in the format of x, good until the next are asked
    for."""
    d_out, d_in = weight_shape(W)
    if _as_it_is(x, W):
        yield slice(0, d_out), W
        return
    count = max(WEIGHT_CHUNK // d_in // 128 * 128, 128)
    read = _unpack(W, x.dtype) if hasattr(W, "quant_state") else _cast(W, x.dtype, count)
    for start in range(0, d_out, count):
        rows = slice(start, min(start + count, d_out))
        yield rows, read(rows)


def _cast(W: torch.Tensor, dtype: torch.dtype, count: int) -> Callable[[slice], torch.Tensor]:
    space = W.new_empty(min(count, len(W)), W.shape[1], dtype=dtype)
    return lambda rows: space[: rows.stop - rows.start].copy_(W[rows])


def _unpack(W: torch.Tensor, dtype: torch.dtype) -> Callable[[slice], torch.Tensor]:
    state: Any = W.quant_state  # type: ignore[attr-defined]
    if _repacked(state):
        raise _repacked_error(f"one of {tuple(state.shape)}")
    bits, width, size = W.detach().view(torch.uint8).view(-1), state.shape[1], state.blocksize

    def read(rows: slice) -> torch.Tensor:
        packed = bits[rows.start * width // 2 : rows.stop * width // 2, None]
        scales = state.absmax[rows.start * width // size : rows.stop * width // size]
        shape = [rows.stop - rows.start, width]
        return torch.ops.bitsandbytes.dequantize_4bit(packed, scales, size, state.quant_type, shape, dtype)  # type: ignore[no-any-return]

    return read
