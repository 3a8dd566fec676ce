"""Which layers get an adapter, on twenty architectures; and what is refused."""

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hatrack.adapter.count import Experts
from hatrack.adapter.place import head_modules, linear_layers, place
from hatrack.adapter.targets import ModelLayers, check_rank, choose_targets, layer_counts
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
    choice = choose_targets(ModelLayers(linears, heads=heads, modules=modules), "auto", None)
    stacks = layer_counts(choice.names)
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


def test_placing_says_nothing_of_what_nobody_can_change() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        place(tiny.model("Llama", "causal"), Recipe.make(base="b", r=2), task="complete")


def test_short_names_are_short() -> None:
    assert choose_targets(ModelLayers(LLAMA), "auto", None).target_modules == (
        "q_proj",
        "v_proj",
        "up_proj",
        "down_proj",
    )
    bert = tiny.model("Bert", "classify", num_labels=2)
    modules = [name for name, _ in bert.named_modules() if name]
    choice = choose_targets(ModelLayers(linear_layers(bert), heads=["classifier"], modules=modules), "auto", None)
    assert set(choice.target_modules) == {"query", "key", "value", "output.dense", "intermediate.dense"}


def test_the_last_layers_only() -> None:
    choice = choose_targets(ModelLayers(LLAMA), "q_proj", 2)
    assert (
        choice.names == choice.target_modules == ("model.layers.2.self_attn.q_proj", "model.layers.3.self_attn.q_proj")
    )
    with pytest.raises(RecipeError, match="top-5 is more than this model has; got 4 layers; fix: use --layers all"):
        choose_targets(ModelLayers(LLAMA), "auto", 5)


def test_all_linear_takes_everything_but_the_output() -> None:
    assert set(choose_targets(ModelLayers(LLAMA | {"model.project": (8, 8)}), "all-linear", None).names) == set(
        LLAMA
    ) - {"lm_head"} | {"model.project"}


ATTENTION = {f"m.layers.{i}.self_attn.q_proj": (32, 32) for i in range(2)}
DIALS = {
    f"m.layers.{i}.{name}": sides
    for i in range(2)
    for name, sides in {
        "mlp.gate": (32, 4),
        "mlp.router": (32, 4),
        "mlp.router.layer": (32, 4),
        "mlp.shared_expert_gate": (32, 1),
        "feed_forward.router_mlp.fc1": (32, 32),
        "self_attn.indexer.wq_b": (32, 32),
        "altup.modality_router": (32, 4),
    }.items()
}


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_routers_never_get_an_adapter(targets: str) -> None:
    assert set(choose_targets(ModelLayers(ATTENTION | DIALS), targets, None).names) == set(ATTENTION)


@pytest.mark.parametrize("name", ["gate", "router", "shared_expert_gate", "modality_router"])
def test_a_router_that_is_named_is_refused(name: str) -> None:
    with pytest.raises(TargetError, match=f"'{name}' sends tokens to experts; got a model with q_proj; fix: use those"):
        choose_targets(ModelLayers(ATTENTION | DIALS), f"q_proj,{name}", None)


def test_experts_that_are_joined_are_refused_by_name_and_told_of() -> None:
    modules, experts = [*ATTENTION, "m.layers.0.mlp.experts"], Experts(("m.layers.0.mlp.experts",), ("w1", "w2", "w3"))
    for name in ("experts", "w1", "mlp.w1"):
        with pytest.raises(TargetError, match=f"^{name}: each layer joins its experts into one tensor"):
            choose_targets(ModelLayers(ATTENTION, modules=modules, experts=experts), name, None)
    with pytest.raises(TargetError, match="'fc' matches no layer; got a model with q_proj, whose experts are joined"):
        choose_targets(ModelLayers(ATTENTION, modules=modules, experts=experts), "fc", None)
    dense = {"m.layers.0.mlp.w1": (32, 32)}
    choice = choose_targets(ModelLayers(ATTENTION | dense, experts=experts), "auto", None)
    assert set(choice.names) == set(ATTENTION)
    assert choice.notes == (
        "no adapter on the experts: each layer joins them into one tensor, which takes none",
        "no adapter on 1 layer beside them, which peft takes for experts by name (w1)",
    )


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_layers_much_narrower_than_the_rank_are_left_out_and_others_refused(targets: str) -> None:
    dials = {"m.layers.0.mlp.dt": (32, 4), "m.layers.0.mlp.one": (32, 1), "m.layers.0.mlp.k_proj": (32, 8)}
    choice = choose_targets(ModelLayers(ATTENTION | dials), targets, None, r=8)
    assert choice.notes == ("no adapter on 2 layers narrower than --r 8 (dt, one)",)
    assert set(choice.names) == set(ATTENTION) | {"m.layers.0.mlp.k_proj"}
    assert choose_targets(ModelLayers(ATTENTION | dials), targets, None, r=4).notes == (
        "no adapter on 1 layer narrower than --r 4 (one)",
    )
    with pytest.raises(RecipeError, match=r"--r is larger than m\.layers\.0\.mlp\.k_proj is wide; got 16 and 8"):
        check_rank(16, choose_targets(ModelLayers(ATTENTION | dials), targets, None, r=16), ATTENTION | dials)


def test_parts_that_text_does_not_pass_are_left_out() -> None:
    seen = {
        f"m.{part}.layers.0.self_attn.q_proj": (32, 32) for part in ("vision_tower", "audio_tower", "image_encoder")
    }
    for targets in ("auto", "all-linear"):
        assert set(choose_targets(ModelLayers(ATTENTION | seen), targets, None).names) == set(ATTENTION)
    assert set(choose_targets(ModelLayers(ATTENTION | seen), "q_proj", None).names) == set(ATTENTION) | set(seen)


def test_of_a_state_space_layer_only_what_its_kernels_call_is_adapted() -> None:
    mixer = {f"m.layers.0.mixer.{name}": (32, 32) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    choice = choose_targets(ModelLayers(mixer), "auto", None)
    assert choice.names == ("m.layers.0.mixer.in_proj",)
    assert choice.why == "state-space projections"
    with pytest.raises(TargetError, match="'out_proj' is read directly by state-space kernels, which skip adapters"):
        choose_targets(ModelLayers(mixer), "out_proj", None)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["self_attn.q_proj"], "attention projections"),
        (["self_attn.q_proj", "mlp.up_proj"], "attention and MLP projections"),
        (
            ["mlp.shared_expert.up_proj", "attention.query", "output.dense"],
            "attention, shared expert and MLP projections",
        ),
        (["ff.layer_1"], "MLP projections"),
    ],
)
def test_what_is_adapted_is_said_truly(names: list[str], why: str) -> None:
    assert choose_targets(ModelLayers({f"m.layers.0.{name}": (8, 8) for name in names}), "auto", None).why == why


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
        choose_targets(ModelLayers(LLAMA, modules=modules), targets, None)


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
        with pytest.raises(AdapterError, match="already has an adapter"):
            place(wrapped, Recipe.make(), task="chat")


def test_the_layer_class_is_used() -> None:
    class Mine(nn.Module):
        pass

    model = tiny.model("Llama", "causal")
    with pytest.raises(TypeError, match="Mine"):  # peft builds the class it was given
        place(model, Recipe.make(r=2), task="chat", layer_classes={nn.Linear: Mine})
