"""Rows handed over in Python are the rows of a file with the same content."""

import datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import hatrack
from hatrack.data.examples import read_examples
from hatrack.data.in_memory import cache_rows
from hatrack.data.read import read_rows
from hatrack.errors import DataError
from hatrack.recipe import Recipe

ROWS = [{"text": "good film", "label": "yes"}, {"text": "bad film", "label": "no"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        tuple(ROWS),
        {"text": ["good film", "bad film"], "label": ["yes", "no"]},
        pd.DataFrame(ROWS, index=[7, 9]),
        pd.DataFrame(ROWS).set_index("text"),
        pa.Table.from_pylist(ROWS),
        datasets.Dataset.from_list(ROWS),
    ],
    ids=["list", "tuple", "columns", "pandas", "pandas with an index", "pyarrow", "datasets"],
)
def test_every_kind_of_table_is_read(data: Any) -> None:
    rows = read_rows(cache_rows(data))
    assert rows.rows == ROWS and rows.columns == ("text", "label")


def test_a_series_has_no_columns() -> None:
    with pytest.raises(DataError, match=r"a list of rows, a DataFrame or a datasets.Dataset; got Series"):
        cache_rows(pd.Series(["a", "b"]))


def test_the_same_rows_are_the_same_file() -> None:
    assert cache_rows(ROWS) == cache_rows(pd.DataFrame(ROWS))
    assert cache_rows(ROWS) != cache_rows(ROWS[::-1])


def test_messages_name_the_option_and_the_place_in_the_list() -> None:
    rows = [*ROWS * 3, {"text": "", "label": "x"}]
    for options, name in (({}, "data"), ({"eval_data": cache_rows([*ROWS, {"text": "", "label": "x"}])}, "eval_data")):
        with pytest.raises(DataError) as caught:
            read_examples(Recipe.make(data=cache_rows(rows if name == "data" else ROWS * 3), **options))
        expected = f"{name} row {len(rows) if name == 'data' else len(ROWS) + 1}, column text: the text is empty"
        assert expected in caught.value.complaints and "rows.jsonl" not in str(caught.value)


def test_class_numbers_become_names() -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    assert [row["label"] for row in read_rows(cache_rows(data)).rows] == ["yes", "no"]


def test_numbers_of_numpy_and_missing_values_are_plain() -> None:
    row = {"a": np.int64(2**53 + 1), "b": np.float32(0.5), "c": np.array([1, 0]), "d": float("nan"), "e": pd.NaT}
    row |= {"f": pd.NA, "g": datetime.date(2026, 1, 2), "h": np.bool_(True), "i": {"role": "user"}}
    (found,) = read_rows(cache_rows([row])).rows
    missing = {"d": None, "e": None, "f": None}
    assert (
        found == {"a": 2**53 + 1, "b": 0.5, "c": [1, 0], "g": "2026-01-02", "h": True, "i": {"role": "user"}} | missing
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "the data has no rows"),
        (pd.DataFrame({"text": []}), "the data has no rows"),
        (["a text"], "each row must be a dict"),
        ([("a", "b")], "each row must be a dict"),
        ({"text": ["a"], "label": ["x", "y"]}, "all of the same length"),
        ({"text": "a", "label": "b"}, "all of the same length"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), r"splits train; fix: give one, such as"),
        (7, "must be a path, a list of rows"),
        ([{"text": b"bytes"}], "row 1 holds a value that is not a text"),
    ],
)
def test_what_is_no_table_is_named(data: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        cache_rows(data)


def test_training_on_rows_in_memory_and_on_a_path(tiny_encoder: Path, reviews: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(reviews)
    options = {"base": tiny_encoder, "steps": 2, "batch_size": 4, "device": "cpu"}
    of_file = hatrack.train(data=reviews, output=tmp_path / "one", **options)
    of_frame = hatrack.train(data=frame, output=tmp_path / "two", eval_data=frame.to_dict("records")[:20], **options)
    of_list = hatrack.train(data=frame.to_dict("records"), output=tmp_path / "three", **options)
    names = [hat.result["name"] for hat in (of_file, of_frame, of_list)]
    assert names == ["reviews", "rows", "rows-2"]
    text = ["it was good and fine"]
    assert of_file.predict(text) == of_list.predict(text)
    assert repr(of_file).startswith("Hat(reviews (in use); classify, labels ['no', 'yes']; base ")
