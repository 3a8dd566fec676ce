"""The loss in one pass: the same values and gradients as the stock one, without all logits."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import hatrack
import hatrack.kernels.loss
from hatrack.evaluate.loss import losses
from hatrack.kernels.loss import next_token_losses

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(vocab_size=301, num_key_value_heads=2, **SMALL)
DECODERS = {
    "llama": lambda: LlamaForCausalLM(LLAMA),
    "llama, tied": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=301, num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=301, n_embd=32, n_layer=2, n_head=4)),
    "gptj, bias in the head": lambda: GPTJForCausalLM(
        GPTJConfig(vocab_size=301, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    ),
    "gemma2, bounded logits": lambda: Gemma2ForCausalLM(
        Gemma2Config(vocab_size=301, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05, **SMALL)
    ),
    "cohere, scaled logits": lambda: CohereForCausalLM(CohereConfig(vocab_size=301, logit_scale=0.5, **SMALL)),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hatrack.kernels.loss, "LOGITS_BLOCK", 17 * 301)


def _batch(rows: int = 3, length: int = 23) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 300, (rows, length))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, 10:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("name", DECODERS)
def test_values_and_gradients_are_the_stock_ones(name: str) -> None:
    torch.manual_seed(0)
    base = DECODERS[name]().requires_grad_(False).eval()
    config = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=name == "gpt2"
    )  # only to spare peft's warning
    model = hatrack.get_peft_model(base, config)
    batch = _batch()
    gradients = []
    for loss in (model(**batch).loss, losses(model, batch, "chat")[0].mean()):
        model.zero_grad()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for stock, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)
    head = base.get_output_embeddings()
    assert type(head) is torch.nn.Linear and model(**batch).logits.shape == (3, 23, 301)


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LLAMA).requires_grad_(False).eval()
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = hatrack.get_peft_model(base, config)
    batch = _batch()
    wanted = torch.autograd.grad(model(**batch).loss, [p for p in model.parameters() if p.requires_grad])
    found = torch.autograd.grad(
        losses(model, batch, "chat")[0].mean(), [p for p in model.parameters() if p.requires_grad]
    )
    for stock, ours in zip(wanted, found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_weighs_as_its_gradient_says(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    states, W = torch.randn(50, 32).to(dtype), (torch.randn(301, 32) / 4).to(dtype)
    wanted, weights = torch.randint(301, (50,)), torch.rand(50)
    found = []
    ways: list[Any] = [
        lambda x: next_token_losses(x, W, None, wanted),
        lambda x: F.cross_entropy(x.float() @ W.float().t(), wanted, reduction="none"),
    ]
    for loss in ways:
        x = states.clone().requires_grad_()
        values = loss(x)
        (values * weights).sum().backward()
        assert x.grad is not None
        found.append((values.detach(), x.grad.float()))
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[0][0], found[1][0], rtol=bound, atol=bound)
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < bound


def test_a_token_thought_impossible_has_its_full_loss() -> None:
    states = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    W = torch.tensor([[1.0], [0.0], [-1.0]])
    values = next_token_losses(states, W, None, torch.tensor([2, 0]))
    assert values.tolist() == [400.0, 400.0]


def test_nothing_to_learn_from_gives_no_losses_and_no_gradient() -> None:
    states = torch.randn(0, 8, requires_grad=True)
    values = next_token_losses(states, torch.randn(11, 8), None, torch.empty(0, dtype=torch.long))
    values.sum().backward()  # type: ignore[no-untyped-call]
    assert values.shape == (0,) and states.grad is not None and states.grad.shape == (0, 8)


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest tensor any operation gives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return found


@pytest.mark.parametrize("training", [True, False])
def test_all_logits_are_never_held(training: bool) -> None:
    model = LlamaForCausalLM(LLAMA).eval()
    model.get_output_embeddings().requires_grad_(False)
    batch = _batch(8, 40)
    with _Largest() as seen, torch.set_grad_enabled(training):
        values = losses(model, batch, "chat")[0]
        if training:
            values.sum().backward()  # type: ignore[no-untyped-call]
    assert seen.numbers < 8 * 39 * 301 / 4
    assert len(values) > 250
