"""An adapter made elsewhere is used with the tokenizer that it brought, the others on its base with the base's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

import hatrack
from hatrack.errors import AdapterError, DataError
from hatrack.inference.generate import prompt_ids

TEMPLATE = (
    "{% for m in messages %}<tool> {{ m.role }} : {{ m.content }} <stop>\n{% endfor %}"
    "{% if add_generation_prompt %}<tool> assistant : {% endif %}"
)
ADDED = ["<tool>", "<stop>"]


@pytest.fixture
def base(tmp_path: Path, tiny_decoder: Path) -> Path:
    """With room for four tokens more, as many bases have."""
    model = LlamaForCausalLM.from_pretrained(tiny_decoder)
    model.resize_token_embeddings(model.config.vocab_size + 4, mean_resizing=False)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_decoder).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _adapter(base: Path, name: str, change: Any = None, **options: Any) -> Path:
    """Trained elsewhere, its tokenizer beside it."""
    folder = base.parent / name
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn_like(weight)
    model.save_pretrained(folder, save_embedding_layers=bool(options))
    tokenizer = AutoTokenizer.from_pretrained(base)
    if change:
        change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def _more(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    tokenizer.eos_token = "<stop>"
    tokenizer.chat_template = TEMPLATE


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=["LoRA", "embeddings"])
def test_it_answers_as_peft_with_its_own_tokenizer(base: Path, options: dict[str, Any], capsys: Any) -> None:
    folder = _adapter(base, "own", _more, **options)
    hat = hatrack.load(folder, device="cpu", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "its own tokenizer is used: 2 more tokens, such as '<tool>'" in capsys.readouterr().err
    turns = [{"role": "user", "content": "what is red"}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder)
    answer = model.generate(**asked, max_new_tokens=6, do_sample=False, eos_token_id=[3, tokenizer.eos_token_id])
    told = tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert hat.predict("what is red", max_new_tokens=6)[0]["text"].strip() == told.strip()


def test_others_on_the_same_base_keep_theirs(base: Path) -> None:
    own, plain = _adapter(base, "own", _more), _adapter(base, "plain")
    hat = hatrack.load([plain, own], device="cpu", dtype="float32")
    assert hat.tokenizer is hat.base.tokenizer
    hat.use("own")
    assert set(ADDED) <= set(hat.tokenizer.get_vocab())
    assert hat.tokenizer.pad_token_id == hat.base.tokenizer.pad_token_id
    hat.use(None)
    assert hat.tokenizer is hat.base.tokenizer
    hat.drop("own")
    assert hat.tokenizer_of("own") is hat.base.tokenizer


def test_the_same_tokenizer_is_no_news(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hat = hatrack.load(_adapter(base, "plain"), device="cpu", dtype="float32")
    assert hat.tokenizer is hat.base.tokenizer
    assert "its own tokenizer" not in capsys.readouterr().err


def test_another_template_alone_is_used(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _adapter(base, "own", lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages[0].content }} :"))
    hat = hatrack.load(folder, device="cpu", dtype="float32")
    assert "is used: another chat template" in capsys.readouterr().err
    assert hat.tokenizer.decode(prompt_ids(hat.active_model, "what is red")) == "what is red :"


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("tokenizer.json", "{}", r"cannot be loaded.*remove the tokenizer's files"),
        ("tokenizer_config.json", "{", r"tokenizer_config.json is not valid JSON.*remove the tokenizer's files"),
        (
            "tokenizer.json",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is a Git LFS pointer",
        ),
    ],
)
def test_a_damaged_one_is_refused(base: Path, file: str, content: str, told: str) -> None:
    folder = _adapter(base, "own", _more)
    (folder / file).write_text(content)
    with pytest.raises(AdapterError, match=told):
        hatrack.load(folder, device="cpu", dtype="float32")


def test_one_that_needs_code_is_not_used(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _adapter(base, "own", _more)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": ["own.Own", None]},
    }
    path.write_text(json.dumps(settings))
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    hat = hatrack.load(folder, device="cpu", dtype="float32")
    assert hat.tokenizer is hat.base.tokenizer
    assert "needs code of its own, which is not run: the base's tokenizer is used" in capsys.readouterr().err


def test_a_classifier_with_a_padding_token_of_its_own(base: Path) -> None:
    """Each text gets the scores that plain peft gives it alone."""
    folder, texts = base.parent / "classifier", ["a <tool> film", "what is red and what is blue ?", "good"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<none>", "additional_special_tokens": ["<tool>"]})
    tokenizer.padding_side = "left"
    bare = LlamaForSequenceClassification.from_pretrained(base, num_labels=3)
    bare.config.pad_token_id = tokenizer.pad_token_id
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(bare, config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        wanted = [
            model.eval()(tokenizer(text, return_tensors="pt")["input_ids"]).logits.softmax(-1)[0] for text in texts
        ]
    found = hatrack.load(folder, device="cpu", dtype="float32").predict(texts)
    for answer, scores in zip(found, wanted, strict=True):
        assert list(answer["scores"].values()) == pytest.approx(scores.tolist(), abs=1e-5)


def test_a_token_without_an_embedding_is_named(base: Path) -> None:
    folder = _adapter(base, "own", lambda tokenizer: tokenizer.add_tokens([f"<{number}>" for number in range(6)]))
    hat = hatrack.load(folder, device="cpu", dtype="float32")
    assert hat.predict("what <0> is", max_new_tokens=2)[0]["text"] is not None
    with pytest.raises(DataError, match=r"no embedding for; got '<5>' as 48, and 47 embeddings"):
        hat.predict("what <5> is", max_new_tokens=2)
