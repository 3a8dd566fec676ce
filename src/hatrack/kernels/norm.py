"""RMSNorm with a frozen weight, in one pass forward and one backward.

y = w x / sqrt(mean(x^2) + epsilon) (Zhang and Sennrich, 2019). With s = 1 / sqrt(...) and u = w g for the gradient g of
y: dx = s u - x s^3 mean(u x). Only x and s are saved for the backward pass.
"""

from typing import Any

import torch
from torch.nn import functional as F

from hatrack.kernels import native


def rms_norm(x: torch.Tensor, w: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x (..., d), w (d,) float32 without a gradient -> (..., d) of the dtype of x, computed in float32. On an
    accelerator w may have the dtype of x, for which torch has a kernel."""
    if native.supports(x):
        return _RMSNorm.apply(x, w, epsilon)  # type: ignore[no-any-return,no-untyped-call]
    if x.device.type != "cpu" and w.dtype == x.dtype:
        return F.rms_norm(x, w.shape, w, epsilon)
    return F.rms_norm(x.float(), w.shape, w, epsilon).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = x.contiguous()
        n, d = x.numel() // x.shape[-1], x.shape[-1]
        y, inverse = torch.empty_like(x), torch.empty(n)
        native.call("rms_norm", x.dtype, x, w, y, inverse, n, d, epsilon)
        ctx.save_for_backward(x, w, inverse)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, w, inverse = ctx.saved_tensors
        dx = torch.empty_like(x)
        native.call("rms_norm_backward", x.dtype, x, w, inverse, g.contiguous(), dx, len(inverse), x.shape[-1])
        return dx, None, None
