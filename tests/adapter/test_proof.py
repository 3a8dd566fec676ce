"""Adapters that do nothing, are not what was trained, or sit on a base that answers differently are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hatrack
from hatrack.errors import AdapterError

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: Path) -> Path:
    """A generator's adapter."""
    folder = tmp_path_factory.mktemp("made")
    rows = [{"prompt": f"what {a} is {b} ?", "completion": f"the {b} {a} ."} for a in ("film", "plot") for b in "ab"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 1))
    options: dict[str, Any] = {"epochs": 4, "lr": 0.02, "batch_size": 2, "device": "cpu", "dtype": "float32"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HATRACK_HOME", str(folder / "home"))
        hatrack.train(base=str(tiny_decoder), data=str(folder / "rows.jsonl"), output=str(folder / "hat"), **options)
    return folder / "hat"


@pytest.fixture
def hat(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    shutil.copytree(made, tmp_path / "hat")
    return tmp_path / "hat"


def _tensors(folder: Path, change: Change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def _note(folder: Path, **fields: Any) -> dict[str, Any]:
    path = folder / "hatrack.json"
    content: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(content | fields))
    return content


def test_the_proof_is_recorded_and_says_what_it_saw(made: Path) -> None:
    proof = _note(made)["proof"]
    assert len(proof["probe"]) == 4 and len({len(row) for row in proof["probe"]}) == 1
    assert proof["tensors"].keys() == load_file(made / "adapter_model.safetensors").keys()
    assert proof["tolerance"] == 1e-3 and proof["dtype"] == "float32" and proof["moved"] > 0.01
    for base, adapter in zip(proof["base"], proof["adapter"], strict=True):
        assert adapter == sorted(adapter, reverse=True) and 0 < sum(adapter) <= 1 and base != adapter
    hatrack.load(made, dtype="float32")
    hatrack.load(made, dtype="bfloat16")  # other arithmetic, within what it allows


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "without a record"])
def test_an_adapter_that_does_nothing_is_refused(hat: Path, recorded: bool) -> None:
    _tensors(hat, lambda t: {name: torch.zeros_like(v) if "lora_B" in name else v for name, v in t.items()})
    if not recorded:
        _note(hat, proof=None)
        with pytest.raises(AdapterError) as caught:
            hatrack.load(hat, dtype="float32")
        assert caught.value.what == f"{hat} changes nothing: with it the base answers as without it"
        assert str(caught.value.got).startswith("14 of 14 lora_B all zero (base_model.model.model.layers.0")
        assert caught.value.fix == "train longer, or with a higher --lr"
    else:
        with pytest.raises(AdapterError, match=r"lora_B.weight is different.* and 9 more; fix: copy the adapter again"):
            hatrack.load(hat, dtype="float32")
    hatrack.load(hat, dtype="float32", prove=False)


def test_layers_that_do_nothing_are_said(hat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(name for name in sorted(tensors) if "lora_B" in name)
        return tensors | {name: torch.zeros_like(tensors[name])}

    _tensors(hat, one)
    _note(hat, proof=None)
    hatrack.load(hat, dtype="float32")
    assert "1 of 14 layers do nothing, their lora_B is zero: base_model.model.model.layers.0" in capsys.readouterr().err


def test_a_tensor_changed_by_one_bit_is_named(hat: Path) -> None:
    path = hat / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(AdapterError, match=r"is not what hatrack.json says was trained; got .*weight is different;"):
        hatrack.load(hat)


def test_a_base_that_answers_differently_is_told_from_the_adapter(hat: Path) -> None:
    proof = _note(hat)["proof"]
    _note(hat, proof=proof | {"base": [row[::-1] for row in proof["base"]]})
    with pytest.raises(AdapterError, match=r"^the base does not give the answers recorded when .*; got probabilities"):
        hatrack.load(hat, dtype="float32")
    _note(hat, proof=proof | {"adapter": [row[::-1] for row in proof["adapter"]]})
    with pytest.raises(AdapterError, match=r"hat does not give the answers recorded .* more than 0.10%; fix: give the"):
        hatrack.load(hat, dtype="float32")


@pytest.mark.parametrize(
    "change",
    [
        {"probe": [[10**6] * 4] * 4},
        {"probe": [[1.5] * 4] * 4},
        {"probe": [[1] * 10_000] * 4},
        {"probe": []},
        {"answers": [[-1] * 16] * 4},
        {"answers": [[10**6] * 16] * 4},
        {"base": [[0.1]]},
        {"tolerance": 1e9},
        {"tolerance": float("nan")},
        {"tensors": []},
        {"tensors": {"x": 1}},
    ],
    ids=str,
)
def test_a_malformed_proof_is_refused(hat: Path, change: dict[str, Any]) -> None:
    _note(hat, proof=_note(hat)["proof"] | change)
    with pytest.raises(AdapterError, match=r"has a malformed proof|is not what hatrack.json says"):
        hatrack.load(hat, dtype="float32")


def test_in_a_hat_one_bad_adapter_leaves_the_others(made: Path, hat: Path) -> None:
    ready = hatrack.load(made, dtype="float32")
    before = ready.predict("what film is a ?", max_new_tokens=4)
    _tensors(hat, lambda t: {name: v * 2 for name, v in t.items()})
    with pytest.raises(AdapterError, match=r"is not what hatrack.json says was trained"):
        ready.add(hat, name="bad")
    assert list(ready.hats) == [ready.active] and len(ready.model.peft_config) == 1
    assert ready.predict("what film is a ?", max_new_tokens=4) == before
    assert not any(parameter.requires_grad for parameter in ready.model.parameters())
