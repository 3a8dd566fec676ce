"""Products of float32 matrices in integers, on a processor that is quick at these: with AVX2.

For x (n, k), W (k, d) and blocks p of 128 along k, with M the largest integer of a format:

    s_ip = max over k in p of |x_ik| / M,   q_ik = round(x_ik / s_ip)       scales (n, k / 128), integers (n, k)
    t_pj = max over k in p of |W_kj| / M,   r_kj = round(W_kj / t_pj)
    y_ij = sum over p of s_ip t_pj (sum over k in p of q_ik r_kj)           (n, d)

The inner sum is exact, the outer one of float32 numbers. With u = s_ip / 2 and v = t_pj / 2, the most that rounding
changes a number of a block by, an output is off by at most

    sum over p, k in p of  u |W_kj| + v |x_ik| + u v

besides what is lost to float32. M is 4,095 (`int16`, 13 bits: 128 M^2 < 2^31) or 63 (`int8`, 7 bits: two products and
two more fit in 16 bits with x moved to 0..2 M). W is quantized as it is multiplied: no copy of it is kept. A block with
an infinity or a NaN has a scale of NaN, and so the whole row or column of y. Knows nothing of layers.
"""

import torch

from hatrack.kernels import native

BITS = {"int16": 13, "int8": 7}
"""Of each format's integers, sign included."""
BLOCK = 128
TINY = 2.0**-100
"""A block with nothing larger counts as zeros."""


def is_available() -> bool:
    """Whether the kernels are there, which need a processor with AVX2."""
    library = native.library()
    return library is not None and bool(library.integers_covered())


def int_matmul(x: torch.Tensor, W: torch.Tensor, out: torch.Tensor, format: str, *, add: bool = False) -> None:
    """out (n, d) = x (n, k) W (k, d), or += where `add`; all float32 on a processor. x and out have rows without gaps
    (stride(1) == 1), and so has W or its transpose. `format`: one of `BITS`. Only where `is_available()`."""
    (n, k), d = x.shape, W.shape[1]
    library = native.library()
    assert library is not None and x.dtype == W.dtype == out.dtype == torch.float32
    assert x.stride(1) == out.stride(1) == 1 and 1 in W.stride() and out.shape == (n, d) and len(W) == k
    if k == 0 and not add:
        out.zero_()
    if not n or not k or not d:
        return
    transposed = W.stride(1) != 1
    space = torch.empty(library.product_space(n, k, torch.get_num_threads()), dtype=torch.uint8)
    leads = x.stride(0), W.stride(1 if transposed else 0), out.stride(0)
    native.call("product", getattr(torch, format), x, W, out, space, n, k, d, *leads, transposed, add)


def reference_matmul(x: torch.Tensor, W: torch.Tensor, format: str) -> torch.Tensor:
    """x (n, k) W (k, d) by the formulas, (n, d) float64: what the kernel is held to."""
    most = 2 ** (BITS[format] - 1) - 1
    y = torch.zeros(len(x), W.shape[1], dtype=torch.float64)
    for rows, columns in zip(torch.split(x, BLOCK, 1), torch.split(W, BLOCK), strict=True):
        (q, s), (r, t) = quantize_block(rows, most), quantize_block(columns.t(), most)
        y += s.double() * t.double().t() * (q.double() @ r.double().t())
    return y


def quantize_block(x: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A block (n, 128 at most) as integers -most..most, float32, and the scale (n, 1) of each row."""
    largest = x.abs().amax(1, keepdim=True)
    some = (largest >= TINY) & largest.isfinite()
    scale = torch.where(some, largest / most, torch.where(largest < TINY, 0.0, torch.nan))
    inverse = torch.full_like(largest, most) / largest  # a number over a tensor would be rounded twice
    return torch.where(some, (x * inverse).round(), 0.0), scale
