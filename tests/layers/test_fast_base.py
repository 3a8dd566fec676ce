"""Kernels in a frozen base: the same outputs and gradients for any architecture, no change where they do not fit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

import hatrack
from hatrack.errors import ModelError
from hatrack.layers.fast_base import ATTENTION_NAME, FastDropout, FastGELU, FastRMSNorm, speed_up

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**SIZES, "vocab_size": 97}
FEW = {"num_key_value_heads": 2, "head_dim": 16}
T5: dict[str, Any] = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 97,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
BASES: dict[
    str, tuple[Callable[[], Any], bool, int]
] = {  # how it is made, whether attention changes, norms that change
    "bert": (lambda: BertForSequenceClassification(BertConfig(**SMALL)), True, 0),
    "roberta": (lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL)), True, 0),
    "distilbert": (
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(dim=64, hidden_dim=96, n_layers=2, n_heads=4, vocab_size=97)
        ),
        True,
        0,
    ),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=97)), True, 0),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)), True, 5),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)), True, 5),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8)), True, 5),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, **FEW)), False, 9),
    "gemma3": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **FEW, sliding_window=8)), True, 9),
    "modernbert": (
        lambda: ModernBertForSequenceClassification(ModernBertConfig(**SMALL, pad_token_id=0, local_attention=8)),
        True,
        0,
    ),
    "t5": (lambda: T5ForSequenceClassification(T5Config(**T5)), False, 12),
}


def _random(make: Callable[[], Any]) -> Any:
    """A frozen model none of whose weights are ones or zeros."""
    torch.manual_seed(3)
    model = make().requires_grad_(False).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.add_(torch.randn_like(weight) * 0.1)
    model.config.pad_token_id = 0
    return model


def _outputs(model: Any, length: int) -> list[torch.Tensor]:
    """Logits at real tokens, and the gradients of what the embeddings give."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 97, (3, length), generator=generator)
    real = torch.ones_like(ids)
    real[1, length // 2 :] = 0
    ids[real == 0] = 0
    if model.config.is_encoder_decoder:
        ids[:, -1] = 1
        real[:, -1] = 1
    given: list[torch.Tensor] = []
    words = [layer for layer in model.modules() if isinstance(layer, nn.Embedding) and layer.num_embeddings == 97]
    hooks = [
        layer.register_forward_hook(lambda _, __, output: given.append(output.requires_grad_())) for layer in words
    ]
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    kept = logits[real.bool()] if logits.shape[:2] == ids.shape else logits
    gradients = torch.autograd.grad((kept * torch.linspace(-1, 1, kept.numel()).view_as(kept)).sum(), given)
    return [kept.detach(), *gradients]


@pytest.mark.parametrize("length", [6, 40])
@pytest.mark.parametrize("name", BASES)
def test_outputs_and_gradients_stay(name: str, length: int) -> None:
    make, changes, norms = BASES[name]
    model = _random(make)
    wanted = _outputs(model, length)
    speed_up(model)
    assert (model.config._attn_implementation == ATTENTION_NAME) is changes
    assert sum(isinstance(layer, FastRMSNorm) for layer in model.modules()) == norms
    assert not any(type(layer) is nn.Dropout and layer.p for layer in model.modules())
    for ours, stock in zip(_outputs(model, length), wanted, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layers"), [("gelu_new", 2), ("gelu_pytorch_tanh", 2), ("gelu_fast", 2), ("gelu", 0), ("quick_gelu", 0)]
)
def test_activations_that_are_gelus_tanh_form_are_one_pass(name: str, layers: int) -> None:
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=97, activation_function=name)
    model = _random(lambda: GPT2LMHeadModel(config))
    wanted = _outputs(model, 12)
    speed_up(model)
    assert sum(isinstance(layer, FastGELU) for layer in model.modules()) == layers
    for ours, stock in zip(_outputs(model, 12), wanted, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_where_torchs_attention_steps_in_padding_is_not_seen(name: str) -> None:
    """Under autocast, with padding on the left: hatrack's masks are (B, T), torch's are not."""
    model = _random(BASES[name][0])
    ids, real = torch.randint(3, 97, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    real[1, :4] = 0
    found = []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(model(input_ids=ids, attention_mask=real).logits.float())
        speed_up(model)
    chosen = real.bool() if name == "llama" else slice(None)
    assert model.config._attn_implementation == ATTENTION_NAME
    torch.testing.assert_close(found[1][chosen], found[0][chosen], rtol=0.05, atol=0.05)


def test_weights_keep_their_names_and_generation_goes_on() -> None:
    model = _random(BASES["llama"][0])
    names = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(3, 97, (2, 9))
    wanted = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    speed_up(model)
    assert {name: torch.equal(value, names[name]) for name, value in model.state_dict().items()} == dict.fromkeys(
        names, True
    )
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert torch.equal(found, wanted)


def test_dropout_of_the_base_drops_in_training_only() -> None:
    model = _random(BASES["bert"][0])
    speed_up(model)
    dropouts = [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]
    assert dropouts and all(isinstance(layer, FastDropout) and layer.p == 0.1 for layer in dropouts)
    x = torch.ones(64, 64)
    assert torch.equal(dropouts[0](x), x)
    dropouts[0].train()
    assert 0.05 < float((dropouts[0](x) == 0).float().mean()) < 0.15


class _Other(nn.Module):
    """Looks like an RMSNorm and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64), requires_grad=False), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


def test_a_norm_of_another_kind_or_in_training_stays() -> None:
    model = _random(BASES["llama"][0])
    model.model.norm = _Other()
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    speed_up(model)
    assert isinstance(model.model.norm, _Other)
    assert sum(isinstance(layer, FastRMSNorm) for layer in model.modules()) == 3


@pytest.mark.parametrize("adapted_first", [True, False])
def test_matrices_in_four_bits_are_never_unpacked_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, adapted_first: bool
) -> None:
    """peft's layer around such a matrix shows it as its own weight, and keeps its own forward."""
    bitsandbytes: Any = pytest.importorskip("bitsandbytes")
    shape: dict[str, Any] = {"compute_dtype": torch.float32, "compress_statistics": False, "quant_type": "nf4"}
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(LlamaConfig(**SMALL | {"intermediate_size": 128})).requires_grad_(False)
    base.is_loaded_in_4bit = True  # by which peft takes its layer for these
    base.eval()
    mlp = base.model.layers[0].mlp
    for name in ("gate_proj", "down_proj"):
        d_out, d_in = getattr(mlp, name).weight.shape
        layer = bitsandbytes.nn.Linear4bit(d_in, d_out, bias=name == "down_proj", **shape).requires_grad_(False)
        setattr(mlp, name, layer.to("cpu"))
        layer.support_avx512bf16_for_cpu = True  # by which it would repack itself, on whichever CPU
    if not adapted_first:
        speed_up(base)
    get_peft_model(base, LoraConfig(r=4, target_modules=["gate_proj", "down_proj"], init_lora_weights=False))
    x = torch.randn(2, 3, 64, requires_grad=True)

    def answers() -> tuple[torch.Tensor, ...]:
        y = mlp(x)
        return y, *torch.autograd.grad(y.sum(), (x, mlp.gate_proj.lora_A.default.weight))

    with monkeypatch.context() as patch:
        if adapted_first:
            wanted = answers()
            speed_up(base)
        else:
            for name in ("gate_proj", "down_proj"):
                patch.delitem(getattr(mlp, name).base_layer.__dict__, "forward")
            wanted = answers()
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", None)
    for found, other in zip(answers(), wanted, strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize(
    "wrap", [speed_up, lambda base: hatrack.get_peft_model(base, LoraConfig(target_modules=["1"]))]
)
def test_a_base_that_bitsandbytes_repacked_is_refused(wrap: Any) -> None:
    """It would answer, and learn nothing."""
    bitsandbytes: Any = pytest.importorskip("bitsandbytes")
    base: Any = nn.Sequential(nn.ReLU(), bitsandbytes.nn.Linear4bit(128, 64, compress_statistics=False))
    base = base.requires_grad_(False).to("cpu").eval()
    base.device, weight = torch.device("cpu"), base[1].weight
    weight.data, _ = bitsandbytes.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(ModelError, match="repacked by bitsandbytes for inference, and cannot be trained on; got 1"):
        wrap(base)
