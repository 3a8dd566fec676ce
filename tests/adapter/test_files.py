"""Adapters on disk: what is written, what plain peft makes of it, and every broken folder refused by name."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from hatrack.adapter.attach import attach, detach
from hatrack.adapter.card import AdapterCard, read_card
from hatrack.adapter.files import read_adapter, save_adapter
from hatrack.adapter.place import place
from hatrack.errors import AdapterError, MachineError
from hatrack.recipe import Recipe
from tests.base import tiny

HAT = AdapterCard(name="hat", base={"source": "somewhere"}, task="classify", labels=["no", "yes"])
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def _base(labels: int = 2, kind: str = "Bert") -> Any:
    if kind == "Llama":
        return tiny.model("Llama", "causal").eval()
    return tiny.model(kind, "classify", num_labels=labels, pad_token_id=0).eval()


def _saved(
    folder: Path, *, labels: int = 2, kind: str = "Bert", seed: int = 1, base: str = "b", **options: Any
) -> torch.Tensor:
    """Saves a random adapter, and gives its logits."""
    task = "chat" if kind == "Llama" else "classify"
    model = place(_base(labels, kind), Recipe.make(r=2, **options), task=task)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    names = [f"label {index}" for index in range(labels)] if task == "classify" else []
    save_adapter(
        model, folder, AdapterCard(name=folder.name, base={"source": base}, task=task, labels=names), base=base
    )
    return _logits(model)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits  # type: ignore[no-any-return]


def _digest(model: Any) -> str:
    """Of the base's own weights, whatever is wrapped round them."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    hasher = hashlib.sha256()
    for name, tensor in sorted(bare.state_dict().items()):
        if "lora_" not in name and ".modules_to_save." not in name:
            hasher.update(name.replace("base_layer.", "").replace("original_module.", "").encode())
            hasher.update(tensor.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def test_the_folder_has_what_it_needs_and_nothing_of_the_base(tmp_path: Path) -> None:
    _saved(tmp_path / "hat")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "hatrack.json"]
    assert sorted(path.name for path in (tmp_path / "hat").iterdir()) == names
    tensors = load_file(tmp_path / "hat/adapter_model.safetensors")
    assert all(".lora_" in name or ".classifier." in name for name in tensors)
    config = json.loads((tmp_path / "hat/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"]) and config["base_model_name_or_path"] == "b"
    assert config["modules_to_save"] == ["classifier", "score"] and config["task_type"] == "SEQ_CLS"
    card = (tmp_path / "hat/README.md").read_text()
    assert card.startswith('---\nbase_model: "b"\nlibrary_name: peft\n') and "label 0, label 1" in card
    assert read_card(tmp_path / "hat") == read_adapter(tmp_path / "hat").card


def test_the_textbook_recipe_on_distilbert_is_under_4_megabytes(tmp_path: Path) -> None:
    model = DistilBertForSequenceClassification(DistilBertConfig(num_labels=2))
    wrapped = place(model, Recipe.make(r=8, targets="q_lin,v_lin"), task="classify")
    save_adapter(wrapped, tmp_path / "hat", HAT, base="distilbert-base-uncased")
    size = sum(path.stat().st_size for path in (tmp_path / "hat").iterdir())
    assert 739_586 * 4 < size < 4_000_000
    tensors = load_file(tmp_path / "hat/adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == 739_586


PLAIN_PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
base, folder, kind = sys.argv[1:]
make = AutoModelForCausalLM if kind == "Llama" else AutoModelForSequenceClassification
model = PeftModel.from_pretrained(make.from_pretrained(base), folder).eval()
ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
with torch.no_grad():
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
assert not any(name.startswith("hatrack") for name in sys.modules)
print(json.dumps(logits.tolist()))
"""


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_plain_peft_gives_the_same_logits_in_its_own_process(tmp_path: Path, kind: str) -> None:
    _base(kind=kind).save_pretrained(tmp_path / "base")
    expected = _saved(tmp_path / "hat", kind=kind, base=str(tmp_path / "base"))
    command = [sys.executable, "-c", PLAIN_PEFT, str(tmp_path / "base"), str(tmp_path / "hat"), kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected)


def test_what_is_attached_is_what_was_saved_and_frozen(tmp_path: Path) -> None:
    expected = _saved(tmp_path / "hat")
    model = attach(_base(), tmp_path / "hat", "hat")
    torch.testing.assert_close(_logits(model), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    with model.disable_adapter():
        torch.testing.assert_close(_logits(model), _logits(_base()))


def test_classifiers_with_other_labels_share_a_base_that_never_changes(tmp_path: Path) -> None:
    sizes = {"two": 2, "three": 3, "five": 5}
    expected = {name: _saved(tmp_path / name, labels=count, seed=count) for name, count in sizes.items()}
    base = _base()
    digest = _digest(base)
    bare = _logits(base)
    model = attach(base, tmp_path / "three", "three")
    for name in ("two", "five"):
        model = attach(model, tmp_path / name, name)
    for name in ("five", "two", "three", "five"):
        model.set_adapter(name)
        torch.testing.assert_close(_logits(model), expected[name])
    model.set_adapter("two")
    detach(model, "three")
    model = attach(model, tmp_path / "three", "again")
    for name, same in (("again", "three"), ("two", "two")):
        model.set_adapter(name)
        torch.testing.assert_close(_logits(model), expected[same])
    with model.disable_adapter():
        torch.testing.assert_close(_logits(model), bare)
    assert _digest(model) == digest


def _change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in (config | fields).items() if value != "GONE"}))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def _first(tensors: dict[str, torch.Tensor], part: str = "lora_A") -> str:
    return next(name for name in sorted(tensors) if part in name)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: shutil.rmtree(f), "there is no such adapter folder; got .*hat; fix: hatrack list"),
    "no config": (
        lambda f: (f / "adapter_config.json").unlink(),
        "hat has no adapter_config.json; got README.md, .*; fix: give the folder",
    ),
    "no JSON": (
        lambda f: (f / "adapter_config.json").write_text("{"),
        "adapter_config.json is not valid JSON; got .*; fix: copy",
    ),
    "a list": (
        lambda f: (f / "adapter_config.json").write_text("[]"),
        "adapter_config.json must hold one JSON object; got list",
    ),
    "no peft_type": (
        lambda f: _change(f, peft_type="GONE"),
        "adapter_config.json does not say what kind of adapter it is; got no peft_type",
    ),
    "another kind": (
        lambda f: _change(f, peft_type="IA3"),
        "is not the config of a LoRA adapter; got peft_type 'IA3'; fix: hatrack loads LoRA",
    ),
    "r as text": (
        lambda f: _change(f, r="4"),
        "adapter_config.json is malformed; got r '4'; fix: correct these fields",
    ),
    "r of zero": (lambda f: _change(f, r=0), "adapter_config.json is malformed; got r 0"),
    "alpha as text": (lambda f: _change(f, lora_alpha="x"), "is malformed; got lora_alpha 'x'"),
    "a changed base": (
        lambda f: _change(f, init_lora_weights="pissa"),
        "was trained on a base whose weights were changed first",
    ),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "hat has no adapter_model.safetensors; got README.md",
    ),
    "a pickle": (
        lambda f: torch.save({}, (f / "adapter_model.safetensors").rename(f / "adapter_model.bin")),
        "is a pickle, which can run code when it is opened; got no adapter_model.safetensors; fix: ask for safetensors",
    ),
    "empty weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
        "adapter_model.safetensors is damaged",
    ),
    "cut weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        "adapter_model.safetensors is damaged or not a safetensors file; got .*; fix: copy the adapter again",
    ),
    "no tensors": (lambda f: _tensors(f, lambda t: {}), "adapter_model.safetensors holds no tensors"),
    "a bad hatrack.json": (
        lambda f: (f / "hatrack.json").write_text('{"name": 1}'),
        "hatrack.json is malformed; got no valid name",
    ),
    "missing keys": (
        lambda f: _tensors(f, lambda t: {n: v for n, v in t.items() if n != _first(t)}),
        "a tensor does not fit in .*model.safetensors; got .*lora_A.weight: missing from the file; fix: copy",
    ),
    "extra keys": (
        lambda f: _tensors(f, lambda t: t | {"base_model.model.x.lora_A.weight": torch.ones(2, 2), "y": torch.ones(1)}),
        "2 tensors do not fit in .*; got .*: no place in the model; .*: no place in the model",
    ),
    "another shape": (
        lambda f: _tensors(f, lambda t: t | {_first(t): torch.ones(2, 7)}),
        r"lora_A.weight: file \(2, 7\), model \(2, 16\)",
    ),
    "not a number": (
        lambda f: _tensors(f, lambda t: t | {_first(t): t[_first(t)] * float("nan")}),
        "lora_A.weight: holds values that are not finite",
    ),
    "wrong targets": (
        lambda f: _change(f, target_modules=["nothing"]),
        r"adapter_config.json names no layer of this base; got .*nothing.*; the base has .*query.*; fix: give",
    ),
    "no head": (
        lambda f: _tensors(f, lambda t: {n: v for n, v in t.items() if "lora_" in n}),
        "adapter_model.safetensors has no classification head; got no classifier; fix: .* the head in modules_to_save",
    ),
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
@pytest.mark.parametrize("case", BAD)
def test_broken_adapters_are_refused_and_change_nothing(tmp_path: Path, case: str, wrapped: bool) -> None:
    damage, message = BAD[case]
    good = _saved(tmp_path / "good", seed=2)
    _saved(tmp_path / "hat")
    damage(tmp_path / "hat")
    model = attach(_base(), tmp_path / "good", "good") if wrapped else _base()
    before, digest = _logits(model), _digest(model)
    with pytest.raises(AdapterError, match=message) as caught:
        attach(model, tmp_path / "hat", "hat")
    assert "\n" not in str(caught.value)
    torch.testing.assert_close(_logits(model), before)
    assert _digest(model) == digest
    model = attach(model, tmp_path / "good", "other")  # and it can go on being used
    model.set_adapter("other")
    torch.testing.assert_close(_logits(model), good)


def test_a_name_is_attached_once(tmp_path: Path) -> None:
    expected = _saved(tmp_path / "hat")
    model = attach(_base(), tmp_path / "hat", "hat")
    with pytest.raises(AdapterError, match="an adapter of that name is attached already; got hat"):
        attach(model, tmp_path / "hat", "hat")
    torch.testing.assert_close(_logits(model), expected)


def test_after_the_last_adapter_the_base_is_bare_again(tmp_path: Path) -> None:
    _saved(tmp_path / "hat", labels=3)
    base = _base()
    names, bare = list(base.state_dict()), _logits(base)
    model = detach(attach(base, tmp_path / "hat", "hat"), "hat")
    assert model is base and list(model.state_dict()) == names and torch.equal(_logits(model), bare)


def test_a_classifier_is_refused_on_a_base_that_generates(tmp_path: Path) -> None:
    _saved(tmp_path / "hat")
    with pytest.raises(
        AdapterError, match=r"hat is a classifier's adapter; got a base loaded as LlamaForCausalLM; fix: load"
    ):
        attach(_base(kind="Llama"), tmp_path / "hat", "hat")


def test_an_adapter_of_a_deeper_base_is_refused(tmp_path: Path) -> None:
    deep = tiny.model("Llama", "causal", num_hidden_layers=3)
    save_adapter(place(deep, Recipe.make(r=2), task="chat"), tmp_path / "deep", replace(HAT, task="chat"), base="b")
    with pytest.raises(AdapterError, match=r"14 tensors do not fit in .*layers.2.*: no place in the model; and 9 more"):
        attach(_base(kind="Llama"), tmp_path / "deep", "deep")


def test_saving_refuses_to_lose_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was placed is counted in the model: a peft that forgets a tensor is found out."""

    def forgets(model: Any, *given: Any, **options: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, *given, **options)
        return dict(list(found.items())[1:])

    monkeypatch.setattr("peft.peft_model.get_peft_model_state_dict", forgets)
    with pytest.raises(AdapterError, match=r"the tensors saved are not those placed; got .*lora_A.weight; fix"):
        _saved(tmp_path / "hat")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _saved(tmp_path / "hat")
    with pytest.raises(AdapterError, match=r"the adapter's folder exists already; got .*hat; fix: choose another one"):
        _saved(tmp_path / "hat")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hatrack.adapter.files.write_file", full)
    with pytest.raises(MachineError, match="the disk is full while writing"):
        _saved(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["hat"]


def test_later_versions_of_hatrack_json_are_read(tmp_path: Path) -> None:
    _saved(tmp_path / "hat")
    path = tmp_path / "hat/hatrack.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format": 9, "something": {"of": "later"}}))
    found = read_card(tmp_path / "hat")
    assert found is not None and found.format == 9 and found.labels == ["label 0", "label 1"]
    path.unlink()
    assert read_card(tmp_path / "hat") is None
