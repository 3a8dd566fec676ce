"""Puts hatrack's kernels into a frozen base: attention by transformers' own interface, dropout and norms as layers,
products with matrices in four bits without ever having one unpacked as a whole.

Nothing is known of any architecture. A norm is replaced when it answers as an RMSNorm does, an activation when it
answers as GELU's tanh form, whatever their names, and attention when the model leaves the choice of it to transformers
and answers the same with it. The rest stays as it is. On accelerators only norms and activations are replaced, by
torch's fused ones: attention and dropout are fused already.
"""

import ctypes
import inspect
import os
import platform
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, activations
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.pytorch_utils import Conv1D

from hatrack.errors import RecipeError
from hatrack.kernels import dropout, int8, native
from hatrack.kernels.attention import attention
from hatrack.kernels.frozen_linear import FrozenLinear, active_rounding, can_unpack, linear, prevent_repacking
from hatrack.kernels.gelu import gelu_tanh
from hatrack.kernels.limits import STORED_MATMULS
from hatrack.kernels.norm import rms_norm

NAME = "hatrack"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers (malloc.h) for: give memory back to the system above this; take single blocks from it above that."""


PRIMITIVES = {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(STORED_MATMULS)}
"""How many compiled matmuls torch keeps: one for each shape, and so for each length of rows. oneDNN, which multiplies
bfloat16, keeps 1,024 by default and torch as many again, 0.4 MiB each, between the activations; a step has some 20."""


class Shortenable(Protocol):
    """The layers of a base, of which all but the last can be left out for a while (`base.layer_stack.LayerStack`)."""

    def only_last_layers(self) -> AbstractContextManager[Any]:
        """Leaves them out while the block runs."""


def speed_up(base: PreTrainedModel, trunk: Shortenable | None = None, compute: str = "auto") -> None:
    """Has a frozen base compute with hatrack's kernels wherever they give the same. Before or after it gets an adapter.

    Outputs and gradients stay as they were, but for rounding; the masks of dropout are drawn otherwise. Weights, their
    names and saved files do not change. Freed memory stays with the process from then on (glibc). With the `trunk` of a
    base larger than memory, only its last layer is asked for answers.

    `compute` int16 or int8 rounds the products with its matrices while it trains (`kernels/int8.py`), in float32 on
    a processor; under autocast nothing is rounded. Raises RecipeError where that cannot be done.
    """
    on_processor = base.device.type == "cpu"
    prevent_repacking(base)
    if compute != "auto":
        if (
            trunk is None and base.dtype != torch.float32
        ):  # streamed, a base is multiplied in another format than its own
            raise RecipeError(
                f"--compute {compute} is for a base in float32", got=native.dtype_name(base.dtype), fix="load it so"
            )
        _round_products(base, compute)
    if on_processor:
        bound_primitives()
        _keep_freed_memory(2**25 if getattr(base, "is_quantized", False) else 2**30)
        with trunk.only_last_layers() if trunk else nullcontext():
            _use_attention(base)
    for parent in list(base.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Dropout and not layer.inplace and 0 < layer.p < 1 and on_processor:
                setattr(parent, name, FastDropout(layer.p).train(layer.training))
            elif (norm := _as_rms_norm(layer)) is not None:
                setattr(parent, name, norm.train(layer.training))
            elif _is_gelu_tanh(layer):
                setattr(parent, name, FastGELU().train(layer.training))
            elif on_processor and isinstance(layer, nn.Linear) and can_unpack(layer.weight) and not _watched(layer):
                layer.forward = partial(_unpacked, layer)  # type: ignore[method-assign]


def bound_primitives() -> None:
    """Has torch forget matmuls compiled for shapes of earlier steps (docs/log.md), unless the environment says how many
    it is to keep. It is read when the first matmul in bfloat16 is computed; later it changes nothing."""
    for name, kept in PRIMITIVES.items():
        os.environ.setdefault(name, kept)


def _keep_freed_memory(largest: int) -> None:
    """Has glibc keep what is freed for the next step, which wants the same again: handing pages back to the system and
    clearing new ones took up to a fifth of a step (docs/log.md). Nothing where there is no glibc.

    Single blocks above `largest` bytes come and go: a layer in eight bits is unpacked for each product, and beside a
    base in four bits the heap kept 0.5 to 0.9 GB of holes otherwise (docs/log.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_MMAP_THRESHOLD, largest) or mallopt(M_MMAP_THRESHOLD, 2**25)


def check_rounding(compute: str, device: str) -> None:
    """Raises RecipeError where a kind of device cannot round products as `compute` (int16, int8 or auto) asks."""
    if compute != "auto" and (device != "cpu" or not int8.is_available()):
        raise RecipeError(
            f"--compute {compute} is for processors with AVX2 and hatrack's compiled kernels",
            got=f"{device}{'' if int8.is_available() else ', without them'}",
            fix="leave it out",
        )


def _round_products(base: PreTrainedModel, compute: str) -> None:
    """Marks every frozen matrix of the base, so that the layer it is in has its products rounded."""
    if compute not in int8.BITS:
        raise RecipeError(f"compute: {compute} is not known", fix=f"use auto, {' or '.join(int8.BITS)}")
    check_rounding(compute, base.device.type)
    for parent in base.modules():
        for layer in parent.children():
            of_adapter = isinstance(parent, nn.ModuleDict)  # peft keeps its own layers so
            trained = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
            if not isinstance(layer, nn.Linear | Conv1D) or of_adapter or trained or _watched(layer):
                continue
            layer.rounding = compute
            if type(layer) is nn.Linear:
                layer.__class__ = FrozenLinear


def _unpacked(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes' layer in four bits gives for x (..., d_in), in the format of x."""
    y = linear(x.to(layer.compute_dtype or x.dtype), layer.weight, None, active_rounding(layer))
    return (y if layer.bias is None else y + layer.bias.to(y.dtype)).to(x.dtype)


def _use_attention(base: PreTrainedModel) -> None:
    """Registers the attention for `base` if its answers stay the same, padded rows included."""
    if base.config._attn_implementation != "sdpa":
        return
    wanted = _answers(base)
    if wanted is None:
        return
    base.set_attn_implementation(NAME)
    found = _answers(base)
    if found is None or not float((found - wanted).norm()) <= 0.1 * float(wanted.norm()):
        base.set_attn_implementation("sdpa")


@torch.no_grad()
def _answers(base: PreTrainedModel) -> torch.Tensor | None:
    """What the model's body makes of two short rows, one of them padded; None where it cannot be asked this way."""
    body = base.base_model
    ids = (torch.arange(1, 17).view(2, 8) * 7919) % base.config.get_text_config().vocab_size
    real = torch.ones_like(ids)
    real[1, 5:] = 0
    was_training = body.training
    body.eval()
    try:
        states = body(input_ids=ids, attention_mask=real)[0]
    except Exception:  # an encoder-decoder, or a model of something else than text
        return None
    finally:
        body.train(was_training)
    return states.float()[real.bool()] if states.shape[:2] == ids.shape else None


class FastDropout(nn.Dropout):
    """torch's dropout, its mask drawn at a fraction of the cost and not kept."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout.dropout(x, self.p) if self.training and x.dim() else x


class FastRMSNorm(nn.Module):
    """An RMSNorm whose weight (d,) is frozen. The weight keeps its name and format; `added` is 1 where it is w - 1."""

    def __init__(self, weight: nn.Parameter, epsilon: float, added: float) -> None:
        super().__init__()
        self.weight, self.epsilon, self.added = weight, epsilon, added
        self._float = weight.detach().float() + added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu":
            return rms_norm(x, self._float, self.epsilon)
        return rms_norm(x, self.weight.float() + self.added if self.added else self.weight, self.epsilon)


@torch.no_grad()
def _as_rms_norm(layer: nn.Module) -> FastRMSNorm | None:
    """The same norm made for speed, if `layer` has one frozen vector and answers to random vectors as an RMSNorm."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    if isinstance(layer, FastRMSNorm) or len(tensors) != 1 or tensors[0][0] != "weight" or list(layer.children()):
        return None
    weight = tensors[0][1]
    epsilons = {value for value in vars(layer).values() if isinstance(value, float) and 0 < value < 1e-2}
    if weight.dim() != 1 or weight.requires_grad or len(epsilons) != 1 or _watched(layer) or weight.shape[0] % 32:
        return None
    if not isinstance(weight, nn.Parameter) or len(inspect.signature(layer.forward).parameters) != 1:
        return None  # a weight that is not used, or a norm that is given a gate as well
    probe = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 4)[:, None]
    probe = probe.to(weight)
    try:
        wanted = layer(probe)
    except Exception:  # whatever it is, it is not a norm of one tensor
        return None
    bound = 1e-5 if weight.dtype == torch.float32 else 2e-2
    for added in (0.0, 1.0):
        norm = FastRMSNorm(weight, next(iter(epsilons)), added)
        same_kind = isinstance(wanted, torch.Tensor) and (wanted.dtype, wanted.shape) == (probe.dtype, probe.shape)
        if same_kind and torch.allclose(norm(probe).float(), wanted.float(), rtol=bound, atol=bound * 1e-2):
            return norm
    return None


class FastGELU(nn.Module):
    """GELU in its tanh form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu_tanh(x)


@torch.no_grad()
def _is_gelu_tanh(layer: nn.Module) -> bool:
    """Whether one of transformers' activations answers as that does: it has several by other names."""
    if type(layer).__module__ != activations.__name__ or list(layer.parameters()) or _watched(layer):
        return False
    probe = torch.linspace(-6, 6, 193)
    return torch.allclose(layer(probe), F.gelu(probe, approximate="tanh"), rtol=1e-5, atol=1e-6)


def _watched(layer: nn.Module) -> bool:
    """Whether somebody looks into the layer, whom a new one in its place would lose."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or "forward" in vars(layer))


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: query (B, H, T, d), key and value (B, H / groups, T, d) -> (B, T, H, d).

    `attention_mask`: None, or (B, T) true at real tokens, or whatever torch's attention takes.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    covered = (
        (attention_mask is None or attention_mask.dim() == 2)
        and position_bias is None
        and query.shape[2] == key.shape[2]
        and query.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and query.dtype == key.dtype == value.dtype
        and not kwargs.get("output_attentions", False)
    )
    if not covered:
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = _square(attention_mask, query.shape[2], causal)
        kwargs |= {"is_causal": is_causal, "position_bias": position_bias, "dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, attention_mask, causal=causal, scale=scale, p=dropout), None


def _square(real: torch.Tensor, queries: int, causal: bool) -> torch.Tensor:
    """What torch's attention takes for `real` (B, T): which query sees which key, (B, 1, 1 or queries, T)."""
    seen = real[:, None, None, :]
    return seen & torch.ones(queries, real.shape[1], dtype=torch.bool, device=real.device).tril() if causal else seen


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """What transformers asks for a mask, once a pass: (B, T) for padded rows, none where no query sees the padding, its
    own for anything else."""
    plain = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    if plain and q_length == kv_length and q_offset == kv_offset == 0:
        if attention_mask is None or bool(attention_mask.all()):
            return None
        on_the_right = bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
        if on_the_right and mask_function is causal_mask_function:
            return None  # the padding comes after every real query, which so never sees it
        return attention_mask.bool()
    return sdpa_mask(  # type: ignore[no-any-return]
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
    )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
