"""Headers and configs: what a base is, without reading its weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hatrack.base.header import (
    family,
    head_modules,
    head_shapes,
    parameter_count,
    read_config,
    read_tensors,
    weight_bytes,
)
from hatrack.errors import ModelError

from . import tiny


def real_shapes(auto: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """What transformers itself calls the parameters, without memory for them."""
    with torch.device("meta"):
        model = auto.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


CHECKPOINTS = [(kind, "body") for kind in tiny.OPTIONS]
CHECKPOINTS += [(kind, "masked") for kind in tiny.MASKED]
CHECKPOINTS += [(kind, "causal") for kind in tiny.DECODERS]
CHECKPOINTS += [(kind, "classify") for kind in tiny.OPTIONS]


@pytest.mark.parametrize(("kind", "head"), CHECKPOINTS)
def test_shapes_of_a_classifier_are_those_of_transformers(kind: str, head: str, tmp_path: Path) -> None:
    tiny.model(kind, head, num_labels=2).save_pretrained(tmp_path)
    expected = real_shapes(AutoModelForSequenceClassification, tiny.config(kind, num_labels=5))
    assert tiny.shapes_of(tmp_path, "classify", 5) == expected
    outside = head_shapes(read_config(tmp_path), 5)
    assert outside.items() <= expected.items()
    assert not any(
        name.split(".")[0] in head_modules(read_config(tmp_path)) for name in expected if name not in outside
    )


LANGUAGE_MODELS = [(kind, "causal", tied) for kind in tiny.DECODERS for tied in (True, False)]
LANGUAGE_MODELS += [(kind, "body", True) for kind in tiny.DECODERS if kind != "Phi"]  # Phi's head has a bias of its own


@pytest.mark.parametrize(("kind", "head", "tied"), LANGUAGE_MODELS)
def test_shapes_of_a_language_model_are_those_of_transformers(kind: str, head: str, tied: bool, tmp_path: Path) -> None:
    tiny.model(kind, head, tie_word_embeddings=tied).save_pretrained(tmp_path)
    expected = real_shapes(AutoModelForCausalLM, tiny.config(kind, tie_word_embeddings=tied))
    assert tiny.shapes_of(tmp_path, "chat") == expected == tiny.shapes_of(tmp_path, "complete")


def test_the_oldest_names_and_buffers_are_understood(tmp_path: Path) -> None:
    model = tiny.model("Bert", "masked")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if "decoder" not in name}
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
    old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in old.items()}
    old["bert.embeddings.position_ids"] = torch.arange(40)[None]
    model.config.save_pretrained(tmp_path)
    save_file(old, tmp_path / "model.safetensors")
    expected = real_shapes(AutoModelForSequenceClassification, tiny.config("Bert", num_labels=3))
    assert tiny.shapes_of(tmp_path, "classify", 3) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "bert"}, "encoder"),
        ({"model_type": "bert", "is_decoder": True}, "decoder"),
        ({"model_type": "llama"}, "decoder"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "brand-new", "architectures": ["BrandNewForMaskedLM"]}, "encoder"),
        ({"model_type": "brand-new", "architectures": ["BrandNewForCausalLM"]}, "decoder"),
    ],
)
def test_the_family_follows_from_the_config(config: dict[str, Any], expected: str) -> None:
    assert family(config) == expected


@pytest.mark.parametrize("kind", tiny.OPTIONS)
def test_the_family_of_each_architecture(kind: str) -> None:
    wanted = "encoder" if kind in tiny.MASKED else "decoder" if kind in tiny.DECODERS else "encoder-decoder"
    assert family(json.loads(tiny.config(kind).to_json_string())) == wanted


def test_a_header_tells_shape_type_and_place(tmp_path: Path) -> None:
    first, second = torch.arange(6, dtype=torch.float32).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)
    save_file({"a": first, "b": second}, tmp_path / "model.safetensors")
    header = read_tensors(tmp_path)
    assert (header["a"].shape, header["a"].dtype, header["a"].bytes) == ((2, 3), "F32", 24)
    assert (header["b"].shape, header["b"].dtype, header["b"].bytes) == ((4,), "BF16", 8)
    content = header["a"].file.read_bytes()[header["a"].offset :][: header["a"].bytes]
    assert content == first.numpy().tobytes()
    assert weight_bytes(header) == 32
    assert parameter_count({name: info.shape for name, info in header.items()}) == 10


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    model = tiny.model("Llama", "causal")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "many")
    assert {name: info.shape for name, info in one.items()} == {name: info.shape for name, info in many.items()}

    shard = sorted((tmp_path / "many").glob("*.safetensors"))[0]
    content = shard.read_bytes()
    save_file({"other": torch.ones(1)}, shard)
    with pytest.raises(ModelError, match=rf"{shard.name} lacks \d+ tensors of the index; got "):
        read_tensors(tmp_path / "many")
    shard.write_bytes(content)
    shard.unlink()
    with pytest.raises(
        ModelError, match=rf"1 of the \d+ weight files of .*many are missing; got {shard.name}; fix: copy"
    ):
        read_tensors(tmp_path / "many")


def test_an_index_that_leads_outside_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(ModelError, match=r"outside its folder; got \.\./other\.safetensors; fix: "):
        read_tensors(tmp_path)


def damaged_files() -> list[tuple[str, bytes, str]]:
    """Name, content and what is said of it."""

    def file(header: object, data: int = 0) -> bytes:
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + bytes(data)

    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return [
        ("empty", b"", "0 bytes, shorter than its own header"),
        ("short", b"\x10\0\0", "3 bytes, shorter than its own header"),
        ("pickle", b"\x80\x05" + bytes(200), "202 bytes, shorter than its own header"),
        ("long header", (1000).to_bytes(8, "little") + b"{}", "10 bytes, shorter than its own header"),
        ("no json", file({})[:8] + b"no", "a header that is not JSON"),
        ("list", file([]), "a header that is not a JSON object"),
        ("truncated", file({"a": good}, 4), r"\d+ bytes where its header says \d+"),
        ("wrong size", file({"a": good | {"shape": [3]}}, 8), r"a with shape \[3\] in bytes 0 to 8"),
        ("negative", file({"a": good | {"shape": [-2]}}, 8), r"a with shape \[-2\]"),
        ("text shape", file({"a": good | {"shape": ["2"]}}, 8), r"a with shape \['2'\]"),
        ("no dtype", file({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8), "a malformed entry for a"),
        ("odd dtype", file({"a": good | {"dtype": "Q7"}}, 8), "a malformed entry for a"),
        ("nothing", file({"a": None}, 8), "a malformed entry for a"),
    ]


@pytest.mark.parametrize(("name", "content", "said"), damaged_files())
def test_a_damaged_file_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(
        ModelError, match=rf"model\.safetensors is damaged or not a safetensors file; got {said}.*; fix: copy"
    ) as caught:
        read_tensors(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((200 * 2**20).to_bytes(8, "little"))
        file.truncate(300 * 2**20)
    with pytest.raises(ModelError, match="a header of 209,715,200 bytes"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"has no config\.json; fix: give the folder of a whole model"),
        (b"{", r"config\.json is not valid JSON; got "),
        (b"\xff\xfe", r"config\.json is not valid JSON; got "),
        (b"[" * 100_000, r"config\.json is not valid JSON; got "),
        (b"[]", r"config\.json is not a JSON object; got list"),
    ],
)
def test_a_bad_config_is_named(content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=said):
        read_config(tmp_path)


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json cannot be read; got Is a directory"):
        read_config(tmp_path)


def test_a_config_without_a_width_is_refused() -> None:
    with pytest.raises(ModelError, match="has no hidden_size; got odd; fix: use another base"):
        head_shapes({"model_type": "odd"}, 2)


def test_headers_need_no_torch() -> None:
    code = "import sys, hatrack.base.header, hatrack.base.fingerprint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
