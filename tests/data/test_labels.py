"""Labels: what is one class in several spellings, what are no classes, and how cells spell lists."""

from decimal import Decimal
from typing import Any

import pytest

from hatrack.data import labels
from hatrack.data.examples import Examples, make_examples, read_examples
from hatrack.data.read import Rows
from hatrack.errors import DataError
from hatrack.recipe import Recipe


def _rows(values: list[Any], source: str = "file.csv", count: int = 24, text: str = "text") -> Rows:
    """`count` rows whose labels are `values` in turn."""
    rows = [{"text": f"{text} {index}", "label": values[index % len(values)]} for index in range(count)]
    return Rows(source, ("text", "label"), rows, list(range(1, count + 1)))


def _prepare(values: list[Any], held_out: list[Any] | None = None, **options: Any) -> Examples:
    eval_rows = _rows(held_out, "held.csv", 6, "other") if held_out else None
    return make_examples(Recipe.make(**options), _rows(values), eval_rows)


def _refused(values: list[Any], held_out: list[Any] | None = None, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        _prepare(values, held_out, **options)
    return caught.value


@pytest.mark.parametrize(
    "spellings",
    [
        ["Positive", "positive"],
        ["very good", "very  good", "Very\tGood"],
        ["1", "1.0", "01", "1e0", "+1", "1."],
        ["0", "-0", "0.00"],
        ["100", "1e2"],
        ["True", "TRUE", "true"],
        ["None", "null", "nan", "NA", "N/A", "<NA>"],
        ["caf\u00e9", "cafe\u0301"],
        ["\uff21", "a"],
        ["\uff11", "1"],
        ["Stra\u00dfe", "STRASSE"],
        ["good", "go\u200bod", "good\ufeff", "good\x00"],
        ["\u2764\ufe0f", "\u2764"],
    ],
)
def test_one_class_in_several_spellings_is_refused_or_merged(
    spellings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    error = _refused([*spellings, "other"])
    assert error.gotcha == "labels-spelled-twice" and "--merge-labels" in str(error)
    assert all(ascii(spelling)[1:-1] in ascii(str(error)).replace("\\\\", "\\") for spelling in spellings[:2])
    found = _prepare([*spellings, spellings[-1], "other"], merge_labels=True)
    assert set(found.labels) == {spellings[-1], "other"}  # the commonest
    assert "labels merged: " in capsys.readouterr().err


def test_each_spelling_is_counted() -> None:
    assert _refused(["Yes", "Yes", "yes", "no"]).complaints == ["'Yes' (12 rows) and 'yes' (6 rows)"]
    assert len(_refused(["Yes", "yes", "No", "no"]).complaints) == 2
    assert "'a' (12 rows) and 'A' (12 rows)" in str(_refused([["a", "b"], ["A"]]))


@pytest.mark.parametrize(
    "values",
    [
        ["1", "2", "10"],
        ["1.5", "1.50001"],
        [2**53, 2**53 + 1],
        [str(2**53), str(2**53 + 1)],
        ["None", "good"],
        ["C", "C++", "C#"],
        ["e", "1e", "e1"],
        ["1,000", "1000"],
        ["true", "1", "2"],
        ["v1.0", "v1"],
        ["\U0001f600", "\U0001f601"],
    ],
)
def test_what_is_not_equal_stays_apart(values: list[Any]) -> None:
    assert len(_prepare(values).labels) == len(values)


def test_true_is_1_where_there_is_nothing_else() -> None:
    assert len(_refused(["True", "1", "False", "0"]).complaints) == 2
    assert _prepare(["True", "True", "1", "False", "False", "0"], merge_labels=True).labels == ["False", "True"]
    assert "mixed types" in str(_refused([True, True, 1, False, False, 0]))
    assert _prepare([True, True, 1, False, False, 0], merge_labels=True).labels == ["false", "true"]
    assert _prepare([1, 1, "1", 2], merge_labels=True).labels == ["1", "2"]


def test_held_out_labels_in_another_spelling() -> None:
    error = _refused(["Yes", "No"], ["yes", "no"])
    assert (
        "held.csv rows 1, 3, 5, column label: label 'yes' is spelled 'Yes' in the training rows (--merge-labels"
        in str(error)
    )
    found = _prepare(["Yes", "No"], ["yes", "no"], merge_labels=True)
    assert found.labels == ["No", "Yes"] and [example.label for example in found.held_out[:2]] == [1, 0]
    assert _prepare(["1", "0"], [1.0, 0.0]).labels == ["0", "1"]  # a number is shown as "1"
    assert _prepare(["yes", "no"], ["yes  ", " no"]).labels == ["no", "yes"]  # spaces around a label are nothing
    assert "'1.0' is spelled '1'" in str(_refused(["1", "0"], ["1.0", "0.0"]))
    assert "'maybe' does not occur in the training rows" in str(_refused(["yes", "no"], ["maybe"], merge_labels=True))


@pytest.mark.parametrize(
    "vectors",
    [
        [[1, 0, 0], [0, 1, 1], [0, 0, 1]],
        [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]],
        [[True, False], [False, True], [False, False]],
        [["1", "0"], ["0", "1"]],
        ["[1, 0, 0]", "[0, 1, 1]"],
        ["1 0 0", "0 1 1"],
        ["1,0,0", "0,1,1"],
        ["1.0;0.0", "0.0;1.0"],
        ["True False", "False True"],
        ["001", "010", "000"],
        [[1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 0]],  # one of another length
        [[1, 0], [0, 1]],
        [[1, 0, 0], [0, 0, 0], []],
        [[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]],
        [[1, -1, -1], [-1, 1, 1]],
    ],
)
def test_vectors_are_no_labels(vectors: list[Any]) -> None:
    for options in (Recipe.make(), Recipe.make(merge_labels=True), Recipe.make(bad_rows="skip")):
        error = _refused(vectors, **options.explicit_options())
        assert error.gotcha == "labels-are-vectors" and '["sports", "politics"] or [0, 2]' in str(error)


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ([[0], [1, 2], [2], [0, 1]], ["0", "1", "2"]),
        ([[0], [1]], ["0", "1"]),
        ([[0], [1], [0, 1], []], ["0", "1"]),
        ([[0, 2], [1, 3]], ["0", "1", "2", "3"]),
        (["['a']", "('b',)", "['a', 'b']", "{'b', 'c'}", "[]"], ["a", "b", "c"]),
        (['["a"]', "['b']", '["it\'s"]'], ["a", "b", "it's"]),
        (["['caf\\xe9']", "['b']"], ["b", "caf\u00e9"]),
    ],
)
def test_lists_of_labels(values: list[Any], classes: list[str]) -> None:
    found = _prepare(values)
    assert found.multi_label and found.labels == classes


def test_held_out_vectors_are_no_lists_of_labels() -> None:
    error = _refused([[0], [1, 2]], [[1, 0, 0], [0, 0, 1]])
    assert "held.csv rows 1-6, column label: the label looks like a list with a number for each class" in str(error)


@pytest.mark.parametrize(
    "cell",
    [
        "[a, b]",
        "[1 0 0]",
        "['a' 'b']",
        "['a', b]",
        "{'a': 1}",
        '{"a": 1, "b": 0}',
        "(a, b)",
        "[a]",
        "[1.2.3]",
        "['\\x']",
        "[" * 3000 + "]",
    ],
)
def test_what_looks_like_a_list_and_is_none(cell: str) -> None:
    error = _refused(["x", "y", "x", "y", "x", cell])
    assert "column label: the label looks like a list, but is not one in JSON" in str(error)


@pytest.mark.parametrize("name", ["(none)", "a [b]", "{x}", "[", ":)", "(a) or (b)"])
def test_brackets_in_a_name(name: str) -> None:
    assert name in _prepare(["x", name]).labels


@pytest.mark.parametrize("values", [[index / 7 for index in range(24)], [str(index) for index in range(24)]])
def test_scores_are_no_classes(values: list[Any]) -> None:
    for options in (Recipe.make(), Recipe.make(bad_rows="skip")):
        error = _refused(values, **options.explicit_options())
        assert error.gotcha == "labels-are-scores" and "24 different labels in 24 rows" in str(error)
        assert "\n" not in str(error)
    assert _refused([0.25, 0.75, *values[:22]]).gotcha == "labels-are-scores"


def test_texts_are_no_classes() -> None:
    error = _refused([f"A summary of story {index}." for index in range(24)])
    assert "nearly all different" in str(error) and "--prompt COLUMN --completion COLUMN" in str(error.fix)
    assert not error.gotcha and "\n" not in str(error)
    assert len(_refused([*"abcdefghi", *"z" * 15]).complaints) == 9


def test_few_different_numbers_are_classes() -> None:
    assert _prepare([0.5, 1.0, 1.5, 2.0]).labels == ["0.5", "1", "1.5", "2"]
    assert len(_prepare(list(range(8))).labels) == 8


@pytest.mark.parametrize("value", [None, "", "  ", float("nan"), "\u200b", "\x00"])
def test_no_label(value: Any) -> None:
    assert "rows 3, 6, 9, 12, 15, 18, 21, 24, column label: the label is empty" in str(_refused(["a", "b", value]))


def test_every_class_is_said_with_its_count(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"class {index:02}" for index in range(25)]
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"text {i},{names[i % 25]}\n" for i in range(100)) + "more,class 07\n"
    )
    read_examples(Recipe.make(data=str(tmp_path / "rows.csv")))
    said = capsys.readouterr().err
    assert "classes: class 07 (5), class 00 (4), class 01 (4)" in said and "class 19 (4) and 5 more" in said
    assert labels.describe_classes(["a, b", "\x07"], {0: 1, 1: 2000}) == r"'\x07' (2,000), 'a, b' (1)"


def test_numbers_are_compared_exactly() -> None:
    assert labels.merge_spellings(["0.1", "0.10000000000000000000000000000000001"], "f", "c", merge=False) == {}
    assert labels.find_classes(["1e3", "999", "-2"]) == (["-2", "999", "1e3"], False)
    assert Decimal("1e3") == 1000


def test_joined_labels_are_read_as_one_label_which_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    labels.warn_of_unsplit_labels(["a;b", "c", "c;a", "b;a"])
    assert capsys.readouterr().err == (
        "labels such as 'a;b' are read as one label; give lists for several labels per row\n"
    )
    labels.warn_of_unsplit_labels(["a;b", "c", ["a|b"], "b|a", "d;"])
    assert capsys.readouterr().err == ""
