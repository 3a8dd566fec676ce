"""`hatrack predict`: runs an adapter on texts and prints one answer per text."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hatrack.cli.adapter_options import Adapter, LoadHat, with_adapter_options
from hatrack.cli.options import Json
from hatrack.console import format_rows, say
from hatrack.errors import DataError, truncate

if TYPE_CHECKING:
    from hatrack.cli.inputs import InputRow
    from hatrack.inference.hat import Hat

WithoutAdapter = Annotated[bool, typer.Option("--without-adapter", help="Use the base alone.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Maximum length of an answer in tokens.")
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", metavar="NUMBER", min=0.0, help="0: always the most likely token. Above 0: sampling."
    ),
]

BATCH = 32
Show = Callable[["InputRow", dict[str, Any]], None]


@with_adapter_options
def predict(
    adapter: Adapter,
    *,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Texts. Default: standard input, one text per line."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="FILE", help="Read the texts from a table, or from a text file with one text per line."
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="COLUMN", help="Column of --file with the texts.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write rows and answers to a new .csv, .tsv or .jsonl file."),
    ] = None,
    load_hat: LoadHat,
    without_adapter: WithoutAdapter = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    as_json: Json = False,
) -> None:
    """Run an adapter on texts: hatrack predict NAME "a text".

    Or one text per line: hatrack predict NAME < lines.txt

    Prints one line per text, in order; with --json, one JSON object per line. Exit code 2: some texts got no answer.
    """
    from hatrack.cli.inputs import open_source, read_input
    from hatrack.cli.outputs import check_output, open_table, print_answer, raise_for_failed

    check_output(output)
    source = open_source(texts, file, text)
    hat = load_hat()
    generates, several = hat.task != "classify", not source.streamed and len(texts or ()) != 1
    trained_on = next(iter(hat.cards.values())).recipe
    if without_adapter:
        hat.use(None)
    rows = read_input(source, hat.task, text, trained_on)
    generation = {"max_new_tokens": max_new_tokens, "temperature": temperature} if generates else {}
    answers = _answers(hat, rows, 1 if generates or source.streamed else BATCH, generation)
    show: Show = functools.partial(print_answer, as_json=as_json)
    with ExitStack() as stack:
        if output is not None:
            columns = source.columns("prompt" if generates else "text")
            show = stack.enter_context(open_table(output, columns, hat.task))
        elif generates and not as_json:
            answers = _print_answers(hat, rows, generation, several=several)
            show = _ignore
        count, shortened, failed = _show_all(answers, show)
    if shortened:
        say(f"{format_rows(shortened)} cut to the maximum input length of the adapter, as in training")
    if output is not None:
        facts = {"output": str(output), "rows": count, "failed": len(failed)}
        print(json.dumps(facts) if as_json else f"answers to {format_rows(count)} are in {output}")
    raise_for_failed(failed, count, source.name)


def _show_all(
    answers: Iterable[tuple["InputRow", dict[str, Any]]], show: Show
) -> tuple[int, int, list[tuple[int, str]]]:
    """Shows each answer. Returns the number of answers and of shortened texts, and the failed rows' problems."""
    count, shortened, failed = 0, 0, []
    for row, answer in answers:
        show(row, answer)
        count, shortened = count + 1, shortened + bool(answer.get("cut"))
        failed += [(row.number, answer["error"])] if "error" in answer else []
    return count, shortened, failed


def _answers(
    hat: "Hat", rows: Iterable["InputRow"], batch_size: int, generation: dict[str, Any]
) -> Iterator[tuple["InputRow", dict[str, Any]]]:
    """Yields each row with its answer or its error."""
    iterator = iter(rows)
    while batch := list(islice(iterator, batch_size)):
        found = iter(_predict(hat, [row for row in batch if not row.problem], generation))
        for row in batch:
            yield row, _error(hat, row, row.problem) if row.problem else next(found)


def _predict(hat: "Hat", batch: list["InputRow"], generation: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        return hat.predict([row.prompt for row in batch], **generation) if batch else []
    except DataError as error:  # one prompt is too long, or the chat template refuses it
        if len(batch) > 1:
            return [answer for row in batch for answer in _predict(hat, [row], generation)]
        return [_error(hat, batch[0], str(error))]


def _print_answers(
    hat: "Hat", rows: Iterable["InputRow"], generation: dict[str, Any], *, several: bool
) -> Iterator[tuple["InputRow", dict[str, Any]]]:
    """Prints each answer while it is generated; with `several`, its prompt too. Yields rows and errors."""
    for row in rows:
        problem = row.problem
        if several:
            print(f"> {truncate(str(row.prompt))}", flush=True)
        try:
            for piece in hat.stream(row.prompt, **generation) if not problem else ():
                print(piece, end="", flush=True)
        except DataError as error:
            problem = str(error)
        if problem:
            print(f"error: row {row.number}: {problem}", end="")
        print("\n" if several else "", flush=True)
        yield row, _error(hat, row, problem) if problem else {}


def _ignore(row: "InputRow", answer: dict[str, Any]) -> None:
    """Shows nothing: `_print_answers` has printed the answer already."""


def _error(hat: "Hat", row: "InputRow", problem: str) -> dict[str, Any]:
    return {"text" if hat.task == "classify" else "prompt": row.prompt, "error": problem}
