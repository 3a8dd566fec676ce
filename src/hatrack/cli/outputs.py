"""Answers to rows: printed as text or JSON, or written to a table beside the columns they were asked in."""

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from hatrack.cli.inputs import Asked
from hatrack.console import say
from hatrack.errors import CONTROLS_TO_SPACES, DataError, RecipeError, truncate
from hatrack.storage import new_file

Answer = Mapping[str, Any]
"""What `Hat.predict` gives for a row, or its `error`."""

OWN = {"classify": ("label", "score", "scores"), "chat": ("text",), "complete": ("text",)}
"""Columns of an answer, by the adapter's task."""

SEPARATORS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}


def check_output(path: Path | None) -> None:
    """Raises RecipeError where answers cannot be written to a file of this name, before anything slow begins."""
    if path is None:
        return
    if path.suffix.lower() not in SEPARATORS:
        raise RecipeError("--output is a table", got=path, fix="name it .csv, .tsv or .jsonl")
    if path.exists() or path.is_symlink():
        raise RecipeError("--output is there already", got=path, fix="choose another name, or remove it first")


@contextlib.contextmanager
def written(path: Path, columns: Sequence[str], task: str) -> Iterator[Callable[[Asked, Answer], None]]:
    """Yields what writes a row and its answer. The file is there once the block ends, whole, or not at all."""
    names = {own: _free(own, columns) for own in (*OWN[task], "error")}
    moved = [f"{own} is in {name}" for own, name in names.items() if own != name]
    if moved:
        say(f"{path}: the rows have columns of these names, so the answer's {', '.join(moved)}")
    separator = SEPARATORS[path.suffix.lower()]
    with new_file(path) as binary:
        file = io.TextIOWrapper(binary, "utf-8", errors="backslashreplace", newline="", write_through=True)
        table = csv.writer(file, delimiter=separator or ",", lineterminator="\n")
        if separator:
            table.writerow([*columns, *names.values()])

        def write(asked: Asked, answer: Answer) -> None:
            told = {name: _told(answer, own) for own, name in names.items()}
            if separator:
                table.writerow([*(_cell(asked.cells.get(column)) for column in columns), *map(_cell, told.values())])
            else:
                given = {name: value for name, value in told.items() if value is not None}
                file.write(json.dumps(dict(asked.cells) | given, default=str) + "\n")

        yield write
        file.detach()


def print_answer(asked: Asked, answer: Answer, *, as_json: bool) -> None:
    """One line for a row: JSON, or for people the label, its score and the text."""
    if as_json:
        print(json.dumps(answer, default=str), flush=True)
    elif "error" in answer:
        print(f"error\t-\trow {asked.row}: {answer['error']}", flush=True)
    else:
        text = truncate(str(answer["text"])).translate(CONTROLS_TO_SPACES)
        print(f"{_label(answer).translate(CONTROLS_TO_SPACES)}\t{_told(answer, 'score'):.3f}\t{text}", flush=True)


def refuse_failed(failed: Sequence[tuple[int, str]], rows: int, source: str) -> None:
    """Raises DataError where rows got no answer, once all others have theirs."""
    if failed:
        raise DataError(
            f"{len(failed):,} of {rows:,} rows got no answer" if rows > 1 else "the row got no answer",
            fix="correct them, or leave them out" if len(failed) > 1 else "correct it, or leave it out",
            complaints=[f"{source} row {row}: {words}" for row, words in failed],
        )


def _label(answer: Answer) -> str:
    label = answer["label"]
    return label if isinstance(label, str) else ",".join(label) or "-"


def _told(answer: Answer, what: str) -> Any:
    """A part of an answer; the `score` is that of its label, of several the lowest. None where it has none."""
    if what != "score" or "label" not in answer:
        return answer.get(what)
    chosen = [answer["label"]] if isinstance(answer["label"], str) else answer["label"]
    return min((answer["scores"][name] for name in chosen), default=0.0)


def _free(name: str, taken: Sequence[str]) -> str:
    """A name that no column has."""
    tries = chain([name, f"predicted_{name}"], (f"predicted_{name}_{number}" for number in count(2)))
    return next(each for each in tries if each not in taken)


def _cell(value: Any) -> Any:
    return json.dumps(value, default=str) if isinstance(value, list | dict) else value
