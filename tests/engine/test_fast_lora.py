"""The fast layer against its plain twin and against peft's own layer: outputs, gradients, and all it hands over."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as stock_get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hatrack
from hatrack.engine.fast_lora import FastLinear, PlainLinear, _LoraProduct, reference
from hatrack.kernels.drop import KEEP, Mask
from tests.kernels.test_low_rank import kept

SHAPES = [(7, 16, 24), (33, 24, 8), (1, 32, 64), (65, 96, 32), (64, 48, 48)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def _inputs(n: int, d_in: int, d_out: int, r: int, dtype: torch.dtype, bias: bool) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(n + d_in)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, W = normal(n, d_in).to(dtype), (normal(d_out, d_in) / d_in**0.5).to(dtype)
    return [x, W, normal(d_out).to(dtype) if bias else None, normal(r, d_in) / d_in**0.5, normal(d_out, r)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [4, 8, 24])
@pytest.mark.parametrize(("n", "d_in", "d_out"), SHAPES)
def test_it_is_its_plain_twin(
    n: int, d_in: int, d_out: int, r: int, bias: bool, dropout: float, dtype: torch.dtype
) -> None:
    results = []
    mask = Mask(dropout, 11) if dropout else KEEP
    for function, last in ((_LoraProduct.apply, mask), (reference, kept(n, d_in, mask, dtype) * mask.scale)):
        x, W, b, A, B = _inputs(n, d_in, d_out, r, dtype, bias)
        assert x is not None and W is not None and A is not None and B is not None
        leaves = [tensor.requires_grad_() for tensor in (x, A, B)]
        y = function(x, W, b, A, B, 2.0, last)  # type: ignore[arg-type]
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        scale = plain.float().abs().max().item() + 1e-6
        assert (ours.float() - plain.float()).abs().max().item() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("frozen", ["x", "A", "B"])
def test_gradients_are_given_only_where_asked(frozen: str) -> None:
    x, W, b, A, B = _inputs(5, 8, 6, 2, torch.float32, True)
    tensors = {"x": x, "A": A, "B": B}
    for name, tensor in tensors.items():
        assert tensor is not None
        tensor.requires_grad_(name != frozen)
    _LoraProduct.apply(x, W, b, A, B, 1.0, Mask(0.2, 3)).sum().backward()  # type: ignore[no-untyped-call]
    assert {name for name, tensor in tensors.items() if tensor is not None and tensor.grad is None} == {frozen}


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def _pair(**options: Any) -> tuple[PeftModel, PeftModel]:
    """The same small model with hatrack's layers and with peft's, with the same random adapter."""
    models = []
    for make in (hatrack.get_peft_model, stock_get_peft_model):
        torch.manual_seed(5)
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["up", "down"], init_lora_weights=False, **options)
        models.append(make(_Stack(), config))
    ours, stock = models
    stock.load_state_dict(ours.state_dict())
    layers = [type(module) for module in ours.modules() if hasattr(module, "lora_A")]
    assert layers == [FastLinear, FastLinear]
    return ours, stock


def _same(ours: PeftModel, stock: PeftModel, **forward: Any) -> None:
    for shape in ((4, 12), (2, 3, 12)):
        x = torch.randn(*shape)
        outputs = []
        for model in (ours, stock):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            y = model(leaf, **forward)
            if y.requires_grad:
                y.square().sum().backward()
            grads = [
                p.grad.clone() if p.grad is not None else torch.zeros(1) for p in model.parameters() if p.requires_grad
            ]
            outputs.append([y.detach(), leaf.grad if leaf.grad is not None else torch.zeros(1), *grads])
        for one, other in zip(*outputs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_model_with_fast_layers_is_pefts() -> None:
    ours, stock = _pair()
    _same(ours, stock)
    x = torch.randn(12, 6).t()  # not contiguous
    torch.testing.assert_close(ours(x), stock(x))
    assert ours(torch.randn(0, 12)).shape == (0, 12)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_variants_give_what_peft_gives(options: dict[str, bool]) -> None:
    _same(*_pair(**options))


def test_merging_disabling_switching_and_mixing_give_what_peft_gives() -> None:
    ours, stock = _pair()
    for model in (ours, stock):
        torch.manual_seed(9)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    stock.load_state_dict(ours.state_dict())
    with ours.disable_adapter(), stock.disable_adapter():
        _same(ours, stock)
    for model in (ours, stock):
        model.set_adapter("second")
    _same(ours, stock)
    for model in (ours, stock):
        model.base_model.set_adapter(["default", "second"])
    _same(ours, stock)
    for model in (ours, stock):
        model.set_adapter("default")
        model.eval()
    x = torch.randn(3, 12)
    names = ["default", "second", "__base__"]
    torch.testing.assert_close(ours(x, adapter_names=names), stock(x, adapter_names=names))
    before = ours(x)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-5)


def test_autocast_gives_what_peft_gives() -> None:
    ours, stock = _pair()
    x = torch.randn(4, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ours(x), stock(x))


def test_hooks_on_the_base_layer_still_run() -> None:
    ours, _ = _pair()
    seen = []
    ours.base_model.model.up.base_layer.register_forward_hook(lambda *args: seen.append(1))
    ours(torch.randn(2, 12))
    assert seen == [1]


def test_recomputed_layers_drop_the_same_numbers() -> None:
    """Gradient checkpointing runs the forward pass twice; the masks must agree, so the gradients do."""
    ours, _ = _pair(lora_dropout=0.4)
    ours.train()
    gradients = []
    for recompute in (False, True):
        ours.zero_grad()
        torch.manual_seed(4)
        x = torch.ones(6, 12, requires_grad=True)
        y = checkpoint(ours, x, use_reentrant=False) if recompute else ours(x)
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    assert len(gradients[0]) == 4
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_it_works_in_a_plain_trainer(tiny_decoder: Path, tmp_path: Path) -> None:
    model = hatrack.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.float32),
        LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]}] * 32
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        learning_rate=0.05,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < before - 0.2


def test_quantised_layers_are_left_to_peft() -> None:
    class Quantised(nn.Linear):
        pass

    assert isinstance(nn.Linear(2, 2), PlainLinear) and not isinstance(Quantised(2, 2), PlainLinear)
