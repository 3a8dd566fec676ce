"""The three products of a low-rank adapter, with dropout of the wide side: by hatrack's kernels, or by torch.

For x (n, d) and factors A (r, d), h (n, r), with D dropout that zeroes but does not divide:

    down:  h = D(x) A^T
    up:    y = y + D(h A)
    outer: h^T D(x)                      (r, d)

In torch each is a skinny product after a copy of x with zeros in it; the kernels make one pass over x, which is all
the work there is. A mask is a function of its `Mask` alone, so it is made again in the backward pass, never kept.
Knows nothing of layers.
"""

import torch
from torch.nn import functional as F

from hatrack.kernels import native
from hatrack.kernels.drop import KEEP, STEPS, Mask, dropped

LARGEST_RANK = 64
"""Above it a general matrix product does better."""


def rows(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A factor (r, d) in the products' format, contiguous, its rank filled up with zeros to a multiple of 8."""
    return F.pad(factor.to(dtype), (0, 0, 0, -len(factor) % 8)).contiguous()


def down(x: torch.Tensor, A: torch.Tensor, scale: float, mask: Mask = KEEP) -> torch.Tensor:
    """scale D(x) A^T, (n, r) float32, for contiguous x (n, d) and A (r, d) of one dtype."""
    if not _covered(x, len(A), mask):
        return torch.mul(dropped(x, mask) @ A.t(), scale).float()
    h = torch.empty(len(x), len(A))
    native.call("down", x.dtype, x, A, h, len(x), x.shape[1], len(A), scale, mask.threshold, mask.seed)
    return h


def up(y: torch.Tensor, h: torch.Tensor, A: torch.Tensor, scale: float, mask: Mask = KEEP) -> None:
    """y += scale D(h A) in place, for contiguous y (n, d), h (n, r) float32 and A (r, d) of y's dtype."""
    if _covered(y, len(A), mask):
        native.call("up", y.dtype, y, h, A, len(y), y.shape[1], len(A), scale, mask.threshold, mask.seed)
    elif mask.p:
        y.add_(dropped((h * scale).to(y.dtype) @ A, mask))
    else:
        y.addmm_(h.to(y.dtype), A, alpha=scale)


def outer(x: torch.Tensor, h: torch.Tensor, mask: Mask = KEEP) -> torch.Tensor:
    """h^T D(x), (r, d) float32, for contiguous x (n, d) and h (n, r) float32."""
    rank, width = h.shape[1], x.shape[1]
    if not _covered(x, rank, mask):
        return (h.to(x.dtype).t() @ dropped(x, mask)).float()
    out, space = torch.empty(rank, width), torch.empty(torch.get_num_threads(), rank, width)
    native.call("outer", x.dtype, x, h, out, space, len(x), width, rank, mask.threshold, mask.seed)
    return out


def _covered(x: torch.Tensor, rank: int, mask: Mask) -> bool:
    return native.covers(x) and rank % 8 == 0 and rank <= LARGEST_RANK and mask.threshold < STEPS
