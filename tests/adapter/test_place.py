"""Which layers get an adapter, on twenty architectures; and what is refused."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hatrack.adapter.place import head_modules, linear_layers, place
from hatrack.adapter.targets import choose, depth
from hatrack.errors import AdapterError, RecipeError, TargetError
from hatrack.recipe import Recipe
from tests.base import tiny

LLAMA = {
    f"model.layers.{i}.{name}": sides
    for i in range(4)
    for name, sides in {
        "self_attn.q_proj": (8, 8),
        "self_attn.v_proj": (8, 4),
        "mlp.up_proj": (8, 16),
        "mlp.down_proj": (16, 8),
    }.items()
} | {"lm_head": (8, 100)}


@pytest.mark.parametrize("kind", sorted(tiny.OPTIONS))
def test_auto_finds_the_projections_of_any_architecture(kind: str) -> None:
    head = "causal" if kind in tiny.DECODERS else "classify"
    more = {} if head == "causal" else {"num_labels": 2}
    model = tiny.model(kind, head, **more)
    heads = head_modules(model) if head == "classify" else []
    linears = linear_layers(model)
    modules = [name for name, _ in model.named_modules() if name]
    choice = choose(linears, "auto", None, heads=heads, modules=modules)
    stacks = depth(choice.names)
    assert stacks and all(count >= 1 for count in stacks.values())
    for name in choice.names:
        assert not any(part in name for part in ("embed", "lm_head", "score", "pooler", "classifier", *heads)), name
    for stack, layers in stacks.items():
        for index in range(layers):
            assert sum(name.startswith(f"{stack}.{index}.") for name in choice.names) >= 4
    # plain peft, given the short names, adapts exactly these layers
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=list(choice.target_modules), fan_in_fan_out=kind == "GPT2")
    )
    placed = {n.removeprefix("base_model.model.") for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    assert placed == set(choice.names)


def test_short_names_are_short() -> None:
    assert choose(LLAMA, "auto", None).target_modules == ("q_proj", "v_proj", "up_proj", "down_proj")
    bert = tiny.model("Bert", "classify", num_labels=2)
    modules = [name for name, _ in bert.named_modules() if name]
    choice = choose(linear_layers(bert), "auto", None, heads=["classifier"], modules=modules)
    assert set(choice.target_modules) == {"query", "key", "value", "output.dense", "intermediate.dense"}


def test_the_last_layers_only() -> None:
    choice = choose(LLAMA, "q_proj", 2)
    assert (
        choice.names == choice.target_modules == ("model.layers.2.self_attn.q_proj", "model.layers.3.self_attn.q_proj")
    )
    with pytest.raises(RecipeError, match="top-5 is more than this model has; got 4 layers; fix: use --layers all"):
        choose(LLAMA, "auto", 5)


def test_all_linear_takes_everything_but_the_output() -> None:
    assert set(choose(LLAMA | {"model.project": (8, 8)}, "all-linear", None).names) == set(LLAMA) - {"lm_head"} | {
        "model.project"
    }


def test_routers_are_left_alone() -> None:
    experts = {f"m.layers.{i}.mlp.experts.{e}.up": (8, 8) for i in range(2) for e in range(2)}
    routers = {f"m.layers.{i}.mlp.gate": (8, 2) for i in range(2)}
    assert set(choose(experts | routers, "auto", None).names) == set(experts)
    assert "m.layers.0.gate" in choose({"m.layers.0.gate": (8, 8)}, "auto", None).names


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            "q_porj",
            r"'q_porj' matches no layer \(did you mean q_proj\?\); got a model with down_proj, q_proj, up_proj, v_proj",
        ),
        ("q_proj,k_proj", r"'k_proj' matches no layer"),
        ("foo,bar", r"'foo' matches no layer; 'bar' matches no layer"),
        ("lm_head", r"'lm_head' is the output head, which is trained without being named"),
        ("self_attn", r"'self_attn' is not a linear layer"),
    ],
)
def test_each_name_that_matches_nothing_is_an_error(targets: str, message: str) -> None:
    modules = {*LLAMA, *(f"model.layers.{i}.self_attn" for i in range(4))}
    with pytest.raises(TargetError, match=message):
        choose(LLAMA, targets, None, modules=modules)


def _place(kind: str, task: str, **options: Any) -> Any:
    model = tiny.model(
        kind,
        "causal" if task != "classify" else "classify",
        **({"num_labels": 3, "pad_token_id": 0} if task == "classify" else {}),
    )
    return place(model.to(options.pop("dtype", torch.float32)), Recipe.make(r=2, **options), task=task)


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Roberta", "GPT2", "Llama", "T5"])
def test_a_bf16_base_trains_a_float32_head(kind: str) -> None:
    model = _place(kind, "classify", dtype=torch.bfloat16)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trainable.values())
    heads = {name for name in trainable if ".lora_" not in name}
    assert heads and all("modules_to_save" in name for name in heads)
    ids = torch.tensor([[3, 4, 5, 2], [6, 7, 8, 2]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert logits.shape == (2, 3) and logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for name, p in trainable.items() if name in heads)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for name, p in trainable.items() if "lora_B" in name)


@pytest.mark.parametrize(("task", "kind"), [("classify", "SEQ_CLS"), ("chat", "CAUSAL_LM"), ("complete", "CAUSAL_LM")])
def test_the_task_type_is_derived(task: str, kind: str) -> None:
    config = _place("Llama", task).peft_config["default"]
    assert config.task_type == kind and config.lora_alpha == 4 and config.fan_in_fan_out is False


def test_conv1d_is_turned_round_silently() -> None:
    assert _place("GPT2", "chat").peft_config["default"].fan_in_fan_out is True


def test_a_rank_wider_than_a_layer_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"--r is larger than .* is wide; got 64 and \d+; fix: at most --r \d+"):
        place(tiny.model("Llama", "causal"), Recipe.make(r=64), task="chat")


def test_a_base_that_carries_an_adapter_is_refused() -> None:
    model = _place("Llama", "chat")
    for wrapped in (model, model.get_base_model()):
        with pytest.raises(AdapterError, match="already carries an adapter"):
            place(wrapped, Recipe.make(), task="chat")


def test_the_layer_class_is_used() -> None:
    class Mine(nn.Module):
        pass

    model = tiny.model("Llama", "causal")
    with pytest.raises(TypeError, match="Mine"):  # peft builds the class it was given
        place(model, Recipe.make(r=2), task="chat", layer_classes={nn.Linear: Mine})
