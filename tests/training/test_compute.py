"""`--compute`: products rounded while a model trains, exact while it is scored, and refused where they cannot be."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hatrack
from hatrack.errors import RecipeError
from hatrack.evaluate.loss import losses
from hatrack.kernels import int8
from hatrack.kernels.frozen_linear import FrozenLinear, linear
from hatrack.layers.fast_base import speed_up
from hatrack.recipe import Recipe
from tests.training.stopping import stopped_at_five
from tests.training.test_layer_streaming import too_large

RUN: dict[str, Any] = {"epochs": 2, "lr": 5e-3, "batch_size": 32, "max_length": 32, "seed": 3}
ERRORS = {"int16": 5e-3, "int8": 0.4}
"""Errors of a whole model's gradients that roundings of 2e-4 and 1e-2 may add up to."""

QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

needs_integers = pytest.mark.skipif(not int8.is_available(), reason="needs AVX2 and a compiler")


def _llama() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=97))


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=97, **QUIET))


def _adapted(make: Any, compute: str, *, after: bool = False) -> Any:
    """A model with adapters on all its layers whose two factors count; `after`: they are placed before the speed-up."""
    torch.manual_seed(1)
    base = make().requires_grad_(False)
    names = ["c_attn", "c_fc", "c_proj"] if make is _gpt2 else "all-linear"
    config = LoraConfig(r=4, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")
    if not after:
        speed_up(base, compute=compute)
    model = hatrack.get_peft_model(base, config)
    if after:
        speed_up(base, compute=compute)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 97, (4, 40), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _gradients(model: Any) -> torch.Tensor:
    losses(model, _batch(), "chat")[0].mean().backward()  # type: ignore[no-untyped-call]
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


@needs_integers
@pytest.mark.parametrize("compute", list(int8.BITS))
@pytest.mark.parametrize("make", [_llama, _gpt2])
@pytest.mark.parametrize("after", [False, True])
def test_training_is_rounded_and_scoring_exact(make: Any, compute: str, after: bool) -> None:
    exact, rounded = _adapted(make, "auto"), _adapted(make, compute, after=after)
    wanted, found = _gradients(exact), _gradients(rounded)
    error = float((found - wanted).norm() / wanted.norm())
    assert 1e-6 < error < ERRORS[compute]
    with torch.no_grad():
        assert torch.equal(losses(exact.eval(), _batch(), "chat")[0], losses(rounded.eval(), _batch(), "chat")[0])


@needs_integers
def test_a_finer_rounding_is_closer() -> None:
    wanted = _gradients(_adapted(_llama, "auto"))
    coarse, fine = (float((_gradients(_adapted(_llama, each)) - wanted).norm()) for each in ("int8", "int16"))
    assert fine * 10 < coarse


@needs_integers
def test_what_is_trained_after_all_is_exact_and_has_gradients() -> None:
    base = nn.Sequential(nn.Linear(64, 64))
    frozen = copy.deepcopy(base).requires_grad_(False)
    speed_up(_as_model(frozen), compute="int8")
    layer = copy.deepcopy(frozen[0])  # as peft copies a head that is to be trained
    assert type(layer) is FrozenLinear
    layer.requires_grad_(True).train()
    x = torch.randn(80, 64)
    assert torch.equal(layer(x), base[0](x))
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None


def _as_model(module: Any) -> Any:
    """A module with what `speed_up` asks a model for."""
    module.device, module.dtype = torch.device("cpu"), torch.float32
    module.config = type("Config", (), {"_attn_implementation": "eager"})()
    return module


@needs_integers
def test_under_autocast_torch_computes() -> None:
    layer = nn.Linear(64, 64).requires_grad_(False)
    plain = copy.deepcopy(layer)
    speed_up(_as_model(nn.Sequential(layer)), compute="int8")
    x = torch.randn(80, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.train()(x), plain(x)) and layer(x).dtype == torch.bfloat16


@needs_integers
def test_few_rows_and_other_formats_are_exact() -> None:
    W = torch.randn(64, 64)
    few, many = torch.randn(8, 64), torch.randn(100, 64)
    assert torch.equal(linear(few, W, None, "int8"), linear(few, W, None))
    assert torch.equal(linear(many.bfloat16(), W.bfloat16(), None, "int8"), linear(many.bfloat16(), W.bfloat16(), None))
    assert not torch.equal(linear(many, W, None, "int8"), linear(many, W, None))


@needs_integers
def test_a_matrix_in_bfloat16_is_rounded_like_its_wide_copy() -> None:
    W, x = torch.randn(300, 200).bfloat16(), torch.randn(100, 200)
    assert torch.equal(linear(x, W, None, "int16"), linear(x, W.float(), None, "int16"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compute": "int8", "dtype": "bfloat16"}, "--compute int8 goes with float32; got --dtype bfloat16"),
        ({"compute": "int16", "quantize": "8bit"}, "--compute int16 and --quantize 8bit exclude each other"),
        ({"compute": "int4"}, "--compute"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.make(**options)


def test_all_else_is_float32() -> None:
    recipe = Recipe.make(compute="int8")
    assert recipe.dtype == "float32" and recipe.changed(r=4).dtype == "float32"
    assert Recipe.make().dtype == "auto"


def test_an_unknown_rounding_is_refused() -> None:
    with pytest.raises(RecipeError, match="compute: invalid value int7"):
        speed_up(_as_model(nn.Sequential()), compute="int7")


@needs_integers
def test_a_base_in_another_format_is_refused() -> None:
    base: Any = LlamaForCausalLM(_llama().config).to(torch.bfloat16)
    with pytest.raises(RecipeError, match="--compute int8 is for a base in float32; got bfloat16"):
        speed_up(base, compute="int8")


def test_without_the_kernels_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="--compute int8 is for CPUs with AVX2"):
        speed_up(_as_model(nn.Sequential()), compute="int8")


def test_a_processor_without_avx2_is_refused_before_anything_is_loaded(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hatrack.cpu.features", lambda: frozenset({"sse4_2"}))
    with pytest.raises(RecipeError, match="--compute int8 is for CPUs with AVX2"):
        train("old", compute="int8")
    assert not (tmp_path / "old").exists()


def test_a_run_without_the_kernels_is_refused_before_anything_is_loaded(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hatrack.cpu.features", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(int8, "is_available", lambda: False)
    monkeypatch.setattr("hatrack.training.load.load_base", lambda *_, **__: pytest.fail("a base was loaded"))
    with pytest.raises(RecipeError, match="--compute int8 is for CPUs with AVX2 and hatrack's compiled kernels"):
        train("old", compute="int8")
    assert not (tmp_path / "old").exists()


@needs_integers
@pytest.mark.parametrize("task", ["classify", "chat"])
def test_a_run_learns_and_is_what_its_score_says(train: Any, tmp_path: Path, task: str) -> None:
    hat = train("rounded", task, compute="int8")
    exact = train("exact", task)
    assert hat.result["eval"]["loss"] < hat.result["before"]["loss"]
    assert hat.result["eval"]["loss"] == pytest.approx(exact.result["eval"]["loss"], rel=0.1)
    assert hat.result["eval"]["loss"] != exact.result["eval"]["loss"]
    assert json.loads((tmp_path / "rounded" / "hatrack.json").read_text())["recipe"]["compute"] == "int8"
    again = hatrack.load(tmp_path / "rounded")  # proves it: nothing of the rounding is in what loads
    assert again.quantize == "none"


@needs_integers
def test_a_swept_run_is_rounded_like_an_ordinary_one(tmp_path: Path, half_decoder: Path, questions: Path) -> None:
    """A sum in another order may round to the next integer, so they are near, not equal."""
    run = RUN | {"base": str(half_decoder), "data": str(questions), "compute": "int16"}
    plain = hatrack.train(output=str(tmp_path / "plain"), name="plain", **run)
    with too_large():
        streamed = hatrack.train(output=str(tmp_path / "streamed"), name="streamed", **run)
    assert streamed.base.streamed and not plain.base.streamed
    assert streamed.result["eval"] == pytest.approx(plain.result["eval"], rel=1e-3)
    exact = hatrack.train(output=str(tmp_path / "exact"), name="exact", **run | {"compute": "auto"})
    losses_of = [each.result["train_loss"] for each in (plain, streamed, exact)]
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-4) and losses_of[0] != losses_of[2]


@needs_integers
def test_a_base_in_four_bits_is_rounded_too() -> None:
    bitsandbytes: Any = pytest.importorskip("bitsandbytes")
    shape: dict[str, Any] = {"compute_dtype": torch.float32, "compress_statistics": False, "quant_type": "nf4"}
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=True, **shape).requires_grad_(False).to("cpu")
    x = torch.randn(80, 128)
    wanted = layer(x)
    speed_up(_as_model(nn.Sequential(layer)), compute="int16")
    error = float((layer.train()(x) - wanted).norm() / wanted.norm())
    assert 1e-6 < error < 1e-3
    assert float((layer.eval()(x) - wanted).norm() / wanted.norm()) < 1e-6


@needs_integers
def test_a_stopped_run_goes_on_rounding(train: Any, tmp_path: Path) -> None:
    train("straight", compute="int8", batch_size=8)
    with stopped_at_five():
        train("stopped", compute="int8", batch_size=8)
    hatrack.train(output=str(tmp_path / "stopped"), name="stopped", resume=True)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)
