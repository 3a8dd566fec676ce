"""Attention on a CPU, a block of queries at a time.

For one head with queries Q (t, d), keys K and values V (t, d), scale s and the mask M of visible positions:

    P = softmax(s Q K^T where M, else -infinity)      (t, t)
    O = D(P) V                                        (t, d)

and for the gradient G of O, with P recomputed instead of saved (Dao et al., FlashAttention, 2022):

    dV = D(P)^T G
    dP = D(G V^T)
    dS = P * (dP - rowsum(P * dP))
    dQ = s dS K,   dK = s dS^T Q

D is dropout. Query heads that share keys and values (grouped-query attention) are stacked as rows of one matmul. A
block holds at most `ATTENTION_BLOCK` elements of P. With causal attention, keys after a block are not computed. Padding
is a (B, t) mask; no mask of (t, t) is made.

In float32 one kernel computes all of it (attention.cpp); in other dtypes, torch's matmuls do, over all heads at once,
with kernels for the softmax. torch's own `scaled_dot_product_attention` gives the same, far slower in bfloat16 on a
CPU.
"""

from typing import Any, NamedTuple

import torch

from hatrack.kernels import native
from hatrack.kernels.dropout import Mask, apply_mask, draw_mask
from hatrack.kernels.limits import ATTENTION_BLOCK
from hatrack.upstream.torch import softmax_backward

KEY_MULTIPLE = 32
"""Keys are padded to a multiple of this: a softmax over 30 bfloat16 elements takes five times as long as over 32."""


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
    """query (B, H, T, d), key and value (B, H / groups, T, d) of one dtype -> (B, T, H, d).

    `real` (B, T): false at padding, to which no real token attends; None without padding. `p`: dropout probability of
    the elements of P.
    """
    padding = None if real is None else torch.zeros(real.shape).masked_fill_(~real, -1e30)  # added to keys' scores
    function = _KernelAttention if _kernel_supports(query, key, value) else _MatmulAttention
    return function.apply(query, key, value, padding, causal, scale, draw_mask(p))  # type: ignore[no-any-return,no-untyped-call]


def _kernel_supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel supports these: float32, a head width divisible by 16, the same for keys and values."""
    return (
        query.dtype == torch.float32
        and native.supports(query, columns=16)
        and query.shape[-1] == value.shape[-1]
        and all(states.stride(-1) == 1 for states in (query, key, value))
    )


class _KernelAttention(torch.autograd.Function):
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
        workspace = _workspace(length, width, backward=False)
        native.call("attention", query.dtype, query, key, value, padding, out, log_sums, workspace, sizes, *settings)
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
        tensors = query, key, value, padding, g, log_sums, dQ, dK, dV, _workspace(length, width, backward=True)
        native.call("attention_backward", g.dtype, *tensors, _sizes(query, key, value, g), *ctx.settings)
        shared = key.shape[1]
        if shared != heads:
            dK, dV = (each.view(batch, length, shared, -1, width).sum(3) for each in (dK, dV))
        return dQ.transpose(1, 2), dK.transpose(1, 2), dV.transpose(1, 2), *[None] * 4


def _sizes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The kernel's `Sizes`, for `out` (B, T, H, d)."""
    batch, length, heads, width = out.shape
    strides = *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], out.stride(0), out.stride(2), out.stride(1)
    return torch.tensor([batch, heads, key.shape[1], length, width, *strides])


def _workspace(length: int, width: int, *, backward: bool) -> torch.Tensor:
    """Scratch memory of the kernel, one row per thread."""
    loaded = native.library()
    assert loaded is not None
    return torch.empty(torch.get_num_threads(), loaded.attention_workspace(length, width, int(backward)))


class _MatmulAttention(torch.autograd.Function):
    """query (B, H, T, d), key and value (B, H / groups, T, d) -> (B, T, H, d), by matmuls of all heads at once."""

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
        K, V = _pad_keys(key), _pad_keys(value)
        out = query.new_empty(rows, length, heads, V.shape[-1]).transpose(1, 2)
        visible = _Visible(causal, padding, length)
        for block in _blocks(query, causal):
            Q = _stack_heads(query, K, block).mul_(scale)
            P = _probabilities(Q, K[:, : block.keys], block, visible)
            P = apply_mask(P, mask._replace(seed=mask.seed + block.start), mask.scale)
            _unstack_heads(torch.bmm(P, V[:, : block.keys]), out, block)
        ctx.save_for_backward(query, key, value, padding)
        ctx.settings = causal, scale, mask
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, padding = ctx.saved_tensors
        causal, scale, mask = ctx.settings
        K, V, g = _pad_keys(key), _pad_keys(value), g.transpose(1, 2)
        visible = _Visible(causal, padding, query.shape[2])
        dQ = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        blocks = _blocks(query, causal)
        sums = torch.float32 if len(blocks) > 1 else K.dtype
        dK, dV = torch.zeros_like(K, dtype=sums), torch.zeros_like(V, dtype=sums)
        for block in blocks:
            keys = block.keys
            Q = _stack_heads(query, K, block).mul_(scale)
            P = _probabilities(Q, K[:, :keys], block, visible)
            G = _stack_heads(g, K, block)
            block_mask = mask._replace(seed=mask.seed + block.start)
            dV[:, :keys] += torch.bmm(apply_mask(P, block_mask, mask.scale).mT, G)
            dP = apply_mask(torch.bmm(G, V[:, :keys].mT), block_mask, mask.scale)
            dS = _softmax_backward(dP, P)
            dK[:, :keys] += torch.bmm(dS.mT, Q)
            _unstack_heads(torch.bmm(dS, K[:, :keys]).mul_(scale), dQ, block)
        return dQ, _unpad_keys(dK, key), _unpad_keys(dV, value), *[None] * 4


class _Block(NamedTuple):
    """A block of queries, from `start` up to `stop`, which see at most the first `keys` keys."""

    start: int
    stop: int
    keys: int


class _Visible(NamedTuple):
    """Which of `length` keys a query sees: if `causal`, those up to itself. `padding` (B, T) is added to the scores."""

    causal: bool
    padding: torch.Tensor | None
    length: int


def _softmax_backward(g: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    """The gradient of the scores from g, that of the probabilities P (..., keys). May overwrite g."""
    if not native.supports(P):
        return softmax_backward(g, P)
    native.call("softmax_backward", P.dtype, P, g, P.numel() // P.shape[-1], P.shape[-1])
    return g


def _blocks(query: torch.Tensor, causal: bool) -> list[_Block]:
    """The blocks of queries (B, H, T, d)."""
    rows, heads, length, _ = query.shape
    size = max(KEY_MULTIPLE, ATTENTION_BLOCK // (rows * heads * length) // KEY_MULTIPLE * KEY_MULTIPLE)
    padded = -(-length // KEY_MULTIPLE) * KEY_MULTIPLE
    return [
        _Block(start, min(start + size, length), start + min(size, padded - start) if causal else padded)
        for start in range(0, length, size)
    ]


def _pad_keys(states: torch.Tensor) -> torch.Tensor:
    """Keys or values (B, H, T, d) -> (B H, T rounded up, d), zeros at the end."""
    rows, heads, length, width = states.shape
    padded = states.new_empty(rows, heads, -(-length // KEY_MULTIPLE) * KEY_MULTIPLE, width)
    padded[:, :, :length] = states
    padded[:, :, length:] = 0
    return padded.view(rows * heads, -1, width)


def _unpad_keys(gradient: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """(B H, T rounded up, d) -> the shape and dtype of `states` (B, H, T, d)."""
    rows, heads, length, width = states.shape
    return gradient.view(rows, heads, -1, width)[:, :, :length].to(states.dtype)


def _stack_heads(states: torch.Tensor, K: torch.Tensor, block: _Block) -> torch.Tensor:
    """A copy of the block's rows of (B, H, T, d), stacked by the keys they share: (len(K), -1, d)."""
    part = states[:, :, block.start : block.stop]
    return torch.empty_like(part, memory_format=torch.contiguous_format).copy_(part).view(len(K), -1, part.shape[-1])


def _unstack_heads(stacked: torch.Tensor, states: torch.Tensor, block: _Block) -> None:
    """Writes stacked rows back into (B, H, T, d)."""
    part = states[:, :, block.start : block.stop]
    part.copy_(stacked.view(part.shape))


def _probabilities(Q: torch.Tensor, K: torch.Tensor, block: _Block, visible: _Visible) -> torch.Tensor:
    """P of a block, (n, groups x block, keys), for scaled queries Q (n, groups x block, d) and keys K (n, keys, d)."""
    S = torch.bmm(Q, K.mT)
    causal, padding, length = visible
    queries, keys = block.stop - block.start, S.shape[-1]
    if native.supports(S):
        workspace, batch = torch.empty(torch.get_num_threads(), keys), 1 if padding is None else len(padding)
        shape = S.numel() // keys, keys, queries, block.start, length, int(causal), batch
        native.call("softmax", S.dtype, S, padding, workspace, *shape)
        return S
    if causal:
        future = torch.full((queries, keys - block.start), -torch.inf, dtype=S.dtype).triu_(1)
        S.view(-1, queries, keys)[:, :, block.start :] += future
    elif keys > length:
        S[:, :, length:] = -torch.inf
    if padding is not None:
        S.view(len(padding), -1, keys)[:, :, :length].add_(padding[:, None, :keys].to(S.dtype))
    return S.softmax(-1)
