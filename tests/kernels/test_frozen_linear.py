"""Products with matrices kept in other formats, against products with a copy in their own format."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hatrack.errors import ModelError
from hatrack.kernels import frozen_linear
from hatrack.kernels.frozen_linear import FrozenLinear, linear, matmul, matmul_backward, prevent_repacking

BOUND = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows at a time, the fewest."""
    monkeypatch.setattr(frozen_linear, "WEIGHT_CHUNK", 1)


def _near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert float((found.double() - wanted.double()).norm()) <= BOUND[found.dtype] * float(wanted.double().norm())


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) * shape[0])).to(dtype)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d_out", [7, 64, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_a_copy(
    kept: torch.dtype, dtype: torch.dtype, d_out: int, bias: bool
) -> None:
    W, b = _random(d_out, 96, dtype=kept), _random(d_out, dtype=kept) if bias else None
    results = []
    for product in (
        lambda x: linear(x, W, b),
        lambda x: F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype)),
    ):
        x = _random(2, 5, 96, dtype=dtype).requires_grad_()
        y = product(x)  # type: ignore[no-untyped-call]
        torch.autograd.backward(y, _random(2, 5, d_out, dtype=dtype))
        results.append((y.detach(), x.grad))
    for one, other in zip(*results, strict=True):
        assert one is not None and other is not None
        _near(one, other)


def test_a_gradient_is_added_to_the_one_given() -> None:
    g, W, given = _random(5, 100), _random(100, 32, dtype=torch.bfloat16), _random(5, 32)
    kept = given.clone()
    assert matmul_backward(g, W, add_to=kept) is kept
    _near(kept, given + g @ W.float())


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["added", "alone"])
def test_rows_without_a_gradient_are_left_out(kept: torch.dtype, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    g, W = _random(40, 100), _random(100, 32, dtype=kept)
    g[torch.arange(40) % 4 > 0] = 0
    g[:, 0] = 0  # a row is not told by its first number alone
    g_x = _random(40, 32)
    wanted = g @ W.float() + (g_x if given else 0)
    multiplied: list[int] = []

    def noted(name: str, of: int) -> Callable[..., torch.Tensor]:
        product = getattr(torch.Tensor, name)

        def note(*matrices: torch.Tensor) -> Any:
            multiplied.append(len(matrices[of]))
            return product(*matrices)

        return note

    monkeypatch.setattr(torch.Tensor, "__matmul__", noted("__matmul__", 0))
    monkeypatch.setattr(torch.Tensor, "addmm_", noted("addmm_", 1))
    plain = frozen_linear._multiply

    def noted_part(g: torch.Tensor, *others: Any, **how: Any) -> None:
        multiplied.append(len(g))
        plain(g, *others, **how)

    monkeypatch.setattr(frozen_linear, "_multiply", noted_part)
    found = matmul_backward(g, W, add_to=g_x if given else None)
    assert set(multiplied) == {10}
    _near(found, wanted)


def test_nothing_is_left_out_of_a_gradient_that_is_not_a_number() -> None:
    g, W = torch.zeros(8, 64), _random(64, 32)
    g[5, 3] = torch.nan
    found = matmul_backward(g, W)
    assert found[5].isnan().all() and not found[:5].any()


def test_a_gradient_without_any_rows_is_zero() -> None:
    assert not matmul_backward(torch.zeros(8, 64), _random(64, 32)).any()


def test_rows_of_a_turned_matrix_are_taken() -> None:
    x, W = _random(3, 32), _random(32, 150, dtype=torch.bfloat16).t()
    _near(matmul(x, W, None), x @ W.float().t())


def test_a_layer_takes_inputs_of_any_format() -> None:
    layer = torch.nn.Linear(32, 70, dtype=torch.bfloat16).requires_grad_(False)
    x = _random(4, 32)
    wanted = F.linear(x, layer.weight.float(), layer.bias.float())
    layer.__class__ = FrozenLinear
    _near(layer(x), wanted)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_matrix_in_four_bits_is_unpacked_a_few_rows_at_a_time(kind: str, dtype: torch.dtype) -> None:
    bitsandbytes: Any = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(
        128, 200, bias=False, compute_dtype=dtype, compress_statistics=False, quant_type=kind
    )
    layer = layer.to("cpu").requires_grad_(False)
    assert frozen_linear.can_unpack(layer.weight)
    whole = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    x = _random(2, 5, 128, dtype=dtype).requires_grad_()
    y = linear(x, layer.weight, None)
    g = _random(2, 5, 200, dtype=dtype)
    torch.autograd.backward(y, g)
    _near(y.detach(), x.detach() @ whole.t())
    assert x.grad is not None
    _near(x.grad, g @ whole)


def _in_four_bits(d_in: int, d_out: int) -> Any:
    bitsandbytes: Any = pytest.importorskip("bitsandbytes")
    shape: dict[str, Any] = {"compute_dtype": torch.float32, "compress_statistics": False, "quant_type": "nf4"}
    layer = bitsandbytes.nn.Linear4bit(d_in, d_out, bias=False, **shape).requires_grad_(False).to("cpu")
    layer.support_avx512bf16_for_cpu = True
    return layer


def _repack(layer: Any, *, back_again: bool) -> None:
    """What bitsandbytes does on a CPU with AVX512-BF16 when a layer is evaluated, and when it is saved after that."""
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    layer.weight.data, _ = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    if back_again:
        layer.state_dict()


@pytest.mark.parametrize("back_again", [False, True])
@pytest.mark.parametrize("d_in", [64, 128])
def test_a_matrix_that_was_repacked_is_never_read(d_in: int, back_again: bool) -> None:
    layer = _in_four_bits(d_in, 64)
    x, g = _random(4, d_in), _random(4, 64)
    prevent_repacking(layer)
    assert frozen_linear.can_unpack(layer.weight)
    layer.support_avx512bf16_for_cpu = True
    _repack(layer, back_again=back_again)
    assert not frozen_linear.can_unpack(layer.weight)
    with pytest.raises(ModelError, match=r"was repacked by bitsandbytes.*load the base again"):
        matmul(x, layer.weight, None)
    with pytest.raises(ModelError, match=r"was repacked by bitsandbytes"):
        matmul_backward(g, layer.weight)
    with pytest.raises(ModelError, match=r"was repacked.*got 1;"):
        prevent_repacking(torch.nn.Sequential(torch.nn.ReLU(), layer))


def test_a_matrix_stays_as_it_is_from_then_on() -> None:
    layer = _in_four_bits(128, 64)
    kept, x = layer.weight.data.clone(), _random(4, 128)
    prevent_repacking(layer)
    wanted = matmul(x, layer.weight, None)
    with torch.no_grad():
        found = layer.eval()(x)
    layer.state_dict()
    assert torch.equal(layer.weight.data, kept)
    _near(found, wanted)
    _near(matmul(x, layer.weight, None), wanted)
