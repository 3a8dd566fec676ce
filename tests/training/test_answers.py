"""What is trained is what is asked at the end: how a prompt ends and an answer begins, and where it stops."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

import hatrack
from hatrack.base.load import BaseOptions, load_base
from hatrack.base.sources import find_base
from hatrack.data import template as templates
from hatrack.data.examples import Example
from hatrack.data.render import RenderSettings, render
from hatrack.inference.generate import prompt_ids, until_stop
from hatrack.training import sample_answers
from tests.conftest import turns
from tests.training.stopping import stopped_at_five
from tests.training.talking import CAPITALS, CHATML, LANDS, SPECIAL, byte_tokenizer, capitals, talking_base

FAST = {"device": "cpu", "dtype": "float32", "lr": 0.01, "batch_size": 4, "steps": 8}
EOS, END = SPECIAL.index("<|endoftext|>"), SPECIAL.index("<|im_end|>")
DATED = "{{ 'Today is ' ~ strftime_now('%d %b %Y %H:%M:%S.%f') ~ '\\n' }}" + CHATML


@pytest.fixture(autouse=True)
def time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is."""
    monkeypatch.setattr(sample_answers, "SECONDS", 600.0)
    monkeypatch.setattr(sample_answers, "FREE", 600.0)


def _on(day: int, patch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2026, 5, day, 15, 30, 12, 345678)

    patch.setattr(templates, "datetime", Clock)


def test_the_date_of_a_run_is_kept_when_it_goes_on_and_when_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"base": str(talking_base(tmp_path / "base", DATED)), "data": str(capitals(tmp_path / "capitals.jsonl"))}
    output = str(tmp_path / "hat")
    _on(4, monkeypatch)
    with stopped_at_five():
        hatrack.train(**given, output=output, name="hat", **FAST)
    _on(5, monkeypatch)
    hat = hatrack.train(output=output, resume=True)
    _on(6, monkeypatch)
    asked = prompt_ids(hatrack.load(output).active_model, "Capital of Peru?")
    assert hat.base.tokenizer.decode(asked).startswith("Today is 04 May 2026 00:00:00.000000\n<|im_start|>user")
    assert "04" in json.loads((tmp_path / "hat/hatrack.json").read_text())["template"].partition("\n")[0]


def _said(stream: Any) -> tuple[str, bool]:
    """An answer, and whether it is whole."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as ended:
            return "".join(pieces), ended.value


def _trained(tmp_path: Path, template: str, **base: str) -> hatrack.Hat:
    """Hardly anything is learned: what is said is what the base says."""
    folder = talking_base(tmp_path / "base", template, **base)
    data = capitals(tmp_path / "capitals.jsonl")
    options = FAST | {"steps": 2, "lr": 1e-4}
    return hatrack.train(base=str(folder), data=str(data), output=str(tmp_path / "hat"), name="hat", **options)


@pytest.mark.parametrize("pad", ["<pad>", "<|endoftext|>"])
def test_an_answer_stops_at_the_templates_end_on_a_base_with_another(tmp_path: Path, pad: str) -> None:
    hat = _trained(tmp_path, CHATML, pad=pad, says="\nIt.<|im_end|>ab")
    assert json.loads((tmp_path / "hat/hatrack.json").read_text())["end_tokens"] == [END]
    written = GenerationConfig.from_pretrained(tmp_path / "hat")
    assert written.eos_token_id == [EOS, END] and written.pad_token_id == SPECIAL.index(pad)
    assert _said(hat.stream("Capital of Peru?", max_new_tokens=9)) == ("It.", True)
    assert _said(hat.stream("Capital of Peru?", max_new_tokens=2)) == ("It", False)

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "hat")
    plain.generation_config = written
    asked = torch.tensor([prompt_ids(hat.active_model, "Capital of Peru?")])
    found = plain.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=9, do_sample=False)
    found = found[0, asked.shape[1] :]
    assert hat.base.tokenizer.decode(found) == "It.<|im_end|>"


def test_an_answer_stops_at_a_text_where_the_template_ends_with_one(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ 'User: ' if m.role == 'user' else ' ' }}{{ m.content }}"
        "{{ '\\nBot;' if m.role == 'user' else '\\nUser:' }}{% endfor %}"
    )
    hat = _trained(tmp_path, template, says="; It.\nUser:abc")
    assert json.loads((tmp_path / "hat/hatrack.json").read_text())["stop_strings"] == ["\nUser:"]
    assert GenerationConfig.from_pretrained(tmp_path / "hat").stop_strings == ["\nUser:"]
    assert _said(hat.stream("Capital of Peru?", max_new_tokens=20)) == ("It.", True)
    assert _said(hat.stream("Capital of Peru?", max_new_tokens=8)) == ("It.\nUse", False)


@pytest.mark.parametrize(
    ("pieces", "said", "stopped"),
    [
        (["It is Oslo.", "\nUs", "er:", " next"], "It is Oslo.", True),
        (["It is Oslo.\nUs", "ual"], "It is Oslo.\nUsual", False),
        (["It", " is\nUser: a", "\nUser:"], "It is", True),
        (["It is\nUse"], "It is\nUse", False),
        ([], "", False),
    ],
)
def test_text_up_to_a_stop_is_said_and_nothing_of_it(pieces: list[str], said: str, stopped: bool) -> None:
    assert _said(until_stop(["\nUser:", "###"], pieces)) == (said, stopped)
    assert _said(until_stop([], pieces)) == ("".join(pieces), False)


def test_held_out_questions_are_answered_at_each_evaluation_and_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = talking_base(tmp_path / "base", says="\nIt.<|im_end|>ab")
    given = {"base": str(base), "data": str(capitals(tmp_path / "capitals.jsonl")), **FAST, "lr": 1e-3}
    hatrack.train(**given, output=str(tmp_path / "asked"), name="asked")
    said = capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "asked/metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if "answers" in line]
    assert [line["step"] for line in rounds] == [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 8]
    (answer,) = rounds[0]["answers"]  # a tenth of twelve rows is held out
    assert answer["answer"] == "It." and answer["ended"]
    assert f"Capital of {LANDS[answer['row'] - 1]}?" in answer["prompt"]
    assert answer["wanted"] == f"It is {CAPITALS[answer['row'] - 1]}."
    assert said.count(f"row {answer['row']}, 'Capital of {LANDS[answer['row'] - 1]}?': 'It.'\n") == 3
    assert "[end-not-learned]" not in said

    monkeypatch.setattr(sample_answers, "QUESTIONS", 0)
    hatrack.train(**given, output=str(tmp_path / "quiet"), name="quiet")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("asked", "quiet"))
    assert all((one[name] == other[name]).all() for name in one)


def test_answers_that_do_not_end_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _trained(tmp_path, CHATML, says="\nIt is.ab")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "[end-not-learned]" in line]
    assert "'<|im_end|>' is 0% likely at the end of row" in line and "tokens were generated without it" in line
    last = json.loads((tmp_path / "hat/metrics.jsonl").read_text().splitlines()[-1])
    assert "train_loss" in last or "answers" in last


def test_a_question_is_what_stands_before_the_last_answer() -> None:
    tokenizer = byte_tokenizer()
    talk = [("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D.")]
    examples = [
        Example(1, text="no question"),
        Example(2, messages=turns(*talk)),
        Example(3, text="C?", completion=" D."),
    ]
    rows = [
        render([each], tokenizer, RenderSettings(task="chat", max_length=300, template=CHATML)) for each in examples
    ]
    assert sample_answers.find_questions(rows[0], 2) == []
    (asked,) = sample_answers.find_questions(rows[1], 2)
    assert tokenizer.decode(asked.prompt).endswith("C?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(asked.answer) == "D.<|im_end|>"
    (asked,) = sample_answers.find_questions(rows[2], 2)
    assert (tokenizer.decode(asked.prompt), tokenizer.decode(asked.answer)) == ("C?", " D.<|endoftext|>")
    assert sample_answers.find_questions(rows[1], 2, longest=10) == []


def test_a_model_that_cannot_generate_is_trained_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no such cache\nmore")

    monkeypatch.setattr(sample_answers, "generate_answer", fail)
    _trained(tmp_path, CHATML, says="\nIt is.ab")
    said = capsys.readouterr().err
    assert said.count("held-out questions are not answered: no such cache\n") == 1
    assert "it could not be checked that answers end: no such cache\n" in said
    assert (tmp_path / "hat/adapter_model.safetensors").is_file()


def test_an_answer_is_no_longer_than_the_model_takes(tmp_path: Path) -> None:
    base = load_base(find_base(str(talking_base(tmp_path / "base", says="ab"))), BaseOptions(task="chat", device="cpu"))
    for tokens, most in ((512, 0), (509, 3), (5, 40)):
        prompt = np.full(tokens, base.tokenizer("b")["input_ids"][0])
        assert len(sample_answers.generate_answer(base.model, prompt, [EOS], base, 40)) == most
