"""What an adapter says of its task and base, whoever wrote it, and the next step where that is not enough."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import hatrack
from hatrack.adapter.card import AdapterCard, model_card
from hatrack.adapter.files import read_adapter
from hatrack.adapter.origin import card_of, find_base_of
from hatrack.base.description import describe_folder
from hatrack.base.fingerprint import base_record
from hatrack.check.folder import check_adapter
from hatrack.errors import AdapterError, HatrackError, ModelError, OptionStyle
from tests.adapter.test_like_peft import QV, _adapter, _base

GOOD = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _adapter(tmp_path_factory.mktemp("made") / "helper", _base("Llama"), QV)


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "helper")


def _write(folder: Path, config: dict[str, Any]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _refused(folder: Path) -> str:
    """What reading it says; checking it says the same."""
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    found = check_adapter(folder)
    assert [finding.what for finding in found] == [caught.value.what] and found[0].refused
    assert "\n" not in str(caught.value)
    return str(caught.value)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "mlx-lm": (
        {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}, "model": "acme/tiny"},
        "is in mlx-lm's format, which is not peft's; .*mlx_lm.fuse",
    ),
    "a model's": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32},
        "is a model's config.json, not an adapter's; got model_type 'llama'",
    ),
    "no kind": ({"r": 4, "lora_alpha": 8}, "does not say what kind of adapter it is; got no peft_type"),
    "AdaLoRA": (GOOD | {"peft_type": "ADALORA"}, "is not the config of a LoRA adapter; got peft_type 'ADALORA'"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}, "got peft_type 'PROMPT_TUNING'"),
    "translation": (GOOD | {"task_type": "SEQ_2_SEQ_LM"}, "is for an encoder-decoder; got .*SEQ_2_SEQ_LM"),
    "embedding": (GOOD | {"task_type": "FEATURE_EXTRACTION"}, "a model that embeds texts; got .*FEATURE_EXTRACTION"),
    "tagging": (GOOD | {"task_type": "TOKEN_CLS"}, "a tagger of words; got task_type TOKEN_CLS"),
    "answering": (GOOD | {"task_type": "QUESTION_ANS"}, "finds answers in a text; got task_type QUESTION_ANS"),
    "a task nobody knows": (GOOD | {"task_type": "causal-lm"}, "has a task_type that peft does not know; got .*causal"),
    "no task": (
        GOOD | {"task_type": None, "base_model_name_or_path": "b"},
        r'does not say what the adapter is for; got task_type None; fix: set "task_type".*CAUSAL_LM.*SEQ_CLS',
    ),
    "neither task nor base": (
        {name: value for name, value in GOOD.items() if name != "task_type"},
        r'got task_type None, base_model_name_or_path None; fix: set "task_type".*base_model_name_or_path.*--base',
    ),
    "later fields": (
        GOOD | {"quantum_scale": 1.0, "mode": "default", "use_tomorrow": False, "tomorrow_config": None, "other": {}},
        r"needs what hatrack does not load; got mode 'default', quantum_scale 1.0; fix: use it with peft itself",
    ),
    "merged linears": (GOOD | {"enable_lora": [True, False, True]}, r"does not load; got enable_lora \[True"),
    "numbers as text": (GOOD | {"r": "4", "lora_alpha": "8"}, "malformed; got r '4', lora_alpha '8'; fix: correct"),
    "half a rank": (GOOD | {"r": 4.5}, "malformed; got r 4.5; fix: correct"),
    "no targets": (GOOD | {"target_modules": []}, "malformed; got target_modules None"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_loaded_is_named_as_what_it_is(adapter: Path, name: str) -> None:
    config, message = CONFIGS[name]
    _write(adapter, config)
    with pytest.raises(AdapterError, match=message):
        raise AdapterError(_refused(adapter))


@pytest.mark.parametrize(
    "more",
    [
        {"r": 4.0, "lora_alpha": 8.0},
        {"layers_pattern": "", "exclude_modules": "", "modules_to_save": []},
        {"enable_lora": None, "merge_weights": False, "target_modules": ["q_proj", "v_proj", "xxx"]},
        {"auto_mapping": {"base_model_class": "L", "unsloth_fixed": True}, "peft_version": None},
        {"qalora_group_size": 16, "use_qalora": False, "lora_bias": False, "trainable_token_indices": None},
    ],
    ids=str,
)
def test_what_changes_nothing_is_no_obstacle(adapter: Path, more: dict[str, Any]) -> None:
    _write(adapter, GOOD | {"base_model_name_or_path": "b"} | more)
    files = read_adapter(adapter)
    assert files.config["r"] == 4 and type(files.config["r"]) is int and card_of(files).task == "chat"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("/content/drive/MyDrive/llm/tiny", "there is no base at /content/drive/MyDrive/llm/tiny"),
        ("C:\\Users\\ann\\models\\tiny", "Windows path"),
        ("saves/Custom/lora/tiny", "there is no base at saves/Custom/lora/tiny"),
        ("./tiny", "there is no base at ./tiny"),
        ("/data/tiny/", "there is no base at /data/tiny/"),
        ("acme/tiny-bnb-4bit", "acme/tiny-bnb-4bit"),
    ],
)
def test_a_base_that_is_not_here(adapter: Path, source: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapter.parent)
    _write(adapter, GOOD | {"base_model_name_or_path": source, "revision": "main"})
    with pytest.raises(ModelError) as caught:
        find_base_of(read_adapter(adapter))
    error = str(caught.value)
    assert error.startswith(f"the base of {adapter} is not available: ") and told in error
    assert "--base" in str(caught.value.fix) and "--revision" not in error
    monkeypatch.setattr(OptionStyle, "flags", False)
    with pytest.raises(ModelError) as caught:
        find_base_of(read_adapter(adapter))
    assert len(re.findall(r"\b(with base\b|base=)", str(caught.value.fix))) == 1


@pytest.mark.parametrize("source", [None, "", "  ", 7])
def test_no_base_is_named(adapter: Path, tiny_decoder: Path, source: Any) -> None:
    _write(adapter, GOOD | {"base_model_name_or_path": source})
    files = read_adapter(adapter)
    with pytest.raises(AdapterError, match=r"helper does not name its base; got .*; fix: name it with --base"):
        find_base_of(files)
    assert find_base_of(files, str(tiny_decoder)).folder == tiny_decoder
    assert card_of(files, str(tiny_decoder)).base == {"source": str(tiny_decoder), "revision": None, "named": False}


def test_a_revision_does_not_go_with_a_folder(
    adapter: Path, tiny_decoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(adapter, GOOD | {"base_model_name_or_path": str(tiny_decoder), "revision": "main"})
    assert find_base_of(read_adapter(adapter)).folder == tiny_decoder
    assert "revision main is ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "accident"),
    [
        (QV | {"trainable_token_indices": [3, 4]}, False),
        (QV | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
    ],
    ids=str,
)
def test_embeddings_that_were_asked_for_are_no_accident(
    tmp_path: Path, options: dict[str, Any], accident: bool
) -> None:
    folder = _adapter(tmp_path / "hat", _base("Tied"), options)
    assert ("embeddings-saved" in {finding.gotcha for finding in check_adapter(folder)}) == accident


def test_what_a_base_is_called_elsewhere(tiny_decoder: Path, tmp_path: Path) -> None:
    """A hub id or a package's name where there is one; a folder in the hub's cache is the hub's; else the path."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--acme--tiny--base/snapshots" / commit
    shutil.copytree(tiny_decoder, cached)
    wheel = "pypi:some-base==1.0/some/model"
    for files, source, revision in (
        (describe_folder(cached, "acme/tiny", revision=commit), "acme/tiny", commit),
        (describe_folder(cached), "acme/tiny--base", commit),
        (describe_folder(cached, wheel), wheel, None),
        (describe_folder(tiny_decoder), str(tiny_decoder.resolve()), None),
    ):
        made_on = base_record(files)
        assert (made_on["source"], made_on["revision"]) == (source, revision)


def test_the_card_tells_plain_transformers_the_classes() -> None:
    hat = AdapterCard(name="kinds", base={"source": "acme/tiny"}, task="classify", labels=["it's no", 'a "yes"'])
    card = model_card(hat, {"r": 8, "lora_alpha": 16})
    line = next(line for line in card.splitlines() if line.startswith("base = "))

    def from_pretrained(name: str, id2label: dict[int, str], label2id: dict[str, int]) -> Any:
        return name, id2label, label2id

    scope: dict[str, Any] = {"AutoModelForSequenceClassification": type("M", (), {"from_pretrained": from_pretrained})}
    exec(line, scope)
    assert scope["base"] == ("acme/tiny", dict(enumerate(hat.labels)), {"it's no": 0, 'a "yes"': 1})
    for source, expected in (
        ("pypi:a==1/b/c.gguf", 'from_pretrained("path/of/the/base", gguf_file="c.gguf"'),
        ("/models/tiny.gguf", 'from_pretrained("/models", gguf_file="tiny.gguf"'),
        ("pypi:a==1/b", 'from_pretrained("path/of/the/base", id2label'),
    ):
        assert expected in model_card(AdapterCard("x", {"source": source}, "classify", ["a"]), {})


def test_a_base_of_the_same_name_elsewhere_is_taken(adapter: Path, tmp_path: Path, tiny_decoder: Path) -> None:
    """The last part of the name agrees, whatever machine the path was of."""
    made = _adapter(tmp_path / "own", _own(tiny_decoder), QV)
    for source in ("/content/drive/tiny-decoder", "C:\\models\\tiny-decoder", "x/y/z/tiny-decoder", "./tiny-decoder/"):
        config = json.loads((made / "adapter_config.json").read_text())
        _write(made, config | {"base_model_name_or_path": source, "revision": "main"})
        assert hatrack.load(made, base=str(tiny_decoder), device="cpu", dtype="float32").active == "own"
    _write(made, config | {"base_model_name_or_path": "acme/other"})
    with pytest.raises(HatrackError, match="names another base: acme/other"):
        hatrack.load(made, base=str(tiny_decoder), device="cpu")


def _own(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)
