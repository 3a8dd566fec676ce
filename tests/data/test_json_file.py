"""JSON in whatever layout: all rows, or a line that says where it stops being JSON."""

import json
from collections.abc import Callable

import pytest

from hatrack.data.json_file import read_json_array, read_json_lines
from hatrack.data.table import Rows
from hatrack.errors import DataError

ROWS = [{"text": f"it's \u2028 {n}, [{{ok}}]", "label": word} for n, word in enumerate(("yes", "no", "yes", "no"))]
LINES = [json.dumps(row) for row in ROWS]
PRETTY = [json.dumps(row, indent=2) for row in ROWS]
COLUMNS = {name: [row[name] for row in ROWS] for name in ("text", "label")}


def reader(name: str) -> Callable[[str, str], Rows]:
    """What reads a file of this name."""
    return read_json_lines if name.endswith(".jsonl") else read_json_array


LAYOUTS = {
    "one object a line": "\n".join(LINES),
    "blank lines": "\n\n".join(LINES) + "\n\n",
    "as Windows ends lines": "\r\n".join(LINES),
    "as old Macs did": "\r".join(LINES),
    "letters as they are": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "an array": json.dumps(ROWS),
    "an array over lines": json.dumps(ROWS, indent=2),
    "an array of lines": "[\n" + ",\n".join(LINES) + "\n]\n",
    "a comma before its end": "[\n" + ",\n".join(LINES) + ",\n]\n",
    "a comma before its end in one line": "[" + ", ".join(LINES) + ", ]",
    "objects over lines": "\n".join(PRETTY),
    "objects over lines with commas": ",\n".join(PRETTY) + ",",
    "commas at the ends": ",\n".join(LINES) + ",\n",
    "commas between": ",\n".join(LINES),
    "nothing between": "".join(LINES),
    "under a key": json.dumps({"version": "1", "data": ROWS}),
    "under a key over lines": json.dumps({"data": ROWS, "info": {"by": "me"}}, indent=1),
    "as Python prints objects": "\n".join(map(str, ROWS)),
    "as Python prints a list": str(ROWS),
    "as Python prints a list, by lines": "[\n" + ",\n".join(map(str, ROWS)) + ",\n]",
    "commas inside objects": "\n".join(line[:-1] + ",}" for line in LINES),
}
AS_NAMED = {
    "x.jsonl": list(LAYOUTS)[:5],
    "x.json": ["an array", "an array over lines", "an array of lines"],
}


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_every_row(layout: str, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    if name == "x.json" and layout in ("commas inside objects", "as Python prints objects"):
        pytest.skip("neither JSON nor Python as a whole")
    rows = reader(name)(name, LAYOUTS[layout])
    assert rows.rows == ROWS and rows.numbers == [1, 2, 3, 4] and rows.problems == []
    said = capfd.readouterr().err
    assert (said == "") == (layout in AS_NAMED[name])
    assert said == "" or (said.startswith(name) and said.endswith("read as such\n") and said.count("\n") == 1)


@pytest.mark.parametrize(
    "columns",
    [
        COLUMNS,
        {name: {str(place): value for place, value in enumerate(values)} for name, values in COLUMNS.items()},
        {"columns": ["text", "label"], "index": [0, 1, 2, 3], "data": [list(row.values()) for row in ROWS]},
    ],
    ids=["lists", "by index", "split"],
)
def test_columns_as_pandas_writes_them(columns: object, capfd: pytest.CaptureFixture[str]) -> None:
    assert read_json_array("x.json", json.dumps(columns)).rows == ROWS
    assert capfd.readouterr().err == "x.json holds columns, not one array of objects: read as such\n"


REFUSED = [
    (
        "x.jsonl",
        json.dumps(ROWS, indent=2).replace('"label": "no"', '"label" "no"', 1),
        "line 8: Expecting ':' delimiter",
    ),
    ("x.jsonl", json.dumps(ROWS)[:100], "x.jsonl is not valid JSON Lines; got line 1: "),
    ("x.json", json.dumps(ROWS, indent=1)[:90], "x.json is not valid JSON; got line "),
    ("x.json", "[\n// rows\n" + ",\n".join(LINES) + "]", "line 2: a comment, which JSON does not have: '// rows'"),
    (
        "x.jsonl",
        "text,label\na,b\n",
        "line 1: an object was expected: 'text,label'; fix: name it .csv if it is a table",
    ),
    ("x.json", '["a", "b"]', 'x.json must hold objects; got a text as the first row; fix: write each row as {"text"'),
    ("x.json", "null", "x.json must hold objects; got null as the first row"),
    (
        "x.json",
        LINES[0],
        "x.json must hold one array of objects; got one object with the keys text, label; fix: put the",
    ),
    (
        "x.json",
        json.dumps({"train": ROWS, "test": ROWS}),
        "the keys train, test; fix: put the rows of one key into a file",
    ),
    ("x.json", json.dumps({"0": ROWS[0], "1": ROWS[1]}), "one object with the keys 0, 1"),
    ("x.json", json.dumps({"columns": 1, "index": [], "data": [1]}), "one object with the keys columns, index, data"),
    (
        "x.json",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "keys messages",
    ),
    ("x.jsonl", '[{"role": "user", "content": "a"}]\n' * 2, 'fix: write each row as {"messages": [...]}'),
    ("x.jsonl", f"[{LINES[0]}]\n[{LINES[1]}]", "got an array as the first row; fix: give one object per line"),
    ("x.jsonl", "{text: 'a'}\n{text: 'b'}", "line 1: Expecting property name enclosed in double quotes"),
    ("x.jsonl", "{'text': b'a'}\n{'text': {1, 2}}", "line 1: Expecting property name"),
    ("x.json", "[" * 200_000, "got nested too deeply"),
]


@pytest.mark.parametrize(("name", "text", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_is_no_json_is_one_line(name: str, text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        reader(name)(name, text)
    assert message in str(caught.value) and "\n" not in str(caught.value) and caught.value.gotcha == "json-layout"


def test_single_bad_lines_are_problems_of_their_rows() -> None:
    text = "\n".join([*LINES[:2], '{"text": ', "[1]", "", *LINES[2:], "# the end"])
    rows = read_json_lines("x.jsonl", text)
    assert rows.rows == ROWS and rows.numbers == [1, 2, 5, 6]
    assert rows.problems == [
        (3, "malformed JSON: Expecting value at character 10"),
        (4, "list where an object was expected"),
        (7, "malformed JSON: Expecting value at character 1"),
    ]


def test_one_line_as_python_writes_it_among_others(capfd: pytest.CaptureFixture[str]) -> None:
    rows = read_json_lines("x.jsonl", "\n".join([LINES[0], "{'text': None, 'label': True, 'tags': ('a',)}"]))
    assert rows.rows[1] == {"text": None, "label": True, "tags": ["a"]}
    assert capfd.readouterr().err == "x.jsonl: a line is not JSON but objects as Python prints them: read as such\n"


def test_pathological_lines_stay_problems() -> None:
    rows = read_json_lines("x.jsonl", "\n".join([*LINES, "{'a': " + "[" * 100_000, "{'a': " + "-" * 100_000 + "1}"]))
    assert rows.rows == ROWS and [number for number, _ in rows.problems] == [5, 6]


def test_an_index_among_the_keys_is_passed_over(capfd: pytest.CaptureFixture[str]) -> None:
    text = "".join(json.dumps({"Unnamed: 0": n, **row}) + "\n" for n, row in enumerate(ROWS))
    assert read_json_lines("x.jsonl", text).rows == ROWS
    assert capfd.readouterr().err.startswith("x.jsonl: not read: Unnamed: 0 (pandas' index")


@pytest.mark.parametrize("text", ["{}", "[{}]", "[\n{},\n]"], ids=["a line", "an array", "objects"])
def test_a_row_with_a_key_twice_is_a_problem_of_that_row(text: str) -> None:
    """JSON parsers silently use the last of two values."""
    twice = '{"text": "a", "label": "x", "text": "b"}, {"text": "c", "label": [{"y": 1, "y": 2}]}'
    good = '{"text": "d", "label": "x", "text": "d"}'
    rows = f"{twice}, {good}".replace("}, {", "}\n{" if text == "{}" else "},\n{")
    found = reader("x.jsonl" if text == "{}" else "x.json")("x", text.replace("{}", rows))
    assert found.rows == [{"text": "d", "label": "x"}]
    words = [f"the key {key!r} occurs twice with different values" for key in ("text", "y")]
    assert found.problems == list(zip((1, 2), words, strict=True))


def test_columns_with_a_name_twice_are_refused() -> None:
    with pytest.raises(DataError, match=r"must hold one array of objects; got one object with the key 'text' twice"):
        read_json_array("x.json", '{"text": ["a", "b"], "label": ["x", "y"], "text": ["c", "d"]}')
