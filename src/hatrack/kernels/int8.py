"""Float32 matmuls rounded to 16-bit or 8-bit integers, for CPUs with AVX2.

On a CPU without bfloat16 instructions, training is 1.2 to 1.6x faster (docs/performance.md).

For x (n, k), W (k, d) and blocks p of 128 along k, with M the largest integer of a format:

    s_ip = max over k in p of |x_ik| / M,   q_ik = round(x_ik / s_ip)       scales (n, k / 128), integers (n, k)
    t_pj = max over k in p of |W_kj| / M,   r_kj = round(W_kj / t_pj)
    y_ij = sum over p of s_ip t_pj (sum over k in p of q_ik r_kj)           (n, d)

The inner sum is exact, the outer one is in float32. Rounding changes an element of a block by at most u = s_ip / 2 or
v = t_pj / 2, so an output is off by at most

    sum over p, k in p of  u |W_kj| + v |x_ik| + u v

besides the rounding of float32. M is 4,095 (`int16`, 13 bits: 128 M^2 < 2^31) or 63 (`int8`, 7 bits: two sums of two
multiplications fit in 16 bits with x shifted to 0..2 M). W is quantized during the matmul; no quantized copy is stored.
A block with an infinity or a NaN has a scale of NaN, which makes its whole row or column of y NaN.
"""

import torch

from hatrack.kernels import native

BITS = {"int16": 13, "int8": 7}
"""Bits of the integers, sign included."""
BLOCK = 128
TINY = 2.0**-100
"""A block whose elements are all smaller than this counts as zeros."""


def is_available() -> bool:
    """Whether the kernels are compiled and the CPU has AVX2."""
    library = native.library()
    return library is not None and bool(library.integers_supported())


def int_matmul(x: torch.Tensor, W: torch.Tensor, out: torch.Tensor, format: str, *, add: bool = False) -> None:
    """out (n, d) = x (n, k) W (k, d), or += if `add`; all float32 on a CPU. x, out, and W or its transpose have
    stride(1) == 1. `format`: a key of `BITS`. Needs `is_available()`."""
    (n, k), d = x.shape, W.shape[1]
    library = native.library()
    assert library is not None and x.dtype == W.dtype == out.dtype == torch.float32
    assert x.stride(1) == out.stride(1) == 1 and 1 in W.stride() and out.shape == (n, d) and len(W) == k
    if k == 0 and not add:
        out.zero_()
    if not n or not k or not d:
        return
    transposed = W.stride(1) != 1
    workspace = torch.empty(library.int_matmul_workspace(n, k, torch.get_num_threads()), dtype=torch.uint8)
    strides = x.stride(0), W.stride(1 if transposed else 0), out.stride(0)
    native.call("int_matmul", getattr(torch, format), x, W, out, workspace, n, k, d, *strides, transposed, add)


def reference_matmul(x: torch.Tensor, W: torch.Tensor, format: str) -> torch.Tensor:
    """The kernel's result in plain torch, for tests: x (n, k) W (k, d), (n, d) float64."""
    limit = 2 ** (BITS[format] - 1) - 1
    y = torch.zeros(len(x), W.shape[1], dtype=torch.float64)
    for rows, columns in zip(torch.split(x, BLOCK, 1), torch.split(W, BLOCK), strict=True):
        (q, s), (r, t) = quantize_block(rows, limit), quantize_block(columns.t(), limit)
        y += s.double() * t.double().t() * (q.double() @ r.double().t())
    return y


def quantize_block(x: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A block (n, at most 128) as integers from -limit to limit, in float32, and the scales (n, 1) of its rows."""
    largest = x.abs().amax(1, keepdim=True)
    usable = (largest >= TINY) & largest.isfinite()
    scale = torch.where(usable, largest / limit, torch.where(largest < TINY, 0.0, torch.nan))
    inverse = torch.full_like(largest, limit) / largest  # torch would round limit / largest twice
    return torch.where(usable, (x * inverse).round(), 0.0), scale
