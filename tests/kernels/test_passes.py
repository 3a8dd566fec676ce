"""The kernels that are one pass: RMSNorm, dropout as a layer, the loss; each against torch, and each left to torch."""

import pytest
import torch
from torch.nn import functional as F

from hatrack.kernels.dropout import dropout
from hatrack.kernels.gelu import gelu_tanh
from hatrack.kernels.loss import next_token_losses
from hatrack.kernels.norm import rms_norm

pytestmark = pytest.mark.usefixtures("ways")
BOUND = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 32), (7, 64), (2, 5, 576), (0, 32), (3, 48)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w, g = torch.randn(shape).to(dtype) * 3, torch.randn(shape[-1]), torch.randn(shape).to(dtype)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y = rms_norm(ours, w, 1e-5)
    wanted = F.rms_norm(exact, w.shape, w.double(), 1e-5)
    y.backward(g)  # type: ignore[no-untyped-call]
    wanted.backward(g.double())  # type: ignore[no-untyped-call]
    assert y.dtype == dtype and ours.grad is not None and exact.grad is not None
    assert float((y - wanted).detach().norm()) <= BOUND[dtype] * float(wanted.detach().norm())
    assert float((ours.grad - exact.grad).norm()) <= BOUND[dtype] * float(exact.grad.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 64), (2, 5, 576), (0, 32), (3, 17)])
def test_gelu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, g = (torch.randn(shape) * 3).to(dtype), torch.randn(shape).to(dtype)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, wanted = gelu_tanh(ours), F.gelu(exact, approximate="tanh")
    y.backward(g)  # type: ignore[no-untyped-call]
    wanted.backward(g.double())  # type: ignore[no-untyped-call]
    assert y.dtype == dtype and ours.grad is not None and exact.grad is not None
    assert float((y - wanted).detach().norm()) <= BOUND[dtype] * float(wanted.detach().norm())
    assert float((ours.grad - exact.grad).norm()) <= BOUND[dtype] * float(exact.grad.norm())


def test_gelu_of_the_largest_and_of_no_number() -> None:
    x = torch.tensor([-1e30, -1e4, -30.0, 0.0, 30.0, 1e4, 1e30, torch.nan, torch.inf]).repeat(32)
    x = x.requires_grad_()
    y = gelu_tanh(x)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    wanted = torch.tensor([0.0, 0.0, 0.0, 0.0, 30.0, 1e4, 1e30, torch.nan, torch.inf]).repeat(32)
    torch.testing.assert_close(y.detach(), wanted, equal_nan=True, rtol=1e-6, atol=1e-6)
    assert x.grad[7].isnan() and x.grad[[1, 2, 3, 4, 5]].tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40, 64), (4, 10, 96), (30, 17)])
def test_dropout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.25)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and torch.equal(x.grad, y.detach())
    kept = y.detach() != 0
    assert 0.6 < float(kept.float().mean()) < 0.9
    torch.testing.assert_close(y.detach()[kept].float(), torch.full((int(kept.sum()),), 1 / 0.75), rtol=4e-3, atol=0)
    assert not torch.equal(y, dropout(x, 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", [16, 33, 1007])
def test_loss_of_logits(words: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = (torch.randn(9, words) * 20).to(dtype)
    wanted = torch.randint(words, (9,))
    ours, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    values = next_token_losses(ours, None, None, wanted)
    plain = F.cross_entropy(exact, wanted, reduction="none")
    values.sum().backward()  # type: ignore[no-untyped-call]
    plain.sum().backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None and exact.grad is not None
    torch.testing.assert_close(values.double(), plain, rtol=1e-6, atol=1e-5)
    assert float((ours.grad - exact.grad).norm()) <= BOUND[dtype] * float(exact.grad.norm())
    assert torch.equal(ours.detach(), z), "logits are the caller's"
