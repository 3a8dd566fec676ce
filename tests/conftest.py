"""Small bases with a tokenizer of their own, made once a session, and a rack that is nobody's."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hatrack import console, cpu
from hatrack.base import quantized_cache
from hatrack.errors import OptionStyle

WORDS = [
    "good",
    "bad",
    "fine",
    "poor",
    "great",
    "awful",
    "film",
    "plot",
    "actor",
    "scene",
    "was",
    "is",
    "the",
    "a",
    "it",
    "so",
    "and",
    "very",
    "not",
    "what",
    "who",
    "where",
    "when",
    "question",
    "answer",
    "one",
    "two",
    "three",
    "red",
    "blue",
    "green",
    "User",
    "Assistant",
    ":",
    "?",
    "!",
    ".",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<start> {{ m.role }} : {{ m.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start> assistant : {% endif %}"
)


def pytest_report_header() -> str:
    return f"CPU: {torch.backends.cpu.get_cpu_capability()}, {' '.join(cpu.compiler_flags())}"


@pytest.fixture(scope="session", autouse=True)
def bitsandbytes_on_the_same_cpu() -> None:
    """bitsandbytes asks the CPU itself, whatever `HATRACK_CPU` says."""
    if cpu.chosen_level() is not None and importlib.util.find_spec("bitsandbytes") is not None:
        has_bf16 = "avx512_bf16" in cpu.features()
        importlib.import_module("bitsandbytes.cextension").lib.has_avx512bf16_cpu = lambda: has_bf16


@pytest.fixture(autouse=True)
def own_rack(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the rack or the cached bases of whoever runs it, and none asks a hub."""
    monkeypatch.setenv("HATRACK_HOME", str(tmp_path_factory.mktemp("home")))
    bases = tmp_path_factory.mktemp("packed")
    monkeypatch.setattr(quantized_cache, "root", lambda: bases)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def turns(*pairs: tuple[str, str]) -> tuple[dict[str, Any], ...]:
    """(role, content) each, as the messages of an example."""
    return tuple({"role": role, "content": content} for role, content in pairs)


@pytest.fixture(autouse=True)
def flags_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages name options as at the command line; tests/test_words.py looks at Python's words."""
    monkeypatch.setattr(OptionStyle, "flags", True)


def tiny_tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    """Splits at white space; knows a few words, calls the rest unknown."""
    special = ["<pad>", "<unk>", "<start>", "<end>"]
    vocabulary = {word: index for index, word in enumerate([*special, "user", "assistant", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", model_max_length=64
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with random weights, as a folder."""
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer(chat=False)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("bases") / "tiny-encoder"
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights and a chat template, as a folder."""
    torch.manual_seed(2)
    tokenizer = tiny_tokenizer(chat=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=3,
    )
    folder = tmp_path_factory.mktemp("bases") / "tiny-decoder"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """120 labelled rows that two words decide."""
    lines = ["text,label"]
    for index in range(60):
        filler = " ".join(WORDS[6 + (index * step) % 16] for step in (1, 3, 5, 7)[: 1 + index % 4])
        lines += [
            f"it was {WORDS[(index % 2) * 2]} {filler} {WORDS[index % 16]} .,yes",
            f"it was {WORDS[1 + (index % 2) * 2]} {filler} {WORDS[(index * 3) % 16]} !,no",
        ]
    path = tmp_path / "reviews.csv"
    path.write_text("\n".join(dict.fromkeys(lines)) + "\n")
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Question and answer rows."""
    rows = [
        f'{{"prompt": "what {a} is {b} ?", "completion": "the {b} {a} ."}}'
        for a in ("film", "plot", "actor", "scene")
        for b in ("one", "two", "three", "red", "blue", "green", "good", "bad")
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(autouse=True)
def nothing_said_before() -> None:
    """Lets each test see what is said once per process, whatever tests ran before it."""
    console.say_once.cache_clear()
