"""Weights that are not what config.json or their names say: read as what they are, or refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hatrack.base.description import describe_folder
from hatrack.base.fingerprint import fingerprint
from hatrack.base.header import quantization_in_config, read_config, read_tensors
from hatrack.base.load import BaseOptions, load_base
from hatrack.errors import ModelError

from . import tiny

IDS = torch.tensor([[3, 4, 5, 6]])
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LEFT_OVER = {
    "4 bits (bitsandbytes)": BNB,
    "8 bits (bitsandbytes)": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "4 bits (gptq)": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "4 bits (awq)": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "brand-new": {"quant_method": "brand-new"},
    "quantization_config": {"anything": 1},
}


Tensors = dict[str, torch.Tensor]


def change(folder: Path, tensors: Callable[[Tensors], Tensors] = dict, **config: Any) -> Path:
    """The same base with other tensors and config.json."""
    file = folder / "model.safetensors"
    save_file(tensors(load_file(file)), file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(read_config(folder) | config))
    return folder


def load(folder: Path, task: Any = "chat") -> Any:
    labels = ("a", "b") if task == "classify" else ()
    return load_base(describe_folder(folder), BaseOptions(task=task, labels=labels, device="cpu", dtype="float32"))


def refused(folder: Path, task: str = "chat") -> str:
    """What loading and planning refuse alike."""
    with pytest.raises(ModelError) as caught:
        load(folder, task)
    with pytest.raises(ModelError) as planned:
        describe_folder(folder)
    assert str(caught.value) == str(planned.value)
    assert "\n" not in str(caught.value)
    assert "CUDA" not in str(caught.value)
    return str(caught.value).replace(str(folder), "some/base")


# --- what config.json tells of quantization ------------------------------------------------------------------------


@pytest.mark.parametrize("told", LEFT_OVER)
def test_full_weights_are_used_as_what_they_are(told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = load(tiny.save(tmp_path, "Llama", "causal")).model(IDS).logits
    change(tmp_path, quantization_config=LEFT_OVER[told])
    capsys.readouterr()
    base = load(tmp_path)
    assert torch.equal(base.model(IDS).logits, plain)
    assert getattr(base.model.config, "quantization_config", None) is None
    said = capsys.readouterr().err
    assert said == f"{tmp_path}: config.json says {told}, but the weights are F32: used as F32\n"
    assert load(tmp_path, "classify").model.config.num_labels == 2


def test_full_weights_under_a_left_over_config_can_be_quantized(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128}
    change(tiny.save(tmp_path, "Llama", "causal", **wide), quantization_config=LEFT_OVER["4 bits (gptq)"])
    base = load_base(
        describe_folder(tmp_path, "b"), BaseOptions(task="chat", device="cpu", dtype="float32", quantize="4bit")
    )
    assert any(type(module).__name__ == "Linear4bit" for module in base.model.modules())


def half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.uint8).flatten()[: tensor.numel() // 2].reshape(-1, 1)


def packed_by(kind: str) -> Callable[[Tensors], Tensors]:
    def gptq(name: str, tensor: torch.Tensor) -> Tensors:
        stem, (d_out, d_in) = name.removesuffix("weight"), tensor.shape
        weight = torch.zeros(d_in // 8, d_out, dtype=torch.int32)
        return {f"{stem}qweight": weight, f"{stem}scales": torch.ones(1, d_out)}

    ways: dict[str, Callable[[str, torch.Tensor], Tensors]] = {
        "bnb4": lambda name, tensor: {name: half(tensor), f"{name}.absmax": torch.ones(4)},
        "bnb8": lambda name, tensor: {name: tensor.to(torch.int8), name.replace("weight", "SCB"): torch.ones(4)},
        "gptq": gptq,
        "fp8": lambda name, tensor: {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)},
    }

    def pack(tensors: Tensors) -> Tensors:
        made: Tensors = {}
        for name, tensor in tensors.items():
            made |= ways[kind](name, tensor) if name.endswith("_proj.weight") else {name: tensor}
        return made

    return pack


@pytest.mark.parametrize(("kind", "dtype"), [("bnb4", "U8"), ("bnb8", "I8"), ("gptq", "I32"), ("fp8", "F8_E4M3")])
@pytest.mark.parametrize("told", [None, "4 bits (bitsandbytes)", "fp8"])
@pytest.mark.parametrize("task", ["chat", "classify"])
def test_packed_weights_are_refused_by_name(kind: str, dtype: str, told: str | None, task: str, tmp_path: Path) -> None:
    config = {"quantization_config": LEFT_OVER[told]} if told else {}
    said = refused(change(tiny.save(tmp_path, "Llama", "causal"), packed_by(kind), **config), task)
    assert f"the weights of some/base are packed in {told or 'fewer bits'}, which cannot be trained on; got " in said
    assert f"weight as {dtype}; fix: use the full model that it was made from, with --quantize 4bit" in said


def test_integer_buffers_are_no_packed_weights(tmp_path: Path) -> None:
    old = {"bert.embeddings.position_ids": torch.arange(40)[None], "extra.mask": torch.ones(2, 2, dtype=torch.uint8)}
    change(tiny.save(tmp_path, "Bert"), lambda tensors: tensors | old)
    assert load(tmp_path, "classify").model.config.num_labels == 2


def test_quantization_of_a_part_is_told(tmp_path: Path) -> None:
    assert quantization_in_config({"text_config": {"quantization_config": BNB}}) == "4 bits (bitsandbytes)"
    assert (
        quantization_in_config({"compression_config": {"quant_method": "compressed-tensors"}}) == "compressed-tensors"
    )
    assert quantization_in_config({"quantization_config": None}) is None


# --- empty tensors, and names that are not the model's --------------------------------------------------------------


@pytest.mark.parametrize("which", ["weight", "q_proj"])
def test_empty_tensors_are_refused(which: str, tmp_path: Path) -> None:
    def emptied(tensors: Tensors) -> Tensors:
        return {name: torch.empty(0) if which in name else tensor for name, tensor in tensors.items()}

    said = refused(change(tiny.save(tmp_path, "Llama", "causal"), emptied))
    assert "tensors of some/base are empty; got " in said
    assert "of shape [0]; fix: save it again with all of its parts: DeepSpeed ZeRO-3" in said


WRAPPED: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DistributedDataParallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "the other way round": lambda name: f"_orig_mod.module.{name}",
    "compiled inside": lambda name: name.replace("model.", "model._orig_mod.", 1),
    "compiled layers": lambda name: name.replace(".0.", ".0._orig_mod.").replace(".1.", ".1._orig_mod."),
    "FSDP": lambda name: name.replace(".0.", ".0._fsdp_wrapped_module.").replace(".1.", ".1._fsdp_wrapped_module."),
    "checkpointing": lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "without the model's prefix": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("task", ["chat", "classify"])
def test_names_that_a_wrapper_wrote_are_read(
    wrapper: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(tmp_path, "Llama", "causal", tie_word_embeddings=False)
    plain, taken, shapes = load(folder, task), fingerprint(describe_folder(folder)), tiny.shapes_of(folder, task, 2)
    change(folder, lambda tensors: {WRAPPED[wrapper](name): tensor for name, tensor in tensors.items()})
    capsys.readouterr()
    assert torch.equal(load(folder, task).model(IDS).logits, plain.model(IDS).logits)
    said = capsys.readouterr().err
    assert ("was saved through a wrapper: its tensors are read without" in said) == (not wrapper.startswith("without"))
    assert fingerprint(describe_folder(folder)) == taken
    assert tiny.shapes_of(folder, task, 2) == shapes


def test_names_are_read_without_wrappers_in_shards(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "Llama", "causal")
    names, tensors = list(read_tensors(folder)), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({f"module.{name}": tensors[name] for name in part}, folder / file, {"format": "pt"})
        index |= {f"module.{name}": file for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert set(read_tensors(folder)) == set(names)
    assert load(folder).model(IDS).logits.isfinite().all()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 of the 2 weight files of .* are missing; got model-00002-of-00002"):
        load(folder)


def test_an_older_configs_dtype_is_read(tmp_path: Path) -> None:
    config = read_config(tiny.save(tmp_path, "Llama", "causal"))
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    assert load(tmp_path).model.dtype == torch.float32


def _shards(folder: Path, copies: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A base in two files, one tensor of the first in the second too."""
    tensors = load_file(folder / "model.safetensors")
    names, first = list(tensors), "model-00001-of-00002.safetensors"
    (folder / "model.safetensors").unlink()
    save_file({name: tensors[name] for name in names[:4]}, folder / first, {"format": "pt"})
    rest = {name: tensors[name] for name in names[4:]} | {names[0]: copies(tensors[names[0]])}
    save_file(rest, folder / "model-00002-of-00002.safetensors", {"format": "pt"})
    index = dict.fromkeys(rest, "model-00002-of-00002.safetensors") | dict.fromkeys(names[:4], first)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_a_tensor_in_two_shards_is_refused_where_its_copies_differ(tmp_path: Path) -> None:
    folder = _shards(tiny.save(tmp_path, "Llama", "causal"), lambda tensor: tensor + 1)
    assert "some/base holds a tensor twice, with different values; got " in refused(folder)


def test_copies_that_are_the_same_are_one(tmp_path: Path) -> None:
    plain = load(tiny.save(tmp_path, "Llama", "causal")).model(IDS).logits
    assert torch.equal(load(_shards(tmp_path, torch.clone)).model(IDS).logits, plain)


def test_a_tensor_with_and_without_a_wrappers_name_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "Llama", "causal")
    change(folder, lambda tensors: tensors | {"_orig_mod.model.norm.weight": torch.zeros(16)})
    assert "got model.norm.weight in model.safetensors" in refused(folder)


def test_the_whole_file_counts_beside_older_shards(tmp_path: Path) -> None:
    """As transformers takes it."""
    folder = tiny.save(tmp_path / "base", "Llama", "causal")
    whole, plain = (folder / "model.safetensors").read_bytes(), fingerprint(describe_folder(folder))
    change(folder, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    _shards(folder, torch.clone)
    (folder / "model.safetensors").write_bytes(whole)
    assert fingerprint(describe_folder(folder)) == plain
    assert read_tensors(folder)["model.norm.weight"].file.name == "model.safetensors"


def test_a_name_in_front_of_all_tensors_is_named(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "Llama", "causal")
    change(folder, lambda tensors: {f"llm.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(
        ModelError, match=r"have other names than its config.json asks for; got llm\..*remove 'llm\.' from"
    ):
        load(folder)


def test_what_is_said_of_a_base_is_said_once(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    change(tiny.save(tmp_path / "base", "Llama", "causal"), quantization_config=BNB)
    monkeypatch.chdir(tmp_path)
    for source in ("base", str(tmp_path / "base")):
        load_base(describe_folder(Path(source)), BaseOptions(task="chat", device="cpu", dtype="float32"))
    assert capsys.readouterr().err.count("used as F32") == 1
