"""The count from shapes is peft's own, at the real published shapes, on the meta device."""

import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
)

from hatrack.adapter.count import count_parameters, linear_layers_from_shapes, trainable_line
from hatrack.adapter.place import head_modules, linear_layers, place
from hatrack.adapter.targets import ModelLayers, choose_targets
from hatrack.recipe import Recipe

CONFIGS: dict[str, PretrainedConfig] = {
    "distilbert-base-uncased": DistilBertConfig(),
    "bert-base-uncased": BertConfig(),
    "roberta-base": RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
    "gpt2": GPT2Config(pad_token_id=0),
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "gemma-2-2b": Gemma2Config(),
    "t5-small": T5Config(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128),
}
ENCODERS = ("distilbert-base-uncased", "bert-base-uncased", "roberta-base", "t5-small")


@functools.cache
def _meta(name: str, task: str) -> Any:
    config = CONFIGS[name].__class__.from_dict(CONFIGS[name].to_dict() | {"num_labels": 2})
    kind = AutoModelForSequenceClassification if task == "classify" else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


def _fresh(name: str, task: str) -> Any:
    _meta.cache_clear()
    return _meta(name, task)


CASES = [(name, "classify") for name in CONFIGS] + [(name, "chat") for name in CONFIGS if name not in ENCODERS]
SETTINGS = [
    {"r": 8},
    {"r": 16, "targets": "all-linear"},
    {"r": 4, "layers": "top-2"},
    {"r": 8, "variant": "rslora", "layers": "top-1", "targets": "all-linear"},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_count_is_pefts_own(name: str, task: str, options: dict[str, Any]) -> None:
    model, recipe = _fresh(name, task), Recipe.make(**options)
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    heads = head_modules(model) if task == "classify" else []
    linears = linear_layers_from_shapes(shapes, model.config.model_type)
    found = {key: sides for key, sides in linear_layers(model).items() if key != "lm_head"}
    assert {key: sides for key, sides in linears.items() if key != "lm_head"} == found

    choice = choose_targets(ModelLayers(linears, heads=heads), recipe.targets, recipe.top_layers)
    counted = count_parameters(
        shapes, [linears[key] for key in choice.names], r=recipe.r, variant=recipe.variant, heads=heads
    )
    wrapped = place(model, recipe, task=task)
    assert (counted.trainable, counted.total) == wrapped.get_nb_trainable_parameters()


def test_the_textbooks_line() -> None:
    model = _fresh("distilbert-base-uncased", "classify")
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    linears = linear_layers_from_shapes(shapes, "distilbert")
    choice = choose_targets(ModelLayers(linears, heads=head_modules(model)), "q_lin,v_lin", None)
    counted = count_parameters(shapes, [linears[key] for key in choice.names], r=8, heads=head_modules(model))
    shown = "trainable params: 739,586 || all params: 67,694,596 || trainable%: 1.0925"
    assert trainable_line(counted.trainable, counted.total) == shown
    plain = get_peft_model(model, LoraConfig(r=8, target_modules=["q_lin", "v_lin"], task_type="SEQ_CLS"))
    assert trainable_line(*plain.get_nb_trainable_parameters()) == shown


def test_dora_adds_a_magnitude_for_each_output() -> None:
    shapes = {"layers.0.q.weight": (30, 20), "layers.0.q.bias": (30,), "head.weight": (2, 20)}
    counted = count_parameters(shapes, [(20, 30)], r=4, variant="dora", heads=["head"])
    assert (counted.lora, counted.head) == (4 * (20 + 30) + 30, 40)
    assert counted.total == 600 + 30 + 40 + counted.lora + 40
