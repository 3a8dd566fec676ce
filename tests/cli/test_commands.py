"""Every command as a person or a script would use it: what it prints, where, and its exit code."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hatrack.cli.tables import program
from tests.cli.conftest import Ran

Run = Callable[..., Ran]
QUICK = ("--device", "cpu", "--dtype", "float32", "--lr", "0.02", "--batch-size", "8")


@pytest.fixture
def classifier(hatrack: Run, tiny_encoder: Path, reviews: Path) -> Ran:
    """A trained adapter named reviews, in ./reviews."""
    ran = hatrack("train", "--base", tiny_encoder, "--data", reviews, *QUICK, "--epochs", 6, "--json")
    assert ran.code == 0, ran.err
    return ran


def test_train_prints_one_object_with_the_contracts_fields(classifier: Ran) -> None:
    result = classifier.json
    fields = {"adapter": str, "trainable": int, "total": int, "seconds": float, "steps": int, "tokens": int}
    fields |= {"tokens_per_second": float, "train_loss": float, "eval": dict, "peak_memory_bytes": int, "planned": dict}
    for name, kind in fields.items():
        assert isinstance(result[name], kind), name
    assert result["eval"]["accuracy"] > result["before"]["accuracy"]
    assert "trainable params: " in classifier.err and "proof: " in classifier.err
    assert Path(result["adapter"], "adapter_model.safetensors").is_file()


def test_the_package_runs_as_the_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "hatrack", "train", "--r", "0"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "hatrack: --r must be greater than or equal to 1; got '0'; fix: try 8\n"


def test_predict_from_arguments_standard_input_and_files(
    classifier: Ran, hatrack: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["it was good film plot .", "it was awful film plot !"]
    plain = hatrack("predict", "reviews", *texts)
    assert [line.split("\t")[0] for line in plain.out.splitlines()] == ["yes", "no"]
    assert [line.split("\t")[2] for line in plain.out.splitlines()] == texts

    objects = [json.loads(line) for line in hatrack("predict", "reviews", *texts, "--json").out.splitlines()]
    assert [answer["text"] for answer in objects] == texts
    assert all(set(answer) == {"text", "label", "scores"} for answer in objects)
    assert all(sum(answer["scores"].values()) == pytest.approx(1) for answer in objects)

    Path("lines.txt").write_text("\n".join(texts) + "\n")
    with Path("lines.txt").open() as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        assert hatrack("predict", "reviews").out == plain.out
    assert hatrack("predict", "reviews", "--file", "lines.txt").out == plain.out
    Path("table.csv").write_text("said,by\n" + "".join(f"{text},x\n" for text in texts))
    assert hatrack("predict", "reviews", "--file", "table.csv", "--text", "said").out == plain.out
    wrong = hatrack("predict", "reviews", "--file", "table.csv")
    assert wrong.code == 2 and "got columns said, by; fix: name it with --text" in wrong.complaint
    wrong = hatrack("predict", "reviews", "--file", "table.csv", "--text", "sais")
    assert wrong.code == 2 and "use --text with one of said, by" in wrong.complaint


def test_the_bare_base_answers_otherwise(classifier: Ran, hatrack: Run) -> None:
    with_it = json.loads(hatrack("predict", "reviews", "it was good film plot .", "--json").out)
    without = json.loads(hatrack("predict", "reviews", "it was good film plot .", "--json", "--without-adapter").out)
    assert with_it["label"] == "yes" and with_it["scores"]["yes"] - without["scores"]["yes"] > 0.05


def test_the_rack_lists_shows_renames_and_removes(classifier: Ran, hatrack: Run) -> None:
    listed = hatrack("list").out.splitlines()
    assert listed[0].split() == ["NAME", "BASE", "TASK", "SIZE", "METRIC", "AGE"]
    assert (
        listed[1].startswith("reviews ") and "classify" in listed[1] and "accuracy" in listed[1] and "now" in listed[1]
    )
    entry = hatrack("list", "--json").json["hats"][0]
    assert entry["name"] == "reviews" and entry["task"] == "classify" and not entry["missing"]
    shown = hatrack("show", "reviews").out
    assert "classify: no, yes" in shown and "r 8, alpha 16, dropout 0.05" in shown and "held out" in shown
    assert hatrack("show", "reviews", "--json").json["hat"]["labels"] == ["no", "yes"]

    assert hatrack("rename", "reviews", "films").code == 0
    assert hatrack("show", "films", "--json").json["hat"]["recipe"].get("name", "films") == "films"
    assert hatrack("predict", "films", "it was good film plot .").code == 0
    gone = hatrack("predict", "reviews2", "it was good film plot .")
    assert gone.code == 2 and "there is no such adapter; got reviews2" in gone.complaint
    assert hatrack("remove", "films").code == 0
    assert hatrack("list").out.startswith("The rack is empty.")
    assert hatrack("add", "reviews").code == 0 and hatrack("list").out.count("films") >= 1
    assert hatrack("remove", "films", "--files").code == 0 and not Path("reviews").exists()


def test_compare_gives_a_verdict_with_an_interval(classifier: Ran, hatrack: Run) -> None:
    found = hatrack("compare", "reviews", "--json").json
    assert set(found) == {"metric", "base", "adapter", "difference", "ci95", "rows", "verdict"}
    assert found["metric"] == "accuracy" and found["adapter"] == classifier.json["eval"]["accuracy"]
    assert found["base"] == classifier.json["before"]["accuracy"]
    assert found["difference"] == pytest.approx(found["adapter"] - found["base"])
    assert found["ci95"][0] <= found["difference"] <= found["ci95"][1]
    assert "verdict" in hatrack("compare", "reviews").out


def test_chat_and_generation(
    hatrack: Run, tiny_decoder: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        hatrack("train", "--base", tiny_decoder, "--data", questions, *QUICK, "--epochs", 2, "--name", "faq").code == 0
    )
    answer = hatrack("predict", "faq", "what film is good ?", "--json", "--max-new-tokens", 4).json
    assert set(answer) == {"prompt", "text"} and answer["prompt"] == "what film is good ?"
    streamed = hatrack("predict", "faq", "what film is good ?", "--max-new-tokens", 4).out
    assert streamed.strip() == answer["text"].strip()

    monkeypatch.setattr(sys, "stdin", io.StringIO("what film is good ?\n/base\nwhat plot is red ?\n/quit\nnever\n"))
    talk = hatrack("chat", "faq", "--json", "--max-new-tokens", 3)
    messages = talk.json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == "what plot is red ?" and "the base without an adapter answers" in talk.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert hatrack("chat", "nobody").code == 2


def test_three_other_shapes_of_data_from_an_empty_folder(hatrack: Run, tiny_encoder: Path, tiny_decoder: Path) -> None:
    """Numbers as labels in Parquet; lists of labels in JSONL; conversations with a system turn, gzipped or not."""
    words = ["good", "bad", "red", "blue"]
    table = {
        "stars": [index % 2 + 1 for index in range(40)],
        "review": [f"{words[i % 2]} {words[2 + i % 3 % 2]} film {'so ' * (i % 9)}" for i in range(40)],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), "stars.parquet")
    ran = hatrack("train", "--base", tiny_encoder, "--data", "stars.parquet", "--label", "stars", *QUICK, "--epochs", 8)
    assert ran.code == 0, ran.err
    assert "text = 'review'" in ran.err
    assert hatrack("predict", "stars", "good film", "--json").json["label"] == "1"

    rows = [
        {"content": f"{a} {b}", "tags": [w for w in (a, b) if w in words]}
        for a in ("good", "bad", "red", "blue", "film")
        for b in ("it", "red", "is", "bad", "so", "the")
    ]
    Path("tags.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = hatrack("train", "--base", tiny_encoder, "--data", "tags.jsonl", *QUICK, "--epochs", 10)
    assert ran.code == 0, ran.err
    answer = hatrack("predict", "tags", "good so", "--json").json
    assert isinstance(answer["label"], list) and set(answer["scores"]) == set(words)

    talks = [
        {
            "messages": [
                {"role": "system", "content": "answer"},
                {"role": "user", "content": f"what is {w} {v} ?"},
                {"role": "assistant", "content": f"the {v} {w}"},
            ]
        }
        for w in words
        for v in ("film", "plot", "actor")
    ]
    Path("talks.json").write_text(json.dumps(talks))
    ran = hatrack("train", "--base", tiny_decoder, "--data", "talks.json", *QUICK, "--epochs", 2)
    assert ran.code == 0, ran.err
    assert "text" in hatrack("predict", "talks", "what is good film ?", "--json", "--max-new-tokens", 3).json


def test_a_recipe_file_and_flags_are_one_recipe(hatrack: Run, tiny_encoder: Path, reviews: Path) -> None:
    Path("recipe.yaml").write_text(f"base: {tiny_encoder}\ndata: {reviews}\nepochs: 1\nr: 2\ndevice: cpu\n")
    ran = hatrack("train", "recipe.yaml", "--r", 4, "--name", "small", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(Path("small/adapter_config.json").read_text())["r"] == 4


def test_help_needs_no_arguments_and_names_every_command(hatrack: Run) -> None:
    shown = hatrack("--help")
    assert shown.code == 0 and hatrack().out == shown.out
    assert hatrack("--version").out == "hatrack 0.1.0\n"
    for command in ("demo", "train", "predict", "chat", "compare", "list", "show", "add", "rename", "remove"):
        assert f" {command} " in shown.out


def test_help_of_compare_speaks_of_scoring(hatrack: Run) -> None:
    shown = " ".join(hatrack("compare", "--help").out.replace("│", "").split())
    assert (
        "the first adapter was trained with" in shown and "Default: refuse" not in shown and "to train on" not in shown
    )


def test_what_to_type_next_names_the_program_as_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [".venv/bin/hatrack", "demo"])
    monkeypatch.setenv("PATH", "")
    assert program() == ".venv/bin/hatrack"
    monkeypatch.setattr(sys, "argv", ["/somewhere/hatrack/__main__.py", "demo"])
    assert program() == "hatrack"
