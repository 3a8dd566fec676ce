"""What is printed fits the terminal, and whatever its encoding does not know is escaped; shells complete names."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hatrack.adapter.registry import register
from hatrack.cli import tables
from tests.adapter.test_registry import _adapter
from tests.cli.conftest import Ran

Run = Callable[..., Ran]
POOR = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def _hatrack(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own, with other variables."""
    command = [sys.executable, "-m", "hatrack", *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | more, capture_output=True, check=False)


@pytest.mark.parametrize("poor", [POOR, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}])
def test_what_an_encoding_does_not_know_is_escaped(tmp_path: Path, tiny_encoder: Path, poor: dict[str, str]) -> None:
    rows = [
        (f"it was {word} film {index} \u732b", label)
        for index in range(8)
        for word, label in (("good", "ja \U0001f600"), ("bad", "n\u00e9"))
    ]
    (tmp_path / "gr\u00f6\u00dfe.jsonl").write_text(
        "".join(json.dumps({"text": a, "label": b}) + "\n" for a, b in rows)
    )
    home = {"HATRACK_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"} | poor
    train = ["train", "--base", str(tiny_encoder), "--data", "gr\u00f6\u00dfe.jsonl", "--steps", "1", "--device", "cpu"]
    trained = _hatrack(tmp_path, *train, "--name", "cats", **home)
    assert trained.returncode == 0, trained.stderr
    assert b"ja \\U0001f600" in trained.stderr
    assert json.loads((tmp_path / "cats" / "hatrack.json").read_text())["data"]["source"] == "gr\u00f6\u00dfe.jsonl"
    shown = _hatrack(tmp_path, "show", "cats", **home)
    assert shown.returncode == 0 and rb"ja \U0001f600" in shown.stdout
    answer = _hatrack(tmp_path, "predict", "cats", "film \u732b", **home)
    assert answer.returncode == 0 and rb"film \u732b" in answer.stdout
    as_json = _hatrack(tmp_path, "predict", "cats", "film \u732b", "--json", **home)
    assert json.loads(as_json.stdout)["text"] == "film \u732b"


@pytest.fixture
def rack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HATRACK_HOME", str(tmp_path / "home"))
    for name in ("reviews", "reviews-of-last-year-in-all-languages", "talks"):
        register(name, _adapter(tmp_path / name))


def test_tables_fit_the_terminal(rack: None, hatrack: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    narrow = hatrack("list").out
    assert max(map(len, narrow.splitlines())) <= 60
    assert all(name in narrow.splitlines() for name in ("reviews", "reviews-of-last-year-in-all-languages", "talks"))
    monkeypatch.delenv("COLUMNS")
    whole = hatrack("list").out.splitlines()
    assert len(whole) == 4 and whole[0].startswith("NAME")


def test_columns_that_do_not_fit_come_below(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "21")
    tables.print_columns([["", "one", "the second", "third"], ["memory", "1.0 GiB", "20", "30"]])
    assert capsys.readouterr().out.splitlines() == [
        "            one",
        "memory  1.0 GiB",
        "",
        "           the",
        "        second  third",
        "memory      20     30",
    ]
    tables.print_facts({"name": "a", "data": "three words here", "none": ""})
    assert capsys.readouterr().out == "name       a\ndata       three\n           words here\nnone\n"


def test_wide_letters_count_twice(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_table([["A", "B"], ["\u732b", "x"], ["abc", "y"]])
    assert capsys.readouterr().out == "A    B\n\u732b   x\nabc  y\n"


def test_shells_complete_commands_and_names(rack: None, tmp_path: Path) -> None:
    def completed(words: str) -> list[str]:
        place = str(len(words.split()) - 1)
        ran = _hatrack(tmp_path, _HATRACK_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=place)
        return ran.stdout.decode().split()

    assert completed("hatrack pre") == ["predict"]
    assert completed("hatrack show rev") == ["reviews", "reviews-of-last-year-in-all-languages"]
    assert "--eval-data" in completed("hatrack train --eval")
    assert completed("hatrack train --like reviews-") == ["reviews-of-last-year-in-all-languages"]
    assert completed("hatrack compare reviews reviews-") == ["reviews-of-last-year-in-all-languages"]
    assert completed("hatrack train --task c") == ["classify", "chat", "complete"]
