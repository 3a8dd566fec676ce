"""The adapted linear layer for a frozen base, and `get_peft_model`, which puts it into a model.

With x (n, d_in), the frozen W (d_out, d_in) and b, the trained A (r, d_in) and B (d_out, r), s = alpha / r, and D the
dropout of the adapter's input (LoRA, Hu et al. 2021, equation 3):

    h = D(x) A^T                          (n, r)
    y = x W^T + b + s h B^T               (n, d_out)

and for the gradient g of y, where W gets no gradient:

    g_h = s g B                           (n, r)
    g_B = s g^T h                         (d_out, r)
    g_A = g_h^T D(x)                      (r, d_in)
    g_x = g W + D(g_h A)                  (n, d_in)
    g_b = the sum of g's rows             (d_out,), if the base's biases are trained (`bias="all"`, `"lora_only"`)

The forward pass saves x and h for the backward pass. A and B are float32 and are cast to the dtype of x once for
both passes; peft's layer casts x to float32 instead and saves that copy. If x and W have different dtypes (under
autocast, or for a base stored in another dtype), W is cast in each pass, and no copy of it stays in memory
(`kernels/frozen_linear.py`). The mask of D is drawn again from its seed in the backward pass (`kernels/dropout.py`).

Layers that get the same x, such as the query, key and value projections, are computed together (`shared_input.py`): one
pass over x for all h, one for all g_A, and one g_x to which all layers add.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft import get_peft_model as peft_get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hatrack.kernels.dropout import Mask, draw_mask
from hatrack.kernels.frozen_linear import FrozenLinear, active_int_format, matmul, matmul_backward, prevent_repacking
from hatrack.kernels.low_rank import add_up_projection_, concat, down, outer, prepare_factor
from hatrack.layers.lossless_merge import LosslessMerge
from hatrack.layers.shared_input import SharedInput
from hatrack.upstream.peft import use_layers
from hatrack.upstream.torch import child, has_hooks, parameter, version

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_shared_input = SharedInput()


class FastLinear(LosslessMerge, PeftLinear):  # type: ignore[misc]  # peft has no types
    """peft's LoRA layer on a Linear or a Conv1D, x (..., d_in) -> (..., d_out), by the formulas above.

    peft's own forward runs for merged, disabled or several active adapters, variants such as DoRA, batches that mix
    adapters, float64, a base weight that is trained or parametrized, and submodules with hooks. There are no second
    derivatives. Unmerging restores the base's weight bit for bit.
    """

    followers: tuple["FastLinear", ...] = ()
    """The layers that get the same input right after this one (`shared_input.py`)."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtype = _compute_dtype(x)
        parts = None if args or kwargs else self._plain_parts(dtype)
        if parts is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        y = _shared_input.pop_result(x, self, parts.get_state)
        return self._compute(x, dtype, parts) if y is None else y

    def _compute(self, x: torch.Tensor, dtype: torch.dtype, parts: "_PlainParts") -> torch.Tensor:
        """y of this layer. If it is the leader, the first of the layers that get this x, also computes and stores the
        outputs of its followers."""
        shared = [(self, parts)]
        if _shared_input.becomes_leader(x, self):
            for layer in self.followers:
                follower_parts = layer._plain_parts(dtype)
                if follower_parts is not None and follower_parts.can_share_pass(parts):
                    shared.append((layer, follower_parts))
        flat = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
        outputs = project(flat, [each.projection() for _, each in shared])
        own, *rest = (y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)
        for (layer, follower_parts), y in zip(shared[1:], rest, strict=True):
            _shared_input.store_result(layer, follower_parts.get_state(), y)
        return own

    def _plain_parts(self, dtype: torch.dtype) -> "_PlainParts | None":
        """The tensors and settings of the formulas above; None if peft's forward has to run. Reads dicts directly:
        torch's and peft's attribute lookups take longer than a small matmul."""
        names: list[str] = self.active_adapters
        if len(names) != 1 or self.disable_adapters or self.merged_adapters:
            return None
        name, base = names[0], child(self, "base_layer")
        A, B, dropout = (child(child(self, kind), name) for kind in ("lora_A", "lora_B", "lora_dropout"))
        if not (type(A) is type(B) is nn.Linear and isinstance(dropout, nn.Identity | nn.Dropout)):
            return None
        if type(base) not in LAYER_CLASSES or name in self.lora_variant:
            return None
        W, p = parameter(base, "weight"), getattr(dropout, "p", 0.0)
        plain = (
            parameter(B, "bias") is None
            and p < 1
            and not W.requires_grad
            and dtype in COMPUTE_DTYPES
            and (dtype == W.dtype or _accepts_other_dtype(base))
            and not any(map(has_hooks, (base, A, B, dropout)))
        )
        if not plain:
            return None
        factors: tuple[Any, Any] = parameter(A, "weight"), parameter(B, "weight")
        return _PlainParts(name, base, *factors, self.scaling[name], p if dropout.training else 0.0)


class _PlainParts(NamedTuple):
    """An adapter's name, its layer of the base, A (r, d_in) and B (d_out, r), alpha / r, the dropout probability."""

    name: str
    base: Any
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    p: float

    def can_share_pass(self, other: "_PlainParts") -> bool:
        """Whether both can be computed in one pass: A of the same shape, and the same dropout."""
        return self.A.shape == other.A.shape and self.p == other.p

    def projection(self) -> "Projection":
        W, b = parameter(self.base, "weight"), parameter(self.base, "bias")
        W = W.t() if type(self.base) is Conv1D else W
        return Projection(W, b, self.A, self.B, self.scaling, draw_mask(self.p), active_int_format(self.base))

    def get_state(self) -> tuple[object, ...]:
        """What y depends on besides x: weights by identity and version, and settings."""
        W = parameter(self.base, "weight")
        versions = version(self.A), version(self.B), version(W), id(self.A), id(self.B), id(W)
        return self.name, self.scaling, self.p, torch.is_grad_enabled(), *versions


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of the matmuls with x: autocast's if it is on (it does not touch float64), else that of x."""
    if x.dtype in COMPUTE_DTYPES and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _accepts_other_dtype(base: Any) -> bool:
    """Whether a base layer may get an x of another dtype than its weight, which is then cast for the matmul."""
    return type(base) is FrozenLinear or torch.is_autocast_enabled(base.weight.device.type)


class Projection(NamedTuple):
    """The inputs of the formulas above, besides x: W (d_out, d_in), b (d_out,) or None, A (r, d_in), B (d_out, r),
    alpha / r, the dropout mask, and the integer format that the matmuls with W are rounded to, or None
    (`kernels/frozen_linear.py`)."""

    W: torch.Tensor
    b: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    mask: Mask
    int_format: str | None = None


def project(x: torch.Tensor, projections: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """y (n, d_out) of each projection of x (n, d_in), by the formulas at the top of this file, in the dtype of x.

    W, b, A and B may have other dtypes. All projections have the same rank and dropout probability.
    """
    tensors = [tensor for each in projections for tensor in each[:4]]
    return LoraMatmuls.apply(x, [each[4:] for each in projections], *tensors)  # type: ignore[no-any-return,no-untyped-call]


class LoraMatmuls(torch.autograd.Function):
    """Takes x, the scaling, mask and integer format of each projection, then W, b, A and B of each."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, settings: list[tuple[float, Mask, str | None]], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        masks, weights = [mask for _, mask, _ in settings], tensors[::4]
        A = concat([prepare_factor(A, x.dtype) for A in tensors[2::4]])  # ranks padded to a multiple of 8
        B_transposed = [prepare_factor(B.t(), x.dtype) for B in tensors[3::4]]
        h = down(x, A, masks[0].scale, *masks)  # (n, ranks of all)
        outputs = []
        parts = zip(weights, tensors[1::4], B_transposed, h.chunk(len(masks), 1), settings, strict=True)
        for W, b, B_t, h_own, (scaling, _, int_format) in parts:
            y = matmul(x, W, b, int_format)  # (n, d_out)
            add_up_projection_(y, h_own, B_t, scaling)
            outputs.append(y)
        ctx.save_for_backward(x, h, A, *weights, *B_transposed)
        ctx.settings, ctx.rank = settings, len(tensors[2])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, A, *saved = ctx.saved_tensors
        masks, needed = [mask for _, mask, _ in ctx.settings], ctx.needs_input_grad[2:]
        weights, B_transposed = saved[: len(masks)], saved[len(masks) :]
        tensor_gradients: list[torch.Tensor | None] = [None] * len(needed)
        low_rank_gradients: list[torch.Tensor] = []
        gradients = tuple(g.contiguous() for g in gradients)
        parts = zip(gradients, B_transposed, h.chunk(len(masks), 1), ctx.settings, strict=True)
        for number, (g, B_t, h_own, (scaling, mask, _)) in enumerate(parts):
            # g_h (n, r), already multiplied by D's 1 / (1 - p)
            low_rank_gradients.append(down(g, B_t, scaling * mask.scale))
            if needed[4 * number + 1]:
                tensor_gradients[4 * number + 1] = g.sum(0)  # (d_out,)
            if needed[4 * number + 3]:
                tensor_gradients[4 * number + 3] = outer(g, h_own, scaling)[
                    : ctx.rank
                ].t()  # (h^T g)^T = g_B (d_out, r)
        g_h = concat(low_rank_gradients, 1)  # (n, ranks of all)
        if any(needed[2::4]):
            for number, g_A in enumerate(outer(x, g_h, 1.0, *masks).chunk(len(masks))):
                tensor_gradients[4 * number + 2] = g_A[: ctx.rank]  # (r, d_in)
        g_x = None
        if ctx.needs_input_grad[0]:
            int_formats = [int_format for *_, int_format in ctx.settings]
            g_x = matmul_backward(gradients[0], weights[0], int_formats[0])  # (n, d_in)
            for g, W, int_format in zip(gradients[1:], weights[1:], int_formats[1:], strict=True):
                matmul_backward(g, W, int_format, add_to=g_x)
            add_up_projection_(g_x, g_h, A, 1.0, *masks)
        return g_x, None, *tensor_gradients


def reference(x: torch.Tensor, projection: Projection, dropout: torch.Tensor) -> torch.Tensor:
    """`project` for one projection in plain torch, differentiated by autograd. Only tests use it.

    `dropout` (n, d_in): the factors of D, 0 or 1 / (1 - p). The projection's own mask is not used.
    """
    h = (x * dropout) @ projection.A.to(x.dtype).t()
    return F.linear(x, projection.W, projection.b) + projection.scaling * (h @ projection.B.to(x.dtype).t())


def fast_layer(target: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> FastLinear | None:
    """The adapted layer for `target`; None if peft is to make it. peft calls this.

    peft makes the layer for subclasses, other kinds of weights (such as quantized ones), layers with an adapter of
    another method, and adapters of a single parameter.
    """
    if type(target) not in LAYER_CLASSES or type(target.weight) is not nn.Parameter or options.get("parameter_name"):
        return None
    config.fan_in_fan_out = type(target) is Conv1D  # follows from the layer's class; peft reads it from the config
    return FastLinear(target, adapter_name, config=config, is_target_conv_1d_layer=config.fan_in_fan_out, **options)


LAYER_CLASSES: dict[type[nn.Module], Callable[..., FastLinear | None]] = dict.fromkeys(
    (nn.Linear, FrozenLinear, Conv1D), fast_layer
)
"""The classes of base layers that `FastLinear` adapts, with the function that creates it; peft adapts all others."""


def get_peft_model(base: nn.Module, config: PeftConfig, **options: Any) -> PeftModel:
    """peft's `get_peft_model` with hatrack's layers, for any script: transformers' Trainer, TRL, your own loop.

    base: the model to adapt, any that peft takes. Its weights are frozen.
    config: any PeftConfig. For a LoraConfig, Linear and Conv1D layers are adapted by `FastLinear`; for other methods,
        peft's layers are used. A LoraConfig is changed: the layers are registered in it.
    options: what peft's function takes (adapter_name, mixed, autocast_adapter_dtype, low_cpu_mem_usage, ...).

    Returns a PeftModel, which saves and loads as peft's own does. Saved adapters are plain peft adapters.

    Raises ModelError if bitsandbytes has repacked 4-bit weights for inference, as it does at the first evaluation on
    some CPUs: no gradient flows through them. Else what peft's function raises.
    """
    prevent_repacking(base)
    if isinstance(config, LoraConfig):
        use_layers(config, LAYER_CLASSES)
    return peft_get_peft_model(base, config, **options)
