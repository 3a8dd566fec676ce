"""The three products of a low-rank adapter, with dropout of the wide side: by hatrack's kernels, or by torch.

For x (n, d) and factors A (r, d), h (n, r), with D dropout that zeroes but does not divide:

    down:  h = D(x) A^T
    up:    y = y + D(h A)
    outer: h^T D(x)                      (r, d)

In torch, which accelerators leave them to, each is a skinny product after a copy of x with zeros in it; the kernels
make one pass over x, which is all the work there is. A mask is a function of its `Mask` alone, so it is made again in
the backward pass, never kept. Several adapters of one x share the pass: their factors stand beneath each other, equally
many rows each, and each has its own mask. Knows nothing of layers.
"""

import ctypes
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from hatrack.kernels import native
from hatrack.kernels.dropout import NO_DROPOUT, THRESHOLD_STEPS, Mask, apply_mask

LARGEST_RANK, LARGEST_STACK = 64, 256
"""Above the first, for one adapter, a general matrix product does better; the second is the kernels' for a stack."""


def prepare_factor(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A factor (r, d) in the products' format; for the kernels contiguous, its rank filled up with zeros to a multiple
    of 8."""
    factor = factor.to(dtype)
    if factor.device.type != "cpu":
        return factor
    missing = -factor.shape[0] % 8
    return (F.pad(factor, (0, 0, 0, missing)) if missing else factor).contiguous()


def down(x: torch.Tensor, A: torch.Tensor, scale: float, *masks: Mask) -> torch.Tensor:
    """scale D(x) A^T, (n, r), for contiguous x (n, d) and A (r, d) of one dtype; in float32, but on an accelerator,
    where a cast costs a launch, in x's format."""
    masks = masks or (NO_DROPOUT,)
    (n, width), rank = x.shape, A.shape[0]
    if not _covered(x, rank, masks):
        parts = [_product(apply_mask(x, mask), part.t(), scale) for part, mask in _parts(A, masks)]
        h = concat(parts, 1)
        return h.float() if x.device.type == "cpu" else h
    h = torch.empty(n, rank)
    native.call("down", x.dtype, x, A, h, n, width, rank, rank, scale, masks[0].threshold, _seeds(masks, rank))
    return h


def up(y: torch.Tensor, h: torch.Tensor, A: torch.Tensor, scale: float, *masks: Mask) -> None:
    """y += scale D(h A) in place, for contiguous y (n, d), h (n, r) as `down` gives it and A (r, d) of y's dtype."""
    masks = masks or (NO_DROPOUT,)
    (n, width), rank = y.shape, A.shape[0]
    if _covered(y, rank, masks):
        sizes = n, width, rank, h.stride(0)
        native.call("up", y.dtype, y, h, A, *sizes, scale, masks[0].threshold, _seeds(masks, rank))
    elif not masks[0].p:
        y.addmm_(h.to(y.dtype), A, alpha=scale)
    else:
        for (part, mask), states in zip(_parts(A, masks), h.chunk(len(masks), 1), strict=True):
            y.add_(apply_mask(states.to(y.dtype) @ part, mask, scale))


def outer(x: torch.Tensor, h: torch.Tensor, scale: float, *masks: Mask) -> torch.Tensor:
    """scale h^T D(x), (r, d) float32, for contiguous x (n, d) and h (n, r) as `down` gives it."""
    masks = masks or (NO_DROPOUT,)
    (n, width), rank = x.shape, h.shape[1]
    if not _covered(x, rank, masks):
        parts = [_product(states.to(x.dtype), apply_mask(x, mask), scale) for states, mask in _parts(h.t(), masks)]
        return concat(parts).float()
    out, space = torch.empty(rank, width), torch.empty(torch.get_num_threads(), rank, width)
    sizes = n, width, rank, h.stride(0)
    native.call("outer", x.dtype, x, h, out, space, *sizes, masks[0].threshold, _seeds(masks, rank))
    return out if scale == 1 else out.mul_(scale)


def concat(several: list[torch.Tensor], dimension: int = 0) -> torch.Tensor:
    """All beside each other; one alone is not copied for it."""
    return torch.cat(several, dimension) if len(several) > 1 else several[0]


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale left right, the factor taken in before the product is rounded."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale)  # with a beta of 0 the first is not read


def _covered(x: torch.Tensor, rank: int, masks: tuple[Mask, ...]) -> bool:
    fits = rank % (8 * len(masks)) == 0 and rank <= LARGEST_STACK and rank <= LARGEST_RANK * len(masks)
    return native.supports(x) and fits and masks[0].threshold < THRESHOLD_STEPS


def _parts(factors: torch.Tensor, masks: tuple[Mask, ...]) -> Iterator[tuple[torch.Tensor, Mask]]:
    """Each adapter's rows of the factors, and its mask; all rows at once where nothing is dropped."""
    if not masks[0].p:
        masks = masks[:1]
    return zip(factors.chunk(len(masks)), masks, strict=True)


def _seeds(masks: tuple[Mask, ...], rank: int) -> ctypes.Array[ctypes.c_uint64]:
    """The seed for each eight ranks, as the kernels want them."""
    each = rank // 8 // len(masks)
    return (ctypes.c_uint64 * (each * len(masks)))(*(mask.seed for mask in masks for _ in range(each)))
