"""On an accelerator: the same numbers as the stock ones, and runs that end as those on a processor do.

python -m pytest -m gpu tests/training/test_gpu.py
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft import get_peft_model as stock_get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hatrack
from hatrack.base.layer_stack import find_layer_stack
from hatrack.base.offload import move_all_but_layers, open_layers
from hatrack.check.checks import check_recipe
from hatrack.evaluate.loss import losses
from hatrack.kernels.dropout import NO_DROPOUT, Mask, apply_mask
from hatrack.kernels.loss import next_token_losses
from hatrack.layers.fast_base import FastRMSNorm, speed_up
from hatrack.layers.fast_lora import FastLinear, Projection, project, reference
from hatrack.recipe import Recipe
from hatrack.training.layer_streaming import LayerInputs, LayerStreaming
from hatrack.training.one_step import one_step
from tests.training.stopping import stopped_at_five
from tests.training.test_layer_streaming import _same_adapter, too_large

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
GPU = torch.device("cuda", 0)
WIDTH = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def _llama(layers: int = 3, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1000, num_hidden_layers=layers, pad_token_id=0, **(WIDTH | more))
    model = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5)
    return model


def _batch(rows: int = 3, length: int = 40, device: torch.device = GPU) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 1000, (rows, length), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[1, length - 9 :] = 0
    labels = ids.masked_fill(real == 0, -100)
    labels[1, length - 10] = -100  # turned round it comes first, and would be told by the state of padding
    return {k: v.to(device) for k, v in {"input_ids": ids, "attention_mask": real, "labels": labels}.items()}


def _near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape and bool(ours.isfinite().all())
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_fast_layer_is_its_plain_twin(p: float, dtype: torch.dtype) -> None:
    masks, found = [Mask(p, seed) for seed in (3, 4)], []
    for ours in (True, False):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(70, 64, generator=generator).to(GPU, dtype).requires_grad_()
        parts = []
        for width in (96, 32):
            W, A, B = (torch.randn(shape, generator=generator) / 8 for shape in ((width, 64), (4, 64), (width, 4)))
            parts.append((W.to(GPU, dtype), None, A.to(GPU).requires_grad_(), B.to(GPU).requires_grad_()))
        if ours:
            ys = project(x, [Projection(*part, 2.0, mask) for part, mask in zip(parts, masks, strict=True)])
        else:
            ones = torch.ones(70, 64, device=GPU, dtype=dtype)
            kept = [apply_mask(ones, mask) * mask.scale for mask in masks]
            ys = tuple(
                reference(x, Projection(*part, 2.0, NO_DROPOUT), each) for part, each in zip(parts, kept, strict=True)
            )
        sum((y.float() * torch.linspace(-1, 1, y.numel(), device=GPU).view_as(y)).sum() for y in ys).backward()  # type: ignore[union-attr]
        found.append([*ys, x.grad, *(tensor.grad for part in parts for tensor in part[2:])])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None
        _near(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_is_drawn_on_the_device_and_the_same_for_a_seed(p: float) -> None:
    ones = torch.ones(1000, 1000, device=GPU, dtype=torch.bfloat16)
    masks = [apply_mask(ones, Mask(p, seed)) == 0 for seed in (1, 2)]
    assert torch.equal(masks[0], apply_mask(ones, Mask(p, 1)) == 0)
    for mask in masks:
        assert abs(float(mask.float().mean()) - p) < 5e-3
    assert abs(float((masks[0] & masks[1]).float().mean()) - p * p) < 5e-3


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_loss_is_the_stock_one(dtype: torch.dtype) -> None:
    states = torch.randn(300, 64, device=GPU).to(dtype).requires_grad_()
    W, wanted = torch.randn(1000, 64, device=GPU).to(dtype) / 4, torch.randint(1000, (300,), device=GPU)
    found = next_token_losses(states, W, None, wanted)
    (ours,) = torch.autograd.grad(found.mean(), states)
    plain = nn.functional.cross_entropy((states @ W.t()).float(), wanted, reduction="none")
    (theirs,) = torch.autograd.grad(plain.mean(), states)
    _near(found, plain, TOLERANCE[dtype])
    _near(ours, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sped_up_on", ["cuda", "cpu"])
def test_a_step_is_pefts_own(dtype: torch.dtype, sped_up_on: str) -> None:
    """Adapted, padded on the right and on the left; also where the base was made fast before it came to the GPU."""
    found = []
    for ours in (True, False):
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        base = _llama(dtype=dtype).to(sped_up_on)
        if ours:
            speed_up(base)
            assert sum(isinstance(layer, FastRMSNorm) for layer in base.modules()) == 7
        torch.manual_seed(2)
        model = (hatrack.get_peft_model if ours else stock_get_peft_model)(base, config).to(GPU).train()
        assert any(isinstance(layer, FastLinear) for layer in model.modules()) is ours
        total = torch.zeros((), device=GPU)
        for batch in (_batch(), {name: tensor.flip(1) for name, tensor in _batch().items()}):
            if ours:
                total = total + losses(model, batch, "chat")[0].mean()
            else:
                with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                    total = total + model(**batch).loss
        total.backward()  # type: ignore[no-untyped-call]
        found.append([total.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None
        _near(one, other, {torch.float32: 1e-4, torch.bfloat16: 8e-2}[dtype])


@pytest.mark.parametrize("stored", TOLERANCE, ids=str)
@pytest.mark.parametrize("budget", [0, 2**27])
def test_a_sweep_gives_the_gradients_of_the_ordinary_step(tmp_path: Path, stored: torch.dtype, budget: int) -> None:
    """Dropout included, with a base that is stored in the products' format or in another."""
    folder, found = tmp_path / "base", []
    _llama(layers=5, dtype=stored).save_pretrained(folder)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2, task_type="CAUSAL_LM")
    batches = [_batch(), _batch(2, 25), _batch(2, 31)]
    for streamed in (True, False):
        base = LlamaForCausalLM.from_pretrained(folder, dtype=stored if streamed else torch.float32).requires_grad_(
            False
        )
        trunk = find_layer_stack(base)
        if streamed:
            move_all_but_layers(base, trunk, torch.float32, GPU)
        else:
            base.to(GPU)
        speed_up(base)
        torch.manual_seed(2)
        model = hatrack.get_peft_model(base, config)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
                weight.data = (noise / 16).to(GPU)
        model.train()

        def loss_of(batch: dict[str, torch.Tensor], model: Any = model) -> torch.Tensor:
            return losses(model, batch, "chat")[0].sum() / 50

        if streamed:
            window = open_layers(base, trunk, torch.float32, folder, GPU)
            streaming = LayerStreaming(model, window, "chat", LayerInputs(tmp_path, budget))
            total = streaming.step(batches, [0, 1, 2], loss_of)
        else:
            total = torch.zeros((), device=GPU)
            for seed, batch in enumerate(batches):
                torch.manual_seed(seed)
                loss = loss_of(batch)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        found.append([total, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None
        _near(one, other, 1e-4)


RUN: dict[str, Any] = {"device": "cuda", "lr": 0.02, "batch_size": 8, "epochs": 3}


@pytest.mark.parametrize("task", ["classify", "chat"])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float32"}, {"layers": "top-1"}, {"variant": "dora"}, {"quantize": "8bit"}, {"quantize": "4bit"}],
    ids=str,
)
def test_a_run_learns_and_is_proven(train: Any, task: str, options: dict[str, Any]) -> None:
    hat = train("hat", task, **options)
    assert hat.base.device.type == "cuda"
    assert hat.result["eval"]["loss"] < hat.result["before"]["loss"]
    assert hat.predict(["it was good film ."])[0]


def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(tmp_path: Path, train: Any) -> None:
    train("straight", "chat", dtype="float32")
    with stopped_at_five():
        train("stopped", "chat", dtype="float32")
    hatrack.train(output=str(tmp_path / "stopped"), name="stopped", resume=True)
    _same_adapter(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("task", ["classify", "chat"])
def test_a_swept_run_makes_the_adapter_of_an_ordinary_one(tmp_path: Path, train: Any, task: str) -> None:
    plain = train("plain", task, dtype="float32")
    with too_large():
        streamed = train("streamed", task, dtype="float32")
    assert streamed.base.streamed and not plain.base.streamed and streamed.base.device.type == "cuda"
    assert streamed.result["eval"] == pytest.approx(plain.result["eval"], rel=1e-3)
    _same_adapter(tmp_path / "plain", tmp_path / "streamed")
    text = "it was good film ." if task == "classify" else "what film is red ?"
    assert plain.predict([text])[0]["text"] == streamed.predict([text])[0]["text"]
    with too_large():
        loaded = hatrack.load(tmp_path / "streamed", device="cuda", dtype="float32")
        loaded.add(tmp_path / "plain")
        loaded.use("plain")
        assert loaded.predict([text])[0]["text"] == plain.predict([text])[0]["text"]


@pytest.mark.parametrize("task", ["classify", "chat"])
def test_a_streamed_base_is_checked_there(
    task: str, tiny_encoder: Path, tiny_decoder: Path, reviews: Path, questions: Path
) -> None:
    base, data = (tiny_encoder, reviews) if task == "classify" else (tiny_decoder, questions)
    with too_large():
        findings, facts = check_recipe(Recipe.make(base=str(base), data=str(data), device="cuda"))
        assert facts is not None and facts.plan.method.streamed and not any(finding.refused for finding in findings)
        assert one_step(facts) == []


@pytest.mark.parametrize("options", [{}, {"memory": 300 * 2**20}], ids=["whole", "streamed"])
def test_the_plan_knows_what_the_gpu_will_hold(tmp_path: Path, tiny_decoder: Path, options: dict[str, Any]) -> None:
    """A base of 0.2 GB with rows of 200 tokens: within 15%, and within `memory` where it is streamed."""
    base = tmp_path / "base"
    wide = {"hidden_size": 768, "intermediate_size": 2304, "num_attention_heads": 12, "num_key_value_heads": 4}
    _llama(layers=12, dtype=torch.bfloat16, **wide).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (tiny_decoder / name).read_text()
        (base / name).write_text(text.replace('"model_max_length": 64', '"model_max_length": 512'))
    data, words = tmp_path / "long.jsonl", " ".join(["film plot good bad"] * 45)
    data.write_text(
        "".join(f'{{"prompt": "what {n} {words} ?", "completion": "{words[: 40 + n]} ."}}\n' for n in range(80))
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    given = RUN | {"base": str(base), "data": str(data), "task": "chat", "epochs": 1, "lr": 1e-4} | options
    hat = hatrack.train(output=str(tmp_path / "hat"), name="hat", max_length=256, targets="all-linear", **given)
    planned, actual = hat.result["planned"]["peak_memory_bytes"], hat.result["peak_memory_bytes"]
    print(f"planned {planned:,} actual {actual:,} {dataclasses.asdict(hat.cards['hat'])['cost']}")
    assert hat.base.streamed is bool(options)
    assert actual == pytest.approx(planned, rel=0.15)
