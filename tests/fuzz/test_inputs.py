"""Mutated recipes and data files, read as a run reads them before its base is loaded: a run could begin, or a
HatrackError says why not, soon, and nothing else happens."""

import contextlib
import csv
import datetime
import decimal
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hatrack.check.checks import check_recipe
from hatrack.data.examples import read_examples
from hatrack.data.template import PLAIN_TEMPLATE, write_conversation
from hatrack.errors import DataError, HatrackError
from hatrack.recipe import Recipe
from tests.conftest import tiny_tokenizer
from tests.data.test_template import LLAMA3, TOOLS
from tests.fuzz.watch import JSON, MANY, mutated, outcomes, watched

GOOD: dict[str, list[dict[str, Any]]] = {
    "classify": [{"text": f"it was {w} film {n}", "label": w} for w in ("good", "bad") for n in range(6)],
    "chat": [{"prompt": f"what is {n} ?", "completion": f"it is {n} ."} for n in ("one", "two", "three", "red")],
    "complete": [{"text": f"the film was {n} ."} for n in ("good", "bad", "fine", "poor")],
}
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""3 GB of text, once it is written out."""
YAML = [
    "[" * 3000, "2001-99-99", "!!int x", "!!float x", "!!timestamp x", "!!binary x", "!!python/name:os.system x",
    "&a [*a]", "1" * 5000, "0b", "0x", "1:2:3", ".inf", ".nan", "~", "'", "%", "{<<: 1}", "!!set {a}", "? [a]", "*b",
    "\x00", "!!omap [a: 1]", "- - -", "\t", "no", "1e400", "-1", "0", "1.5", "{a: 1}", "|", "../../up", "x" * 5000,
    f"x\n{LAUGHS}\nr: *i",
]  # fmt: skip
TURNS = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red ."}]
CELLS: list[Any] = [
    "", " ", "\x00", "\ud800", "x" * 100_000, "good " * 3000, "[", "[]", '["a", "b"]', '[["a"]]', "[" * 3000, "nan",
    "1e999", '[{"role": "user"}]', "<start> user :", 10**400, float("inf"), float("nan"), True, None, [], [[]], [None],
    {}, ["a", 1], TURNS, [{"role": ["user"], "content": "a"}], 1, 1.0, [{"from": "gpt", "value": None}], -(2**63),
    "\N{ZERO WIDTH SPACE}", "\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}" * 500, TURNS[0],
]  # fmt: skip
VALUES: list[list[Any]] = [
    ["a", "b", "a", "b"], [1, 2, 1, 2], [0.5, None, float("nan"), 0.5], [b"a", b"\xff", b"", None], [None] * 4,
    [True, False, True, False], [["a"], [], ["b", "a"], None], [{"role": "user"}, None, {}, {"role": "b"}],
    [datetime.date(2020, 1, 1)] * 4, [datetime.datetime(1, 1, 1)] * 4, [datetime.timedelta(1)] * 4,
    [decimal.Decimal("1.5")] * 4, [datetime.time(1)] * 4, [["a", None]] * 4, [TURNS] * 4,
]  # fmt: skip
COLUMNS: list[pyarrow.Array] = [pyarrow.array(values) for values in VALUES]
COLUMNS += [pyarrow.array(VALUES[0]).dictionary_encode(), pyarrow.array([2**62] * 4, pyarrow.timestamp("us"))]
KINDS = ("csv", "csv", "tsv", "jsonl", "jsonl", "json", "csv.gz", "txt", "parquet")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which everything has to stay."""
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HATRACK_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextlib.contextmanager
def _refused_or_taken(kind: str, here: Path) -> Iterator[None]:
    with watched(here):
        try:
            yield
        except HatrackError as error:
            outcomes[kind, "refused"] += 1
            assert len(str(error)) < 20_000 and error.what
        else:
            outcomes[kind, "taken"] += 1


def _could_begin(recipe: Recipe) -> None:
    """All that a run does before its base is loaded. Raises the first refusal."""
    if recipe.data is not None:
        read_examples(recipe)
    found, _ = check_recipe(recipe)
    for finding in found:
        if finding.refused:
            raise HatrackError(finding.what, got=finding.got, fix=finding.fix)


def _write(path: Path, rows: list[dict[str, Any]]) -> bytes:
    """Rows as the file's name says; its bytes."""
    text = io.StringIO()
    if ".csv" in path.name or path.suffix in (".tsv", ".txt"):
        writer = csv.writer(text, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(rows[0])
        writer.writerows([row.values() for row in rows])
    elif path.suffix == ".jsonl":
        text.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        json.dump(rows, text)
    if path.suffix == ".parquet":
        names = list(rows[0])
        parquet.write_table(pyarrow.table({name: [str(row[name]) for row in rows] for name in names}), path)
    else:
        content = text.getvalue().encode("utf-8", "surrogatepass")
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path.read_bytes()


def _recipe(tiny_decoder: Path, data: Path, task: str) -> dict[str, Any]:
    return {"base": str(tiny_decoder), "data": str(data), "task": task, "device": "cpu", "batch_size": 2}


@MANY
@given(data=st.data())
def test_a_recipes_options(here: Path, tiny_decoder: Path, data: st.DataObject) -> None:
    task = data.draw(st.sampled_from(sorted(GOOD)))
    _write(here / "rows.jsonl", GOOD[task])
    options = _recipe(tiny_decoder, here / "rows.jsonl", task)
    path = here / data.draw(st.sampled_from(("recipe.yaml", "recipe.json")))
    names = sorted(set(Recipe.model_fields) - {"base", "data", "eval_data"})  # names of files: nobody to ask for them
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(names))
        likely = st.sampled_from(["auto", "top-1", "1e-3", "all-linear", "none", "float32", "2GiB", 4, 0.5, True, None])
        options[name] = data.draw(likely if data.draw(st.integers(0, 2)) else st.sampled_from(CELLS) | JSON)
    if data.draw(st.integers(0, 9)) == 0:
        options[data.draw(st.text(max_size=8))] = 1
    content = json.dumps(options) if path.suffix == ".json" else yaml.dump(options)
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with _refused_or_taken("options of a recipe", here):
        _could_begin(Recipe.read(path))


@MANY
@given(data=st.data())
def test_a_recipes_text(here: Path, tiny_decoder: Path, data: st.DataObject) -> None:
    _write(here / "rows.jsonl", GOOD["classify"])
    options = _recipe(tiny_decoder, here / "rows.jsonl", "classify")
    lines = [*yaml.dump(options).splitlines(), "r: 2", "lr: 0.001"]
    for _ in range(data.draw(st.integers(0, 2))):
        place = data.draw(st.integers(0, len(lines) - 1))
        name = lines[place].partition(":")[0]
        if name not in ("base", "data"):
            lines[place] = f"{name}: {data.draw(st.sampled_from(YAML))}"
    content = "\n".join(lines).encode()
    if data.draw(st.booleans()):
        content = mutated(data, content, within=len(content))
    (here / "recipe.yaml").write_bytes(content)
    with _refused_or_taken("text of a recipe", here):
        recipe = Recipe.read(here / "recipe.yaml")
        if (recipe.base, recipe.data, recipe.eval_data) == (options["base"], options["data"], None):
            _could_begin(recipe)


@MANY
@given(data=st.data())
def test_a_data_files_bytes(here: Path, tiny_decoder: Path, data: st.DataObject) -> None:
    task, kind = data.draw(st.sampled_from(sorted(GOOD))), data.draw(st.sampled_from(KINDS))
    path = here / f"rows.{kind}"
    path.write_bytes(mutated(data, _write(path, GOOD[task]), within=10_000))
    bad_rows = data.draw(st.sampled_from(("skip", "skip", "skip", "refuse")))
    with _refused_or_taken("bytes of a data file", here):
        _could_begin(Recipe.make(**_recipe(tiny_decoder, path, task), bad_rows=bad_rows))


@MANY
@given(data=st.data())
def test_a_data_files_cells(here: Path, tiny_decoder: Path, data: st.DataObject) -> None:
    task, kind = data.draw(st.sampled_from(sorted(GOOD))), data.draw(st.sampled_from(KINDS))
    path = here / f"rows.{kind}"
    rows: list[Any] = [dict(row) for row in GOOD[task]]
    if kind == "parquet":
        names = [*GOOD[task][0], *data.draw(st.lists(st.sampled_from(("id", "text", "messages")), max_size=1))]
        columns = [data.draw(st.sampled_from(COLUMNS)) for _ in names]
        parquet.write_table(pyarrow.table(columns, names=names), path)
    else:
        cell = st.sampled_from(CELLS) | JSON
        for _ in range(data.draw(st.integers(1, 4))):
            row = data.draw(st.sampled_from(rows))
            row[data.draw(st.sampled_from(sorted(rows[0])) | st.text(max_size=4))] = data.draw(cell)
        if kind in ("json", "jsonl") and data.draw(st.integers(0, 4)) == 0:
            rows.append(data.draw(JSON))
        _write(path, rows)
    options = _recipe(tiny_decoder, path, task) | {"bad_rows": data.draw(st.sampled_from(("skip", "refuse")))}
    if data.draw(st.booleans()):
        del options["task"]
    with _refused_or_taken("cells of a data file", here):
        _could_begin(Recipe.make(**options))


MARKER = st.text("abcdefghij", min_size=6, max_size=10)
LAYOUTS = ("pairs", "alpaca", "context", "messages", "sharegpt", "lists")
KEYS: dict[str, Any] = {
    "name": "ann", "id": "m1", "weight": 1, "train": True, "loss": True, "tool_calls": None, "function_call": None,
    "reasoning_content": None, "mask": None, "content": [], "timestamp": 3,
}  # fmt: skip
"""Message keys, and a value of each that changes nothing."""


def _said(data: st.DataObject, words: list[str]) -> str:
    """A text of its own, which is noted."""
    words.append(f"{data.draw(MARKER)}{len(words)}")
    return words[-1]


def _message(data: st.DataObject, words: list[str], role: str) -> dict[str, Any]:
    """A message with text of its own, and what may stand beside it; all its text is noted."""
    parts = data.draw(st.sampled_from((None, "text", "image_url")))
    text = _said(data, words)
    found: dict[str, Any] = {"role": role, "content": [{"type": parts, "text": text}] if parts else text}
    key = data.draw(st.sampled_from(("", *KEYS)))
    if key == "tool_calls":
        arguments = {"a": _said(data, words)}
        given = json.dumps(arguments) if data.draw(st.booleans()) else arguments
        found[key] = [{"type": "function", "function": {"name": _said(data, words), "arguments": given}}]
    elif key in ("function_call", "reasoning_content"):
        found[key] = _said(data, words)
    elif key in ("weight", "train", "loss", "mask"):
        found[key] = data.draw(st.sampled_from((0, 1, True, False, None, 0.5, "true", 7)))
    elif key and key != "content":
        found[key] = KEYS[key]
    return found


def _row(data: st.DataObject, layout: str, words: list[str]) -> dict[str, Any]:
    """A row of one of the common layouts. Every text in it is noted in `words`."""
    if layout in ("pairs", "alpaca", "context"):
        names = {
            "pairs": ("prompt", "completion"),
            "alpaca": ("instruction", "output"),
            "context": ("question", "answer"),
        }
        row: dict[str, Any] = {name: _said(data, words) for name in names[layout]}
        beside = {"pairs": None, "alpaca": "input", "context": "context"}[layout]
        if beside:
            row[beside] = _said(data, words) if data.draw(st.booleans()) else ""
        if data.draw(st.booleans()):
            row["history"] = [[_said(data, words), _said(data, words)]]
    else:
        roles = data.draw(
            st.sampled_from((("user", "assistant"), ("user", "assistant") * 2, ("user", "tool", "assistant")))
        )
        turns = [_message(data, words, role) for role in roles]
        if layout == "sharegpt":
            turns = [
                {("from" if k == "role" else "value" if k == "content" else k): v for k, v in t.items()} for t in turns
            ]
        if layout == "lists":
            row = {"prompt": turns[:-1], "completion": turns[-1:]}
        else:
            cell = json.dumps(turns) if data.draw(st.booleans()) else turns
            row = {"conversations" if layout == "sharegpt" else "messages": cell}
    if data.draw(st.booleans()):
        row["system"] = _said(data, words) if data.draw(st.booleans()) else None
    if data.draw(st.integers(0, 3)) == 0:
        tool = {"name": _said(data, words)}
        row["tools"] = data.draw(
            st.sampled_from(([tool], json.dumps([tool]), [{"type": "function", "function": tool}]))
        )
    return row


@MANY
@given(data=st.data())
def test_no_text_of_a_layout_is_lost(here: Path, tiny_decoder: Path, data: st.DataObject) -> None:
    """All the text of a row is in what is written of it, or the row is refused."""
    layout = data.draw(st.sampled_from(LAYOUTS))
    words: list[list[str]] = [[] for _ in range(3)]
    rows = [_row(data, layout, said) for said in words]
    path = here / "rows.json"
    path.write_text(json.dumps(rows))
    template = data.draw(st.sampled_from((None, TOOLS, LLAMA3, PLAIN_TEMPLATE)))
    tokenizer = tiny_tokenizer(chat=True)
    with _refused_or_taken("layouts", here):
        examples = read_examples(Recipe.make(data=str(path), bad_rows="skip"))
        for example in (*examples.train, *examples.held_out):
            with contextlib.suppress(DataError):
                whole, spans = write_conversation(
                    example.messages,
                    tokenizer,
                    template or tokenizer.chat_template,
                    tools=example.tools,
                    context_only=example.context_only,
                )
                missing = [word for word in words[example.row - 1] if word not in whole]
                assert not missing and spans, (rows[example.row - 1], whole)


@pytest.mark.parametrize("task", sorted(GOOD))
@pytest.mark.parametrize("kind", sorted({*KINDS} - {"txt"}))
def test_the_good_ones_are_taken(here: Path, tiny_decoder: Path, task: str, kind: str) -> None:
    _write(here / f"rows.{kind}", GOOD[task])
    _could_begin(Recipe.make(**_recipe(tiny_decoder, here / f"rows.{kind}", task)))
