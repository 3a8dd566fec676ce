"""Adapters and bases that the stack below hatrack takes in silence, or fails on without saying what is wrong.

Each is fed to `hatrack.load` as a person would, and refused with what, got and fix.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hatrack
from hatrack.adapter import config
from hatrack.adapter.card import AdapterCard
from hatrack.adapter.files import save_adapter
from hatrack.adapter.place import place
from hatrack.base.fingerprint import base_record
from hatrack.base.load import BaseOptions, load_base
from hatrack.base.sources import find_base
from hatrack.errors import AdapterError, HatrackError, WrongBase
from hatrack.recipe import Recipe
from tests.base import tiny

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _make(folder: Path, base: Path, task: str = "chat") -> Path:
    """An adapter with random numbers, as hatrack saves it."""
    files = find_base(str(base))
    labels = ["no", "yes"] if task == "classify" else []
    loaded = load_base(files, BaseOptions(task=task, labels=labels, device="cpu", dtype="float32"))  # type: ignore[arg-type]
    model = place(loaded.model, Recipe.make(r=2), task=task)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    hat = AdapterCard(name=folder.name, base=base_record(files), task=task, labels=labels)
    save_adapter(model, folder, hat, base=str(base))
    return folder


@pytest.fixture
def hat(tmp_path: Path, tiny_decoder: Path) -> Path:
    """A generator's adapter, to damage."""
    return _make(tmp_path / "hat", tiny_decoder)


def _refused(adapter: Path, **options: Any) -> HatrackError:
    with pytest.raises(HatrackError) as caught:
        hatrack.load(adapter, dtype="float32", **options)
    assert "\n" not in str(caught.value)
    return caught.value


def _set(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "GONE"}))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def test_the_good_one_is_loaded(hat: Path) -> None:
    assert hatrack.load(hat, dtype="float32").active == "hat"


def test_a_base_of_the_same_shapes_with_other_weights(hat: Path, tiny_decoder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_decoder, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    error = _refused(hat, base=str(other))
    assert isinstance(error, WrongBase) and error.what.startswith(f"{hat} was trained on other weights: {tiny_decoder}")
    assert str(error.got).startswith(f"{other}, ") and "--allow-other-base" in str(error.fix)


def test_another_bases_name(hat: Path, tiny_decoder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_decoder, tmp_path / "other")
    (hat / "hatrack.json").unlink()
    error = _refused(hat, base=str(tmp_path / "other"))
    assert isinstance(error, WrongBase) and error.what == f"{hat} names another base: {tiny_decoder}"
    assert error.got == str(tmp_path / "other") and "--allow-other-base" in str(error.fix)


def test_a_base_with_fewer_layers(tmp_path: Path) -> None:
    tiny.save(tmp_path / "deep/base", "Llama", "causal", num_hidden_layers=3)
    tiny.save(tmp_path / "flat/base", "Llama", "causal")
    adapter = _make(tmp_path / "hat", tmp_path / "deep/base")
    error = _refused(adapter, base=str(tmp_path / "flat/base"), allow_other_base=True)
    assert error.what == f"14 tensors do not fit in {adapter / WEIGHTS}"
    assert str(error.got).startswith("base_model.model.model.layers.2.") and "no place in the model" in str(error.got)
    assert error.fix == "give it the base it was trained on"


def test_a_classifiers_adapter_on_a_causal_base_and_the_other_way_round(
    tmp_path: Path, hat: Path, tiny_encoder: Path, tiny_decoder: Path
) -> None:
    classifier = _make(tmp_path / "classifier", tiny_encoder, "classify")
    with pytest.raises(AdapterError) as caught:
        hatrack.load(hat, dtype="float32").add(classifier)
    assert caught.value.what.startswith(
        "classifier cannot share this base in memory, which was loaded for the task chat"
    )
    assert caught.value.got == "task classify" and caught.value.fix == "load it by itself"
    _set(hat, task_type="SEQ_CLS")
    error = _refused(hat)
    assert error.what == f"{hat / CONFIG} and hatrack.json contradict each other"
    assert error.got == "task_type 'SEQ_CLS' and task chat" and error.fix == "copy the adapter again"


def test_missing_keys(hat: Path) -> None:
    _tensors(hat, lambda t: {name: tensor for name, tensor in t.items() if "layers.0.self_attn.q_proj" not in name})
    error = _refused(hat)
    assert (
        error.what == f"2 tensors do not fit in {hat / WEIGHTS}"
        and error.fix == "copy the adapter again: its file is incomplete"
    )
    assert str(error.got).count("q_proj.lora_") == 2 and str(error.got).count("missing from the file") == 2


def test_no_weights_file(hat: Path) -> None:
    (hat / WEIGHTS).unlink()
    error = _refused(hat)
    assert (
        error.what == f"{hat} has no {WEIGHTS}" and CONFIG in str(error.got) and error.fix == "copy the adapter again"
    )


def test_a_pickle(hat: Path) -> None:
    torch.save(load_file(hat / WEIGHTS), hat / "adapter_model.bin")
    (hat / WEIGHTS).unlink()
    error = _refused(hat)
    assert error.what == f"{hat / 'adapter_model.bin'} is a pickle, which can run code when it is opened"
    assert error.got == f"no {WEIGHTS}" and "torch.load(weights_only=True)" in str(error.fix)


@pytest.mark.parametrize("length", [0, 5, 400, -1])
def test_a_cut_or_empty_weights_file(hat: Path, length: int) -> None:
    (hat / WEIGHTS).write_bytes((hat / WEIGHTS).read_bytes()[:length])
    error = _refused(hat)
    assert error.what == f"{hat / WEIGHTS} is damaged or not a safetensors file"
    assert "bytes" in str(error.got) and error.fix == "copy the adapter again"


def test_a_malformed_config(hat: Path) -> None:
    path, good = hat / CONFIG, (hat / CONFIG).read_text()
    path.write_text(good[:50])
    error = _refused(hat)
    assert (error.what, error.fix) == (f"{path} is not valid JSON", "copy the adapter again")
    assert "Unterminated string" in str(error.got) or "line" in str(error.got)
    path.write_text(good)
    _set(hat, peft_type="GONE")
    error = _refused(hat)
    assert (error.what, error.got) == (f"{path} does not say what kind of adapter it is", "no peft_type")
    assert error.fix == 'if it is a LoRA adapter, set "peft_type": "LORA" in it'
    path.write_text(good)
    _set(hat, r="4")
    error = _refused(hat)
    assert (error.what, error.got, error.fix) == (f"{path} is malformed", "r '4'", "correct these fields in the file")
    path.write_text(good)
    _set(hat, lora_alpha=0)
    error = _refused(hat)
    assert (error.what, error.got) == (f"{path} turns its adapter off", "lora_alpha 0") and "--alpha" in str(error.fix)


def test_numbers_that_are_none(hat: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(name for name in tensors if "q_proj.lora_A" in name)
        return tensors | {name: tensors[name] * float("nan")}

    _tensors(hat, change)
    error = _refused(hat)
    assert (
        error.what == f"a tensor does not fit in {hat / WEIGHTS}"
        and error.fix == "copy the adapter again, or train it again with a lower --lr"
    )
    assert str(error.got).endswith("q_proj.lora_A.weight: holds values that are not finite")


@pytest.mark.parametrize("name", ["../A", "/abs/path", "a/b", "", "x" * 99])
def test_names_and_paths_that_lead_out_of_the_folder(hat: Path, name: str) -> None:
    content = json.loads((hat / "hatrack.json").read_text())
    if name:
        (hat / "hatrack.json").write_text(json.dumps(content | {"name": name}))
        error = _refused(hat)
        assert (error.what, error.got) == (f"{hat / 'hatrack.json'} is malformed", "no valid name")
        assert error.fix == "copy the adapter again"
        (hat / "hatrack.json").write_text(json.dumps(content))
    ready = hatrack.load(hat, dtype="float32")
    if name:
        with pytest.raises(AdapterError) as caught:
            ready.add(hat, name=name)
        assert caught.value.what == "invalid adapter name" and caught.value.got == repr(name)
        assert caught.value.fix == "use letters, digits, '.', '_' and '-', at most 64"


def test_a_name_that_is_a_part_of_the_base(hat: Path) -> None:
    content = json.loads((hat / "hatrack.json").read_text())
    (hat / "hatrack.json").write_text(json.dumps(content | {"name": "layers"}))
    assert hatrack.load(hat, dtype="float32").active == "layers"


def test_a_regular_expression_without_end(hat: Path) -> None:
    """With the limit that people meet; the next test shortens it."""
    _set(hat, target_modules="(([a-z._0-9]*)*)*X")
    began = time.monotonic()
    error = _refused(hat)
    assert time.monotonic() - began < 20
    assert error.what == f"{hat / CONFIG} has a regular expression that takes too long"
    assert error.got == "'(([a-z._0-9]*)*)*X' after 2 s" and error.fix == "name the layers in full"


@pytest.mark.parametrize("pattern", ["(([a-z._0-9]*)*)*X", "(.*)*(.*)*(.*)*X"])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_no_field_can_hold_one(hat: Path, monkeypatch: pytest.MonkeyPatch, field: str, pattern: str) -> None:
    monkeypatch.setattr(config, "PATTERN_SECONDS", 0.25)
    _set(hat, **{field: {pattern: 4} if field.endswith("pattern") else pattern})
    assert "takes too long" in _refused(hat).what


def test_a_harmless_regular_expression_is_followed(hat: Path) -> None:
    expected = hatrack.load(hat, dtype="float32").predict("what film ?", max_new_tokens=4)
    _set(hat, target_modules=r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj")
    assert hatrack.load(hat, dtype="float32").predict("what film ?", max_new_tokens=4) == expected


def test_a_huge_rank_is_refused_before_anything_is_allocated(hat: Path) -> None:
    _set(hat, r=2**30)  # 2 TiB on this small base
    error = _refused(hat)
    assert error.what == f"{hat / CONFIG} asks for a larger rank than {WEIGHTS} has"
    assert error.got == "1073741824 and 2" and error.fix == "copy the adapter again"
    _set(hat, r=2, rank_pattern={"q_proj": 2**30})
    assert _refused(hat).got == "1073741824 and 2"


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_replication": [[0, 2], [0, 2]]},
        {"trainable_token_indices": [0]},
        {"trainable_token_indices": "all"},
        {"alora_invocation_tokens": [3]},
        {"of_a_later_peft": True},
        {"modules_to_save": ["model"]},
        {"layers_pattern": "(a+)+$", "layers_to_transform": [0]},
    ],
    ids=str,
)
def test_fields_that_would_change_the_base_or_are_unknown(hat: Path, fields: dict[str, Any]) -> None:
    _set(hat, **fields)
    error = _refused(hat)
    assert str(hat) in error.what and error.fix


def test_fields_that_name_code_run_none(hat: Path, tmp_path: Path) -> None:
    expected = hatrack.load(hat, dtype="float32").predict("what film ?", max_new_tokens=4)
    _set(
        hat,
        auto_mapping={"base_model_class": "run", "parent_library": "evil_module"},
        megatron_config={"x": 1},
        megatron_core="evil_module",
    )
    assert hatrack.load(hat, dtype="float32").predict("what film ?", max_new_tokens=4) == expected


def test_a_foreign_adapter_with_an_impossible_field_says_so(hat: Path) -> None:
    content = json.loads((hat / "hatrack.json").read_text())
    (hat / "hatrack.json").write_text(json.dumps(content | {"recipe": {"quantize": {"a": 1}}}))
    error = _refused(hat)
    assert (error.what, error.got) == (f"{hat / 'hatrack.json'} is malformed", "no valid recipe")
