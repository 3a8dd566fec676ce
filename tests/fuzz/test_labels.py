"""Columns of labels as people spell them: no two classes of a run are the same word or number, and a list with a place
for each class is never taken for a list of classes."""

import json
import math
import re
import unicodedata
from decimal import Decimal
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hatrack.data.examples import Examples, make_examples
from hatrack.data.read import Rows
from hatrack.errors import DataError
from hatrack.recipe import Recipe
from tests.fuzz.watch import MANY

WORDS = [
    "yes",
    "No",
    "very good",
    "caf\u00e9",
    "Stra\u00dfe",
    "1",
    "0",
    "10",
    "2.5",
    "true",
    "False",
    "none",
    "a/b",
    "\U0001f600",
]
SPELL: list[Any] = [
    str.upper,
    str.lower,
    str.title,
    lambda word: f" {word}\t",
    lambda word: word.replace(" ", "  "),
    lambda word: unicodedata.normalize("NFD", word),
    lambda word: word + "\u200b",
    lambda word: f"{word}.0" if word.isdigit() else word,
    lambda word: f"0{word}" if word.isdigit() else word,
    lambda word: f"{word}e0" if word.isdigit() else word,
    lambda word: {"none": "NaN", "true": "TRUE"}.get(word, word),
    lambda word: float(word) if re.fullmatch(r"[\d.]+", word) else word,
    lambda word: f'["{word}"]',
    lambda word: [word],
]
CELLS: list[Any] = [
    "",
    None,
    math.nan,
    [],
    "[",
    "[x, y]",
    "('a',)",
    "{'b'}",
    True,
    1,
    1.0,
    "1 0",
    [1, 0, 0],
    "\ud800",
    {},
    b"x",
    2**53 + 1,
]


def _same(name: str) -> object:
    """What a person takes for the same label."""
    text = "".join(letter for letter in unicodedata.normalize("NFKC", name) if letter.isprintable() or letter.isspace())
    text = " ".join(unicodedata.normalize("NFKC", text.casefold()).split())
    if text in ("none", "nan", "null"):
        return "none"
    return Decimal(text) if re.fullmatch(r"\d+(\.\d*)?(e\d)?", text) else text


def _prepared(labels: list[Any], **options: Any) -> Examples:
    rows = [{"text": f"text {index}", "label": label} for index, label in enumerate(labels)]
    return make_examples(
        Recipe.make(**options), Rows("f.jsonl", ("text", "label"), rows, list(range(1, len(rows) + 1)))
    )


@MANY
@given(data=st.data())
def test_no_two_classes_are_spellings_of_one(data: st.DataObject) -> None:
    words = data.draw(st.lists(st.sampled_from(WORDS), min_size=2, max_size=4, unique=True))
    spelled = [data.draw(st.sampled_from([str, *SPELL]))(word) for word in words for _ in range(3)]
    odd = [data.draw(st.sampled_from(CELLS)) for _ in range(data.draw(st.integers(0, 2)))]
    options = {"merge_labels": data.draw(st.booleans()), "bad_rows": data.draw(st.sampled_from(("refuse", "skip")))}
    try:
        found = _prepared((spelled + odd) * 3, **options)
    except DataError as error:
        assert error.what and len(str(error)) < 20_000
        return
    assert len({_same(name) for name in found.labels}) == len(found.labels)
    assert all(name.strip() for name in found.labels)


@MANY
@given(data=st.data())
def test_a_place_for_each_class_is_no_list_of_classes(data: st.DataObject) -> None:
    width = data.draw(st.integers(2, 6))
    one, zero = data.draw(st.sampled_from(((1, 0), (1.0, 0.0), (True, False), ("1", "0"))))
    rows = data.draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=6, max_size=20))
    vectors: list[Any] = [[one if bit else zero for bit in row] for row in rows]
    form = data.draw(st.sampled_from((list, json.dumps, str, lambda row: " ".join(map(str, row)))))
    labels = [form(row) for row in vectors]
    try:
        found = _prepared(labels, bad_rows=data.draw(st.sampled_from(("refuse", "skip"))))
    except DataError:
        return
    raise AssertionError(f"{labels} became the classes {found.labels}")
