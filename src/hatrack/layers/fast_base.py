"""Makes a frozen base compute with hatrack's kernels: attention, dropout, norms, GELU, 4-bit matmuls.

Layers are recognized by their outputs, not by the architecture's name. A norm is replaced if its outputs are those of
an RMSNorm, an activation if its outputs are those of GELU's tanh form, and attention if the model lets transformers
choose it and its hidden states stay the same. Other modules stay as they are. On accelerators only norms and
activations are replaced, by torch's fused ones: attention and dropout are fused already.
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
from hatrack.kernels.frozen_linear import FrozenLinear, active_int_format, can_unpack, linear, prevent_repacking
from hatrack.kernels.gelu import gelu_tanh
from hatrack.kernels.limits import CACHED_MATMULS
from hatrack.kernels.norm import rms_norm
from hatrack.upstream.torch import has_hooks
from hatrack.upstream.transformers import attention_of

ATTENTION_NAME = "hatrack"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt (malloc.h): return free memory at the top of the heap to the kernel above a number of
bytes; map each block larger than a number of bytes separately."""
MATMUL_CACHE_SIZES = {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(CACHED_MATMULS)}
"""How many compiled bfloat16 matmuls torch and oneDNN cache, one per shape and so one per row length. By default each
caches 1,024 of 0.4 MiB, scattered among the activations; a step needs about 20."""


class SkippableLayers(Protocol):
    """The layers of a base, all but the last of which can be skipped (`base.layer_stack.LayerStack`)."""

    def only_last_layers(self) -> AbstractContextManager[Any]:
        """While the block runs, only the last layer computes."""


def speed_up(base: PreTrainedModel, trunk: SkippableLayers | None = None, compute: str = "auto") -> None:
    """Makes a frozen base compute with hatrack's kernels, before or after it gets an adapter. Changes it in place.

    base: a transformers model without trained weights of its own. It may be on an accelerator or quantized.
    trunk: the layers of a base that is larger than memory; attention is then tested with the last layer alone.
    compute: "auto" for exact matmuls; "int16" or "int8" round the base's float32 matmuls in training, faster on CPUs
        with AVX2 (`kernels/int8.py`). Under autocast nothing is rounded.

    Returns None. Outputs and gradients change by rounding alone; dropout draws other masks. Weights, their names and
    saved files stay the same. Memory that is freed stays with the process from then on (on Linux with glibc).

    Raises RecipeError if `compute` has another value, the base is not in float32, or the CPU cannot round; ModelError
    if bitsandbytes has repacked 4-bit weights for inference.
    """
    on_cpu = base.device.type == "cpu"
    prevent_repacking(base)
    if compute != "auto":
        # a streamed base (`trunk`) is stored in its own dtype and multiplied in float32
        if trunk is None and base.dtype != torch.float32:
            raise RecipeError(
                f"--compute {compute} is for a base in float32",
                got=native.dtype_name(base.dtype),
                fix="load it in float32",
            )
        _round_matmuls(base, compute)
    if on_cpu:
        _limit_cached_matmuls()
        _keep_freed_memory(2**25 if getattr(base, "is_quantized", False) else 2**30)
        with trunk.only_last_layers() if trunk else nullcontext():
            _use_attention(base)
    for parent in list(base.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Dropout and not layer.inplace and 0 < layer.p < 1 and on_cpu:
                setattr(parent, name, FastDropout(layer.p).train(layer.training))
            elif (norm := _fast_rms_norm(layer)) is not None:
                setattr(parent, name, norm.train(layer.training))
            elif _is_gelu_tanh(layer):
                setattr(parent, name, FastGELU().train(layer.training))
            elif on_cpu and isinstance(layer, nn.Linear) and can_unpack(layer.weight) and not has_hooks(layer):
                layer.forward = partial(_linear_4bit, layer)  # type: ignore[method-assign]


def _limit_cached_matmuls() -> None:
    """Limits how many compiled matmuls are cached, unless the environment sets it (docs/log.md). Has no effect after
    the first bfloat16 matmul of the process."""
    for name, count in MATMUL_CACHE_SIZES.items():
        os.environ.setdefault(name, count)


def _keep_freed_memory(largest: int) -> None:
    """Makes glibc keep freed memory for the next step, which needs as much: returning pages to the kernel and clearing
    new ones took up to a fifth of a step (docs/log.md). Does nothing without glibc.

    Blocks above `largest` bytes are still returned: an 8-bit layer is unpacked for each matmul, and with a 4-bit base
    the heap had 0.5 to 0.9 GB of holes otherwise (docs/log.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_MMAP_THRESHOLD, largest) or mallopt(M_MMAP_THRESHOLD, 2**25)


def check_rounding(compute: str, device: str) -> None:
    """Raises RecipeError if `device` (cpu, cuda, ...) cannot round matmuls as `compute` asks (auto, int16, int8)."""
    if compute != "auto" and (device != "cpu" or not int8.is_available()):
        raise RecipeError(
            f"--compute {compute} is for CPUs with AVX2 and hatrack's compiled kernels",
            got=f"{device}{'' if int8.is_available() else ', without them'}",
            fix="leave --compute out",
        )


def _round_matmuls(base: PreTrainedModel, compute: str) -> None:
    """Marks the layers of all frozen weights, so that their matmuls are rounded in training."""
    if compute not in int8.BITS:
        raise RecipeError(f"compute: invalid value {compute}", fix=f"use auto, {' or '.join(int8.BITS)}")
    check_rounding(compute, base.device.type)
    for parent in base.modules():
        for layer in parent.children():
            of_adapter = isinstance(parent, nn.ModuleDict)  # peft puts its own layers there
            trained = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
            if not isinstance(layer, nn.Linear | Conv1D) or of_adapter or trained or has_hooks(layer):
                continue
            layer.int_format = compute
            if type(layer) is nn.Linear:
                layer.__class__ = FrozenLinear


def _linear_4bit(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The output of bitsandbytes' 4-bit layer for x (..., d_in), in the dtype of x."""
    y = linear(x.to(layer.compute_dtype or x.dtype), layer.weight, None, active_int_format(layer))
    return (y if layer.bias is None else y + layer.bias.to(y.dtype)).to(x.dtype)


def _use_attention(base: PreTrainedModel) -> None:
    """Switches `base` to our attention if its outputs stay the same, those of padded rows included."""
    if attention_of(base) != "sdpa":
        return
    expected = _hidden_states(base)
    if expected is None:
        return
    base.set_attn_implementation(ATTENTION_NAME)
    found = _hidden_states(base)
    if found is None or not float((found - expected).norm()) <= 0.1 * float(expected.norm()):
        base.set_attn_implementation("sdpa")


@torch.no_grad()
def _hidden_states(base: PreTrainedModel) -> torch.Tensor | None:
    """The last hidden states of two short rows, one of them padded; None if the model cannot read them."""
    body = base.base_model
    ids = (torch.arange(1, 17).view(2, 8) * 7919) % base.config.get_text_config().vocab_size
    real = torch.ones_like(ids)
    real[1, 5:] = 0
    was_training = body.training
    body.eval()
    try:
        states = body(input_ids=ids, attention_mask=real)[0]
    except Exception:  # an encoder-decoder, or a model that does not read text
        return None
    finally:
        body.train(was_training)
    return states.float()[real.bool()] if states.shape[:2] == ids.shape else None


class FastDropout(nn.Dropout):
    """Dropout with a mask that is cheaper to draw than torch's, and is not saved."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout.dropout(x, self.p) if self.training and x.dim() else x


class FastRMSNorm(nn.Module):
    """An RMSNorm with a frozen weight (d,), whose name and dtype stay. `added`: 1 if the weight is stored as w - 1."""

    def __init__(self, weight: nn.Parameter, epsilon: float, added: float) -> None:
        super().__init__()
        self.weight, self.epsilon, self.added = weight, epsilon, added
        self._float = weight.detach().float() + added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu":
            return rms_norm(x, self._float, self.epsilon)
        return rms_norm(x, self.weight.float() + self.added if self.added else self.weight, self.epsilon)


@torch.no_grad()
def _fast_rms_norm(layer: nn.Module) -> FastRMSNorm | None:
    """The fast norm for `layer`, if it has one frozen vector and its outputs on a probe are those of an RMSNorm."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    if isinstance(layer, FastRMSNorm) or len(tensors) != 1 or tensors[0][0] != "weight" or list(layer.children()):
        return None
    weight = tensors[0][1]
    epsilons = {value for value in vars(layer).values() if isinstance(value, float) and 0 < value < 1e-2}
    if weight.dim() != 1 or weight.requires_grad or len(epsilons) != 1 or has_hooks(layer) or weight.shape[0] % 32:
        return None
    if not isinstance(weight, nn.Parameter) or len(inspect.signature(layer.forward).parameters) != 1:
        return None  # a weight that is not used, or a norm with a second input
    probe = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 4)[:, None]
    probe = probe.to(weight)
    try:
        expected = layer(probe)
    except Exception:  # not a norm of one tensor
        return None
    bound = 1e-5 if weight.dtype == torch.float32 else 2e-2
    for added in (0.0, 1.0):
        norm = FastRMSNorm(weight, next(iter(epsilons)), added)
        same_shape = isinstance(expected, torch.Tensor) and (expected.dtype, expected.shape) == (
            probe.dtype,
            probe.shape,
        )
        if same_shape and torch.allclose(norm(probe).float(), expected.float(), rtol=bound, atol=bound * 1e-2):
            return norm
    return None


class FastGELU(nn.Module):
    """GELU in its tanh form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu_tanh(x)


@torch.no_grad()
def _is_gelu_tanh(layer: nn.Module) -> bool:
    """Whether `layer` is one of transformers' activations, and its outputs are those of GELU's tanh form."""
    if type(layer).__module__ != activations.__name__ or list(layer.parameters()) or has_hooks(layer):
        return False
    probe = torch.linspace(-6, 6, 193)
    return torch.allclose(layer(probe), F.gelu(probe, approximate="tanh"), rtol=1e-5, atol=1e-6)


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
    """The attention function that transformers calls: query (B, H, T, d), key and value (B, H / groups, T, d) ->
    (B, T, H, d). `attention_mask`: None, (B, T) with true at real tokens, or what torch's attention takes.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    supported = (
        (attention_mask is None or attention_mask.dim() == 2)
        and position_bias is None
        and query.shape[2] == key.shape[2]
        and query.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and query.dtype == key.dtype == value.dtype
        and not kwargs.get("output_attentions", False)
    )
    if not supported:
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = _square(attention_mask, query.shape[2], causal)
        kwargs |= {"is_causal": is_causal, "position_bias": position_bias, "dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, attention_mask, causal=causal, scale=scale, p=dropout), None


def _square(real: torch.Tensor, queries: int, causal: bool) -> torch.Tensor:
    """torch's attention mask for `real` (B, T): which query sees which key, (B, 1, 1 or queries, T)."""
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
    """The mask function that transformers calls once per forward pass: (B, T) for padded rows, None if no query sees
    padding, transformers' own mask for other masks."""
    plain = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    if plain and q_length == kv_length and q_offset == kv_offset == 0:
        if attention_mask is None or bool(attention_mask.all()):
            return None
        on_the_right = bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
        if on_the_right and mask_function is causal_mask_function:
            return None  # padding comes after every real query, so none sees it
        return attention_mask.bool()
    return sdpa_mask(  # type: ignore[no-any-return]
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
    )


AttentionInterface.register(ATTENTION_NAME, attend)
AttentionMaskInterface.register(ATTENTION_NAME, mask)
