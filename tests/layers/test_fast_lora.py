"""The fast layer against its plain twin and against peft's own layer: outputs, gradients, and all it hands over."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftMixedModel, PeftModel
from peft import get_peft_model as stock_get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import hatrack
from hatrack.kernels.dropout import NO_DROPOUT, Mask
from hatrack.layers import fast_lora
from hatrack.layers.fast_lora import LAYER_CLASSES, FastLinear, Projection, fast_layer, project, reference
from tests.kernels.test_low_rank import kept

SHAPES = [(7, 16, 24), (33, 24, 8), (1, 32, 64), (65, 96, 32), (64, 48, 48)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def _inputs(n: int, d_in: int, d_out: int, r: int, dtype: torch.dtype, bias: bool) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(n + d_in)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, W = normal(n, d_in).to(dtype), (normal(d_out, d_in) / d_in**0.5).to(dtype)
    return [x, W, normal(d_out).to(dtype) if bias else None, normal(r, d_in) / d_in**0.5, normal(d_out, r)]


def _close(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    """Each pair of tensors differs by at most `tolerance` of the second's largest number."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        if other.numel():
            scale = other.float().abs().max().item() + 1e-6
            assert (one.float() - other.float()).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [4, 8, 24])
@pytest.mark.parametrize(("n", "d_in", "d_out"), SHAPES)
def test_it_is_its_plain_twin(
    n: int, d_in: int, d_out: int, r: int, bias: bool, dropout: float, dtype: torch.dtype
) -> None:
    results: list[list[Any]] = []
    mask = Mask(dropout, 11) if dropout else NO_DROPOUT
    for ours in (True, False):
        x, W, b, A, B = _inputs(n, d_in, d_out, r, dtype, bias)
        assert x is not None and W is not None and A is not None and B is not None
        leaves = [tensor.requires_grad_() for tensor in (x, A, B)]
        if ours:
            y = project(x, [Projection(W, b, A, B, 2.0, mask)])[0]
        else:
            y = reference(x, Projection(W, b, A, B, 2.0, mask), kept(n, d_in, mask, dtype) * mask.scale)
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()  # type: ignore[no-untyped-call]
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    _close(results[0], results[1], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_several_projections_of_one_input_are_their_plain_twins(dropout: float, dtype: torch.dtype) -> None:
    masks = [Mask(dropout, seed) if dropout else NO_DROPOUT for seed in (3, 4, 5)]
    results: list[list[Any]] = []
    for ours in (True, False):
        x = _inputs(33, 64, 32, 3, dtype, True)[0]
        assert x is not None
        parts: list[Any] = [_inputs(33, 64, width, 3, dtype, width == 32)[1:] for width in (32, 96, 40)]
        leaves = [tensor.requires_grad_() for tensor in (x, *(A for _, _, A, _ in parts), *(B for *_, B in parts))]
        projections = [Projection(W, b, A, B, 0.5, mask) for (W, b, A, B), mask in zip(parts, masks, strict=True)]
        if ours:
            ys = project(x, projections)
        else:
            kepts = [kept(33, 64, mask, dtype) * mask.scale for mask in masks]
            ys = tuple(reference(x, each, scales) for each, scales in zip(projections, kepts, strict=True))
        sum((y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in ys).backward()  # type: ignore[union-attr]
        results.append([*(y.detach() for y in ys), *(leaf.grad for leaf in leaves)])
    _close(results[0], results[1], TOLERANCE[dtype])


@pytest.mark.parametrize("frozen", ["x", "A", "B"])
def test_gradients_are_given_only_where_asked(frozen: str) -> None:
    x, W, b, A, B = _inputs(5, 8, 6, 2, torch.float32, True)
    tensors = {"x": x, "A": A, "B": B}
    for name, tensor in tensors.items():
        assert tensor is not None
        tensor.requires_grad_(name != frozen)
    assert x is not None and W is not None and A is not None and B is not None
    project(x, [Projection(W, b, A, B, 1.0, Mask(0.2, 3))])[0].sum().backward()  # type: ignore[no-untyped-call]
    assert {name for name, tensor in tensors.items() if tensor is not None and tensor.grad is None} == {frozen}


class _Stack(nn.Module):
    """Two layers that can carry an adapter, of torch's kind or GPT-2's, wide enough for the kernels."""

    def __init__(self, turned: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.up = Conv1D(64, 32) if turned else nn.Linear(32, 64, bias=bias)
        self.down = Conv1D(32, 64) if turned else nn.Linear(64, 32, bias=bias)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.down(nn.functional.silu(self.up(x)))  # type: ignore[no-any-return]


def _pair(turned: bool = False, base_bias: bool = True, **options: Any) -> tuple[PeftModel, PeftModel]:
    """The same small model with hatrack's layers and with peft's, with the same random adapter."""
    models = []
    for make in (hatrack.get_peft_model, stock_get_peft_model):
        torch.manual_seed(5)
        config = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "fan_in_fan_out": turned, **options}
        models.append(make(_Stack(turned, base_bias), LoraConfig(target_modules=["up", "down"], **config)))
    ours, stock = models
    stock.load_state_dict(ours.state_dict())
    layers = [type(module) for module in ours.modules() if hasattr(module, "lora_A")]
    assert layers == [FastLinear, FastLinear]
    return ours, stock


def _results(model: PeftModel, x: torch.Tensor, autocast: bool = False, **forward: Any) -> list[torch.Tensor]:
    """The output, the gradient of x, and those of all that is trained, in order; zeros where there is none."""
    model.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(x, **forward)
    if y.requires_grad:
        y.float().square().sum().backward()
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    return [y.detach(), *(torch.zeros(1) if leaf.grad is None else leaf.grad.clone() for leaf in leaves)]


def _same(ours: PeftModel, stock: PeftModel, **forward: Any) -> None:
    for x in (torch.randn(4, 32), torch.randn(2, 3, 32, requires_grad=True)):
        _close(_results(ours, x, **forward), _results(stock, x, **forward))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each forward pass of a fast layer, whether it took the fast path."""
    answers: list[bool] = []
    judge = FastLinear._plain_parts

    def note(layer: FastLinear, dtype: torch.dtype) -> Any:
        parts = judge(layer, dtype)
        answers.append(parts is not None)
        return parts

    monkeypatch.setattr(FastLinear, "_plain_parts", note)
    return answers


INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "a vector": lambda: torch.randn(32),
    "no rows": lambda: torch.randn(0, 32),
    "rows": lambda: torch.randn(5, 32),
    "rows with a gradient": lambda: torch.randn(5, 32, requires_grad=True),
    "batches": lambda: torch.randn(2, 7, 32, requires_grad=True),
    "turned": lambda: torch.randn(32, 6).t().requires_grad_(),
    "every second column": lambda: torch.randn(4, 64)[:, ::2].requires_grad_(),
    "one row many times": lambda: torch.randn(1, 32).expand(6, 32),
}


@pytest.mark.parametrize("trained_bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("base", ["linear", "linear without bias", "conv1d"])
@pytest.mark.parametrize("r", [1, 3, 8, 72])
def test_a_model_with_fast_layers_is_pefts(r: int, base: str, trained_bias: str, taken: list[bool]) -> None:
    ours, stock = _pair(base == "conv1d", base == "linear", r=r, bias=trained_bias)
    for make in INPUTS.values():
        x = make()
        _close(_results(ours, x), _results(stock, x))
    assert len(taken) == 2 * len(INPUTS) and all(taken)


@pytest.mark.parametrize("base", ["float32 under autocast", "bfloat16 under autocast", "bfloat16"])
@pytest.mark.parametrize("turned", [False, True], ids=["linear", "conv1d"])
def test_in_bfloat16_it_is_as_near_to_the_truth_as_pefts(turned: bool, base: str, taken: list[bool]) -> None:
    ours, stock = _pair(turned)
    autocast = "autocast" in base
    x = torch.randn(64, 32, requires_grad=True)
    truth = _results(stock, x)
    if base.startswith("bfloat16"):
        for model in (ours, stock):
            for layer in (model.base_model.model.up, model.base_model.model.down):
                layer.base_layer.to(torch.bfloat16)
    x = x if autocast else x.detach().bfloat16().requires_grad_()
    for one, other, true in zip(_results(ours, x, autocast), _results(stock, x, autocast), truth, strict=True):
        assert one.dtype == other.dtype
        # up to 2.5 times peft's error: where pairs of bfloat16 are multiplied at once, h is rounded to it as well
        assert (one - true).norm() <= 2.5 * (other - true).norm() <= 0.1 * true.norm()
    assert taken == [True, True]


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}, {"rank_pattern": {"up": 5}}], ids=str
)
def test_variants_give_what_peft_gives(options: dict[str, Any], taken: list[bool]) -> None:
    _same(*_pair(**options))
    assert set(taken) == {"use_rslora" in options or "rank_pattern" in options}


def test_what_it_does_not_handle_goes_to_peft(taken: list[bool]) -> None:
    x = torch.ones(3, 32, dtype=torch.float64)
    ours, stock = (model.double() for model in _pair())
    _close(_results(ours, x), _results(stock, x), 1e-12)
    ours, stock = _pair()
    for model in (ours, stock):
        model.base_model.model.up.base_layer.weight.requires_grad_(True)
        model.base_model.model.down.lora_dropout["default"] = nn.AlphaDropout(0.5).eval()
    _same(ours, stock)
    ours, stock = _pair(lora_dropout=1.0)
    _same(ours, stock)
    assert not any(taken)


def test_a_layer_of_another_method_stays_in_the_sum() -> None:
    """peft's mixed models put one method's layer around another's."""
    torch.manual_seed(5)
    model = PeftMixedModel(_Stack(), LoHaConfig(target_modules=["up"], init_weights=False), "loha")
    config = LoraConfig(target_modules=["up"], init_lora_weights=False)
    config._register_custom_module(dict(LAYER_CLASSES))
    x = torch.randn(3, 32)
    model.add_adapter("lora", config)
    outputs = []
    for active in (["loha"], ["lora"], ["loha", "lora"], []):
        model.set_adapter(active)
        outputs.append(model.base_model.model.up(x))
    loha, lora, both, none = outputs
    torch.testing.assert_close(both - none, (loha - none) + (lora - none), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both, lora, atol=1e-2)


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
def test_hooks_on_its_parts_still_run(part: str) -> None:
    ours, _ = _pair(lora_dropout=0.1)
    module = getattr(ours.base_model.model.up, part)
    seen = []
    (module if part == "base_layer" else module["default"]).register_forward_hook(lambda *args: seen.append(1))
    ours(torch.randn(2, 32))
    assert seen == [1]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_drop_the_same_numbers(reentrant: bool, autocast: bool) -> None:
    """Gradient checkpointing runs the forward pass twice; the masks must agree, so the gradients do."""
    ours, _ = _pair(lora_dropout=0.4)
    ours.train()

    def again(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(ours, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    results = []
    for forward in (ours, again):
        ours.zero_grad()
        torch.manual_seed(4)
        x = torch.ones(6, 32, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = forward(x)
        y.float().square().sum().backward()
        results.append([x.grad, *(p.grad.clone() for p in ours.parameters() if p.grad is not None)])
    assert len(results[0]) == 5
    for one, other in zip(*results, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_quantized_layers_are_left_to_peft() -> None:
    class Quantized(nn.Linear):
        pass

    config = LoraConfig(r=2)
    assert isinstance(fast_layer(nn.Linear(2, 2), "default", config, r=2, lora_alpha=2), FastLinear)
    assert fast_layer(Quantized(2, 2), "default", config, r=2, lora_alpha=2) is None


class _Heads(nn.Module):
    """Three layers of one input, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 64), nn.Linear(32, 32), nn.Linear(32, 64)
        self.out = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor, only: str = "qkv") -> torch.Tensor:
        states = [getattr(self, name)(x) for name in only]
        return self.out(sum(y if y.shape[-1] == 64 else torch.cat([y, y], -1) for y in states))  # type: ignore[no-any-return]


def _heads(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[PeftModel, PeftModel, list[int]]:
    """A model with layers of one input, with hatrack's layers and peft's, and how many projections each call made."""
    models = []
    for make in (hatrack.get_peft_model, stock_get_peft_model):
        torch.manual_seed(5)
        config = LoraConfig(r=4, target_modules=["q", "k", "v", "out"], init_lora_weights=False, **options)
        models.append(make(_Heads(), config))
    models[1].load_state_dict(models[0].state_dict())
    calls: list[int] = []

    def counted(x: torch.Tensor, projections: list[Projection]) -> tuple[torch.Tensor, ...]:
        calls.append(len(projections))
        return project(x, projections)

    monkeypatch.setattr(fast_lora, "project", counted)
    return models[0], models[1], calls


def test_layers_given_the_same_input_are_computed_together_from_the_second_time_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, stock, calls = _heads(monkeypatch)
    for expected in ([1, 1, 1, 1], [3, 1], [3, 1]):
        calls.clear()
        _same(ours, stock)
        assert calls == expected * 2 if expected == [3, 1] else calls[:4] == expected


def test_sharing_an_input_draws_the_masks_that_each_layer_alone_would(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, calls = _heads(monkeypatch, lora_dropout=0.4)
    x = torch.randn(9, 32, requires_grad=True)
    alone: list[torch.Tensor] = []
    together: list[torch.Tensor] = []
    for found in (alone, together):
        torch.manual_seed(2)
        found += _results(ours, x)
    assert calls == [1, 1, 1, 1, 3, 1]
    _close(together, alone)


def test_what_changed_in_between_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = _heads(monkeypatch)[0]
    q, k = ours.base_model.model.q, ours.base_model.model.k
    x = torch.randn(5, 32)
    ours(x.clone())
    with torch.no_grad():
        q(x)
        k.lora_B["default"].weight.mul_(2)
        changed = k(x)
        torch.testing.assert_close(changed, k(x.clone()))
        other = torch.randn(5, 32)
        q(other)
        other.mul_(3)
        torch.testing.assert_close(k(other), k(other.clone()))
    q(x)
    assert k(x).requires_grad


def test_what_nobody_asked_for_is_not_computed_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, calls = _heads(monkeypatch)
    for only in ("qkv", "q", "q", "qkv", "qkv"):
        ours(torch.randn(5, 32), only=only)
    assert calls == [1, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1, 3, 1]


def test_layers_of_other_ranks_or_adapters_are_computed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stock, calls = _heads(monkeypatch, rank_pattern={"k": 6})
    _same(ours, stock)
    calls.clear()
    ours(torch.randn(3, 32))
    assert calls == [2, 1, 1]
    for model in (ours, stock):
        torch.manual_seed(1)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False))
        model.set_adapter("second")
    _same(ours, stock)
