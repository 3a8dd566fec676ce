"""Dropout whose mask is not stored, but drawn again from its seed in the backward pass.

The kernel hashes 16 random bits per element. An accelerator uses its own generator, seeded with the seed. Elsewhere
torch zeroes randomly drawn positions of the n elements: instead of n random numbers, the number of positions K is drawn
from a Poisson distribution of mean n l, then K positions, uniformly and with replacement. How often a position is drawn
is then Poisson of mean l, independently of the others, so with l = -log(1 - p) each element is dropped with probability
1 - exp(-l) = p. This equals one draw per element, at about p times the cost. A position is a 32-bit random number
scaled to the size of the matrix, so probabilities differ from p by up to n / 2^32 of p.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch

from hatrack.kernels import native

THRESHOLD_STEPS = 2**16
"""The kernel draws 16 bits per element, so dropout probabilities are multiples of 1 / 65,536."""


class Mask(NamedTuple):
    """Dropout of a matrix: each element is zeroed with probability `p`. The same seed drops the same elements."""

    p: float
    seed: int

    @property
    def threshold(self) -> int:
        """p in steps of 1 / 65,536."""
        return round(self.p * THRESHOLD_STEPS)

    @property
    def scale(self) -> float:
        """The factor for the elements that are not dropped, which keeps the mean."""
        return 1 / (1 - self.threshold / THRESHOLD_STEPS)


NO_DROPOUT = Mask(0.0, 0)
"""Drops nothing."""


def draw_mask(p: float) -> Mask:
    """A new mask, seeded from torch's random state."""
    return Mask(p, int(torch.randint(2**62, (), device="cpu"))) if p else NO_DROPOUT


def apply_mask(x: torch.Tensor, mask: Mask, scale: float = 1.0) -> torch.Tensor:
    """A copy of contiguous x (..., d) times `scale`, zero where `mask` drops; x itself if that changes nothing."""
    if not mask.p:
        return x if scale == 1 else x * scale
    if native.supports(x) and mask.threshold < THRESHOLD_STEPS:
        out, width = torch.empty_like(x), x.shape[-1]
        native.call("drop", x.dtype, x, out, x.numel() // width, width, scale, mask.threshold, mask.seed)
        return out
    if x.device.type != "cpu":
        generator = _generator(x.device).manual_seed(mask.seed)
        multiplier = torch.empty_like(x).bernoulli_(1 - mask.threshold / THRESHOLD_STEPS, generator=generator)
        return multiplier.mul_(x if scale == 1 else x * scale)
    positions = dropout_positions(x.numel(), min(mask.threshold / THRESHOLD_STEPS, 1 - 1 / THRESHOLD_STEPS), mask.seed)
    out = x * scale if scale != 1 else x.clone()
    out.view(-1).index_fill_(0, positions, 0)
    return out


@functools.cache
def _generator(device: torch.device) -> torch.Generator:
    """The device's random generator for masks, created once: creating it takes longer than a small matmul."""
    return torch.Generator(device)


def dropout_positions(count: int, p: float, seed: int) -> torch.Tensor:
    """The positions to drop among `count` elements, int64, possibly repeated; a pure function of its arguments."""
    bits = np.random.SFC64(seed)
    draws = int(np.random.Generator(bits).poisson(-count * math.log1p(-p)))
    halves = torch.from_numpy(bits.random_raw(draws // 2 + 1).view(np.int32)[:draws])
    return halves.long().bitwise_and_(2**32 - 1).mul_(count).bitwise_right_shift_(32)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: Mask) -> torch.Tensor:
        ctx.mask = mask
        return apply_mask(x, mask, mask.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return apply_mask(g.contiguous(), ctx.mask, ctx.mask.scale), None


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout of x (..., d) with a new mask, 0 <= p < 1. Elements that are not dropped are divided by 1 - p."""
    return _Dropout.apply(x.contiguous(), draw_mask(p)) if p else x  # type: ignore[no-untyped-call]
