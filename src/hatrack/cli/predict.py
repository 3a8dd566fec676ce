"""`hatrack predict` and `hatrack chat`: using an adapter."""

import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hatrack.cli.opening import Adapter, OpenHat, with_hat
from hatrack.cli.options import Json
from hatrack.errors import DataError, RecipeError

if TYPE_CHECKING:
    from hatrack.hat import Hat

Bare = Annotated[bool, typer.Option("--without-adapter", help="Answer with the bare base instead.")]
Length = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The most tokens of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the likeliest words.")]

BATCH = 32


@with_hat
def predict(
    adapter: Adapter,
    *,
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts. Without any, one a line from standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="Take the texts from a file: a line each, or a column of a table.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="The column of --file that holds the text.")] = None,
    open_hat: OpenHat,
    without_adapter: Bare = False,
    max_new_tokens: Length = 128,
    temperature: Temperature = 0.0,
    as_json: Json = False,
) -> None:
    """Answer texts: hatrack predict NAME "a text", or hatrack predict NAME < lines.txt"""
    if texts and file:
        raise RecipeError("texts come from the arguments or from --file, not both", fix="leave one out")
    batches = _batches(texts, file, text)
    hat = open_hat()
    if without_adapter:
        hat.use(None)
    for batch in batches:
        if hat.task == "classify":
            for answer in hat.predict(batch):
                _print_label(answer, as_json)
        else:
            for prompt in batch:
                _print_answer(
                    hat, prompt, as_json, several=len(batch) > 1, max_new_tokens=max_new_tokens, temperature=temperature
                )


@with_hat
def chat(
    adapter: Adapter,
    open_hat: OpenHat,
    max_new_tokens: Length = 256,
    temperature: Temperature = 0.0,
    as_json: Json = False,
) -> None:
    """Talk with an adapter. /base answers without it, /hat with it again, /new starts over, /quit leaves."""
    from hatrack.say import say

    hat = open_hat()
    if hat.task == "classify":
        raise RecipeError(f"{adapter} is a classifier and does not talk", fix=f'use hatrack predict {adapter} "a text"')
    name = hat.active
    person = sys.stdin.isatty()
    if person:
        say(f"talking with {name}: /base, /hat, /new, /quit")
    messages: list[dict[str, str]] = []
    while (line := _read_line("> " if person else "")) is not None and line != "/quit":
        if line == "/new":
            messages = []
        elif line in ("/base", "/hat"):
            hat.use(None if line == "/base" else name)
            say("the bare base answers" if line == "/base" else f"{name} answers")
        elif line:
            messages.append({"role": "user", "content": line})
            answer = ""
            for piece in hat.stream(messages, max_new_tokens=max_new_tokens, temperature=temperature):
                answer += piece
                if not as_json:
                    print(piece, end="", flush=True)
            if not as_json:
                print(flush=True)
            messages.append({"role": "assistant", "content": answer})
    if as_json:
        print(json.dumps({"adapter": name, "messages": messages}))


def _batches(texts: list[str] | None, file: Path | None, column: str | None) -> Iterator[list[str]]:
    """The texts, some at a time; from a pipe one at a time, so that each is answered as it comes."""
    if texts:
        return _some(map(_as_typed, texts), BATCH)
    if file:
        return _some(_file_texts(file, column), BATCH)
    if sys.stdin.isatty():
        raise RecipeError("there is no text to answer", fix='add one ("a text"), --file FILE, or pipe lines in')
    lines = (line.rstrip("\r\n") for line in sys.stdin)
    return _some((line for line in lines if line.strip()), BATCH if stat.S_ISREG(os.fstat(0).st_mode) else 1)


def _as_typed(argument: str) -> str:
    """An argument as UTF-8, which is what terminals send, also where the system's locale is a lesser one."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError:
        return argument


def _some(texts: Iterable[str], count: int) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, count)):
        yield batch


def _file_texts(path: Path, column: str | None) -> list[str]:
    """A column of a table, or the lines of any other file."""
    from hatrack.data.read import is_table, read_rows

    if not is_table(str(path)):
        try:
            return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                "the file cannot be read", got=f"{path}: {error}", fix="check the path and the encoding"
            ) from error
    rows = read_rows(str(path))
    column = column or next((name for name in ("text", "prompt") if name in rows.columns), None)
    if column is None or column not in rows.columns:
        raise DataError(
            f"{path} has no such column",
            got=column or "no --text",
            fix=f"use --text with one of {', '.join(rows.columns)}",
        )
    return [str(row[column]) for row in rows.rows]


def _print_label(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer), flush=True)
        return
    label = answer["label"] if isinstance(answer["label"], str) else ",".join(answer["label"]) or "-"
    chosen = [answer["scores"][name] for name in ([label] if isinstance(answer["label"], str) else answer["label"])]
    print(f"{label}\t{min(chosen, default=0.0):.3f}\t{answer['text']}", flush=True)


def _print_answer(hat: "Hat", prompt: str, as_json: bool, *, several: bool, **generation: Any) -> None:
    if as_json:
        print(json.dumps(hat.predict(prompt, **generation)[0]), flush=True)
        return
    if several:
        print(f"> {prompt}", flush=True)
    for piece in hat.stream(prompt, **generation):
        print(piece, end="", flush=True)
    print("\n" if several else "", flush=True)


def _read_line(prompt: str) -> str | None:
    try:
        return input(prompt).strip()
    except EOFError:
        return None
