"""Whether a module or autograd has hooks, which computing a layer another way would pass over."""

import torch
from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says. accelerate moves weights by an instance's `forward`."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    ) or ("forward" in module.__dict__)


def has_saved_tensor_hooks() -> bool:
    """Whether something replaces the tensors that autograd saves, as gradient checkpointing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
