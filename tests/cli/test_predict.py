"""`hatrack predict`: each row gets exactly one answer, in order, wherever it comes from, and beside its columns."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hatrack.data.columns import find_prompt_columns
from hatrack.data.row_values import BadRow, read_prompt
from hatrack.errors import DataError
from tests.cli.conftest import Ran

Run = Callable[..., Ran]
QUICK = ("--device", "cpu", "--dtype", "float32", "--lr", "0.02", "--batch-size", "8")
GOOD, BAD = "it was good film plot .", "it was awful film plot !"


@pytest.fixture
def classifier(hatrack: Run, tiny_encoder: Path, reviews: Path) -> None:
    """A trained adapter named reviews."""
    ran = hatrack("train", "--base", tiny_encoder, "--data", reviews, *QUICK, "--steps", 30, "--name", "reviews")
    assert ran.code == 0, ran.err


@pytest.fixture
def generator(hatrack: Run, tiny_decoder: Path, questions: Path) -> None:
    """A trained adapter named faq."""
    ran = hatrack("train", "--base", tiny_decoder, "--data", questions, *QUICK, "--steps", 2, "--name", "faq")
    assert ran.code == 0, ran.err


def _answers(ran: Ran) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ran.out.splitlines()]


def test_each_line_has_one_answer(classifier: None, hatrack: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [GOOD, "", f"{BAD}\u2028so", "bad\x0b\x85film\x0c", "   ", GOOD]
    content = "\r\n".join(lines[:3]).encode() + b"\n" + "\n".join(lines[3:]).encode()
    Path("lines.txt").write_bytes(content)
    from_file = hatrack("predict", "reviews", "--file", "lines.txt", "--json")
    answers = _answers(from_file)
    assert [answer["text"] for answer in answers] == lines
    assert [answer.get("error") for answer in answers] == [
        None,
        "the text is empty",
        None,
        None,
        "the text is empty",
        None,
    ]
    assert from_file.code == 2
    assert "2 of 6 rows got no answer; fix: correct them, or leave them out" in from_file.complaint
    assert "lines.txt row 2: the text is empty" in from_file.err

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))  # whatever the locale says
    piped = _answers(hatrack("predict", "reviews", "--json"))
    assert [(a["text"], a.get("label")) for a in piped] == [(a["text"], a.get("label")) for a in answers]
    plain = hatrack("predict", "reviews", "--file", "lines.txt")
    first = [line.split("\t")[0] for line in plain.out.split("\n")[:-1]]
    assert first == [answer.get("label", "error") for answer in answers]
    assert plain.code == 2 and "error\t-\trow 2: the text is empty" in plain.out

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"good film\n\xff\xfe\nbad film\n"), "utf-8"))
    broken = _answers(hatrack("predict", "reviews", "--json"))
    assert [answer.get("error") for answer in broken] == [None, "the text is not UTF-8", None]
    assert [answer.get("error") for answer in _answers(hatrack("predict", "reviews", GOOD, "", "--json"))] == [
        None,
        "the text is empty",
    ]


def test_a_table_is_read_as_for_training(classifier: None, hatrack: Run) -> None:
    rows = [{"id": 1, "review": GOOD}, {"id": 2, "review": None}, {"id": 3}, {"id": 4, "review": 5}]
    text = (
        "".join(json.dumps(row) + "\n" for row in rows) + '{"id": 5, "review"\n' + json.dumps({"id": 6, "review": BAD})
    )
    Path("rows.jsonl").write_text(text)
    ran = hatrack("predict", "reviews", "--file", "rows.jsonl", "--json")
    answers = _answers(ran)
    assert ["label" in answer for answer in answers] == [True, False, False, False, False, True]
    assert ["error" in answer for answer in answers] == [False, True, True, True, True, False]
    assert "malformed JSON" in answers[4]["error"] and "columns: text = 'review'" in ran.err and ran.code == 2
    assert "mixed types: int" in answers[3]["error"] and answers[1]["error"] == "the text is missing"
    Path("cells.csv").write_text(f'text,label\n"{GOOD}\nso",x\n{BAD}\n{GOOD},y\n')
    ran = hatrack("predict", "reviews", "--file", "cells.csv")
    assert len(ran.out.splitlines()) == 3 and ran.out.splitlines()[0].endswith(f"{GOOD} so")


def test_answers_are_written_beside_the_columns(classifier: None, hatrack: Run) -> None:
    Path("rows.csv").write_text(f'id,text,label\n007,"{GOOD}",x\n008,,y\n009,{BAD}\n')
    ran = hatrack("predict", "reviews", "--file", "rows.csv", "--output", "out.csv")
    assert ran.code == 2 and ran.out == "answers to 3 rows are in out.csv\n"
    assert "label is written to predicted_label" in ran.err
    with Path("out.csv").open(newline="") as file:
        header, *written = list(csv.reader(file))
    assert header == ["id", "text", "label", "predicted_label", "score", "scores", "error"]
    assert [row[:4] for row in written] == [["007", GOOD, "x", "yes"], ["008", "", "y", ""], ["", "", "", ""]]
    assert set(json.loads(written[0][5])) == {"yes", "no"} and float(written[0][4]) > 0.5
    assert [row[6] for row in written[:2]] == ["", "the text is empty"] and "2 cells" in written[2][6]

    again = hatrack("predict", "reviews", "--file", "rows.csv", "--output", "out.csv")
    assert again.code == 2 and "--output exists already; got out.csv" in again.complaint
    table = hatrack("predict", "reviews", GOOD, BAD, "--output", "out.jsonl", "--json")
    assert table.json == {"output": "out.jsonl", "rows": 2, "failed": 0} and table.code == 0
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [(row["text"], row["label"]) for row in found] == [(GOOD, "yes"), (BAD, "no")]
    wrong = hatrack("predict", "reviews", GOOD, "--output", "out.xlsx")
    assert wrong.code == 2 and "name it .csv, .tsv or .jsonl" in wrong.complaint
    failed = hatrack("predict", "reviews", "--file", "rows.csv", "--text", "nope", "--output", "none.csv")
    assert failed.code == 2 and not list(Path.cwd().glob("*none*"))


def test_an_argument_that_is_a_file_is_asked_about(hatrack: Run, classifier: None) -> None:
    Path("lines.txt").write_text(GOOD)
    ran = hatrack("predict", "reviews", "lines.txt")
    assert ran.code == 2 and ran.out == ""
    assert "the text is the name of a file; got lines.txt; fix: use --file lines.txt to read its rows" in ran.complaint
    assert hatrack("predict", "reviews", "x" * 5000, ".").code == 0
    assert "--text names a column of a table" in hatrack("predict", "reviews", GOOD, "--text", "a").complaint
    assert (
        "texts are given both as arguments and by --file"
        in hatrack("predict", "reviews", GOOD, "--file", "lines.txt").complaint
    )


def test_a_text_of_a_megabyte_is_cut_and_said(classifier: None, hatrack: Run) -> None:
    Path("long.csv").write_text(f"text,label\n{'good film ' * 100_000},yes\n{GOOD},yes\n")
    ran = hatrack("predict", "reviews", "--file", "long.csv", "--json")
    first, second = _answers(ran)
    assert ran.code == 0 and first["cut"] and "cut" not in second and "label" in first
    assert "a row cut to the maximum input length of the adapter, as in training" in ran.err
    assert len(ran.err) < 2000
    assert max(map(len, hatrack("predict", "reviews", "--file", "long.csv").out.splitlines())) < 2100


def test_a_generator_answers_each_row(generator: None, hatrack: Run) -> None:
    rows = [
        {"instruction": "what film is", "input": "good ?", "output": "x"},
        {"instruction": "what plot is red ?", "input": "", "output": "y"},
        {"instruction": " ", "output": "y"},
        {"instruction": "film " * 80, "output": "y"},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = hatrack("predict", "faq", "--file", "rows.jsonl", "--json", "--max-new-tokens", 2)
    answers = _answers(ran)
    assert ran.code == 2
    assert [answer["prompt"] for answer in answers[:2]] == ["what film is\n\ngood ?", "what plot is red ?"]
    assert "the text is empty" in answers[2]["error"] and "leaves no room for an answer" in answers[3]["error"]
    plain = hatrack("predict", "faq", "--file", "rows.jsonl", "--max-new-tokens", 2)
    assert plain.out.count("> ") >= 4 and "error: row 3: the text is empty" in plain.out and plain.code == 2
    written = hatrack("predict", "faq", "--file", "rows.jsonl", "--output", "o.tsv", "--max-new-tokens", 2)
    header, *cells = [line.split("\t") for line in Path("o.tsv").read_text().splitlines()]
    assert written.code == 2 and header == ["instruction", "input", "output", "text", "error"] and len(cells) == 4


@pytest.mark.parametrize(
    ("task", "columns", "named", "found"),
    [
        ("classify", ["id", "body", "label"], {}, {"text": "body"}),
        ("classify", ["one"], {}, {"text": "one"}),
        ("classify", ["text", "body"], {"text": "body"}, {"text": "body"}),
        ("classify", ["text", "x"], {"text": "gone"}, {"text": "text"}),
        ("chat", ["messages", "prompt"], {}, {"messages": "messages"}),
        ("chat", ["messages", "prompt"], {"prompt": "prompt"}, {"prompt": "prompt"}),
        (
            "chat",
            ["instruction", "input", "system"],
            {},
            {"prompt": "instruction", "input": "input", "system": "system"},
        ),
        ("chat", ["question"], {}, {"prompt": "question"}),
        ("chat", ["q"], {}, {"prompt": "q"}),
        ("complete", ["text", "n"], {}, {"text": "text"}),
        ("complete", ["prompt", "completion"], {}, {"prompt": "prompt"}),
    ],
)
def test_which_column_is_asked(task: str, columns: list[str], named: dict[str, str], found: dict[str, str]) -> None:
    assert find_prompt_columns(task, columns, "f.csv", named) == found


def test_what_no_column_tells_is_refused() -> None:
    for task, columns in (("classify", ["a", "b"]), ("chat", ["a", "b"]), ("complete", ["a", "b"])):
        with pytest.raises(DataError, match=r"it is not clear which column of .* to answer; got columns a, b"):
            find_prompt_columns(task, columns, "f.csv", {})
    with pytest.raises(DataError, match="has tools, which are not used"):
        find_prompt_columns("chat", ["prompt", "tools"], "f.csv", {})


def test_a_conversation_is_asked_up_to_its_answer() -> None:
    user, assistant = {"role": "user", "content": "a ?"}, {"role": "assistant", "content": "b"}
    system = {"role": "system", "content": "c"}
    columns = {"messages": "m"}
    assert read_prompt(1, {"m": [user, assistant]}, "chat", columns) == "a ?"
    assert read_prompt(1, {"m": [user, assistant, user]}, "chat", columns) == [user, assistant, user]
    assert read_prompt(1, {"m": [system, user]}, "chat", columns) == [system, user]
    assert read_prompt(1, {"p": "a ?", "s": "c"}, "chat", {"prompt": "p", "system": "s"}) == [system, user]
    nothing = read_prompt(7, {"m": [assistant]}, "chat", columns)
    assert isinstance(nothing, BadRow) and nothing.row == 7 and "no turn to answer" in nothing.reason


def test_answers_come_line_by_line_from_a_pipe(classifier: None) -> None:
    command = [sys.executable, "-m", "hatrack", "predict", "reviews"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as ran:
        assert ran.stdin is not None and ran.stdout is not None
        for text, label in ((GOOD, b"yes"), (BAD, b"no")):
            ran.stdin.write(text.encode() + b"\n")
            ran.stdin.flush()
            assert ran.stdout.readline().startswith(label)
        ran.stdin.close()
        assert ran.wait() == 0
