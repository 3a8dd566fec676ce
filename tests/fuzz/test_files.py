"""Rows written in every encoding, container and layout that people have them in: what is read is every row as it was
written, or a HatrackError says why not. Mutated bytes of them never do anything else either."""

import bz2
import contextlib
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hatrack.data.read import read_lines, read_rows
from hatrack.errors import HatrackError
from tests.fuzz.watch import MANY, mutated, outcomes, watched

Row = dict[str, str]

PIECES = [
    "fine",
    "a",
    "é",
    "ß",
    "’",
    '"',
    '""',
    '\\"',
    "'",
    ",",
    ", ",
    ";",
    "\t",
    "|",
    "\n",
    "\r\n",
    "\\",
    " ",
    "1,000",
    "=",
    "<b>",
]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join).filter(str.strip)
ROWS = st.lists(st.tuples(TEXT, st.sampled_from(("good", "bad"))), min_size=2, max_size=14).map(
    lambda pairs: [{"text": text, "label": label} for text, label in pairs]
)


def _csv(
    separator: str = ",", quoting: int = csv.QUOTE_MINIMAL, end: str = "\r\n", **more: str
) -> Callable[[list[Row]], str]:
    """What writes rows as CSV; `index` and `empty` add columns without a name, `first` a line before the header."""

    def write(rows: list[Row]) -> str:
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=separator, quoting=quoting, lineterminator=end)  # type: ignore[arg-type]
        before, behind = [""] * ("index" in more), [""] * 2 * ("empty" in more)
        writer.writerow([*before, "text", "label", *behind])
        for number, row in enumerate(rows):
            writer.writerow([*([str(number)] if before else []), *row.values(), *behind])
        return more.get("first", "") + text.getvalue()

    return write


def _as_python(rows: list[Row]) -> str:
    return "\n".join(map(str, rows))


LAYOUTS: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "csv": ("csv", _csv()),
    "csv, all in quotes": ("csv", _csv(quoting=csv.QUOTE_ALL, end="\n")),
    "csv of old Macs": ("csv", _csv(quoting=csv.QUOTE_ALL, end="\r")),
    "csv with pandas' index": ("csv", _csv(end="\n", index="")),
    "csv with empty columns": ("csv", _csv(empty="")),
    "semicolons": ("csv", _csv(";")),
    "sep line": ("csv", _csv(";", first="sep=;\r\n")),
    "tabs in csv": ("csv", _csv("\t")),
    "tsv": ("tsv", _csv("\t", end="\n")),
    "lines": ("jsonl", lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)),
    "array in jsonl": ("jsonl", json.dumps),
    "pretty array in jsonl": ("jsonl", lambda rows: json.dumps(rows, indent=2)),
    "pretty objects": ("jsonl", lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows)),
    "commas at ends": ("jsonl", lambda rows: ",\n".join(json.dumps(row) for row in rows) + ","),
    "python": ("jsonl", _as_python),
    "json": ("json", json.dumps),
    "lines in json": ("json", lambda rows: "\n".join(map(json.dumps, rows))),
    "under a key": ("json", lambda rows: json.dumps({"data": rows, "version": 1})),
    "trailing comma": ("json", lambda rows: json.dumps(rows)[:-1] + ",]"),
    "python list": ("json", str),
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252")
CONTAINERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}


def _written(data: st.DataObject, folder: Path, rows: list[Row]) -> Path:
    kind, write = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]
    container = data.draw(st.sampled_from(("", "", ".gz", ".bz2")))
    path = folder / f"rows.{kind}{container}"
    path.write_bytes(CONTAINERS[container](write(rows).encode(data.draw(st.sampled_from(ENCODINGS)))))
    return path


@MANY
@given(data=st.data(), rows=ROWS)
def test_what_is_read_is_what_was_written(tmp_path: Path, data: st.DataObject, rows: list[Row]) -> None:
    path = _written(data, tmp_path, rows)
    with watched(tmp_path):
        try:
            found = read_rows(str(path))
        except HatrackError as error:
            outcomes["layouts of files", "refused"] += 1
            assert error.what and "\n" not in str(error)
        else:
            outcomes["layouts of files", "taken"] += 1
            assert found.rows == rows and found.problems == []


@MANY
@given(data=st.data())
def test_quotes_that_nobody_escaped_never_cost_a_row(tmp_path: Path, data: st.DataObject) -> None:
    pieces = [piece for piece in PIECES if "\n" not in piece and piece not in (";", "|", "\t")]
    text = (
        st.lists(st.sampled_from([*pieces, '"', "a fine one"]), min_size=1, max_size=5).map("".join).filter(str.strip)
    )
    texts = data.draw(st.lists(text, min_size=5, max_size=12))
    labels = [data.draw(st.sampled_from(("good", "bad"))) for _ in texts]
    content = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in zip(texts, labels, strict=True))
    (tmp_path / "rows.tsv").write_text(content, encoding="utf-8", newline="")
    with watched(tmp_path), contextlib.suppress(HatrackError):
        found = read_rows(str(tmp_path / "rows.tsv"))
        assert len(found.rows) + len(found.problems) == len(texts)
        assert [row["label"] for row in found.rows] == labels or found.problems


@MANY
@given(data=st.data(), rows=ROWS)
def test_mutated_bytes_in_any_encoding(tmp_path: Path, data: st.DataObject, rows: list[Row]) -> None:
    path = _written(data, tmp_path, rows)
    path.write_bytes(mutated(data, path.read_bytes(), within=200))
    for read in (read_rows, read_lines):
        with watched(tmp_path):
            try:
                read(str(path))
            except HatrackError as error:
                outcomes["bytes in any encoding", "refused"] += 1
                assert error.what and "\x00" not in str(error) and len(str(error)) < 20_000
            else:
                outcomes["bytes in any encoding", "taken"] += 1


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_rows_are_taken_in_every_layout(tmp_path: Path, layout: str, encoding: str) -> None:
    rows = [{"text": f"it was {word}, the café’s {n}", "label": word} for word in ("good", "bad") for n in range(4)]
    kind, write = LAYOUTS[layout]
    (tmp_path / f"rows.{kind}").write_bytes(write(rows).encode(encoding))
    assert read_rows(str(tmp_path / f"rows.{kind}")).rows == rows
