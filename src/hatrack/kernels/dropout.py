"""Dropout whose mask is never stored: it is a function of a seed, and made again in the backward pass.

The kernel draws 16 bits for each number by a hash. An accelerator draws one number for each by its own generator, begun
at the seed. Where neither is, torch zeroes drawn positions: rather than n random numbers, K from a Poisson distribution
of mean n l, then K positions, uniform and with replacement. How often each position is hit is then Poisson of mean l,
independently of all others, so with l = -log(1 - p) each is dropped with probability 1 - exp(-l) = p, independently:
the mask that a draw for each would give, at about p times its cost. A position is a 32-bit random number scaled to the
size of the matrix, so chances differ from p by up to n / 2^32 of p.

Knows nothing of layers or models.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch

from hatrack.kernels import native

THRESHOLD_STEPS = 2**16
"""The kernel draws 16 bits for a number: its chance to be dropped is a multiple of 1 / 65,536."""


class Mask(NamedTuple):
    """Dropout of a matrix: each number is zeroed with probability `p`, by a draw that `seed` fixes."""

    p: float
    seed: int

    @property
    def threshold(self) -> int:
        """p in steps of the kernel's draw."""
        return round(self.p * THRESHOLD_STEPS)

    @property
    def scale(self) -> float:
        """What the numbers that are kept are multiplied with, so that their mean stays."""
        return 1 / (1 - self.threshold / THRESHOLD_STEPS)


NO_DROPOUT = Mask(0.0, 0)
"""Nothing is dropped."""


def draw_mask(p: float) -> Mask:
    """A mask of its own for each call, by torch's random state."""
    return Mask(p, int(torch.randint(2**62, (), device="cpu"))) if p else NO_DROPOUT


def apply_mask(x: torch.Tensor, mask: Mask, scale: float = 1.0) -> torch.Tensor:
    """A copy of contiguous x (..., d) times `scale`, with zeros where `mask` drops; x itself where it does nothing."""
    if not mask.p:
        return x if scale == 1 else x * scale
    if native.supports(x) and mask.threshold < THRESHOLD_STEPS:
        out, width = torch.empty_like(x), x.shape[-1]
        native.call("drop", x.dtype, x, out, x.numel() // width, width, scale, mask.threshold, mask.seed)
        return out
    if x.device.type != "cpu":
        drawn = _generator(x.device).manual_seed(mask.seed)
        kept = torch.empty_like(x).bernoulli_(1 - mask.threshold / THRESHOLD_STEPS, generator=drawn)
        return kept.mul_(x if scale == 1 else x * scale)
    positions = dropout_positions(x.numel(), min(mask.threshold / THRESHOLD_STEPS, 1 - 1 / THRESHOLD_STEPS), mask.seed)
    out = x * scale if scale != 1 else x.clone()
    out.view(-1).index_fill_(0, positions, 0)
    return out


@functools.cache
def _generator(device: torch.device) -> torch.Generator:
    """A generator of the device's own, made once: that takes longer than a small product."""
    return torch.Generator(device)


def dropout_positions(count: int, p: float, seed: int) -> torch.Tensor:
    """Flat positions below `count` that are dropped, int64, some more than once; a pure function of its arguments."""
    bits = np.random.SFC64(seed)
    hits = int(np.random.Generator(bits).poisson(-count * math.log1p(-p)))
    halves = torch.from_numpy(bits.random_raw(hits // 2 + 1).view(np.int32)[:hits])
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
    """Dropout of x (..., d) with the mask drawn now; what is kept is divided by 1 - p. 0 <= p < 1."""
    return _Dropout.apply(x.contiguous(), draw_mask(p)) if p else x  # type: ignore[no-untyped-call]
