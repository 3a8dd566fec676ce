"""Whatever plain peft makes of an adapter, hatrack makes of it too: outputs compared, however peft saved it."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import hatrack
from hatrack.adapter.attach import attach, detach
from hatrack.errors import AdapterError
from tests.base import tiny
from tests.conftest import tiny_tokenizer

IDS = torch.tensor([[5, 9, 3, 8, 4, 11, 7, 3]])
QV = {"target_modules": ["q_proj", "v_proj"]}
BOTH = ["embed_tokens", "lm_head"]
LLAMA: dict[str, dict[str, Any]] = {
    "embedding and head saved": QV | {"modules_to_save": BOTH},
    "only the embedding saved": QV | {"modules_to_save": ["embed_tokens"]},
    "only the head saved": QV | {"modules_to_save": ["lm_head"]},
    "norms saved": QV | {"modules_to_save": ["norm", "input_layernorm"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on embedding and head": {"target_modules": ["q_proj", *BOTH]},
    "token rows": QV | {"trainable_token_indices": [3, 4, 5]},
    "DoRA with a saved head": QV | {"use_dora": True, "modules_to_save": ["lm_head"]},
    "DoRA": QV | {"use_dora": True},
    "rsLoRA": QV | {"use_rslora": True},
    "a bias of B": QV | {"lora_bias": True},
    "ranks by pattern": QV | {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6}},
    "alphas by pattern": QV | {"alpha_pattern": {"q_proj": 3, "layers.0.self_attn.v_proj": 24}},
    "some layers": QV | {"layers_to_transform": [1], "layers_pattern": "layers"},
    "one layer": QV | {"layers_to_transform": 0},
    "not all": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "lm_head"]},
    "not by pattern": {"target_modules": "all-linear", "exclude_modules": r".*\.0\.(self_attn|mlp)\..*"},
    "a pattern with groups": {
        "target_modules": r"(?:model\.layers\.(?P<n>\d+)\.|.*?\.)?(?:self_attn|mlp)\.(?:(?:q|up)_proj)"
    },
    "biases, with none there": QV | {"bias": "all"},
}  # fmt: skip
TIED: dict[str, dict[str, Any]] = {
    "saved apart": QV | {"modules_to_save": BOTH},
    "saved and kept tied": QV | {"modules_to_save": BOTH, "ensure_weight_tying": True},
    "LoRA kept tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "only the embedding saved": QV | {"modules_to_save": ["embed_tokens"]},
    "token rows": QV | {"trainable_token_indices": [3, 4, 5]},
    "token rows kept tied": QV | {"trainable_token_indices": [3, 4, 5], "ensure_weight_tying": True},
}
BERT: dict[str, dict[str, Any]] = {
    "biases of all": {"target_modules": ["query", "value"], "bias": "all"},
    "biases of the adapted": {"target_modules": ["query", "value"], "bias": "lora_only"},
    "a part of the head": {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]},
}
GPT2: dict[str, dict[str, Any]] = {
    "turned": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "turned, not told": {"target_modules": ["c_attn"]},
    "biases": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
    "embeddings saved": {"target_modules": ["c_attn"], "modules_to_save": ["wte", "wpe"]},
}
MOE: dict[str, dict[str, Any]] = {
    "attention": QV,
    "experts": QV | {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "experts by rank": {
        "target_parameters": ["mlp.experts.gate_up_proj"],
        "target_modules": [],
        "rank_pattern": {"experts.gate_up_proj": 2},
    },
}
VARIANTS = [("Llama", name, options) for name, options in LLAMA.items()]
VARIANTS += [("Tied", name, options) for name, options in TIED.items()]
VARIANTS += [("Bert", name, options) for name, options in BERT.items()]
VARIANTS += [("GPT2", name, options) for name, options in GPT2.items()]
VARIANTS += [("Mixtral", name, options) for name, options in MOE.items()]


def _base(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    if kind == "Mixtral":
        small = {"num_local_experts": 4, "num_experts_per_tok": 2}
        config = transformers.MixtralConfig(**tiny.LLAMA, **small)
        return transformers.MixtralForCausalLM(config).to(dtype).eval()
    made = {
        "Llama": lambda: tiny.model("Llama", "causal", tie_word_embeddings=False),
        "Tied": lambda: tiny.model("Llama", "causal", tie_word_embeddings=True),
        "Bert": lambda: tiny.model("Bert", "classify", num_labels=3, pad_token_id=0),
        "GPT2": lambda: tiny.model("GPT2", "causal"),
    }
    return made[kind]().to(dtype).eval()


def _adapter(folder: Path, base: Any, options: dict[str, Any], name: str = "default", seed: int = 1) -> Path:
    """A trained-looking adapter: whatever would have been trained has other values than at its start."""
    task = "SEQ_CLS" if "Classification" in type(base).__name__ else "CAUSAL_LM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type=task, **options), adapter_name=name)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float()  # type: ignore[no-any-return]


def _of_peft(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _logits(PeftModel.from_pretrained(_base(kind, dtype), folder))


def _check_same(kind: str, folder: Path, dtype: torch.dtype) -> None:
    base = _base(kind, dtype)
    bare, weights = _logits(base), {name: tensor.clone() for name, tensor in base.state_dict().items()}
    theirs = _of_peft(kind, folder, dtype)
    model = attach(base, folder, "hat")
    ours = _logits(model)
    near = 1e-4 if dtype == torch.float32 else 0.08 * float(theirs.abs().max())
    assert float((theirs - bare).abs().max()) > 2 * near, "the adapter does something"
    assert float((ours - theirs).abs().max()) < near
    with model.disable_adapter():
        torch.testing.assert_close(_logits(model), bare)
    base = detach(model, "hat")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())
    assert set(weights) == set(base.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(("kind", "options"), [v[::2] for v in VARIANTS], ids=[f"{v[0]}: {v[1]}" for v in VARIANTS])
def test_outputs_are_pefts(tmp_path: Path, kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    _check_same(kind, _adapter(tmp_path / "hat", _base(kind, dtype), options), dtype)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["DoRA with a saved head", "LoRA on the embedding", "embedding and head saved"])
def test_a_file_in_another_dtype(tmp_path: Path, stored: torch.dtype, name: str) -> None:
    folder = _adapter(tmp_path / "hat", _base("Llama"), LLAMA[name])
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor.to(stored) for key, tensor in load_file(path).items()}, path)
    _check_same("Llama", folder, torch.float32)


def test_an_embedding_of_its_own_under_lora(tmp_path: Path) -> None:
    """The base's rows came along in the file, and they are not this base's."""
    folder = _adapter(tmp_path / "hat", _base("Llama"), LLAMA["LoRA on embedding and head"])
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    moved = [key for key in tensors if ".base_layer." in key]
    assert len(moved) == 2
    save_file(tensors | {key: tensors[key] + 0.1 * torch.randn_like(tensors[key]) for key in moved}, path)
    _check_same("Llama", folder, torch.float32)


def test_adapters_of_all_kinds_beside_each_other(tmp_path: Path) -> None:
    """Each gives what it gives alone, whichever came before or went."""
    names = ["embedding and head saved", "DoRA", "norms saved", "rsLoRA", "only the head saved"]
    folders = [_adapter(tmp_path / str(number), _base("Llama"), LLAMA[name]) for number, name in enumerate(names)]
    expected = [_of_peft("Llama", folder) for folder in folders]
    base: Any = _base("Llama")
    bare = _logits(base)
    for number, folder in enumerate(folders):
        base = attach(base, folder, f"hat{number}")
    for number in (2, 0, 4, 1, 3, 0):
        base.set_adapter(f"hat{number}", inference_mode=True)
        assert float((_logits(base) - expected[number]).abs().max()) < 1e-4
    for number in (0, 3):
        base = detach(base, f"hat{number}")
    for number in (1, 4, 2):
        base.set_adapter(f"hat{number}", inference_mode=True)
        assert float((_logits(base) - expected[number]).abs().max()) < 1e-4
    with base.disable_adapter():
        torch.testing.assert_close(_logits(base), bare)
    for number in (1, 2, 4):
        base = detach(base, f"hat{number}")
    torch.testing.assert_close(_logits(base), bare)


PAIRS = [("embedding and head saved", "LoRA on the embedding"), ("embedding and head saved", "token rows")]
PAIRS += [(second, first) for first, second in PAIRS] + [
    ("token rows", "DoRA"),
    ("LoRA on the embedding", "token rows"),
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=str)
def test_two_that_peft_cannot_have_beside_each_other(tmp_path: Path, first: str, second: str) -> None:
    """Refused with the reason, and the first goes on as before."""
    one = _adapter(tmp_path / "one", _base("Llama"), LLAMA[first])
    other = _adapter(tmp_path / "other", _base("Llama"), LLAMA[second])
    model = attach(_base("Llama"), one, "one")
    before = _logits(model)
    with pytest.raises(AdapterError, match=r"does not fit this base; got .*; fix: load it by itself"):
        attach(model, other, "other")
    model.set_adapter("one", inference_mode=True)
    torch.testing.assert_close(_logits(model), before)


def _per_expert(folder: Path) -> Path:
    """The adapter as transformers 4 and peft 0.17 saved it: each expert its own."""
    _adapter(folder, _base("Mixtral"), QV)
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(path)
    for layer in range(2):
        for expert in range(4):
            for name, d_in, d_out in (("w1", 16, 24), ("w2", 24, 16), ("w3", 16, 24)):
                place = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = (
                    torch.randn(4, d_in), torch.randn(d_out, 4),
                )  # fmt: skip
    save_file(tensors, path)
    content = json.loads(config.read_text()) | {"target_modules": ["q_proj", "v_proj", "w1", "w2", "w3"]}
    config.write_text(json.dumps(content))
    return folder


def test_experts_that_were_adapted_one_by_one(tmp_path: Path) -> None:
    _check_same("Mixtral", _per_expert(tmp_path / "hat"), torch.float32)


def test_experts_one_by_one_on_a_base_that_never_had_any(tmp_path: Path) -> None:
    folder = _per_expert(tmp_path / "hat")
    with pytest.raises(
        AdapterError, match=r"48 tensors do not fit in .*no place in the model.*joins a layer's experts"
    ):
        attach(_base("Llama"), folder, "hat")


@pytest.mark.parametrize(
    "change",
    [
        lambda name: "module." + name,
        lambda name: "_orig_mod." + name,
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.replace("base_model.model.", "base_model.model.base_model.model."),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: "module._orig_mod." + name.replace(".layers.", "._fsdp_wrapped_module.layers."),
        lambda name: name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
    ],
    ids=["DDP", "compiled", "compiled inside", "wrapped twice", "bare", "several", "with the adapter's name"],
)
def test_names_that_a_trainer_left(tmp_path: Path, change: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _adapter(tmp_path / "hat", _base("Llama"), LLAMA["DoRA with a saved head"])
    expected = _of_peft("Llama", folder)
    path = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)
    torch.testing.assert_close(_logits(attach(_base("Llama"), folder, "hat")), expected, rtol=0, atol=1e-4)
    assert "names that a trainer changed, such as" in capsys.readouterr().err


def test_a_tensor_that_is_there_twice(tmp_path: Path) -> None:
    folder = _adapter(tmp_path / "hat", _base("Llama"), QV)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"module." + name: tensor + 1 for name, tensor in tensors.items()}, path)
    with pytest.raises(AdapterError, match="holds a tensor twice"):
        attach(_base("Llama"), folder, "hat")


def _resized(rows: int) -> Any:
    base = _base("Llama")
    torch.manual_seed(4)
    base.resize_token_embeddings(rows, mean_resizing=False)
    return base


RESIZED: dict[str, dict[str, Any]] = {
    "saved because it was resized": QV,
    "saved as asked": QV | {"modules_to_save": BOTH},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "token rows": QV | {"trainable_token_indices": [3, 33, 34]},
}


@pytest.mark.parametrize("name", RESIZED)
def test_a_resized_vocabulary(tmp_path: Path, name: str) -> None:
    """On the resized base it works, though it brings the rows; on the other both sizes are told."""
    _base("Llama").save_pretrained(tmp_path / "base")
    base = _resized(35)
    base.name_or_path = base.config.name_or_path = str(tmp_path / "base")
    folder = _adapter(tmp_path / "hat", base, RESIZED[name])
    plain = _resized(35)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _logits(PeftModel.from_pretrained(plain, folder))
    torch.testing.assert_close(_logits(attach(_resized(35), folder, "hat")), theirs, rtol=0, atol=1e-4)
    for model in (_base("Llama"), attach(_base("Llama"), _adapter(tmp_path / "other", _base("Llama"), QV), "other")):
        with pytest.raises(AdapterError, match=r"vocabulary of .*35 tokens, .* has 32; .*--base .*resize_token"):
            attach(model, folder, "hat")


def test_an_adapter_saved_under_a_name(tmp_path: Path) -> None:
    _adapter(tmp_path / "checkpoint", _base("Llama"), QV, name="helper")
    _check_same("Llama", tmp_path / "checkpoint/helper", torch.float32)
    with pytest.raises(
        AdapterError, match=r"is not an adapter's folder; got .*; fix: give one of the folders .*checkpoint/helper"
    ):
        attach(_base("Llama"), tmp_path / "checkpoint", "hat")


def test_bare_base_and_adapter_through_load(tmp_path: Path) -> None:
    """The whole way, in bfloat16: an embedding and a head that differ where the base ties them."""
    tokenizer = tiny_tokenizer(chat=True)
    torch.manual_seed(5)
    config = transformers.LlamaConfig(**tiny.LLAMA | {"vocab_size": len(tokenizer), "tie_word_embeddings": True})
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folder = _adapter(
        tmp_path / "hat", transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), TIED["saved apart"]
    )
    for dtype in ("float32", "bfloat16"):
        hat = hatrack.load(folder, base=str(tmp_path / "base"), dtype=dtype, allow_other_base=True)
        hat.use(None)
        bare = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=getattr(torch, dtype))
        torch.testing.assert_close(_logits(hat.model), _logits(bare))
        assert isinstance(hat.predict("what film ?", max_new_tokens=2)[0]["text"], str)
