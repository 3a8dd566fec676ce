"""Rows that teach the wrong thing are found."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from hatrack.check import base, rows
from tests.check.conftest import Make
from tests.conftest import tiny_tokenizer


def _write(path: Path, content: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def test_one_label_nearly_everywhere(facts: Make, tmp_path: Path) -> None:
    def data(yes: int) -> str:
        table = [{"text": f"film {'so ' * n} good", "label": "yes" if n < yes else "no"} for n in range(50)]
        return _write(tmp_path / "rows.jsonl", table)

    assert rows.class_imbalance(facts(data=data(38))) is None
    found = rows.class_imbalance(facts(data=data(45)))
    assert found is not None and "always answering 'yes' would already be 91% accurate" in found.what
    assert found.got == "41 of 45 rows with one label" and "f1" in found.fix


def test_classes_that_are_scores(facts: Make, tmp_path: Path) -> None:
    def data(step: float) -> str:
        table = [{"text": f"film {'so ' * (n % 9)} good {n}", "label": n % 25 * step} for n in range(100)]
        return _write(tmp_path / "rows.jsonl", table)

    assert rows.labels_are_scores(facts(data=data(1))) is None
    found = rows.labels_are_scores(facts(data=data(0.25)))
    assert found is not None and found.got == "25 classes such as '0' and '0.25'"


def test_rows_that_differ_in_nothing_that_matters(facts: Make, tmp_path: Path) -> None:
    assert rows.near_duplicates(facts()) is None
    learn = _write(tmp_path / "a.jsonl", [{"text": f"good film {n}", "label": n % 2} for n in range(20)])
    scored = [{"text": "Good  film, 3!", "label": 1}, {"text": "another", "label": 0}]
    found = rows.near_duplicates(facts(data=learn, eval_data=_write(tmp_path / "b.jsonl", scored)))
    assert found is not None and found.got == "1 of 2, first row 1 beside row 4" and "--eval-data" in found.fix


def test_answers_that_are_cut(facts: Make) -> None:
    assert rows.answers_cut(facts("chat")) is None
    found = rows.answers_cut(facts("chat", max_length=15))
    assert found is not None and found.what == "the ends of the answers are cut off"
    assert found.got == "32 of 32 rows longer than 15 tokens" and "--max-length" in found.fix


def test_a_template_in_the_rows_already(facts: Make, tmp_path: Path) -> None:
    assert rows.template_twice(facts("chat")) is None
    twice = [{"prompt": f"<start> user : {a} <end>", "completion": "red <end>"} for a in ("one", "two", "three")]
    found = rows.template_twice(facts("chat", data=_write(tmp_path / "twice.jsonl", twice)))
    assert found is not None and found.what == "the chat template would be applied twice"
    assert "<end> in 2 of 2 rows, first row" in found.got and "plain messages" in found.fix


def test_ends_that_no_row_teaches(facts: Make, tiny_decoder: Path, tmp_path: Path) -> None:
    assert rows.end_never_learned(facts("chat")) is None
    assert rows.end_never_learned(facts("complete")) is None
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant : {% endif %}"
    found = rows.end_never_learned(facts("chat", base=str(_with(tokenizer, tiny_decoder, tmp_path))))
    assert found is not None and found.what == "no row teaches where an answer ends: the tuned model will not stop"
    assert found.got.startswith("answers end with '.'") and "chat template" in found.fix


def test_a_template_of_another_base(facts: Make, tiny_decoder: Path, tmp_path: Path) -> None:
    assert base.wrong_chat_template(facts("chat")) is None
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<end>", "<|im_end|> <end>")
    found = base.wrong_chat_template(facts("chat", base=str(_with(tokenizer, tiny_decoder, tmp_path))))
    assert found is not None and "does not have" in found.what and found.got.startswith("<|im_end|> becomes")


def test_no_template_at_all(facts: Make, tiny_decoder: Path, tmp_path: Path) -> None:
    assert base.no_chat_template(facts("chat")) is None
    found = base.no_chat_template(facts("chat", base=str(_with(tiny_tokenizer(chat=False), tiny_decoder, tmp_path))))
    assert found is not None and "'User: ...' and 'Assistant: ...'" in found.what and "instruct" in found.fix


def test_an_instruct_base_for_plain_text(facts: Make) -> None:
    found = base.base_already_tuned(facts("complete"))
    assert found is not None and "makes it forget" in found.what and "--task chat" in found.fix
    assert base.base_already_tuned(facts("chat")) is None and base.base_already_tuned(facts()) is None


def _classifier(tiny_encoder: Path, tmp_path: Path, labels: int) -> str:
    """The tiny encoder with a classification head of its own."""
    torch.manual_seed(0)
    named = {index: f"mood {index}" for index in range(labels)}
    model = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, id2label=named, num_labels=labels)
    folder = tmp_path / f"classifier-{labels}"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_encoder / name).read_bytes())
    return str(folder)


def test_a_base_with_a_head_of_another_size(facts: Make, tiny_encoder: Path, tmp_path: Path) -> None:
    assert base.label_count(facts()) is None
    assert base.label_count(facts(base=_classifier(tiny_encoder, tmp_path, 2))) is None
    found = base.label_count(facts(base=_classifier(tiny_encoder, tmp_path, 5)))
    assert found is not None and found.what.endswith("a different number of labels: a new head replaces its own")
    assert found.got == "5 in the base, 2 in the data" and found.fix == "go on, or give the data the base's labels"


def test_a_base_that_is_a_classifier_already(facts: Make, tiny_encoder: Path, tmp_path: Path) -> None:
    assert base.base_already_tuned(facts(base=_classifier(tiny_encoder, tmp_path, 5))) is None
    found = base.base_already_tuned(facts(base=_classifier(tiny_encoder, tmp_path, 2)))
    assert found is not None and found.what == "the base is a classifier already: training continues from its head"
    assert found.got == "its labels mood 0, mood 1; yours no, yes" and "the base it was made from" in found.fix


def _with(tokenizer: Any, decoder: Path, tmp_path: Path) -> Path:
    """The tiny decoder's weights with another tokenizer."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((decoder / name).read_bytes())
    tokenizer.save_pretrained(folder)
    return folder
