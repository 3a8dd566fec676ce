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
x's dtype for the products, once for both passes; peft's layer casts x to float32 instead and keeps that copy. x may
have another dtype than W (autocast's, or that of a base which is computed otherwise than it is kept): W is then cast to
it in either pass, and no cast copy of it is kept in between (`kernels/frozen_linear.py`).

D is made again from its seed in the backward pass (`kernels/dropout.py`).

Layers that are given the same x, such as the projections to queries, keys and values, are computed together: one pass
over x for all of h, one for all of g_A, and one g_x into which each of them adds. Which layers these are is seen from
what they are given, not from their names: a layer given the very tensor that another was given before it is computed
with that one from the next time on.

Knows nothing of models, data or training.
"""

import threading
import weakref
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
from hatrack.kernels.frozen_linear import FrozenLinear, active_rounding, matmul, matmul_backward, prevent_repacking
from hatrack.kernels.low_rank import concat, down, outer, prepare_factor, up
from hatrack.layers.lossless_merge import LosslessMerge

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FastLinear(LosslessMerge, PeftLinear):  # type: ignore[misc]  # peft has no types
    """peft's LoRA layer on a Linear or a Conv1D, x (..., d_in) -> (..., d_out), by the products above.

    Merged, disabled, several active adapters, variants such as DoRA, mixed batches, float64, a base weight that is
    itself trained or replaced, parts with hooks of their own: all go to peft's own forward. Gradients cannot be
    differentiated again. Un-merging gives the base's weight back bit for bit.
    """

    _sharers: tuple["FastLinear", ...] = ()
    """The layers that are given the same input right after this one."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtype = _compute_dtype(x)
        parts = None if args or kwargs else self._parts(dtype)
        if parts is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        y = _given.taken(x, self, parts)
        return self._computed(x, dtype, parts) if y is None else y

    def _computed(self, x: torch.Tensor, dtype: torch.dtype, parts: "_Parts") -> torch.Tensor:
        """y for this layer, and with it those of the layers that will be given the same x."""
        several = [(self, parts)]
        if _given.first(x, self):
            for layer in self._sharers:
                others = layer._parts(dtype)
                if others is not None and others.goes_with(parts):
                    several.append((layer, others))
        flat = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
        found = project(flat, [each.projection() for _, each in several])
        own, *rest = (y.view(*x.shape[:-1], y.shape[-1]) for y in found)
        for (layer, others), y in zip(several[1:], rest, strict=True):
            _given.waiting[layer] = others.state(), y
        return own

    def _parts(self, dtype: torch.dtype) -> "_Parts | None":
        """What the layer computes with, if it is, as it stands, no more than the formulas at the top, for products in
        `dtype`. Looked up past torch's and peft's attributes, which take longer than a small product."""
        names: list[str] = self.active_adapters
        modules: dict[str, Any] = self._modules
        if len(names) != 1 or self._disable_adapters or self.merged_adapters:
            return None
        name, base = names[0], modules["base_layer"]
        A, B, dropout = (modules[kind]._modules.get(name) for kind in ("lora_A", "lora_B", "lora_dropout"))
        if not (type(A) is type(B) is nn.Linear and isinstance(dropout, nn.Identity | nn.Dropout)):
            return None
        if type(base) not in LAYER_CLASSES or name in self.lora_variant:
            return None
        W, p = base._parameters["weight"], getattr(dropout, "p", 0.0)
        plain = (
            B._parameters["bias"] is None
            and p < 1
            and not W.requires_grad
            and dtype in COMPUTE_DTYPES
            and (dtype == W.dtype or _is_cast(base))
            and not any(map(_has_hooks, (base, A, B, dropout)))
        )
        if not plain:
            return None
        factors: tuple[Any, Any] = A._parameters["weight"], B._parameters["weight"]
        return _Parts(name, base, *factors, self.scaling[name], p if dropout.training else 0.0)


class _Parts(NamedTuple):
    """An adapter's name, its layer of the base, its factors A (r, d_in) and B (d_out, r), alpha / r, and dropout."""

    name: str
    base: Any
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    p: float

    def goes_with(self, other: "_Parts") -> bool:
        """Whether both can share their passes: factors of equal shapes, and equal dropout."""
        return self.A.shape == other.A.shape and self.p == other.p

    def projection(self) -> "Projection":
        W, b = self.base._parameters["weight"], self.base._parameters["bias"]
        return Projection(
            W.t() if type(self.base) is Conv1D else W,
            b,
            self.A,
            self.B,
            self.scaling,
            draw_mask(self.p),
            active_rounding(self.base),
        )

    def state(self) -> tuple[object, ...]:
        """What y depends on besides x: where it has changed, what was computed before is of no use."""
        W = self.base._parameters["weight"]
        versions = self.A._version, self.B._version, W._version, id(self.A), id(self.B), id(W)
        return self.name, self.scaling, self.p, torch.is_grad_enabled(), *versions


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that torch multiplies x in: autocast's where it is on, which leaves float64 alone, else x's own."""
    if x.dtype in COMPUTE_DTYPES and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _is_cast(base: Any) -> bool:
    """Whether a base layer is computed in another format than its own."""
    return type(base) is FrozenLinear or torch.is_autocast_enabled(base.weight.device.type)


def _has_hooks(part: nn.Module) -> bool:
    """Whether calling `part` does more than its class says; accelerate puts a forward of its own to move weights."""
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks) or (
        "forward" in part.__dict__
    )


class SharedInput(threading.local):
    """The input that a layer was given last, the first layer that it was given to, and what waits for the others."""

    def __init__(self) -> None:
        self.x: Callable[[], torch.Tensor | None] = lambda: None
        self.version = 0
        self.leader: Callable[[], FastLinear | None] = lambda: None
        self.waiting: dict[FastLinear, tuple[tuple[object, ...], torch.Tensor]] = {}

    def taken(self, x: torch.Tensor, layer: FastLinear, parts: _Parts) -> torch.Tensor | None:
        """The y that was computed for `layer` with the first one given x, if there is one; it is handed out once."""
        if not self._is(x):
            return None
        state, y = self.waiting.pop(layer, (None, None))
        return y if y is not None and state == parts.state() else None

    def first(self, x: torch.Tensor, layer: FastLinear) -> bool:
        """Whether no layer was given x before; if one was, `layer` will be computed with that one the next time."""
        if x.is_inference() or _what_is_saved_is_watched():  # inference tensors do not tell whether they were changed
            return False
        leader = self.leader()
        if self._is(x):
            if leader is not None and leader is not layer and layer not in leader._sharers:
                leader._sharers = (*leader._sharers, layer)
            return False
        if leader is not None and self.waiting:  # not asked for this time: not of the same input any more
            leader._sharers = tuple(each for each in leader._sharers if each not in self.waiting)
        self.x, self.version, self.leader, self.waiting = weakref.ref(x), x._version, weakref.ref(layer), {}
        return True

    def _is(self, x: torch.Tensor) -> bool:
        return self.x() is x and not x.is_inference() and self.version == x._version


_given = SharedInput()


def _what_is_saved_is_watched() -> bool:
    """Whether someone replaces what autograd saves. Gradient checkpointing does, and wants each pass to save the same
    tensors: layers must not be computed apart in the first and together in the second."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class Projection(NamedTuple):
    """What an adapted layer does to its input: W (d_out, d_in), b (d_out,) or None, A (r, d_in), B (d_out, r);
    `rounding`: what the products with W are rounded to (`kernels/frozen_linear.py`)."""

    W: torch.Tensor
    b: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    mask: Mask
    rounding: str | None = None


def project(x: torch.Tensor, projections: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """y (n, d_out) of each projection of x (n, d_in), by the products at the top of this file, in the dtype of x.

    W, b, A and B may be of other dtypes. The ranks and dropouts of the projections are alike.
    """
    tensors = [tensor for each in projections for tensor in each[:4]]
    return LoraMatmuls.apply(x, [each[4:] for each in projections], *tensors)  # type: ignore[no-any-return,no-untyped-call]


class LoraMatmuls(torch.autograd.Function):
    """x, the scalings, masks and roundings, then W, b, A and B of each projection."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, settings: list[tuple[float, Mask, str | None]], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        masks, weights = [mask for _, mask, _ in settings], tensors[::4]
        A = concat([prepare_factor(A, x.dtype) for A in tensors[2::4]])  # each filled up to a multiple of 8 ranks
        several = [prepare_factor(B.t(), x.dtype) for B in tensors[3::4]]
        h = down(x, A, masks[0].scale, *masks)  # (n, ranks of all)
        outputs = []
        parts = zip(weights, tensors[1::4], several, h.chunk(len(masks), 1), settings, strict=True)
        for W, b, B, own, (scaling, _, rounding) in parts:
            y = matmul(x, W, b, rounding)  # (n, d_out)
            up(y, own, B, scaling)
            outputs.append(y)
        ctx.save_for_backward(x, h, A, *weights, *several)
        ctx.settings, ctx.rank = settings, len(tensors[2])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, A, *saved = ctx.saved_tensors
        masks, needed = [mask for _, mask, _ in ctx.settings], ctx.needs_input_grad[2:]
        weights, several = saved[: len(masks)], saved[len(masks) :]
        found: list[torch.Tensor | None] = [None] * len(needed)
        narrow: list[torch.Tensor] = []
        gradients = tuple(g.contiguous() for g in gradients)
        parts = zip(gradients, several, h.chunk(len(masks), 1), ctx.settings, strict=True)
        for number, (g, B, own, (scaling, mask, _)) in enumerate(parts):
            narrow.append(down(g, B, scaling * mask.scale))  # (n, r), D's division included
            if needed[4 * number + 1]:
                found[4 * number + 1] = g.sum(0)  # (d_out,)
            if needed[4 * number + 3]:
                found[4 * number + 3] = outer(g, own, scaling)[: ctx.rank].t()  # (d_out, r)
        g_h = concat(narrow, 1)  # (n, ranks of all)
        if any(needed[2::4]):
            for number, g_A in enumerate(outer(x, g_h, 1.0, *masks).chunk(len(masks))):
                found[4 * number + 2] = g_A[: ctx.rank]  # (r, d_in)
        g_x = None
        if ctx.needs_input_grad[0]:
            roundings = [rounding for *_, rounding in ctx.settings]
            g_x = matmul_backward(gradients[0], weights[0], None, roundings[0])  # (n, d_in)
            for g, W, rounding in zip(gradients[1:], weights[1:], roundings[1:], strict=True):
                matmul_backward(g, W, g_x, rounding)
            up(g_x, g_h, A, 1.0, *masks)
        return g_x, None, *found


def reference(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    kept: torch.Tensor,
) -> torch.Tensor:
    """The plain twin of `project`: the same mathematics, differentiated by autograd. Only tests use it.

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


LAYER_CLASSES: dict[type[nn.Module], Callable[..., FastLinear | None]] = dict.fromkeys(
    (nn.Linear, FrozenLinear, Conv1D), fast_layer
)
"""Which layer of the base gets which adapted layer; all others get peft's."""


def get_peft_model(base: nn.Module, config: PeftConfig, **options: Any) -> PeftModel:
    """peft's own `get_peft_model`, with hatrack's layers: for anyone's own Trainer or TRL script.

    Raises ModelError where bitsandbytes has repacked the base for inference: it would not learn.
    """
    prevent_repacking(base)
    if isinstance(config, LoraConfig):
        config._register_custom_module(dict(LAYER_CLASSES))
    return peft_get_peft_model(base, config, **options)
