"""One row's cells -> the fields of an example, or what is wrong with them. Knows nothing of other rows."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from hatrack.data.labels import Label, encodable, read_label
from hatrack.data.messages import (
    Talk,
    Unusable,
    continued,
    holds,
    looks_like_python_talk,
    looks_like_talk,
    read_history,
    read_talk,
    read_tools,
    said,
    unlearned,
    with_answer,
    with_system,
)

Found = TypeVar("Found")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be learned from, and why."""

    row: int
    reason: str
    column: str = ""


def read_example(
    number: int, row: Mapping[str, Any], task: str, columns: Mapping[str, str], unread: set[str] | None = None
) -> tuple[dict[str, Any], Label] | BadRow:
    """The fields of an example and its label as it stands in the row ("" where the task has none), or a complaint.

    `unread` gets the names of message keys that hold something and are not read.
    """
    try:
        if task == "chat":
            talk = _talk(row, columns)
            tools = _read(row, columns, "tools", read_tools) if "tools" in columns else ()
            if unread is not None:
                unread |= talk.unread
            return {"messages": talk.turns, "context_only": talk.context_only, "tools": tools}, ""
        texts = {role: _text(row, columns, role) for role in ("text", "prompt", "completion") if role in columns}
    except Unusable as error:
        return BadRow(number, str(error), error.column)
    if "completion" in texts:
        return {"text": _with_input(texts["prompt"], row, columns), "completion": texts["completion"]}, ""
    if task != "classify":
        return {"text": texts["text"]}, ""
    try:
        label = read_label(row.get(columns["label"]))
    except ValueError as error:
        return BadRow(number, str(error), columns["label"])
    return {"text": texts["text"]}, label


def read_prompt(
    number: int, row: Mapping[str, Any], task: str, columns: Mapping[str, str]
) -> str | list[dict[str, Any]] | BadRow:
    """What a row asks an adapter for `task`: its text, or the turns of its conversation before the answer; or a
    complaint. Reads what `read_example` reads, without completions and labels."""
    try:
        if task != "chat":
            return _with_input(_text(row, columns, "prompt" if "prompt" in columns else "text"), row, columns)
        turns = list(_conversation(row, columns).turns)
    except Unusable as error:
        return BadRow(number, str(error), error.column)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        return BadRow(number, "the conversation has no turn to answer", next(iter(columns.values())))
    plain = len(turns) == 1 and turns[0] == {"role": "user", "content": turns[0]["content"]}
    return str(turns[0]["content"]) if plain else turns


def _talk(row: Mapping[str, Any], columns: Mapping[str, str]) -> Talk:
    """The conversation of a row. Raises Unusable where it has no answer to learn."""
    talk = _conversation(row, columns)
    return _read(row, columns, "messages" if "messages" in columns else "completion", lambda _: with_answer(talk))


def _conversation(row: Mapping[str, Any], columns: Mapping[str, str]) -> Talk:
    """The turns of a row: its messages, or a prompt and its completion; what the columns beside them say."""
    if "messages" in columns:
        talk = _read(row, columns, "messages", read_talk)
    else:
        talk = unlearned(_turns(row, columns, "prompt"))
        talk = continued(talk, _turns(row, columns, "completion")) if "completion" in columns else talk
    if "history" in columns:
        talk = _read(row, columns, "history", read_history) + talk
    if "system" in columns and holds(row.get(columns["system"])):
        text = _text(row, columns, "system")
        talk = _read(row, columns, "system", lambda _: with_system(talk, text))
    return talk


def _turns(row: Mapping[str, Any], columns: Mapping[str, str], role: str) -> Talk:
    """A prompt or a completion, which is a text or a list of messages."""
    if not looks_like_talk(row.get(columns[role])):
        text = _text(row, columns, role)
        return said("assistant", text) if role == "completion" else said("user", _with_input(text, row, columns))
    if role == "prompt" and holds(row.get(columns.get("input", ""))):
        raise Unusable("there is text beside a prompt that is a list of messages", columns["input"])
    return _read(row, columns, role, read_talk)


def _with_input(prompt: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The prompt and, where the row has one, a blank line and the input it is about."""
    if "input" not in columns or not holds(row.get(columns["input"])):
        return prompt
    return f"{prompt}\n\n{_text(row, columns, 'input')}"


def _read(row: Mapping[str, Any], columns: Mapping[str, str], role: str, read: Callable[[Any], Found]) -> Found:
    """What `read` makes of a cell. Raises Unusable that names its column."""
    try:
        return read(row.get(columns[role]))
    except Unusable as error:
        raise Unusable(str(error), columns[role]) from error


def _text(row: Mapping[str, Any], columns: Mapping[str, str], role: str) -> str:
    """The text of a cell. Raises Unusable where it has none."""
    value = row.get(columns[role])
    problem = text_problem(value)
    if problem:
        raise Unusable(problem, columns[role])
    return str(value)


def text_problem(value: object) -> str:
    """Why a cell is no text to read, or ""."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "the text is missing"
    if not isinstance(value, str):
        hint = "; put it in quotes" if isinstance(value, int | float) and not isinstance(value, bool) else ""
        hint = "; a list of messages goes with --task chat" if looks_like_talk(value) else hint
        return f"mixed types: {type(value).__name__} where text was expected{hint}"
    if looks_like_talk(value):
        return "it is a list of messages in JSON, where a text was expected: name it as a column of messages"
    if looks_like_python_talk(value):
        return "it is a list of messages in Python's way, with single quotes: write it as JSON (json.dumps)"
    if not encodable(value):
        return "the text holds half a character (a lone surrogate)"
    return "" if value.strip() else "the text is empty"
