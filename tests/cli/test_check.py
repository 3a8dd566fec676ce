"""`hatrack check` on recipes and adapters, good and broken."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Ran

Run = Callable[..., Ran]


def test_a_good_recipe(hatrack: Run, tiny_encoder: Path, reviews: Path) -> None:
    Path("recipe.yaml").write_text(f"base: {tiny_encoder}\ndata: {reviews}\ndevice: cpu\nname: films\n")
    ran = hatrack("check", "recipe.yaml")
    assert ran.code == 0 and ran.out == "checked films: no problems found\n"
    assert not list(Path.cwd().glob("films*"))


def test_advice_is_exit_0_and_a_refusal_exit_2(hatrack: Run, tiny_encoder: Path, reviews: Path) -> None:
    flags = ("--base", tiny_encoder, "--data", reviews, "--device", "cpu")
    advice = hatrack("check", *flags, "--alpha", 1)
    assert advice.code == 0 and advice.out.startswith("advice   [alpha-far-from-2r] alpha is far from 2r")
    assert "         got: alpha 1, r 8: scale 0.125\n         fix: leave --alpha out for 16" in advice.out
    assert advice.out.endswith("0 refused, 1 to consider; docs/gotchas.md explains each\n")
    refused = hatrack("check", *flags, "--targets", "qery", "--json")
    assert refused.code == 2 and refused.json["refused"] == 1
    assert refused.json["findings"][0]["gotcha"] == "target-names" and refused.json["findings"][0]["refused"] is True


def test_a_measured_rate_is_said(hatrack: Run, tiny_encoder: Path, reviews: Path) -> None:
    ran = hatrack("check", "--base", tiny_encoder, "--data", reviews, "--device", "cpu", "--lr", "auto")
    assert ran.code == 0 and "(measured: the loss fell from" in ran.err


@pytest.fixture
def adapter(hatrack: Run, tiny_encoder: Path, reviews: Path) -> Path:
    """A trained adapter in ./films."""
    ran = hatrack(
        "train",
        "--base",
        tiny_encoder,
        "--data",
        reviews,
        "--name",
        "films",
        "--lr",
        0.02,
        "--epochs",
        5,
        "--device",
        "cpu",
        "--batch-size",
        8,
    )
    assert ran.code == 0, ran.err
    return Path("films")


def test_an_adapter_by_folder_and_by_name(hatrack: Run, adapter: Path) -> None:
    for name in ("films", Path.cwd() / "films"):
        assert hatrack("check", name).out == f"checked {name}: no problems found\n"


def test_broken_adapters(hatrack: Run, adapter: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    nobody = hatrack("check", "nobody", "--json")
    assert nobody.code == 2 and nobody.json["findings"][0]["gotcha"] == "adapter-refused"

    made = json.loads((adapter / "hatrack.json").read_text())
    (adapter / "hatrack.json").write_text(json.dumps(made | {"base": made["base"] | {"source": "/gone/base"}}))
    lost = hatrack("check", "films", "--json")
    assert lost.code == 2 and [f["gotcha"] for f in lost.json["findings"]] == ["base-lost"]
    assert hatrack("check", "films", "--base", tiny_encoder).code == 0

    better = made["metrics"] | {"after": made["metrics"]["before"]}
    (adapter / "hatrack.json").write_text(
        json.dumps(made | {"metrics": better, "recipe": made["recipe"] | {"quantize": "4bit"}})
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    zero = {name: tensor * 0 if ".lora_B." in name else tensor for name, tensor in tensors.items()}
    save_file(zero, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    found = {f["gotcha"]: f for f in hatrack("check", "films", "--json").json["findings"]}
    assert {"inert-adapter", "quantised-base", "no-better-than-base"} <= set(found)
    assert found["inert-adapter"]["what"] == "the adapter adds nothing to its base"

    (adapter / "adapter_model.safetensors").write_bytes(b"")
    empty = hatrack("check", "films", "--json")
    assert empty.code == 2 and "adapter_model.safetensors is damaged" in empty.json["findings"][0]["what"]
