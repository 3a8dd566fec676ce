"""CSV as people have it: a row for every line that was meant as one, or a refusal; never fewer in silence."""

import csv
import io
import random

import pytest

from hatrack.data.csv_file import read_csv
from hatrack.data.table import Rows
from hatrack.errors import DataError

THINGS, ENDS = (
    ("kettle", "lamp", "tent", "desk", "mug", "radio", "scarf"),
    ("works well", "broke", "came late", "is fine"),
)
ROWS = [(f"The {thing} I bought {end}.", "good" if end in ENDS[::3] else "bad") for thing in THINGS for end in ENDS]


def lines(separator: str = ",", **changed: str) -> list[str]:
    """A header and 28 lines, some of them changed: `_4` is the line of row 4."""
    made = [f"text{separator}label", *(f"{text}{separator}{label}" for text, label in ROWS)]
    return [changed.get(f"_{number}", line) for number, line in enumerate(made)]


def read(text: list[str] | str, separator: str = ",", end: str = "\n") -> Rows:
    """The rows of lines, or of a text as it stands."""
    return read_csv("x", text if isinstance(text, str) else end.join(text) + end, separator)


def texts(rows: Rows) -> list[str]:
    """The first cells."""
    return [next(iter(row.values())) for row in rows.rows]


OPEN = [
    ("closes amid a cell", {"_4": '"Never came', "_10": 'The "best" one'}),
    ("closes at a cell's end", {"_4": '"Never came', "_20": 'It is the "best"'}),
    ("closes two rows later", {"_4": '"Never came', "_6": 'the best"'}),
    ("never closes", {"_4": '"Never came'}),
    ("opens in the last row", {"_28": '"Never came'}),
    ("text after it closes", {"_4": '"Best" ever'}),
    ("two at once", {"_4": '""Never came'}),
    ("all of the file", {"_1": '"Never came', "_28": 'the best"'}),
]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize(("name", "cells"), OPEN, ids=[name for name, _ in OPEN])
def test_quotes_that_are_letters_are_read_as_they_stand(
    name: str, cells: dict[str, str], separator: str, end: str, capfd: pytest.CaptureFixture[str]
) -> None:
    labels = {f"_{number}": label for number, (_, label) in enumerate(ROWS, 1)}
    rows = read(lines(separator, **{k: f"{v}{separator}{labels[k]}" for k, v in cells.items()}), separator, end)
    wanted = [cells.get(f"_{number}", text) for number, (text, _) in enumerate(ROWS, 1)]
    assert texts(rows) == wanted and rows.numbers == list(range(1, 29)) and rows.problems == []
    said = capfd.readouterr().err
    first = int(min(cells, key=lambda key: int(key[1:]))[1:]) + 1
    assert said.startswith("x: quotes are read as ordinary characters (by the rules of CSV") and f"line {first}" in said


def test_quotes_amid_a_cell_are_letters_to_everybody(capfd: pytest.CaptureFixture[str]) -> None:
    rows = read(lines("\t", _4='A 5" tent\tbad', _9='The "best" desk\tgood'), "\t")
    assert texts(rows)[3] == 'A 5" tent' and texts(rows)[8] == 'The "best" desk' and capfd.readouterr().err == ""


UNSURE = [
    ("another cell is in quotes", lines(_4='"Never came,bad', _7='"A fine, thing",good'), "opens in the row at line 5"),
    (
        "closes amid a cell beside a good one",
        lines(_4='"Best" ever,bad', _7='"A fine, thing",good'),
        "at line 5 and closes",
    ),
    ("one column", ["text", "a", '"b', "c", "d"], "a quote in the row at line 3 that is never closed"),
    (
        "the line has other cells",
        lines(_4='"Never, ever, came,bad'),
        "a quote in the row at line 5 that is never closed",
    ),
    (
        "another line has other cells",
        lines(_4='"Never came,bad', _9="a, b,bad"),
        "in the row at line 5 that is never closed",
    ),
    ("an unknown label", lines(_4='"Never came, and'), "a quote in the row at line 5 that is never closed"),
    ("closes in the next row", lines(_4='"Never came,bad', _5='at all",good'), "around 2 lines that look like rows"),
    ("the header", ['"text,label', "a,b", "c,d"], "a quote in the row at line 1 that is never closed"),
    (
        "questions and answers",
        ["prompt,completion", *(f"what is w{n},it is v{n}" for n in range(4)), '"what is a,b', 'what is c",d'],
        "a quote that opens in line 6 and closes in line 7, around 2 lines that look like rows",
    ),
]


@pytest.mark.parametrize(("name", "content", "got"), UNSURE, ids=[name for name, _, _ in UNSURE])
def test_where_quotes_may_mean_either_the_line_is_named(name: str, content: list[str], got: str) -> None:
    with pytest.raises(DataError) as caught:
        read(content)
    said = str(caught.value)
    assert said.startswith("x is not valid CSV; got a quote") and got in said and said.endswith("[csv-quotes]")
    assert "\n" not in said and "fix: correct its quotes" in said


MEANT = [
    'with ""quotes"",\nand lines',
    "Good, but\nnot great",
    "It costs 1,000\nand breaks",
    "one\r\ntwo\r\nthree",
    "Roses are red,\nviolets are blue,\nsugar is sweet",
    "a\n\nb",
    "yes,no\nmaybe",
    "a\rb",
    "\n",
    'He said:\n""Fine, then"",\nand left',
    "C:\\dir\\",
    'a path\\""',
]


@pytest.mark.parametrize("cell", MEANT)
def test_cells_of_several_lines_go_on_working(cell: str, capfd: pytest.CaptureFixture[str]) -> None:
    rows = read(lines(_4=f'"{cell}",bad', _28=f'"{cell}",bad'))
    assert [texts(rows)[place] for place in (3, 27)] == [cell.replace('""', '"')] * 2
    assert len(rows.rows) == 28 and capfd.readouterr().err == ""


def test_whatever_the_writer_writes_is_read() -> None:
    draw = random.Random(0)
    for _ in range(200):
        cells = ["".join(draw.choices("ab ,;\"\n\r\\'\t", k=draw.randint(1, 12))) for _ in range(12)]
        table = [[f"x{cell}", draw.choice(("yes", "no"))] for cell in cells]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("text", "label"), *table])
        try:
            assert [list(row.values()) for row in read(text.getvalue()).rows] == table
        except DataError as error:
            assert error.gotcha == "csv-quotes"  # a cell that looks like rows is refused, never taken apart


def test_backslash_quotes(capfd: pytest.CaptureFixture[str]) -> None:
    rows = read(
        lines(_2='"She said \\"fine\\" twice.",bad', _3='"She said \\"fine\\", and left",bad', _5='"C:\\\\",bad')
    )
    assert texts(rows)[1:3] == ['She said "fine" twice.', 'She said "fine", and left'] and len(rows.rows) == 28
    assert capfd.readouterr().err.startswith(
        'x: \\" is read as a quote inside a cell (by the rules of CSV there is a quote'
    )


def test_spaces_after_separators() -> None:
    rows = read(["text, label", *(f'"{text}, yes", "{label}"' for text, label in ROWS)])
    assert rows.columns == ("text", "label") and rows.rows[0] == {"text": f"{ROWS[0][0]}, yes", "label": ROWS[0][1]}


@pytest.mark.parametrize("promised", [",", "\t"])
@pytest.mark.parametrize(("mark", "name"), [(",", "commas"), ("\t", "tabs"), (";", "semicolons"), ("|", "bars")])
def test_another_separator_that_fits_every_row_is_read_and_said(
    mark: str, name: str, promised: str, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = read(lines(mark, _4=f'"Never{mark} ever came"{mark}bad'), promised)
    assert len(rows.rows) == 28 and texts(rows)[3] == f"Never{mark} ever came" and rows.columns == ("text", "label")
    said = "" if mark == promised else f"x: read with {name} between the cells, as its header has them\n"
    assert capfd.readouterr().err == said


def test_numbers_with_commas_between_semicolons() -> None:
    assert read("text;score\na;1,5\nb;2,5\n").rows[0] == {"text": "a", "score": "1,5"}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("sep=;\r\ntext;label\r\na;b\r\n", [{"text": "a", "label": "b"}]),
        ("sep=,\ntext,label\na,b\n", [{"text": "a", "label": "b"}]),
        ("SEP=\t\ntext\tlabel\na\tb\n", [{"text": "a", "label": "b"}]),
        ('"sep=;"\ntext;label\na;b\n', [{"text": "a", "label": "b"}]),
        ("sep=;\ntext,label\na,b\n", [{"text": "a", "label": "b"}]),
    ],
)
def test_a_line_that_names_the_separator(
    text: str, rows: list[dict[str, str]], capfd: pytest.CaptureFixture[str]
) -> None:
    found = read(text)
    assert found.rows == rows and found.numbers == [1]
    assert "names the separator and is not a row" in capfd.readouterr().err


def test_lines_are_counted_in_the_file_with_its_sep_line() -> None:
    with pytest.raises(DataError, match="a quote in the row at line 4 that is never closed"):
        read('sep=,\ntext,label\na,b\n"c,d,e\n')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (",text,label\n0,a,b\n1,c,d\n", "x: not read: column 1, which has no name (pandas' index, which index=False"),
        ("Unnamed: 0,text,label\n7,a,b\n3,c,d\n", "x: not read: Unnamed: 0 (pandas' index"),
        ("Unnamed: 0.1,Unnamed: 0,text,label\n0,0,a,b\n1,1,c,d\n", "x: not read: Unnamed: 0.1 and Unnamed: 0 (pandas'"),
        ("text,label,,\na,b,,\nc,d,,\n", "x: not read: 2 columns without a name or content\n"),
        ("text,label,,\na,b\nc,d,\n", "x: not read: 2 columns without a name or content\n"),
        ("text,,label\na,,b\nc,,d\n", "x: not read: a column without a name or content\n"),
        ("text,label,Unnamed: 2\na,b,\nc,d,\n", "x: not read: a column without a name or content\n"),
        ("text,label\na,b,\nc,d,,,\n", ""),
    ],
)
def test_columns_that_hold_nothing_are_passed_over_and_said(
    text: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = read(text)
    assert rows.rows == [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}] and rows.columns == ("text", "label")
    heard = capfd.readouterr().err
    assert heard.startswith(said) and heard.count("\n") == bool(said)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            ",label\nA fine film,good\nA bad one,bad\n",
            "needs one name for each column; got '', 'label'; fix: give each",
        ),
        ("text,label,\na,b,\nc,d,note\n", "needs one name for each column; got 'text', 'label', ''; fix: give each"),
        (",\n1,2\n", "needs one name for each column"),
        (
            "text,label\n1,a,b\n2,c,d\n",
            "the header of x has 2 columns and every row 3 cells; got 'text', 'label'; fix:",
        ),
        ('{"text": "a", "label": "b"}\n', 'x is JSON, not CSV; got it begins with \'{"text": "a"'),
        ('[\n  {"text": "a"}\n]\n', "x is JSON, not CSV"),
    ],
)
def test_headers_that_name_too_little(text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rows_are_numbered_as_a_person_counts_them() -> None:
    rows = read("\n\ntext,label\n\na,b\n\n\nc\nd,e,f\ng,h\n")
    assert rows.numbers == [1, 4] and [number for number, _ in rows.problems] == [2, 3]


def test_only_line_ends_end_lines() -> None:
    assert texts(read("text,label\na\u2028b\x85c\x0cd,e\nf,g\n")) == ["a\u2028b\x85c\x0cd", "f"]


def test_the_header_of_a_file_that_was_joined_to_another_is_no_row() -> None:
    rows = read("text,label\nfine,a\ntext,label\nbad,b\n")
    assert rows.numbers == [1, 3] and rows.problems == [(2, "the header again, as if two files were joined")]
