"""The adapted linear layer, written for a frozen base, and the call that wraps a model with it.

With x (n, d_in), the frozen W (d_out, d_in) and b, the trained A (r, d_in) and B (d_out, r), s = alpha / r, and D the
dropout of the adapter's input (LoRA, Hu et al. 2021, equation 3):

    h = D(x) A^T                          (n, r)
    y = x W^T + b + s h B^T               (n, d_out)

and for the gradient g of y, using that W and b have none:

    g_h = s g B                           (n, r)
    g_B = s g^T h                         (d_out, r)
    g_A = g_h^T D(x)                      (r, d_in)
    g_x = g W + D(g_h A)                  (n, d_in)

What is kept for the backward pass is x, which the layer below keeps anyway, and h. A and B are float32 and are cast to
the base's dtype for the products; peft's layer casts x to float32 instead and keeps that copy.

D is made again from its seed in the backward pass (`kernels/drop.py`).

Knows nothing of models, data or training.
"""

from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as peft_get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.nn import functional as F

from hatrack.engine.lossless import LosslessMerge
from hatrack.kernels.drop import Mask, draw
from hatrack.kernels.low_rank import down, outer, rows, up


class FastLinear(LosslessMerge, PeftLinear):  # type: ignore[misc]  # peft has no types
    """peft's LoRA linear layer, x (..., d_in) -> (..., d_out), with the forward and backward above.

    Merged, disabled, several active adapters, variants such as DoRA, mixed batches, autocast, a base layer with
    hooks of its own or trained itself: all go to peft's own forward. Un-merging gives the base's
    weight back bit for bit.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.get_base_layer()
        if args or kwargs or not self._is_plain(base, x):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        name = self.active_adapters[0]
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        dropout = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y = _LoraProduct.apply(flat, base.weight, base.bias, A, B, self.scaling[name], draw(dropout))  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]

    def _is_plain(self, base: nn.Module, x: torch.Tensor) -> bool:
        names = self.active_adapters
        return (
            len(names) == 1
            and names[0] in self.lora_A
            and not (self.disable_adapters or self.merged or names[0] in self.lora_variant)
            and not self.lora_bias.get(names[0], False)
            and isinstance(self.lora_dropout[names[0]], nn.Identity | nn.Dropout)
            and x.dtype == base.weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
            and "forward" not in base.__dict__  # accelerate puts its own there to move weights in and out
        )


class _LoraProduct(torch.autograd.Function):
    """The products at the top of this file. x is (n, d_in); A and B may have another dtype than x and W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor | None,
        A: torch.Tensor,
        B: torch.Tensor,
        scaling: float,
        mask: Mask,
    ) -> torch.Tensor:
        h = down(x, rows(A, x.dtype), mask.scale, mask)  # (n, r), r filled up to a multiple of 8
        y = F.linear(x, W, b)  # (n, d_out)
        up(y, h, rows(B.t(), x.dtype), scaling)
        ctx.save_for_backward(x, W, A, B, h)
        ctx.scaling, ctx.mask = scaling, mask
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        mask, rank, g = ctx.mask, len(A), g.contiguous()
        g_h = down(g, rows(B.t(), g.dtype), ctx.scaling * mask.scale)  # (n, r), D's division included
        g_x = g_A = g_B = None
        if ctx.needs_input_grad[4]:
            g_B = outer(g, h)[:rank].t().to(B.dtype).mul_(ctx.scaling)  # (d_out, r)
        if ctx.needs_input_grad[3]:
            g_A = outer(x, g_h, mask)[:rank].to(A.dtype)  # (r, d_in)
        if ctx.needs_input_grad[0]:
            g_x = g @ W  # (n, d_in)
            up(g_x, g_h, rows(A, g.dtype), 1.0, mask)
        return g_x, None, None, g_A, g_B, None, None


def reference(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    kept: torch.Tensor,
) -> torch.Tensor:
    """The plain twin of `_LoraProduct`: the same mathematics, differentiated by autograd. Only tests use it.

    `kept` (n, d_in): what D multiplies x with, 0 or 1 / (1 - p).
    """
    h = (x * kept) @ A.to(x.dtype).t()
    return F.linear(x, W, b) + scaling * (h @ B.to(x.dtype).t())


class _PlainLinear(type):
    """`isinstance(layer, PlainLinear)` is true for torch's own Linear only: quantised layers derive from it and are
    not to be caught here."""

    def __instancecheck__(cls, layer: object) -> bool:
        return type(layer) is nn.Linear


class PlainLinear(metaclass=_PlainLinear):
    """torch.nn.Linear, without its subclasses."""


LAYER_CLASSES: dict[type, type] = {PlainLinear: FastLinear}
"""Which layer of the base gets which adapted layer; all others get peft's."""


def get_peft_model(base: nn.Module, config: LoraConfig, **options: Any) -> PeftModel:
    """peft's own `get_peft_model`, with hatrack's layers: for anyone's own Trainer or TRL script."""
    config._register_custom_module(dict(LAYER_CLASSES))
    return peft_get_peft_model(base, config, **options)
