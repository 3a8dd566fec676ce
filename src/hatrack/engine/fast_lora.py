"""The adapted linear layer, written for a frozen base, and the call that wraps a model with it.

With x (n, d_in), the frozen W (d_out, d_in) and b, the trained A (r, d_in) and B (d_out, r), s = alpha / r, and D the
dropout of the adapter's input (LoRA, Hu et al. 2021, equation 3):

    h = D(x) A^T                          (n, r)
    y = x W^T + b + s h B^T               (n, d_out)

and for the gradient g of y, using that W has none:

    g_h = s g B                           (n, r)
    g_B = s g^T h                         (d_out, r)
    g_A = g_h^T D(x)                      (r, d_in)
    g_x = g W + D(g_h A)                  (n, d_in)
    g_b = the sum of g's rows             (d_out,), where the base's biases are trained (`bias="all"`, `"lora_only"`)

What is kept for the backward pass is x, which the layer below keeps anyway, and h. A and B are float32 and are cast to
x's dtype for the products; peft's layer casts x to float32 instead and keeps that copy. x has the base's dtype, or
autocast's: then W is cast to it in either pass, and no cast copy of W is kept in between.

D is made again from its seed in the backward pass (`kernels/drop.py`).

Knows nothing of models, data or training.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft import get_peft_model as peft_get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hatrack.engine.lossless import LosslessMerge
from hatrack.kernels.drop import Mask, draw
from hatrack.kernels.low_rank import down, outer, rows, up

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FastLinear(LosslessMerge, PeftLinear):  # type: ignore[misc]  # peft has no types
    """peft's LoRA layer on a Linear or a Conv1D, x (..., d_in) -> (..., d_out), by the products above.

    Merged, disabled, several active adapters, variants such as DoRA, mixed batches, float64, a base weight that is
    itself trained or replaced, parts with hooks of their own: all go to peft's own forward. Gradients cannot be
    differentiated again. Un-merging gives the base's weight back bit for bit.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtype = _compute_dtype(x)
        if args or kwargs or not self._is_plain(dtype):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        name, base = self.active_adapters[0], self.base_layer
        W = base.weight.t() if type(base) is Conv1D else base.weight  # (d_out, d_in)
        A, B, dropout = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_dropout[name]
        mask = draw(getattr(dropout, "p", 0.0) if dropout.training else 0.0)
        flat = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
        y = _LoraProduct.apply(flat, W, base.bias, A, B, self.scaling[name], mask)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]

    def _is_plain(self, dtype: torch.dtype) -> bool:
        """Whether the layer, as it stands, is no more than the formulas at the top, for products in `dtype`."""
        names, base = self.active_adapters, self.base_layer
        if len(names) != 1 or names[0] not in self.lora_A or self.disable_adapters or self.merged:
            return False
        A, B, dropout = self.lora_A[names[0]], self.lora_B[names[0]], self.lora_dropout[names[0]]
        return (
            names[0] not in self.lora_variant
            and type(base) in LAYER_CLASSES
            and type(A) is type(B) is nn.Linear
            and B.bias is None
            and getattr(dropout, "p", 0.0) < 1
            and isinstance(dropout, nn.Identity | nn.Dropout)
            and not base.weight.requires_grad
            and dtype in COMPUTE_DTYPES
            and (dtype == base.weight.dtype or torch.is_autocast_enabled(base.weight.device.type))
            and not any(_has_hooks(part) for part in (base, A, B, dropout))
        )


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that torch multiplies x in: autocast's where it is on, which leaves float64 alone, else x's own."""
    if x.dtype in COMPUTE_DTYPES and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _has_hooks(part: nn.Module) -> bool:
    """Whether calling `part` does more than its class says; accelerate puts a forward of its own to move weights."""
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks) or (
        "forward" in part.__dict__
    )


class _LoraProduct(torch.autograd.Function):
    """The products at the top of this file, in the dtype of x (n, d_in), whatever that of W, b, A and B."""

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
        y = F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))  # (n, d_out)
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
        g_x = g_b = g_A = g_B = None
        if ctx.needs_input_grad[4]:
            g_B = outer(g, h)[:rank].t().to(B.dtype).mul_(ctx.scaling)  # (d_out, r)
        if ctx.needs_input_grad[3]:
            g_A = outer(x, g_h, mask)[:rank].to(A.dtype)  # (r, d_in)
        if ctx.needs_input_grad[2]:
            g_b = g.sum(0)  # (d_out,)
        if ctx.needs_input_grad[0]:
            g_x = g @ W.to(g.dtype)  # (n, d_in)
            up(g_x, g_h, rows(A, g.dtype), 1.0, mask)
        return g_x, None, g_b, g_A, g_B, None, None


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


def fast_layer(target: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> FastLinear | None:
    """The adapted layer for `target`, for peft's `LoraConfig`; None leaves it to peft.

    So it is for subclasses and weights of other kinds, quantised ones among them, for layers that carry an adapter of
    another method, and where a single parameter of the layer is named.
    """
    if type(target) not in LAYER_CLASSES or type(target.weight) is not nn.Parameter or options.get("parameter_name"):
        return None
    config.fan_in_fan_out = type(target) is Conv1D  # only one answer is right, and peft reads it from here
    return FastLinear(target, adapter_name, config=config, is_target_conv_1d_layer=config.fan_in_fan_out, **options)


LAYER_CLASSES: dict[type[nn.Module], Callable[..., FastLinear | None]] = {nn.Linear: fast_layer, Conv1D: fast_layer}
"""Which layer of the base gets which adapted layer; all others get peft's."""


def get_peft_model(base: nn.Module, config: PeftConfig, **options: Any) -> PeftModel:
    """peft's own `get_peft_model`, with hatrack's layers: for anyone's own Trainer or TRL script."""
    if isinstance(config, LoraConfig):
        config._register_custom_module(dict(LAYER_CLASSES))
    return peft_get_peft_model(base, config, **options)
