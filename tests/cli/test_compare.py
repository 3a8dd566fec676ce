"""`hatrack compare` never scores what was trained on, and says which of several adapters is better."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from hatrack.data import trained_rows
from tests.cli.conftest import Ran

Run = Callable[..., Ran]
QUICK = ("--device", "cpu", "--dtype", "float32", "--lr", "0.02", "--batch-size", "8", "--epochs", 2)
ONE = {"metric", "base", "adapter", "difference", "ci95", "rows", "verdict"}


def _learned(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _new(count: int) -> list[dict[str, str]]:
    words = ["red", "blue", "green", "one", "two", "three"]
    rows = []
    for index in range(count):
        side = index % 2
        filler = f"{words[index % 6]} {words[index // 6 % 6]} {words[index // 36 % 6]}"
        rows.append({"text": f"who was {('bad', 'good')[side]} {filler} ?", "label": ("no", "yes")[side]})
    return rows


def _written(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    path = Path(name)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def trained(hatrack: Run, tiny_encoder: Path, reviews: Path) -> Callable[..., Path]:
    """Trains a classifier on the reviews, in a folder of its name."""

    def run(name: str, data: Path = reviews, base: Path = tiny_encoder, **options: object) -> Path:
        flags = [word for option, value in options.items() for word in (f"--{option}", value)]
        ran = hatrack("train", "--base", base, "--data", data, *QUICK, "--name", name, *flags)
        assert ran.code == 0, ran.err
        return Path(name)

    return run


def test_the_training_file_itself_gives_no_verdict(trained: Any, hatrack: Run, reviews: Path) -> None:
    trained("hat")
    rows = len(_learned(reviews))
    found = hatrack("compare", "hat", "--data", reviews)
    held_out = hatrack("compare", "hat", "--json")
    assert "--task" not in held_out.err  # compare has no such option
    left = held_out.json["rows"]
    assert found.code == 2 and found.out == ""
    assert f"these {rows - left} rows were trained on, so they cannot be scored" in found.complaint
    assert "[scored-on-training-rows]" in found.complaint
    _written("learned.csv", [row for row in _learned(reviews) if row["label"] == "yes"])
    assert "rows were trained on" in hatrack("compare", "hat", "--data", "learned.csv").complaint


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_training_rows_are_known_in_any_file(trained: Any, hatrack: Run, reviews: Path, suffix: str) -> None:
    hat = trained("hat")
    known = trained_rows.from_bytes((hat / trained_rows.FILE).read_bytes())
    rows = [*_learned(reviews), *_new(30)]
    rows = [
        {"id": str(index), "Sentiment": row["label"], "Review": f" {row['text'].upper()}  "}
        for index, row in enumerate(rows[::2] + rows[1::2])
    ]
    path = _written(f"mixed.{suffix}", rows)
    reviews.unlink()  # what it was trained on is not asked for
    found = hatrack("compare", "hat", "--data", path, "--text", "Review", "--label", "Sentiment", "--json")
    assert found.code == 0, found.err
    assert f"{len(known)} of {len(rows)} rows were trained on and are left out" in found.err
    assert set(found.json) == ONE and found.json["rows"] == len(rows) - len(known)
    guessed = hatrack("compare", "hat", "--data", path, "--json")
    assert guessed.json == found.json


def test_few_rows_left_of_many_give_no_verdict(trained: Any, hatrack: Run, reviews: Path) -> None:
    trained("hat", data=_written("all.csv", _learned(reviews)), **{"eval-data": _written("scored.csv", _new(40))})
    rows = _learned(Path("all.csv"))
    assert hatrack("compare", "hat", "--json").json["rows"] == 40
    found = hatrack("compare", "hat", "--data", _written("few.csv", [*rows, *_new(19)]))
    assert found.code == 2 and f"these {len(rows)} rows were trained on" in found.complaint
    assert "which has 19 other rows" in found.complaint
    enough = hatrack("compare", "hat", "--data", _written("enough.csv", [*rows, *_new(20)]), "--json")
    assert enough.json["rows"] == 20


def test_an_older_adapter_is_asked_for_its_data(trained: Any, hatrack: Run, reviews: Path) -> None:
    hat = trained("hat")
    mixed = _written("mixed.csv", [*_learned(reviews), *_new(30)])
    wanted = hatrack("compare", "hat", "--data", mixed, "--json").json
    (hat / trained_rows.FILE).unlink()
    assert hatrack("compare", "hat", "--data", mixed, "--json").json == wanted
    reviews.write_text(reviews.read_text() + "it was fine ,yes\n")
    found = hatrack("compare", "hat", "--data", mixed, "--json")
    assert found.json["rows"] == len(_learned(mixed))
    assert "hat does not record the rows it was trained on" in found.err
    changed = hatrack("compare", "hat")
    assert changed.code == 2 and "is no longer what hat was trained on; fix: give rows with --data" in changed.complaint


def test_rows_that_moved_are_asked_for(trained: Any, hatrack: Run, reviews: Path) -> None:
    trained("hat")
    same = hatrack("compare", "hat", "--json")
    assert same.code == 0 and "--task" not in same.err
    moved = reviews.rename(reviews.with_name("moved.csv"))
    found = hatrack("compare", "hat")
    assert found.code == 2 and "the rows that hat was trained on cannot be read: there is no such" in found.complaint
    assert "fix: give rows with --data; that may be the same file" in found.complaint
    assert "were trained on" in hatrack("compare", "hat", "--data", moved).complaint


def test_a_damaged_memory_is_refused(trained: Any, hatrack: Run) -> None:
    path = trained("hat") / trained_rows.FILE
    path.write_bytes(path.read_bytes()[:-8])
    found = hatrack("compare", "hat", "--data", _written("new.csv", _new(30)))
    assert (
        found.code == 2
        and f"{trained_rows.FILE} is damaged" in found.complaint
        and "copy the adapter again" in found.complaint
    )


def test_labels_are_those_of_the_adapter(trained: Any, hatrack: Run) -> None:
    trained("hat")
    new = _new(30)
    plain = hatrack("compare", "hat", "--data", _written("new.csv", new), "--json").json
    spelled = [{**row, "label": row["label"].title() + " "} for row in new]
    assert hatrack("compare", "hat", "--data", _written("spelled.csv", spelled), "--json").json == plain
    one = [row for row in _new(60) if row["label"] == "yes"]
    assert hatrack("compare", "hat", "--data", _written("one.csv", one), "--json").json["rows"] == 30
    _written("odd.csv", [*new, {"text": "who was it ?", "label": "perhaps"}])
    odd = hatrack("compare", "hat", "--data", "odd.csv")
    assert odd.code == 2 and "perhaps" in odd.err and "--bad-rows skip" in odd.err
    assert hatrack("compare", "hat", "--data", "odd.csv", "--bad-rows", "skip", "--json").json == plain
    _written("other.csv", [{"text": row["text"], "label": "0" if row["label"] == "no" else "1"} for row in new])
    other = hatrack("compare", "hat", "--data", "other.csv")
    assert (
        other.code == 2
        and "no label is one that the adapter knows; got '0', '1'; fix: its labels are" in other.complaint
    )
    missing = hatrack("compare", "hat", "--data", _written("bare.csv", [{"text": row["text"]} for row in new]))
    assert missing.code == 2 and "--label" in missing.complaint


def test_an_adapter_made_elsewhere_is_scored_on_what_it_is_given(trained: Any, hatrack: Run, reviews: Path) -> None:
    own = trained("hat")
    known = hatrack("compare", "hat", "--data", _written("new.csv", _new(30)), "--json").json
    shutil.copytree(own, "foreign")
    for name in ("hatrack.json", trained_rows.FILE):
        Path("foreign", name).unlink()
    numbered = [{**row, "label": str(int(row["label"] == "yes"))} for row in _new(30)]
    found = hatrack("compare", "foreign", "--data", _written("numbered.csv", numbered), "--json")
    assert found.json["adapter"] == known["adapter"] and found.json["rows"] == 30
    assert "foreign does not record the rows it was trained on" in found.err
    learned = [{**row, "label": str(int(row["label"] == "yes"))} for row in _learned(reviews)]
    assert hatrack("compare", "foreign", "--data", _written("l.csv", learned), "--json").json["rows"] == len(learned)
    words = hatrack("compare", "foreign", "--data", "new.csv")
    assert words.code == 2 and "its labels are 'LABEL_0', 'LABEL_1'" in words.complaint
    assert "foreign does not record what it was trained on" in hatrack("compare", "foreign").complaint
    pair = hatrack("compare", "hat", "foreign", "--data", "new.csv")
    assert pair.code == 2 and "hat and foreign cannot be compared with each other" in pair.complaint


def test_two_adapters_are_compared_with_the_base_and_each_other(trained: Any, hatrack: Run, reviews: Path) -> None:
    trained("good", epochs=8)
    trained("poor", epochs=1, lr=1e-3)
    new = _written("new.csv", _new(60))
    alone = {name: hatrack("compare", name, "--data", new, "--json").json for name in ("good", "poor")}
    found = hatrack("compare", "good", "poor", "--data", new, "--json").json
    assert found["adapters"] == [{"name": name, **alone[name]} for name in ("good", "poor")]
    (pair,) = found["pairs"]
    assert pair["names"] == ["good", "poor"] and pair["rows"] == 60 and pair["metric"] == "accuracy"
    assert pair["scores"] == [alone["good"]["adapter"], alone["poor"]["adapter"]]
    assert pair["difference"] == pytest.approx(pair["scores"][1] - pair["scores"][0])
    assert pair["ci95"][0] <= pair["difference"] <= pair["ci95"][1]
    sure = pair["ci95"][1] < 0 or pair["ci95"][0] > 0
    assert pair["better"] == (("good" if pair["difference"] < 0 else "poor") if sure else None)
    turned = hatrack("compare", "poor", "good", "--data", new, "--json").json["pairs"][0]
    assert turned["difference"] == -pair["difference"] and turned["better"] == pair["better"]
    printed = hatrack("compare", "good", "poor", "--data", new).out
    assert "poor against good: " in printed and "base: " in printed
    held_out = hatrack("compare", "good", "poor", "--json").json
    assert held_out["adapters"][0] == {"name": "good", **hatrack("compare", "good", "--json").json}


def test_rows_that_either_was_trained_on_are_left_out(trained: Any, hatrack: Run, reviews: Path) -> None:
    rows = _learned(reviews)
    first, second = _written("first.csv", rows[:16]), _written("second.csv", rows[16:])
    scored = _written("scored.csv", _new(30))
    trained("one", data=first, **{"eval-data": scored})
    trained("two", data=second, **{"eval-data": scored})
    assert hatrack("compare", "one", "two", "--json").json["pairs"][0]["rows"] == 30
    mixed = _written("mixed.csv", [*rows, *_new(30)])
    assert hatrack("compare", "one", "two", "--data", mixed, "--json").json["pairs"][0]["rows"] == 30
    assert hatrack("compare", "one", "--data", mixed, "--json").json["rows"] == 30 + len(rows) - 16
    trained("three", data=reviews, seed=7)
    trained("four", data=reviews, seed=8)
    apart = hatrack("compare", "three", "four")
    assert apart.code == 2 and "--data" in apart.complaint
    assert "three and four hold out different rows" in apart.complaint


def test_what_cannot_be_compared_is_refused_before_a_base_is_loaded(
    trained: Any, hatrack: Run, reviews: Path, tiny_decoder: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained("hat")
    trained("chat", data=questions, base=tiny_decoder)
    words = {"yes": "glad", "no": "sad"}
    trained("mood", data=_written("mood.csv", [{**row, "label": words[row["label"]]} for row in _learned(reviews)]))
    monkeypatch.setattr("hatrack.inference.load.load_base", lambda *_, **__: pytest.fail("a base was loaded"))
    for names, got in (
        (("hat", "mood"), "one of the labels no, yes and task classify, one of the labels glad, sad"),
        (("hat", "chat"), "one of the labels no, yes and task chat"),
    ):
        found = hatrack("compare", *names)
        assert found.code == 2 and f"{names[0]} and {names[1]} cannot be compared with each other" in found.complaint
        assert got in found.complaint and "[adapters-not-alike]" in found.complaint
    twice = hatrack("compare", "hat", Path("hat").resolve())
    assert twice.code == 2 and "an adapter is named twice" in twice.complaint
    assert "did you mean hat?" in hatrack("compare", "hat", "hatt").complaint


def test_conversations_are_known_in_any_layout(trained: Any, hatrack: Run, questions: Path, tiny_decoder: Path) -> None:
    trained("faq", data=questions, base=tiny_decoder)
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    new = [{"prompt": f"who is {row['prompt']}", "completion": row["completion"]} for row in rows]
    again = [{"prompt": row["prompt"], "completion": "it is not ."} for row in rows]

    def messages(row: dict[str, str], **more: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["completion"]}]
        return {"conversations": turns, **more}

    learned = hatrack("compare", "faq", "--data", _written("learned.jsonl", [messages(row) for row in rows]))
    assert learned.code == 2 and "rows were trained on" in learned.complaint
    known = len(trained_rows.from_bytes(Path("faq", trained_rows.FILE).read_bytes()))
    mixed = _written("mixed.jsonl", [messages(row) for row in [*rows, *new, *again]])
    found = hatrack("compare", "faq", "--data", mixed, "--json")
    assert found.json["metric"] == "loss" and found.json["rows"] == len(mixed.read_text().splitlines()) - known
    trained("pairs", data=questions, base=tiny_decoder, task="complete")
    renamed = [{"question": row["prompt"], "answer": f" {row['completion']}"} for row in [*rows, *new]]
    found = hatrack("compare", "pairs", "--data", _written("renamed.csv", renamed), "--json")
    assert found.json["rows"] == len(renamed) - known
