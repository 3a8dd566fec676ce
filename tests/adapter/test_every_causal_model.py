"""Every causal model of transformers, full-sized and without weights: `auto` finds its attention and touches no router,
and what the headers of its files tell is what the loaded model has."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.utils import transformers_weight_conversion as conversion
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hatrack.adapter.count import EXPERT_NAMES, joined_experts, linear_layers_from_shapes
from hatrack.adapter.place import linear_layers, output_modules, place
from hatrack.adapter.targets import ModelLayers, choose_targets
from hatrack.base.description import describe_folder
from hatrack.base.header import ENCODERS, TensorInfo, task_shapes
from hatrack.evaluate.loss import losses
from hatrack.layers.fast_base import speed_up
from hatrack.layers.fast_lora import LAYER_CLASSES
from hatrack.planning.model_shape import describe_model
from hatrack.recipe import Recipe

# fmt: off
COMMON = (
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox",
    "bloom", "opt", "falcon", "mpt", "gptj", "codegen", "granite", "starcoder2", "mixtral", "qwen2_moe", "qwen3_moe",
    "qwen3_next", "deepseek_v3", "olmoe", "gpt_oss", "granitemoe", "jetmoe", "phimoe", "llama4_text", "mamba",
    "mamba2", "jamba", "falcon_h1", "gemma3", "lfm2",
)
# fmt: on
WITHOUT_ATTENTION = {
    "mamba": "state-space",
    "mamba2": "state-space",
    "falcon_mamba": "state-space",
    "bamba": "its default configuration has no attention layers",
    "granitemoehybrid": "its default configuration has no attention layers",
    "xlnet": "its attention is tensors of three dimensions",
    "xlm": "its attention is called lin",
    "xlstm": "no attention",
}
# fmt: off
NO_DEFAULT = (
    "cohere_compass_text", "dbrx", "dots1", "gemma3n", "gemma4_assistant", "gemma4_unified_assistant",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "lfm2_moe", "ministral", "nemotron", "qwen4_exp", "qwen4_exp_text",
    "reformer",
)
# fmt: on
"""Their default configuration makes no model (without another library, or values of a real checkpoint)."""
FUSED_OTHERWISE = {"axk2", "hrm_text", "inkling2_text", "zamba", "zamba2"}
"""Their files split or share projections that the model does not, so that headers alone do not tell the layers."""
ATTENTION = re.compile(r"attn|attention|self_att|[qkv]_proj|mixer|temporal_block", re.IGNORECASE)
NOT_TO_TOUCH = re.compile(
    r"router|\.gate$|_expert_gate|shared_experts_gate|indexer|^lm_head|embed_out|vision|audio|image|"
    r"(mixer|mamba)\.(out_proj|x_proj|dt_proj)$",
    re.IGNORECASE,
)
OTHERS = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {*COMMON, *NO_DEFAULT} - ENCODERS)


def empty_model(kind: str) -> Any:
    config = AutoConfig.for_model(kind)
    if getattr(config, "is_encoder_decoder", False):
        pytest.skip("an encoder-decoder, which no task that generates uses")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def header_of(model: Any) -> dict[str, TensorInfo]:
    """The tensors that `save_pretrained` would write: experts one by one, tied weights once."""
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    saved = revert_weight_conversion(model, kept)
    return {name: TensorInfo(tuple(t.shape), "F32", Path("x"), 0, 4 * t.numel()) for name, t in saved.items()}


def check(kind: str) -> None:
    model = empty_model(kind)
    linears, shapes = linear_layers(model), {name: tuple(p.shape) for name, p in model.named_parameters()}
    modules, experts = [name for name, _ in model.named_modules() if name], joined_experts(shapes, kind)
    for targets in ("auto", "all-linear"):
        choice = choose_targets(
            ModelLayers(linears, heads=output_modules(model), modules=modules, experts=experts), targets, None, r=8
        )
        assert not [name for name in choice.names if NOT_TO_TOUCH.search(name)]
        assert all(min(linears[name]) >= 8 for name in choice.names)
    choice = choose_targets(ModelLayers(linears, modules=modules, experts=experts), "auto", None, r=8)
    assert any(ATTENTION.search(name) for name in choice.names) or kind in WITHOUT_ATTENTION
    assert bool(experts.modules) == any("expert" in name.lower() and len(shape) == 3 for name, shape in shapes.items())
    if kind in FUSED_OTHERWISE:
        return
    config = json.loads(json.dumps(model.config.to_dict(), default=str)) | {"architectures": [type(model).__name__]}
    told = task_shapes(config, header_of(model), "chat")
    there = linear_layers_from_shapes(told, kind)
    chosen = choose_targets(ModelLayers(there, experts=joined_experts(told, kind)), "auto", None, r=8)
    assert Counter(there[name] for name in chosen.names) == Counter(linears[name] for name in choice.names)
    assert bool(joined_experts(told, kind).modules) == bool(experts.modules)


@pytest.mark.parametrize("kind", COMMON)
def test_a_common_model_is_adapted_where_it_should_be(kind: str) -> None:
    check(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_model_is_adapted_where_it_should_be(kind: str) -> None:
    check(kind)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss", "granitemoe"])
def test_headers_count_the_parameters_of_joined_experts(kind: str) -> None:
    model = empty_model(kind)
    config = json.loads(json.dumps(model.config.to_dict(), default=str)) | {"architectures": [type(model).__name__]}
    told = task_shapes(config, header_of(model), "chat")
    assert sum(torch.Size(shape).numel() for shape in told.values()) == sum(p.numel() for p in model.parameters())


def test_the_names_that_peft_takes_for_experts_are_its_own() -> None:
    """peft turns such targets into the experts' tensors, also where they are meant for dense layers."""
    told = {
        kind: tuple(name for name in mapping if name != "gate")
        for kind, pattern in conversion._MODEL_TO_CONVERSION_PATTERN.items()
        if (mapping := conversion._MOE_TARGET_MODULE_MAPPING.get(pattern)) and not kind.endswith("Model")
    }
    assert {kind: set(names) for kind, names in EXPERT_NAMES.items()} == {kind: set(n) for kind, n in told.items()}


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
ROUTED |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
FOUR = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
TINY: dict[str, dict[str, Any]] = {
    "Mixtral": FOUR,
    "Qwen2Moe": FOUR | {"shared_expert_intermediate_size": 32},
    "Qwen3Moe": FOUR | {"head_dim": 8},
    "Olmoe": FOUR,
    "GptOss": FOUR | {"head_dim": 8},
    "GraniteMoe": FOUR,
    "JetMoe": FOUR | {"kv_channels": 8},
    "Phimoe": FOUR,
    "Llama4Text": FOUR | {"num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 64},
    "DeepseekV2": ROUTED | LATENT | {"num_key_value_heads": 4},
    "DeepseekV3": ROUTED | LATENT | {"num_key_value_heads": 4},
    "Glm4Moe": ROUTED | {"head_dim": 8},
    "Qwen3Next": FOUR
    | {"shared_expert_intermediate_size": 32, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "GraniteMoeHybrid": FOUR | MAMBA | {"shared_intermediate_size": 32, "layer_types": ["mamba", "attention"]},
    "Mamba": {},
    "Mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "FalconMamba": {},
    "FalconH1": MAMBA | {"mamba_d_ssm": 64},
    "Dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
    | {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}}
    | {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
}


@pytest.mark.parametrize("kind", TINY)
def test_an_adapter_of_the_default_rank_learns_everywhere_it_is(kind: str, tmp_path: Path) -> None:
    """Placed, counted as from the base's files, its loss is hatrack's own, and no part of it is without a gradient."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SMALL | TINY[kind]))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).requires_grad_(False)
    speed_up(model, None, "auto")
    recipe = Recipe.make(targets="auto")
    placed = place(model, recipe, task="chat", layer_classes=LAYER_CLASSES)
    counted = describe_model(describe_folder(tmp_path), recipe, task="chat", labels=0).counts
    assert (counted.trainable, counted.total) == placed.get_nb_trainable_parameters()
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    values = losses(placed, batch, "chat")[0]
    with torch.no_grad():
        logits = placed(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-5)
    values.sum().backward()  # type: ignore[no-untyped-call]
    without = [n for n, p in placed.named_parameters() if "lora_B" in n and (p.grad is None or not p.grad.any())]
    assert not without
