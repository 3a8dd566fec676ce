"""The three matmuls of a low-rank adapter, with dropout on the wide side.

For x (n, d) and factors A (r, d), h (n, r), and dropout D that zeroes but does not divide:

    down:                h = D(x) A^T          (n, r)
    add_up_projection_:  y = y + D(h A)        (n, d), in place
    outer:               h^T D(x)              (r, d)

Each kernel makes a single pass over x, which is its whole cost. In torch (on accelerators, and if no kernel applies)
each is a matmul with a narrow matrix after a masked copy of x. Masks are drawn again in the backward pass
(`dropout.py`). Several adapters of one x share the pass: their factors, all of one rank, are stacked, and each adapter
has its own mask.
"""

import ctypes
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from hatrack.kernels import native
from hatrack.kernels.dropout import NO_DROPOUT, THRESHOLD_STEPS, Mask, apply_mask

LARGEST_RANK, LARGEST_STACK = 64, 256
"""The largest rank of an adapter for which the kernels are used (above it, torch's matmul is faster), and the largest
sum of ranks in a stack.
"""


def prepare_factor(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Casts a factor (r, d) to `dtype`; on a CPU, contiguous and padded with zeros to a multiple of 8 ranks."""
    factor = factor.to(dtype)
    if factor.device.type != "cpu":
        return factor
    missing = -factor.shape[0] % 8
    return (F.pad(factor, (0, 0, 0, missing)) if missing else factor).contiguous()


def down(x: torch.Tensor, A: torch.Tensor, scale: float, *masks: Mask) -> torch.Tensor:
    """scale D(x) A^T, (n, r), for contiguous x (n, d) and A (r, d) of one dtype. float32 on a CPU; in the dtype of
    x on an accelerator, where a cast costs a launch."""
    masks = masks or (NO_DROPOUT,)
    (n, width), rank = x.shape, A.shape[0]
    if not _kernel_supports(x, rank, masks):
        parts = [_scaled_matmul(apply_mask(x, mask), part.t(), scale) for part, mask in _split_adapters(A, masks)]
        h = concat(parts, 1)
        return h.float() if x.device.type == "cpu" else h
    h = torch.empty(n, rank)
    native.call("down", x.dtype, x, A, h, n, width, rank, rank, scale, masks[0].threshold, _seeds(masks, rank))
    return h


def add_up_projection_(y: torch.Tensor, h: torch.Tensor, A: torch.Tensor, scale: float, *masks: Mask) -> None:
    """y += scale D(h A) in place, for contiguous y (n, d), h (n, r) as `down` gives it and A (r, d) of y's dtype."""
    masks = masks or (NO_DROPOUT,)
    (n, width), rank = y.shape, A.shape[0]
    if _kernel_supports(y, rank, masks):
        sizes = n, width, rank, h.stride(0)
        native.call("up", y.dtype, y, h, A, *sizes, scale, masks[0].threshold, _seeds(masks, rank))
    elif not masks[0].p:
        y.addmm_(h.to(y.dtype), A, alpha=scale)
    else:
        for (part, mask), states in zip(_split_adapters(A, masks), h.chunk(len(masks), 1), strict=True):
            y.add_(apply_mask(states.to(y.dtype) @ part, mask, scale))


def outer(x: torch.Tensor, h: torch.Tensor, scale: float, *masks: Mask) -> torch.Tensor:
    """scale h^T D(x), (r, d) float32, for contiguous x (n, d) and h (n, r) as `down` gives it."""
    masks = masks or (NO_DROPOUT,)
    (n, width), rank = x.shape, h.shape[1]
    if not _kernel_supports(x, rank, masks):
        parts = [
            _scaled_matmul(states.to(x.dtype), apply_mask(x, mask), scale)
            for states, mask in _split_adapters(h.t(), masks)
        ]
        return concat(parts).float()
    out, workspace = torch.empty(rank, width), torch.empty(torch.get_num_threads(), rank, width)
    sizes = n, width, rank, h.stride(0)
    native.call("outer", x.dtype, x, h, out, workspace, *sizes, masks[0].threshold, _seeds(masks, rank))
    return out if scale == 1 else out.mul_(scale)


def concat(tensors: list[torch.Tensor], dimension: int = 0) -> torch.Tensor:
    """torch.cat, without a copy if there is only one tensor."""
    return torch.cat(tensors, dimension) if len(tensors) > 1 else tensors[0]


def _scaled_matmul(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale (left right), scaled before rounding to the dtype."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale)  # beta=0: the first argument is not read


def _kernel_supports(x: torch.Tensor, rank: int, masks: tuple[Mask, ...]) -> bool:
    """Whether the kernels support x (n, d) with stacked factors of `rank` rows."""
    fits = rank % (8 * len(masks)) == 0 and rank <= LARGEST_STACK and rank <= LARGEST_RANK * len(masks)
    return native.supports(x) and fits and masks[0].threshold < THRESHOLD_STEPS


def _split_adapters(factors: torch.Tensor, masks: tuple[Mask, ...]) -> Iterator[tuple[torch.Tensor, Mask]]:
    """Each adapter's rows of the stacked factors, with its mask; without dropout, all rows at once."""
    if not masks[0].p:
        masks = masks[:1]
    return zip(factors.chunk(len(masks)), masks, strict=True)


def _seeds(masks: tuple[Mask, ...], rank: int) -> ctypes.Array[ctypes.c_uint64]:
    """A C array with the mask's seed for every eight ranks."""
    count = rank // 8 // len(masks)
    return (ctypes.c_uint64 * (count * len(masks)))(*(mask.seed for mask in masks for _ in range(count)))
