"""Reads the cells of one row into the fields of an example. Knows nothing of other rows."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from hatrack.data.labels import Label, is_encodable, read_label
from hatrack.data.messages import (
    BadCell,
    Conversation,
    add_system_turn,
    as_context,
    check_answer,
    has_content,
    join_completion,
    looks_like_conversation,
    looks_like_python_conversation,
    one_turn,
    read_conversation,
    read_history,
    read_tools,
)

Value = TypeVar("Value")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be learned from: its number, the reason, and the column if the reason is in one."""

    row: int
    reason: str
    column: str = ""


def read_example(
    number: int, row: Mapping[str, Any], task: str, columns: Mapping[str, str], unread: set[str] | None = None
) -> tuple[dict[str, Any], Label] | BadRow:
    """The fields of an example and its label as written in the row ("" for tasks without labels), or a BadRow.

    Adds to `unread` the message keys that are not empty and are not read.
    """
    try:
        if task == "chat":
            conversation = _training_conversation(row, columns)
            tools = _read_cell(row, columns["tools"], read_tools) if "tools" in columns else ()
            if unread is not None:
                unread |= conversation.unread
            return {"messages": conversation.turns, "context_only": conversation.context_only, "tools": tools}, ""
        roles = [role for role in ("text", "prompt", "completion") if role in columns]
        texts = {role: _read_cell(row, columns[role], _read_text) for role in roles}
        if "completion" in texts:
            return {"text": _add_input(texts["prompt"], row, columns), "completion": texts["completion"]}, ""
    except BadCell as error:
        return BadRow(number, str(error), error.column)
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
    """The prompt in a row: its text, or the turns of its conversation before the answer; or a BadRow.

    Reads what `read_example` reads, without completions and labels.
    """
    try:
        if task != "chat":
            column = columns["prompt" if "prompt" in columns else "text"]
            return _add_input(_read_cell(row, column, _read_text), row, columns)
        turns = list(_conversation(row, columns).turns)
    except BadCell as error:
        return BadRow(number, str(error), error.column)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        return BadRow(number, "the conversation has no turn to answer", next(iter(columns.values())))
    plain = len(turns) == 1 and turns[0] == {"role": "user", "content": turns[0]["content"]}
    return str(turns[0]["content"]) if plain else turns


def _training_conversation(row: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    """The conversation of a row. Raises BadCell if it has no supervised answer."""
    conversation = _conversation(row, columns)
    with _named_column(columns["messages" if "messages" in columns else "completion"]):
        return check_answer(conversation)


def _conversation(row: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    """The messages of a row, or its prompt and completion, after its system turn and its history."""
    if "messages" in columns:
        conversation = _read_cell(row, columns["messages"], read_conversation)
    else:
        conversation = as_context(_prompt_or_completion(row, columns, "prompt"))
        if "completion" in columns:
            conversation = join_completion(conversation, _prompt_or_completion(row, columns, "completion"))
    if "history" in columns:
        conversation = _read_cell(row, columns["history"], read_history) + conversation
    if "system" in columns and has_content(row.get(columns["system"])):
        text = _read_cell(row, columns["system"], _read_text)
        with _named_column(columns["system"]):
            conversation = add_system_turn(conversation, text)
    return conversation


def _prompt_or_completion(row: Mapping[str, Any], columns: Mapping[str, str], role: str) -> Conversation:
    """A prompt or a completion, which is a text or a list of messages."""
    if not looks_like_conversation(row.get(columns[role])):
        text = _read_cell(row, columns[role], _read_text)
        return one_turn("assistant", text) if role == "completion" else one_turn("user", _add_input(text, row, columns))
    if role == "prompt" and has_content(row.get(columns.get("input", ""))):
        raise BadCell("there is text beside a prompt that is a list of messages", columns["input"])
    return _read_cell(row, columns[role], read_conversation)


def _add_input(prompt: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The prompt, then a blank line and the row's input if it has one."""
    if "input" not in columns or not has_content(row.get(columns["input"])):
        return prompt
    return f"{prompt}\n\n{_read_cell(row, columns['input'], _read_text)}"


def _read_cell(row: Mapping[str, Any], column: str, read: Callable[[Any], Value]) -> Value:
    """`read` of a cell. Raises BadCell with its column."""
    with _named_column(column):
        return read(row.get(column))


@contextmanager
def _named_column(column: str) -> Iterator[None]:
    """Adds the column's name to a BadCell."""
    try:
        yield
    except BadCell as error:
        raise BadCell(str(error), column) from error


def _read_text(value: object) -> str:
    """The text of a cell. Raises BadCell if it has none."""
    problem = text_problem(value)
    if problem:
        raise BadCell(problem)
    return str(value)


def text_problem(value: object) -> str:
    """Why a cell is not a text to read; empty if it is one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "the text is missing"
    if not isinstance(value, str):
        hint = "; put it in quotes" if isinstance(value, int | float) and not isinstance(value, bool) else ""
        hint = "; a list of messages goes with --task chat" if looks_like_conversation(value) else hint
        return f"mixed types: {type(value).__name__} where text was expected{hint}"
    if looks_like_conversation(value):
        return "it is a list of messages in JSON, where a text was expected: name it as a column of messages"
    if looks_like_python_conversation(value):
        return "it is a list of messages as Python prints it, with single quotes: write it as JSON (json.dumps)"
    if not is_encodable(value):
        return "the text holds half a character (a lone surrogate)"
    return "" if value.strip() else "the text is empty"
