"""Attention by blocks against torch's own: outputs, gradients, padding, groups of heads, neighbours."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hatrack.kernels import attention as room
from hatrack.kernels.attention import attention
from hatrack.kernels.dropout import Mask, apply_mask

pytestmark = pytest.mark.usefixtures("ways")


def _states(heads: int, kv_heads: int, length: int, dtype: torch.dtype, rows: int = 3) -> list[Any]:
    generator = torch.Generator().manual_seed(length * heads)
    return [
        torch.randn(rows, length, number, 16, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for number in (heads, kv_heads, kv_heads)
    ]


def _ours(states: list[Any], real: torch.Tensor | None, **options: Any) -> torch.Tensor:
    query, key, value = states
    return attention(query, key, value, real, **options)


def _stock(states: list[torch.Tensor], allowed: torch.Tensor) -> torch.Tensor:
    query, key, value = states
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed).transpose(1, 2)


@pytest.mark.parametrize("block", [0, 2**8, 2**22], ids=["kernel", "small blocks", "large blocks"])
@pytest.mark.parametrize("padded", ["whole", "right", "left"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(4, 4, 7), (6, 2, 33), (2, 1, 111), (3, 3, 1)])
def test_it_is_torchs_own(
    heads: int, kv_heads: int, length: int, causal: bool, padded: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block:
        monkeypatch.setattr(room, "ATTENTION_BLOCK", block)
        monkeypatch.setattr(room, "_kernel_supports", lambda *states: False)
    real = torch.ones(3, length, dtype=torch.bool)
    if padded != "whole" and length > 5:
        real[1, -4:] = False
        real[2, 5:] = False
        real = real.flip(1) if padded == "left" else real
    allowed = real[:, None, None, :].expand(3, 1, length, length)
    if causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
    results = []
    weights = torch.linspace(-1, 1, length * heads * 16).view(length, heads, 16)
    for ours in (True, False):
        states = _states(heads, kv_heads, length, torch.float32)
        if ours:
            out = _ours(states, None if padded == "whole" else real, causal=causal, scale=0.25)
        else:
            out = _stock(states, allowed)
        out = out * real[:, :, None, None]  # what padding answers is nobody's business
        (out * weights).sum().backward()  # type: ignore[no-untyped-call]
        results.append([out.detach(), *(state.grad for state in states)])
    for mine, torchs in zip(*results, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_is_as_near_as_bfloat16_goes(causal: bool) -> None:
    allowed = torch.ones(70, 70, dtype=torch.bool)
    exact = _stock(_states(4, 2, 70, torch.float32), allowed.tril() if causal else allowed)
    found = _ours(_states(4, 2, 70, torch.bfloat16), None, causal=causal, scale=0.25)
    assert float((found - exact).detach().norm()) < 0.01 * float(exact.detach().norm())


def test_a_row_does_not_see_its_neighbours() -> None:
    states = _states(4, 2, 20, torch.float32)
    order = [2, 0, 1]
    one = _ours(states, None, causal=True, scale=0.25)
    other = _ours([state[order] for state in states], None, causal=True, scale=0.25)
    torch.testing.assert_close(other, one[order])


def test_dropout_is_the_same_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Mask(0.4, 77)
    monkeypatch.setattr(room, "draw_mask", lambda p: mask)
    states = _states(2, 2, 32, torch.float32, rows=1)
    out = _ours(states, None, causal=False, scale=0.25, p=0.4)
    probabilities = (states[0] * 0.25 @ states[1].mT).softmax(-1)
    kept = apply_mask(torch.ones(2, 32, 32), mask, mask.scale)
    plain = (probabilities * kept @ states[2]).transpose(1, 2)
    torch.testing.assert_close(out, plain)
    g = torch.randn(out.shape)
    for mine, by_autograd in zip(
        torch.autograd.grad(out, states, g), torch.autograd.grad(plain, states, g), strict=True
    ):
        torch.testing.assert_close(mine, by_autograd)
