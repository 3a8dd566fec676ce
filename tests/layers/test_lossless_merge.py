"""Merged and un-merged as often as one likes, the base is what it was, bit for bit; peft's own layers drift."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft import get_peft_model as stock_get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import hatrack
from tests.base import tiny

IDS = torch.tensor([[3, 4, 5, 6]])


def _wrapped(make: Any, base: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": "all-linear"}
    return make(base, LoraConfig(**settings | options))


def _digest(model: Any) -> str:
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.get_base_model().state_dict().items()):
        if "lora_" not in name:
            hasher.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe merge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_21_times_leave_the_base_bit_for_bit(dtype: torch.dtype, safe: bool) -> None:
    model = _wrapped(hatrack.get_peft_model, tiny.model("Llama", "causal").to(dtype))
    _logits(model)  # from the second pass on, layers of one input are computed together, which rounds otherwise
    digest, alone = _digest(model), _logits(model)
    for _ in range(21):
        model.merge_adapter(safe_merge=safe)
        assert _digest(model) != digest
        merged = _logits(model)
        model.unmerge_adapter()
        assert _digest(model) == digest
    assert torch.equal(_logits(model), alone)
    torch.testing.assert_close(merged, alone, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 0.05)


def test_pefts_own_layers_drift() -> None:
    """What this is for: if it no longer fails, hatrack's own merging can go."""
    model = _wrapped(stock_get_peft_model, tiny.model("Llama", "causal").to(torch.bfloat16))
    digest = _digest(model)
    for _ in range(21):
        model.merge_adapter()
        model.unmerge_adapter()
    assert _digest(model) != digest


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["up"]}], ids=str)
def test_variants_are_undone_too(options: dict[str, Any]) -> None:
    base = nn.Sequential()
    base.up, base.down = nn.Linear(12, 20), nn.Linear(20, 12)
    model = _wrapped(hatrack.get_peft_model, base.to(torch.bfloat16), **{"target_modules": ["up", "down"]} | options)
    digest = _digest(model)
    for _ in range(3):
        model.merge_adapter()
        assert _digest(model) != digest
        model.unmerge_adapter()
        assert _digest(model) == digest


def test_several_adapters_moves_and_failures(tiny_decoder: Path) -> None:
    model = _wrapped(hatrack.get_peft_model, AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.bfloat16))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    digest = _digest(model)
    model.merge_adapter(["default", "second"])
    model.float()  # what was kept follows the model
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert _digest(model) == digest
    model.merge_adapter(["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells that one is merged already
        model.merge_adapter(["default", "second"])
    model.unmerge_adapter()
    assert _digest(model) == digest

    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True, adapter_names=["default"])
    assert not layer.merged and _digest(model) == digest
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_merging_for_good_still_works() -> None:
    model = _wrapped(hatrack.get_peft_model, tiny.model("Llama", "causal"))
    expected = _logits(model)
    plain = model.merge_and_unload()
    assert not any("lora_" in name for name in plain.state_dict())
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_mapped_base_stays_mapped_while_merged(tiny_decoder: Path) -> None:
    """What is kept is the tensor that transformers mapped from the file, not a copy of it."""
    base = AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.float32)
    model = _wrapped(hatrack.get_peft_model, base)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    place = layer.base_layer.weight.data_ptr()
    model.merge_adapter()
    assert layer._before["weight"].data_ptr() == place != layer.base_layer.weight.data_ptr()
    model.unmerge_adapter()
    assert layer.base_layer.weight.data_ptr() == place
