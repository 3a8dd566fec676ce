"""`hatrack predict`: one answer for each text."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hatrack.cli.adapter_options import Adapter, OpenHat, with_hat
from hatrack.cli.options import Json
from hatrack.console import format_rows, say
from hatrack.errors import DataError, truncate

if TYPE_CHECKING:
    from hatrack.cli.inputs import Asked
    from hatrack.inference.hat import Hat

Bare = Annotated[bool, typer.Option("--without-adapter", help="Answer with the bare base instead.")]
Length = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The most tokens of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the likeliest words.")]

BATCH = 32
Show = Callable[["Asked", dict[str, Any]], None]


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
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Write a new .csv, .tsv or .jsonl: the columns of the rows, and the answers."),
    ] = None,
    open_hat: OpenHat,
    without_adapter: Bare = False,
    max_new_tokens: Length = 128,
    temperature: Temperature = 0.0,
    as_json: Json = False,
) -> None:
    """Answer texts: hatrack predict NAME "a text".

    Or a text a line from standard input: hatrack predict NAME < lines.txt

    Each row gets one answer, in order; one that cannot be answered gets an error, and the exit code is then 2.
    """
    from hatrack.cli.inputs import open_source, read_asked
    from hatrack.cli.outputs import check_output, print_answer, refuse_failed, written

    check_output(output)
    source = open_source(texts, file, text)
    hat = open_hat()
    generates, several = hat.task != "classify", not source.streamed and len(texts or ()) != 1
    trained_on = next(iter(hat.cards.values())).recipe
    if without_adapter:
        hat.use(None)
    rows = read_asked(source, hat.task, text, trained_on)
    generation = {"max_new_tokens": max_new_tokens, "temperature": temperature} if generates else {}
    answers = _answers(hat, rows, 1 if generates or source.streamed else BATCH, generation)
    show: Show = functools.partial(print_answer, as_json=as_json)
    count = shortened = 0
    failed: list[tuple[int, str]] = []
    with ExitStack() as opened:
        if output is not None:
            columns = source.columns("prompt" if generates else "text")
            show = opened.enter_context(written(output, columns, hat.task))
        elif generates and not as_json:
            answers = _aloud(hat, rows, generation, several=several)
            show = _shown_already
        for asked, answer in answers:
            show(asked, answer)
            count, shortened = count + 1, shortened + bool(answer.get("cut"))
            failed += [(asked.row, answer["error"])] if "error" in answer else []
    if shortened:
        say(f"{format_rows(shortened)} longer than the adapter takes: cut, as in training")
    if output is not None:
        told = {"output": str(output), "rows": count, "failed": len(failed)}
        print(json.dumps(told) if as_json else f"answers to {format_rows(count)} are in {output}")
    refuse_failed(failed, count, source.name)


def _answers(
    hat: "Hat", rows: Iterable["Asked"], at_once: int, generation: dict[str, Any]
) -> Iterator[tuple["Asked", dict[str, Any]]]:
    """Each row with its answer, or with its error, so many at a time."""
    iterator = iter(rows)
    while batch := list(islice(iterator, at_once)):
        found = iter(_predicted(hat, [asked for asked in batch if not asked.problem], generation))
        for asked in batch:
            yield asked, _error(hat, asked, asked.problem) if asked.problem else next(found)


def _predicted(hat: "Hat", batch: list["Asked"], generation: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        return hat.predict([asked.prompt for asked in batch], **generation) if batch else []
    except DataError as error:  # one prompt that is too long, or that the chat template refuses
        if len(batch) > 1:
            return [answer for asked in batch for answer in _predicted(hat, [asked], generation)]
        return [_error(hat, batch[0], str(error))]


def _aloud(
    hat: "Hat", rows: Iterable["Asked"], generation: dict[str, Any], *, several: bool
) -> Iterator[tuple["Asked", dict[str, Any]]]:
    """The same for people, who read the answer of a generator while it comes."""
    for asked in rows:
        problem = asked.problem
        if several:
            print(f"> {truncate(str(asked.prompt))}", flush=True)
        try:
            for piece in hat.stream(asked.prompt, **generation) if not problem else ():
                print(piece, end="", flush=True)
        except DataError as error:
            problem = str(error)
        if problem:
            print(f"error: row {asked.row}: {problem}", end="")
        print("\n" if several else "", flush=True)
        yield asked, _error(hat, asked, problem) if problem else {}


def _shown_already(asked: "Asked", answer: dict[str, Any]) -> None:
    """What an answer is shown with that was printed while it came."""


def _error(hat: "Hat", asked: "Asked", problem: str) -> dict[str, Any]:
    return {"text" if hat.task == "classify" else "prompt": asked.prompt, "error": problem}
