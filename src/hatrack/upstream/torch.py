"""Private names of torch: what a module holds, a tensor's version, and three operators."""

from typing import Any

import torch
from torch import nn

from hatrack.upstream.names import require

NAMES = (
    "torch.nn.Module._parameters",
    "torch.nn.Module._modules",
    "torch.nn.Module._forward_hooks",
    "torch.nn.Module._forward_pre_hooks",
    "torch.nn.Module._backward_hooks",
    "torch.nn.Module._backward_pre_hooks",
    "torch.Tensor._version",
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "torch._softmax_backward_data",
)
HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
require("torch", *NAMES, *(["torch.ops.mkldnn._linear_pointwise"] if HAS_ONEDNN else []))


def parameter(module: nn.Module, name: str) -> Any:
    """A module's own parameter, or None; KeyError if it has none of this name. Faster than its attribute, which takes
    longer than a small matmul."""
    return module._parameters[name]


def child(module: nn.Module, name: str) -> Any:
    """A module's child, or None. Faster than its attribute."""
    return module._modules.get(name)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: hooks, or a `forward` of its own, as accelerate sets."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place. Inference tensors have none."""
    return tensor._version


def has_saved_tensor_hooks() -> bool:
    """Whether something replaces the tensors that autograd saves, as gradient checkpointing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def softmax_backward(g: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    """The gradient of the scores (..., keys) from that of their softmax P."""
    return torch._softmax_backward_data(g, P, -1, P.dtype)


def onednn_linear(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """x (n, d) W^T + b by oneDNN, where torch would take MKL. Only where `HAS_ONEDNN`."""
    return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")  # type: ignore[no-any-return]
