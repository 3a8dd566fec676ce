"""Cross-entropy over a large vocabulary, without holding all logits in memory.

For the hidden state x (d,) of a supervised token, the frozen output head W (V, d), b and the target token t:

    z = W x + b                           (V,)
    loss = log(sum(exp(z))) - z_t
    d loss / d x = W^T (softmax(z) - onehot(t))

The gradient needs only z, so it is computed together with the loss, a few tokens at a time: neither all logits nor a
float32 copy of them are in memory at once.
"""

from typing import Any

import torch

from hatrack.kernels import native
from hatrack.kernels.frozen_linear import matmul, matmul_backward
from hatrack.kernels.limits import LOGITS_BLOCK, LOGITS_BLOCK_ON_ACCELERATOR
from hatrack.upstream.torch import HAS_ONEDNN, onednn_linear


def next_token_losses(
    states: torch.Tensor,
    W: torch.Tensor | None,
    b: torch.Tensor | None,
    targets: torch.Tensor,
    int_format: str | None = None,
) -> torch.Tensor:
    """The losses (n,) float32, by the formula above, of hidden states (n, d) and target tokens (n,).

    If W is None, the states are logits (n, V). W and b get no gradient, and may have another dtype. `int_format`:
    what the matmuls with W are rounded to (`frozen_linear.py`).
    """
    if not len(targets):
        return states.sum(-1, dtype=torch.float32)  # empty, but with a gradient
    return _NextToken.apply(states, W, b, targets, int_format)  # type: ignore[no-any-return,no-untyped-call]


class _NextToken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        W: torch.Tensor | None,
        b: torch.Tensor | None,
        targets: torch.Tensor,
        int_format: str | None,
    ) -> torch.Tensor:
        values = torch.empty(len(targets), dtype=torch.float32, device=states.device)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        block = LOGITS_BLOCK if states.device.type == "cpu" else LOGITS_BLOCK_ON_ACCELERATOR
        rows = max(16, block // (states.shape[-1] if W is None else len(W)))
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = states[part].clone() if W is None else _logits(states[part], W, b, int_format)
            values[part], slope = _softmax_loss(logits, targets[part], gradient is not None)
            if slope is not None and gradient is not None:
                gradient[part] = slope if W is None else matmul_backward(slope, W, int_format)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * g[:, None].to(gradient.dtype), None, None, None, None


def _logits(states: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, int_format: str | None) -> torch.Tensor:
    """states (n, d) W^T + b, (n, V). In float32 on a CPU by oneDNN: 1.4x faster than MKL, torch's choice, for few
    states and a W larger than the CPU's caches (docs/log.md)."""
    plain = int_format is None and states.device.type == "cpu" and states.dtype == W.dtype == torch.float32
    if plain and HAS_ONEDNN:
        return onednn_linear(states, W, b)
    return matmul(states, W, b, int_format)


def _softmax_loss(
    logits: torch.Tensor, targets: torch.Tensor, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The losses (n,) float32 of logits (n, V), which may be overwritten, and their gradient (n, V) in the same
    dtype."""
    if native.supports(logits, columns=1):
        values = torch.empty(len(targets))
        native.call("softmax_loss", logits.dtype, logits, targets, values, *logits.shape)
        return values, logits
    z = logits.float()
    z_t = z.gather(-1, targets[:, None])  # (n, 1)
    if not with_gradient:
        return z.logsumexp(-1) - z_t[:, 0], None
    top = logits.amax(-1, keepdim=True).float()  # (n, 1); its probability is at least 1 / V: no logarithm of 0
    p = z.softmax(-1)
    found = top - p.amax(-1, keepdim=True).log() - z_t
    p.scatter_add_(-1, targets[:, None], p.new_full((len(targets), 1), -1.0))
    return found[:, 0], p.to(logits.dtype)
