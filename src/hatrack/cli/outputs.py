"""Prints answers as text or JSON, or writes them to a table beside the input's columns."""

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from hatrack.cli.inputs import InputRow
from hatrack.console import say
from hatrack.errors import CONTROLS_TO_SPACES, DataError, RecipeError, truncate
from hatrack.storage import new_file

Answer = Mapping[str, Any]
"""What `Hat.predict` returns for a row, or a dict with its `error`."""

ANSWER_COLUMNS = {"classify": ("label", "score", "scores"), "chat": ("text",), "complete": ("text",)}
"""Task -> the columns that an answer adds to a table."""

SEPARATORS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}


def check_output(path: Path | None) -> None:
    """Raises RecipeError if answers cannot be written to `path`. Called before the base is loaded."""
    if path is None:
        return
    if path.suffix.lower() not in SEPARATORS:
        raise RecipeError("--output has an unknown suffix", got=path, fix="name it .csv, .tsv or .jsonl")
    if path.exists() or path.is_symlink():
        raise RecipeError("--output exists already", got=path, fix="choose another name, or remove it first")


@contextlib.contextmanager
def open_table(path: Path, columns: Sequence[str], task: str) -> Iterator[Callable[[InputRow, Answer], None]]:
    """Yields a function that writes a row and its answer. The file appears once the block ends without an error."""
    names = {key: _unused_name(key, columns) for key in (*ANSWER_COLUMNS[task], "error")}
    renamed = [f"{key} is written to {name}" for key, name in names.items() if key != name]
    if renamed:
        say(f"{path}: the input has columns of these names already: {', '.join(renamed)}")
    separator = SEPARATORS[path.suffix.lower()]
    with new_file(path) as binary:
        file = io.TextIOWrapper(binary, "utf-8", errors="backslashreplace", newline="", write_through=True)
        table = csv.writer(file, delimiter=separator or ",", lineterminator="\n")
        if separator:
            table.writerow([*columns, *names.values()])

        def write(row: InputRow, answer: Answer) -> None:
            added = {name: _value(answer, key) for key, name in names.items()}
            if separator:
                table.writerow([*(_cell(row.cells.get(column)) for column in columns), *map(_cell, added.values())])
            else:
                present = {name: value for name, value in added.items() if value is not None}
                file.write(json.dumps(dict(row.cells) | present, default=str) + "\n")

        yield write
        file.detach()


def print_answer(row: InputRow, answer: Answer, *, as_json: bool) -> None:
    """Prints one line: JSON, or the label, its score and the text."""
    if as_json:
        print(json.dumps(answer, default=str), flush=True)
    elif "error" in answer:
        print(f"error\t-\trow {row.number}: {answer['error']}", flush=True)
    else:
        text = truncate(str(answer["text"])).translate(CONTROLS_TO_SPACES)
        print(f"{_label(answer).translate(CONTROLS_TO_SPACES)}\t{_value(answer, 'score'):.3f}\t{text}", flush=True)


def raise_for_failed(failed: Sequence[tuple[int, str]], rows: int, source: str) -> None:
    """Raises DataError if rows failed. `failed`: their numbers and problems; `rows`: how many rows there were."""
    if failed:
        raise DataError(
            f"{len(failed):,} of {rows:,} rows got no answer" if rows > 1 else "the row got no answer",
            fix="correct them, or leave them out" if len(failed) > 1 else "correct it, or leave it out",
            complaints=[f"{source} row {row}: {problem}" for row, problem in failed],
        )


def _label(answer: Answer) -> str:
    label = answer["label"]
    return label if isinstance(label, str) else ",".join(label) or "-"


def _value(answer: Answer, key: str) -> Any:
    """Returns an answer's value of `key`, or None. `score` is the score of its label, or the lowest of its labels'."""
    if key != "score" or "label" not in answer:
        return answer.get(key)
    chosen = [answer["label"]] if isinstance(answer["label"], str) else answer["label"]
    return min((answer["scores"][name] for name in chosen), default=0.0)


def _unused_name(name: str, taken: Sequence[str]) -> str:
    """Returns `name`, or a similar name that is not taken."""
    candidates = chain([name, f"predicted_{name}"], (f"predicted_{name}_{number}" for number in count(2)))
    return next(each for each in candidates if each not in taken)


def _cell(value: Any) -> Any:
    return json.dumps(value, default=str) if isinstance(value, list | dict) else value
