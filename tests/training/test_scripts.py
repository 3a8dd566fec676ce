"""`hatrack.get_peft_model` in anybody's script: trainers and a PeftModel's own methods do what they do with peft's."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel
from peft import get_peft_model as stock_get_peft_model
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import hatrack
from hatrack.layers.fast_lora import FastLinear

TARGETS = {"llama": ["q_proj", "v_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"]}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 5, 14, 6]])

TrainOn = Callable[[PeftModel], Any]


@pytest.fixture(params=list(TARGETS))
def pair(request: pytest.FixtureRequest, tiny_decoder: Path) -> tuple[PeftModel, PeftModel]:
    """A decoder with hatrack's layers and the same with peft's, their adapters alike."""
    return _pair(request.param, tiny_decoder)


def _pair(name: str, tiny_decoder: Path) -> tuple[PeftModel, PeftModel]:
    torch.manual_seed(3)
    if name == "llama":
        base = LlamaForCausalLM.from_pretrained(tiny_decoder, dtype=torch.float32)
    else:
        base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    models = []
    for make in (hatrack.get_peft_model, stock_get_peft_model):
        torch.manual_seed(3)
        models.append(make(copy.deepcopy(base), _config(name)))
    assert [type(layer) for layer in _adapted(models[0])] == [FastLinear] * len(TARGETS[name]) * 2
    return models[0], models[1]


def _config(name: str, **options: Any) -> LoraConfig:
    made = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS[name], "init_lora_weights": False, **options}
    return LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2", **made)


def _adapted(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def _logits(model: Any, **options: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits  # type: ignore[no-any-return]


def _same(ours: Any, stock: Any, **options: Any) -> None:
    torch.testing.assert_close(_logits(ours, **options), _logits(stock, **options), rtol=1e-4, atol=1e-5)


def _same_course(pair: tuple[PeftModel, PeftModel], train: TrainOn, tolerance: float = 1e-3) -> None:
    """Both learn, and by the same losses, gradient norms and weights."""
    courses = []
    for model in pair:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        history = [entry for entry in train(model).state.log_history if "grad_norm" in entry]
        moved = {name: p.detach().float() - before[name].float() for name, p in model.named_parameters()}
        assert {name for name, change in moved.items() if change.any()} == {n for n in before if "lora_" in n}
        courses.append((history, torch.cat([change.flatten() for change in moved.values()])))
    (ours, our_change), (stock, stock_change) = courses
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.1 and len(ours) == 8
    for one, other in zip(ours, stock, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=tolerance)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=20 * tolerance)
    assert (our_change - stock_change).norm() <= 20 * tolerance * stock_change.norm()


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"activation_checkpointing": True},
    "autocast": {"bf16": True},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_works_in_a_plain_trainer(pair: tuple[PeftModel, PeftModel], setting: str, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()] * 24

    def train(model: PeftModel) -> Trainer:
        trainer = Trainer(model=model, args=_arguments(TrainingArguments, tmp_path, setting), train_dataset=rows)
        trainer.train()
        return trainer

    _same_course(pair, train, 0.02 if setting == "autocast" else 1e-3)


def _arguments(kind: type, folder: Path, setting: str, **options: Any) -> Any:
    fixed = {"max_steps": 8, "learning_rate": 0.01, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    quiet = {"disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no"}
    return kind(str(folder), **{**fixed, **quiet, "bf16": False, **SETTINGS[setting], **options})


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl asks for it so
@pytest.mark.parametrize("setting", ["plain", "autocast"])
def test_it_works_in_trls_trainer(setting: str, tiny_decoder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "it was", "completion": " good film"}, {"prompt": "so very", "completion": " awful plot"}] * 32
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)

    def train(model: PeftModel) -> SFTTrainer:
        arguments = _arguments(SFTConfig, tmp_path, setting)
        data = Dataset.from_list(rows)
        trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        return trainer

    _same_course(_pair("llama", tiny_decoder), train, 0.02 if setting == "autocast" else 1e-3)


def test_a_run_in_a_plain_trainer_resumes(tiny_decoder: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()] * 24
    arguments = _arguments(TrainingArguments, tmp_path, "plain", save_strategy="steps", save_steps=4)
    ends = []
    for start in (None, str(tmp_path / "checkpoint-4")):
        model = _pair("llama", tiny_decoder)[0]
        Trainer(model=model, args=arguments, train_dataset=rows).train(resume_from_checkpoint=start)
        ends.append(_logits(model))
    torch.testing.assert_close(*ends)


def test_merging_and_unmerging(pair: tuple[PeftModel, PeftModel]) -> None:
    ours, stock = pair
    before = _logits(ours)
    for model in pair:
        model.merge_adapter()
    _same(ours, stock)
    torch.testing.assert_close(_logits(ours), before, rtol=1e-3, atol=1e-4)
    for model in pair:
        model.unmerge_adapter()
    torch.testing.assert_close(_logits(ours), before, rtol=1e-3, atol=1e-4)
    merged = [model.merge_and_unload(safe_merge=True) for model in pair]
    _same(*merged)
    assert not _adapted(merged[0])


def test_switching_adding_and_mixing_adapters(pair: tuple[PeftModel, PeftModel]) -> None:
    ours, stock = pair
    name = ours.config.model_type
    with ours.disable_adapter(), stock.disable_adapter():
        _same(ours, stock)
        bare = _logits(ours)
    for model in pair:
        torch.manual_seed(9)
        model.add_adapter("second", _config(name, r=2, target_modules=TARGETS[name][:1]))
    first = _logits(ours)
    assert not torch.allclose(first, bare, atol=1e-3)
    for active in ("second", "default"):
        for model in pair:
            model.set_adapter(active)
        _same(ours, stock)
    mixed = {"adapter_names": ["default", "second", "__base__"]}
    _same(ours, stock, **mixed)
    torch.testing.assert_close(_logits(ours, **mixed)[2], bare[2], rtol=1e-4, atol=1e-5)
    for model in pair:
        model.base_model.set_adapter(["default", "second"])
    _same(ours, stock)
    for model in pair:
        model.delete_adapter("default")
        model.set_adapter("second")
    _same(ours, stock)
    assert not torch.allclose(_logits(ours), first, atol=1e-3)


def test_only_the_active_adapter_learns(tiny_decoder: Path) -> None:
    ours, _ = _pair("llama", tiny_decoder)
    ours.add_adapter("second", _config("llama"))
    ours.set_adapter("second")
    ours(input_ids=IDS, labels=IDS).loss.backward()
    learning = {name for name, p in ours.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {name for name, _ in ours.named_parameters() if ".second." in name}


def test_what_it_saves_is_pefts_and_loads_into_either(pair: tuple[PeftModel, PeftModel], tmp_path: Path) -> None:
    ours, stock = pair
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    saved = [(tmp_path / side / "adapter_model.safetensors").read_bytes() for side in ("ours", "stock")]
    configs = [(tmp_path / side / "adapter_config.json").read_text() for side in ("ours", "stock")]
    assert saved[0] == saved[1] and configs[0] == configs[1]
    expected = _logits(ours)
    base = stock.unload()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(_logits(loaded), expected, rtol=1e-4, atol=1e-5)
    config = LoraConfig.from_pretrained(tmp_path / "ours")
    config.inference_mode = False  # it is to be trained on
    again = hatrack.get_peft_model(base, config)
    again.load_adapter(tmp_path / "ours", "default", is_trainable=True)
    torch.testing.assert_close(_logits(again), expected)
    assert {type(layer) for layer in _adapted(again)} == {FastLinear}
    again(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for name, parameter in again.named_parameters() if "lora_" in name)


def test_generation_with_a_cache_is_pefts(pair: tuple[PeftModel, PeftModel]) -> None:
    options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    written = [model.eval().generate(**options, pad_token_id=0, eos_token_id=None) for model in pair]
    assert written[0].shape == (3, 10) and torch.equal(*written)


def test_other_methods_are_pefts(tiny_decoder: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(tiny_decoder, dtype=torch.float32)
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    assert hatrack.get_peft_model(base, config).peft_type == "IA3"
