"""Attention on a processor by its matrix products, a block of queries at a time.

For one head with queries Q (t, d), keys K and values V (t, d), scale s and the allowed positions M:

    P = softmax(s Q K^T where M, else -infinity)      (t, t)
    O = D(P) V                                        (t, d)

and for the gradient G of O, with P computed again rather than kept (as Dao et al., FlashAttention, 2022, do):

    dV = D(P)^T G
    dP = D(G V^T)
    dS = P * (dP - rowsum(P * dP))
    dQ = s dS K,   dK = s dS^T Q

D is dropout. Query heads that share keys and values (grouped-query attention) are stacked as rows of one product. A
block holds at most `ATTENTION_BLOCK` elements of P; where attention is causal, keys after a block are not computed at
all. Padding is a (B, t) mask; no mask of t x t is made.

In float32 a kernel does all of it (attention.cpp), elsewhere torch's products of all heads at once, with the passes
between them by kernels where there are any. torch's own `scaled_dot_product_attention` computes the same; on a
processor in bfloat16 it is far slower than its products. Knows nothing of models.
"""

from typing import Any

import torch

from hatrack.kernels import native
from hatrack.kernels.dropout import Mask, apply_mask, draw_mask
from hatrack.kernels.limits import ATTENTION_BLOCK
from hatrack.upstream.torch import softmax_backward

EVEN = 32
"""Keys are filled up to a multiple of this: a softmax over 30 bfloat16 numbers takes five times as long as over 32."""


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    real: torch.Tensor | None,
    *,
    causal: bool,
    scale: float,
    p: float = 0.0,
) -> torch.Tensor:
    """query (B, H, T, d), key and value (B, H / groups, T, d) of one format -> (B, T, H, d).

    `real` (B, T): false where a row is filled up with padding, which no real token attends to; None if nowhere.
    `p`: dropout of the probabilities.
    """
    padding = None if real is None else torch.zeros(real.shape).masked_fill_(~real, -1e30)  # added to keys' scores
    way = _Kernel if _covered(query, key, value) else _Products
    return way.apply(query, key, value, padding, causal, scale, draw_mask(p))  # type: ignore[no-any-return,no-untyped-call]


def _covered(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel does all of it: float32, heads of a width it takes, and equal ones for keys and values."""
    return (
        query.dtype == torch.float32
        and native.supports(query, columns=16)
        and query.shape[-1] == value.shape[-1]
        and all(states.stride(-1) == 1 for states in (query, key, value))
    )


class _Kernel(torch.autograd.Function):
    """query (B, H, T, d), key and value (B, H / groups, T, d) -> (B, T, H, d), by the kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padding: torch.Tensor | None,
        causal: bool,
        scale: float,
        mask: Mask,
    ) -> torch.Tensor:
        batch, heads, length, width = query.shape
        out, log_sums = query.new_empty(batch, length, heads, width), query.new_empty(batch, heads, length)
        sizes = _sizes(query, key, value, out)
        settings = scale, int(causal), mask.threshold, mask.scale, mask.seed
        space = _space(length, width, backward=False)
        native.call("attention", query.dtype, query, key, value, padding, out, log_sums, space, sizes, *settings)
        ctx.save_for_backward(query, key, value, padding, log_sums)
        ctx.settings = settings
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, padding, log_sums = ctx.saved_tensors
        g = g.contiguous()
        batch, length, heads, width = g.shape
        dQ, dK, dV = torch.empty_like(g), torch.empty_like(g), torch.empty_like(g)
        tensors = query, key, value, padding, g, log_sums, dQ, dK, dV, _space(length, width, backward=True)
        native.call("attention_back", g.dtype, *tensors, _sizes(query, key, value, g), *ctx.settings)
        shared = key.shape[1]
        if shared != heads:
            dK, dV = (each.view(batch, length, shared, -1, width).sum(3) for each in (dK, dV))
        return dQ.transpose(1, 2), dK.transpose(1, 2), dV.transpose(1, 2), *[None] * 4


def _sizes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """What the kernel calls `Sizes`, for `out` (B, T, H, d)."""
    batch, length, heads, width = out.shape
    strides = *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], out.stride(0), out.stride(2), out.stride(1)
    return torch.tensor([batch, heads, key.shape[1], length, width, *strides])


def _space(length: int, width: int, *, backward: bool) -> torch.Tensor:
    loaded = native.library()
    assert loaded is not None
    return torch.empty(torch.get_num_threads(), loaded.attention_space(length, width, int(backward)))


class _Products(torch.autograd.Function):
    """query (B, H, T, d), key and value (B, H / groups, T, d) -> (B, T, H, d), by products of all heads at once."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padding: torch.Tensor | None,
        causal: bool,
        scale: float,
        mask: Mask,
    ) -> torch.Tensor:
        rows, heads, length, _ = query.shape
        K, V = _joined(key), _joined(value)
        out = query.new_empty(rows, length, heads, V.shape[-1]).transpose(1, 2)
        for start, stop, keys in _blocks(query, causal):
            Q = _stacked(query, K, start, stop).mul_(scale)
            P = _probabilities(Q, K[:, :keys], padding, causal, start, stop, query.shape[2])
            P = apply_mask(P, mask._replace(seed=mask.seed + start), mask.scale)
            _unstack(torch.bmm(P, V[:, :keys]), out, start, stop)
        ctx.save_for_backward(query, key, value, padding)
        ctx.settings = causal, scale, mask
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, padding = ctx.saved_tensors
        causal, scale, mask = ctx.settings
        K, V, g = _joined(key), _joined(value), g.transpose(1, 2)
        dQ = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        blocks = _blocks(query, causal)
        sums = torch.float32 if len(blocks) > 1 else K.dtype
        dK, dV = torch.zeros_like(K, dtype=sums), torch.zeros_like(V, dtype=sums)
        for start, stop, keys in blocks:
            Q = _stacked(query, K, start, stop).mul_(scale)
            P = _probabilities(Q, K[:, :keys], padding, causal, start, stop, query.shape[2])
            G = _stacked(g, K, start, stop)
            here = mask._replace(seed=mask.seed + start)
            dV[:, :keys] += torch.bmm(apply_mask(P, here, mask.scale).mT, G)
            dP = apply_mask(torch.bmm(G, V[:, :keys].mT), here, mask.scale)
            dS = _softmax_back(dP, P)
            dK[:, :keys] += torch.bmm(dS.mT, Q)
            _unstack(torch.bmm(dS, K[:, :keys]).mul_(scale), dQ, start, stop)
        return dQ, _parted(dK, key), _parted(dV, value), *[None] * 4


def _softmax_back(g: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    """The gradient of the scores, from that of the probabilities (..., keys), which it may overwrite."""
    if not native.supports(P):
        return softmax_backward(g, P)
    native.call("softmax_back", P.dtype, P, g, P.numel() // P.shape[-1], P.shape[-1])
    return g


def _blocks(query: torch.Tensor, causal: bool) -> list[tuple[int, int, int]]:
    """Blocks of queries as (first, one after the last, number of keys they may see)."""
    rows, heads, length, _ = query.shape
    size = max(EVEN, ATTENTION_BLOCK // (rows * heads * length) // EVEN * EVEN)
    whole = -(-length // EVEN) * EVEN
    return [
        (start, min(start + size, length), start + min(size, whole - start) if causal else whole)
        for start in range(0, length, size)
    ]


def _joined(states: torch.Tensor) -> torch.Tensor:
    """Keys or values (B, H, T, d) -> (B H, T rounded up, d), zeros at the end."""
    rows, heads, length, width = states.shape
    padded = states.new_empty(rows, heads, -(-length // EVEN) * EVEN, width)
    padded[:, :, :length] = states
    padded[:, :, length:] = 0
    return padded.view(rows * heads, -1, width)


def _parted(gradient: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """(B H, T rounded up, d) -> the shape and format of `states` (B, H, T, d)."""
    rows, heads, length, width = states.shape
    return gradient.view(rows, heads, -1, width)[:, :, :length].to(states.dtype)


def _stacked(states: torch.Tensor, K: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A copy of the block's rows of (B, H, T, d), heads with the same keys beneath each other: (K's number, -1, d)."""
    part = states[:, :, start:stop]
    return torch.empty_like(part, memory_format=torch.contiguous_format).copy_(part).view(len(K), -1, part.shape[-1])


def _unstack(stacked: torch.Tensor, states: torch.Tensor, start: int, stop: int) -> None:
    """Writes such rows back into (B, H, T, d)."""
    part = states[:, :, start:stop]
    part.copy_(stacked.view(part.shape))


def _probabilities(
    Q: torch.Tensor, K: torch.Tensor, padding: torch.Tensor | None, causal: bool, start: int, stop: int, length: int
) -> torch.Tensor:
    """P of a block, (n, groups x block, keys), for scaled queries Q (n, groups x block, d) and keys K (n, keys, d)."""
    S = torch.bmm(Q, K.mT)
    block, keys = stop - start, S.shape[-1]
    if native.supports(S):
        space, batch = torch.empty(torch.get_num_threads(), keys), 1 if padding is None else len(padding)
        shape = S.numel() // keys, keys, block, start, length, int(causal), batch
        native.call("softmax", S.dtype, S, padding, space, *shape)
        return S
    if causal:
        future = torch.full((block, keys - start), -torch.inf, dtype=S.dtype).triu_(1)
        S.view(-1, block, keys)[:, :, start:] += future
    elif keys > length:
        S[:, :, length:] = -torch.inf
    if padding is not None:
        S.view(len(padding), -1, keys)[:, :, :length].add_(padding[:, None, :keys].to(S.dtype))
    return S.softmax(-1)
