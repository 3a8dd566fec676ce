"""GELU in its tanh form, in one pass forward and one backward.

With only x saved for the backward pass (Hendrycks and Gimpel, 2016):

    y = x s,  s = 1 / (1 + exp(-2 u)) = (1 + tanh(u)) / 2,  u = sqrt(2 / pi) (x + 0.044715 x^3)
    dx = g (s + x s (1 - s) 2 u')

Written out in torch, as in transformers for GPT-2 and others, it takes eight passes and saves four matrices. GELU with
the error function and SiLU are left to torch, whose kernels are as fast as ours were (docs/log.md).
"""

from typing import Any

import torch
from torch.nn import functional as F

from hatrack.kernels import native


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """x (...) -> (...) of the same dtype."""
    if native.supports(x) and x.is_contiguous():
        return _GELU.apply(x)  # type: ignore[no-any-return,no-untyped-call]
    return F.gelu(x, approximate="tanh")


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        native.call("gelu", x.dtype, x, y, x.numel())
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x).copy_(g)
        native.call("gelu_backward", x.dtype, x, dx, x.numel())
        return dx
