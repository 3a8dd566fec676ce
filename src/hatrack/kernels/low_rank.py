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

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from hatrack.kernels import native
from hatrack.kernels.drop import KEEP, STEPS, Mask, dropped

LARGEST_RANK, LARGEST_STACK = 64, 256
"""Above the first, for one adapter, a general matrix product does better; the second is the kernels' for a stack."""


def rows(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A factor (r, d) in the products' format; for the kernels contiguous, its rank filled up with zeros to a multiple
    of 8."""
    if factor.device.type != "cpu":
        return factor.to(dtype)
    return F.pad(factor.to(dtype), (0, 0, 0, -len(factor) % 8)).contiguous()


def down(x: torch.Tensor, A: torch.Tensor, scale: float, *masks: Mask) -> torch.Tensor:
    """scale D(x) A^T, (n, r), for contiguous x (n, d) and A (r, d) of one dtype; in float32, but on an accelerator,
    where a cast costs a launch, in x's format."""
    masks = masks or (KEEP,)
    if not _covered(x, len(A), masks):
        nothing = x.new_empty(1)  # not read, with a beta of 0
        parts = [
            torch.addmm(nothing, dropped(x, mask), part.t(), beta=0, alpha=scale) for part, mask in _parts(A, masks)
        ]
        h = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return h.float() if x.device.type == "cpu" else h
    h = torch.empty(len(x), len(A))
    sizes = len(x), x.shape[1], len(A), h.stride(0)
    native.call("down", x.dtype, x, A, h, *sizes, scale, masks[0].threshold, _seeds(masks, len(A)))
    return h


def up(y: torch.Tensor, h: torch.Tensor, A: torch.Tensor, scale: float, *masks: Mask) -> None:
    """y += scale D(h A) in place, for contiguous y (n, d), h (n, r) as `down` gives it and A (r, d) of y's dtype."""
    masks = masks or (KEEP,)
    if _covered(y, len(A), masks):
        sizes = len(y), y.shape[1], len(A), h.stride(0)
        native.call("up", y.dtype, y, h, A, *sizes, scale, masks[0].threshold, _seeds(masks, len(A)))
    elif not masks[0].p:
        y.addmm_(h.to(y.dtype), A, alpha=scale)
    else:
        for (part, mask), states in zip(_parts(A, masks), h.chunk(len(masks), 1), strict=True):
            y.add_(dropped(states.to(y.dtype) @ part, mask, scale))


def outer(x: torch.Tensor, h: torch.Tensor, *masks: Mask) -> torch.Tensor:
    """h^T D(x), (r, d) float32, for contiguous x (n, d) and h (n, r) as `down` gives it."""
    masks = masks or (KEEP,)
    rank, width = h.shape[1], x.shape[1]
    if not _covered(x, rank, masks):
        parts = [states.to(x.dtype) @ dropped(x, mask) for states, mask in _parts(h.t(), masks)]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).float()
    out, space = torch.empty(rank, width), torch.empty(torch.get_num_threads(), rank, width)
    sizes = len(x), width, rank, h.stride(0)
    native.call("outer", x.dtype, x, h, out, space, *sizes, masks[0].threshold, _seeds(masks, rank))
    return out


def _covered(x: torch.Tensor, rank: int, masks: tuple[Mask, ...]) -> bool:
    fits = rank % (8 * len(masks)) == 0 and rank <= LARGEST_STACK and rank <= LARGEST_RANK * len(masks)
    return native.covers(x) and fits and masks[0].threshold < STEPS


def _parts(factors: torch.Tensor, masks: tuple[Mask, ...]) -> Iterator[tuple[torch.Tensor, Mask]]:
    """Each adapter's rows of the factors, and its mask; all rows at once where nothing is dropped."""
    if not masks[0].p:
        masks = masks[:1]
    return zip(factors.chunk(len(masks)), masks, strict=True)


def _seeds(masks: tuple[Mask, ...], rank: int) -> torch.Tensor:
    """The seed for each eight ranks, as the kernels want them."""
    return torch.tensor([mask.seed for mask in masks]).repeat_interleave(rank // 8 // len(masks))
