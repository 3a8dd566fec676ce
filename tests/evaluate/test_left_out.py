"""Rows that were left out because the base's template or tokenizer refuses them stay out when adapters are compared."""

import json
from pathlib import Path

import pytest

import hatrack
from hatrack.data.complaints import BadRows
from hatrack.evaluate.held_out import held_out_rows

WORDS = ("red", "good", "bad", "fine", "one", "two", "three", "film")


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Eighty rows; the answers of every fourth begin after 24 tokens."""
    rows = [
        {"prompt": f"what is {one} {two} ?" + " so" * 40 * (index % 4 == 0), "completion": f"it is {two} ."}
        for index, (one, two) in enumerate((one, two) for one in WORDS for two in (*WORDS, "so", "very"))
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_was_left_out_in_training_is_left_out_of_a_comparison(
    tmp_path: Path, tiny_decoder: Path, talks: Path
) -> None:
    options = {"base": str(tiny_decoder), "data": str(talks), "device": "cpu", "steps": 2, "max_length": 24}
    with pytest.raises(BadRows, match=r"talks.jsonl rows 1, 5, 9, .*the answer begins after the 24 tokens"):
        hatrack.train(**options, output=str(tmp_path / "a"))
    hat = hatrack.train(**options, bad_rows="skip", output=str(tmp_path / "b"), name="b")
    (rows,) = held_out_rows(hat).values()
    told = json.loads((tmp_path / "b/hatrack.json").read_text())["data"]
    assert len(rows) == told["held_out"] == 6 and told["rows"] == 54 and not any((rows.row_numbers - 1) % 4 == 0)
    (others,) = held_out_rows(hat, str(_others(talks)), bad_rows="skip").values()
    assert len(others) == 60 and not any((others.row_numbers - 1) % 4 == 0)
    with pytest.raises(BadRows):
        held_out_rows(hat, str(_others(talks)), bad_rows="refuse")


def _others(talks: Path) -> Path:
    """Other questions, as long as those."""
    path = talks.with_name("others.jsonl")
    path.write_text(talks.read_text().replace("what is", "who is"))
    return path


def test_of_a_longer_conversation_only_what_is_new_is_scored(
    tmp_path: Path, tiny_decoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"what is {one} {two} ?" for one in WORDS for two in WORDS[:4]]
    first, path = [[("user", ask), ("assistant", "it is red .")] for ask in asked], tmp_path / "talks.jsonl"

    def write(talks: list[list[tuple[str, str]]]) -> str:
        rows = [{"messages": [{"role": role, "content": content} for role, content in talk]} for talk in talks]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    hat = hatrack.train(base=str(tiny_decoder), data=write(first), device="cpu", steps=2, output=str(tmp_path / "a"))
    more = [("user", "so ?"), ("assistant", "it is so .")]
    (rows,) = held_out_rows(hat, write([[*talk, *more] for talk in first])).values()
    assert (
        "29 rows continue conversations that were trained on: only their new answers are scored"
        in capsys.readouterr().err
    )
    learned = {int(count) for count in rows.sizes[:, 1]}
    assert len(learned) == 2 and max(learned) == 2 * min(learned)  # one answer of two; both of those held out
