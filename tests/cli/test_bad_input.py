"""Bad input is one line on standard error (what, got, fix) and exit code 2; nothing is left half-written."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran

Run = Callable[..., Ran]


@pytest.fixture
def files(hatrack: Run, tiny_encoder: Path, reviews: Path) -> dict[str, str]:
    """Data and base files, good and bad, in an empty folder."""
    good = reviews.read_text()
    Path("good.csv").write_text(good)
    Path("empty.csv").write_text("text,label\n")
    Path("one.csv").write_text("text,label\nit was good,yes\n")
    Path("same.csv").write_text("text,label\nit was good,yes\nit was bad,yes\nit was fine,yes\n")
    Path("other.csv").write_text("sentence,stars,place\na,1,x\nb,2,y\n")
    Path("nothing").mkdir()
    return {"base": str(tiny_encoder)}


CASES = [
    ([], "--base is missing", "--base"),
    (["--base", "BASE"], "--data is missing", "--data"),
    (["--base", "BASE", "--data", "goood.csv"], "there is no such data file; got goood.csv", "did you mean good.csv?"),
    (["--base", "BASE", "--data", "nothing", "--name", "x"], "the data is a folder, not a file", "name one file"),
    (["--base", "BASE", "--data", "empty.csv"], "empty.csv has no rows; got 0 rows", "at least 2"),
    (["--base", "BASE", "--data", "one.csv"], "label 'yes' is seen only once", "correct it"),
    (["--base", "BASE", "--data", "same.csv"], "same.csv has only one class; got yes", "at least two labels"),
    (["--base", "BASE", "--data", "other.csv"], "got columns sentence, stars, place", "--text COLUMN --label COLUMN"),
    (["--base", "BASE", "--data", "good.csv", "--text", "txt"], "no column 'txt'", "did you mean text?"),
    (
        ["--base", "BASE", "--data", "good.csv", "--text", "label", "--label", "label"],
        "name the same column",
        "own column",
    ),
    (["--base", "nothing", "--data", "good.csv"], "nothing", "fix: "),
    (["--base", "./nowhere", "--data", "good.csv"], "nowhere", "fix: "),
    (
        ["--base", "BASE", "--data", "good.csv", "--task", "sort"],
        "--task must be one of classify, chat, complete",
        "use",
    ),
    (["--base", "BASE", "--data", "good.csv", "--r", "0"], "--r must be greater than or equal to 1; got '0'", "try 8"),
    (["--base", "BASE", "--data", "good.csv", "--lr", "-1"], "--lr must be greater than 0; got '-1'", "try 1e-3"),
    (
        ["--base", "BASE", "--data", "good.csv", "--targets", "qery,value"],
        "'qery' matches no layer",
        "did you mean query?",
    ),
    (
        ["--base", "BASE", "--data", "good.csv", "--layers", "top-9"],
        "top-9 is more than this model has; got 2 layers",
        "all",
    ),
    (["--base", "BASE", "--data", "good.csv", "--r", "999"], "--r is larger than", "at most --r 32"),
    (["--base", "BASE", "--data", "good.csv", "--max-length", "9999"], "--max-length is more than", "at most 64"),
    (
        ["--base", "BASE", "--data", "good.csv", "--task", "chat", "--text", "text"],
        "no clear columns for chat",
        "--messages",
    ),
    (["--base", "BASE", "--data", "good.csv", "--task", "complete", "--text", "text"], "--task classify", "fix"),
    (["--base", "BASE", "--data", "good.csv", "--device", "cuda"], "cuda", "fix"),
    (["--base", "BASE", "--data", "good.csv", "--memory", "1MB"], "too little even for one row", "fix"),
    (
        ["--base", "BASE", "--data", "good.csv", "--resume"],
        "there is no interrupted run to resume",
        "leave out --resume",
    ),
    (
        ["--base", "BASE", "--data", "good.csv", "--report-to", "wandbb"],
        "--report-to does not know wandbb",
        "did you mean wandb?",
    ),
    (["--base", "pypi:nothing", "--data", "good.csv"], "pypi", "=="),
    (
        ["--base", "BASE", "--data", "good.csv", "--output", "good.csv/x"],
        "the output cannot be a folder",
        "choose another",
    ),
    (["--batchsize", "4"], "there is no option --batchsize", "did you mean --batch-size?"),
    (["--learning-rate", "1e-4"], "there is no option --learning-rate", "did you mean --lr?"),
    (["--per_device_train_batch_size=4"], "there is no option --per_device_train_batch_size", "--batch-size?"),
    (["--load-in-4bit"], "there is no option --load-in-4bit", "did you mean --quantize 4bit?"),
    (["--warmup-steps", "10"], "there is no option --warmup-steps", "leave it out: hatrack warms the learning rate up"),
    (["--xyz", "10"], "there is no option --xyz", "see hatrack train --help"),
    (["nowhere.yaml"], "there is no such recipe file; got nowhere.yaml", "check the path"),
]


@pytest.mark.parametrize(("arguments", "what", "fix"), CASES, ids=[" ".join(case[0]) or "nothing" for case in CASES])
def test_one_line_exit_2_nothing_left(
    hatrack: Run, files: dict[str, str], arguments: list[str], what: str, fix: str
) -> None:
    before = sorted(Path.cwd().rglob("*"))
    ran = hatrack("train", *(files["base"] if word == "BASE" else word for word in arguments))
    assert ran.code == 2, ran.err
    assert what in ran.complaint and fix in ran.complaint
    assert "Traceback" not in ran.err and ran.out == ""
    assert sorted(Path.cwd().rglob("*")) == before


def test_a_full_disk_is_exit_1_and_leaves_no_adapter(
    hatrack: Run, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hatrack.adapter.files.write_file", full)
    ran = hatrack("train", "--base", files["base"], "--data", "good.csv", "--device", "cpu", "--epochs", 1)
    assert ran.code == 1
    assert "the disk is full while writing" in ran.complaint and "free some space" in ran.complaint
    assert not Path("good").exists() and not list(Path.cwd().glob(".good*"))


def test_an_unreadable_file_is_named(hatrack: Run, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("binary.csv").write_bytes(b"text,label\n\xff\xfe,yes\n")
    ran = hatrack("train", "--base", files["base"], "--data", "binary.csv")
    assert ran.code == 2 and "binary.csv is not UTF-8 text; got a stray byte in line 2" in ran.complaint


def test_debug_shows_where(hatrack: Run, files: dict[str, str]) -> None:
    ran = hatrack("train", "--debug", "--r", 0)
    assert ran.code == 2 and "Traceback" in ran.err and "hatrack: --r must be" in ran.err


def test_a_bug_is_said_to_be_one(hatrack: Run, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("hatrack.training.train.open_run", broken)
    ran = hatrack("train", "--base", "x", "--data", "y.csv")
    assert ran.code == 1 and "unexpected ZeroDivisionError: division by zero (this is a bug: --debug" in ran.complaint


REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_cells_and_what_the_template_refuses_are_told_at_once(hatrack: Run, tiny_decoder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_decoder, tmp_path / "base")
    (base / "chat_template.jinja").write_text(REFUSING)
    talks = [[{"role": "user", "content": f"red {n}"}, {"role": "assistant", "content": "good"}] for n in range(20)]
    talks[3].insert(0, {"role": "system", "content": "be brief"})
    talks[6] = []
    Path("talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks) + "{\n")
    for command in ("train", "plan", "check"):
        ran = hatrack(command, "--base", str(base), "--data", "talks.jsonl")
        told = (ran.out if command == "check" else ran.err).splitlines()
        assert ran.code == 2 and [line.strip() for line in told if line.startswith("  talks")] == [
            "talks.jsonl row 4: the chat template refuses a conversation (no system turns)",
            "talks.jsonl row 7, column messages: the conversation is empty",
            "talks.jsonl row 21: malformed JSON: Expecting property name enclosed in double quotes at character 2",
        ]
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }")
    ran = hatrack("plan", "--base", str(base), "--data", "talks.jsonl", "--bad-rows", "skip")
    assert ran.code == 2 and "the base's chat template is not valid Jinja; got line 1: " in ran.err
