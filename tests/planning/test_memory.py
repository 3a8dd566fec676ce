"""Bytes by term, in closed form; what a base keeps for its backward pass, against what torch keeps."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hatrack.adapter.place import place
from hatrack.base.description import BaseDescription
from hatrack.base.header import TensorInfo
from hatrack.evaluate.loss import losses
from hatrack.kernels.limits import CACHED_MATMULS, LOGITS_BLOCK
from hatrack.layers.fast_base import speed_up
from hatrack.layers.fast_lora import LAYER_CLASSES
from hatrack.planning.memory import (
    CACHED_MATMUL_BYTES,
    MemoryRequest,
    Method,
    MicroBatch,
    training_bytes,
)
from hatrack.planning.model_shape import Dimensions, ModelShape, describe_model, dimensions_of
from hatrack.recipe import Recipe
from tests.planning.test_fit import llama

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}
MODELS: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, intermediate_size=160, num_key_value_heads=2)),
    "bert": (BertForSequenceClassification, BertConfig(**SMALL, intermediate_size=160)),
}


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}, (4096, 11008, 32)),
        ({"n_embd": 768, "n_layer": 12, "n_inner": None}, (768, 3072, 12)),
        ({"dim": 768, "n_layers": 6, "hidden_dim": 3072}, (768, 3072, 6)),
        ({"d_model": 512, "d_ff": 2048, "num_layers": 6}, (512, 2048, 6)),
        ({"text_config": {"hidden_size": 8, "num_hidden_layers": 1}}, (8, 32, 1)),
    ],
)
def test_shapes_under_any_name(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    found = dimensions_of(config)
    assert (found.hidden, found.intermediate, found.layers) == shape
    assert dimensions_of({"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}).key == 16


def model(**options: Any) -> ModelShape:
    return describe_model(llama(), Recipe.make(base="x", data="y", **options), task="chat", labels=0)


def terms(tokens: int = 512, method: Method | None = None, dtype: str = "bfloat16", **options: Any) -> dict[str, int]:
    batch = MicroBatch(4, tokens // 4, tokens)
    return training_bytes(MemoryRequest(model(**options), method or Method(), dtype, batch, tokens))


def test_the_shape_of_a_7b() -> None:
    found = model(targets="q_proj,v_proj")
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    assert found.dims == Dimensions(4096, 11008, 32, 32000, 32, 4096, 4096, gated=True)
    assert found.matmul_weights == 32 * layer and found.largest_matrix == 4096 * 11008 and found.linear_layers == 7 * 32
    assert found.other_weights == 2 * 32000 * 4096 + 65 * 4096 and found.frozen == 6_738_415_616
    assert found.counts.trainable == 32 * 2 * 8 * (4096 + 4096) == 4_194_304
    assert found.backward_layers == 32 and model(layers="top-10").backward_layers == 10
    assert found.disk_bytes == 2 * 6_738_415_616 and found.stored_dtype == "bfloat16"


def test_frozen_weights_cost_their_format_and_trained_ones_sixteen_bytes() -> None:
    found = model()
    assert terms()["weights"] == 2 * found.frozen and terms(dtype="float32")["weights"] == 4 * found.frozen
    trained = terms()
    assert trained["adapter"] + trained["gradients"] + trained["optimizer"] == 16 * found.counts.trainable
    full = terms(method=Method(full=True))
    assert full["weights"] + full["gradients"] + full["optimizer"] == 16 * found.frozen
    four = terms(method=Method(quantize="4bit"))["weights"]
    assert four == found.matmul_weights * 9 // 16 + 2 * found.other_weights
    streamed = terms(method=Method(streamed=True))["weights"]
    assert streamed == 2 * found.matmul_weights // 32  # one layer as it lies on the disk, larger than the head
    assert terms(method=Method(streamed=True), dtype="float32")["weights"] == streamed  # and no copy in float32


def test_activations_grow_with_tokens_and_less_when_computed_again() -> None:
    assert terms(1024)["activations"] == 2 * terms(512)["activations"] > 0
    again = terms(512, Method(checkpointing=True))["activations"]
    kept = terms(512)["activations"]
    assert again == 512 * 4096 * 2 * 32 + kept // 32
    assert terms(512, layers="top-8")["activations"] == kept // 4


def test_logits_grow_until_a_chunk_is_full() -> None:
    assert terms(128)["logits"] == 2 * terms(64)["logits"] > 0
    assert terms(4096)["logits"] == terms(2048)["logits"] == 2 * LOGITS_BLOCK * 2


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("targets", ["auto", "attention"])
@pytest.mark.parametrize("layers", ["all", "top-2"])
def test_what_is_kept_is_what_torch_keeps(kind: str, targets: str, layers: str) -> None:
    """Counted by torch's own hooks on a small model, to within 5% (a batch has a few tensors beside the layers)."""
    make, config = MODELS[kind]
    torch.manual_seed(0)
    model = make(config).requires_grad_(False)
    names = {"llama": "q_proj,v_proj", "bert": "query,value"}[kind] if targets == "attention" else targets
    recipe = Recipe.make(base="x", data="y", targets=names, layers=layers, dropout=0.05)
    task = "chat" if kind == "llama" else "classify"
    tensors = {
        name: TensorInfo(tuple(tensor.shape), "F32", Path(), 0, 4 * tensor.numel())
        for name, tensor in model.named_parameters()
    }
    found = describe_model(BaseDescription("", Path(), config.to_dict(), tensors), recipe, task=task, labels=2)
    speed_up(model)
    wrapped = place(model, recipe, task=task, layer_classes=LAYER_CLASSES).train()
    assert (found.counts.trainable, found.counts.total) == wrapped.get_nb_trainable_parameters()
    ids = torch.randint(3, 90, (16, 64))
    labels = ids if task == "chat" else torch.randint(2, (16,))
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        values = losses(wrapped, batch, task)[0]
    run = MemoryRequest(found, Method(), "float32", MicroBatch(16, 64, 1008), 1024)
    planned = training_bytes(run)["activations"]
    assert sum(kept.values()) == pytest.approx(planned, rel=0.05), values.shape


def test_compiled_matmuls_are_counted_where_they_are_stored() -> None:
    def found(compiled: bool, accelerator: bool = False) -> dict[str, int]:
        batch = MicroBatch(4, 128, 512)
        run = MemoryRequest(model(), Method(), "bfloat16", batch, 512, scored=batch)
        return training_bytes(dataclasses.replace(run, caches_primitives=compiled, accelerator=accelerator))

    assert found(True)["matmuls"] == CACHED_MATMULS * CACHED_MATMUL_BYTES and found(False)["matmuls"] == 0
    assert found(True) == found(False) | {"matmuls": CACHED_MATMULS * CACHED_MATMUL_BYTES}
    assert found(True, accelerator=True)["matmuls"] == 0
