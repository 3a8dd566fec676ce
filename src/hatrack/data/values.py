"""One row's cells -> the fields of an example, or what is wrong with them. Knows nothing of other rows."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hatrack.data.labels import Label, encodable, read_label
from hatrack.errors import short

ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Bad:
    """A row that cannot be learned from, and why."""

    row: int
    words: str
    column: str = ""


def read_example(
    number: int, row: Mapping[str, Any], task: str, columns: Mapping[str, str]
) -> tuple[dict[str, Any], Label] | Bad:
    """The fields of an example and its label as it stands in the row ("" where the task has none), or a complaint."""
    if "messages" in columns:
        messages = _messages(row.get(columns["messages"]))
        if isinstance(messages, str):
            return Bad(number, messages, columns["messages"])
        return {"messages": messages}, ""
    texts: dict[str, str] = {}
    for role in ("text", "prompt", "completion"):
        if role in columns:
            value = row.get(columns[role])
            problem = _text_problem(value)
            if problem:
                return Bad(number, problem, columns[role])
            texts[role] = str(value)
    if "completion" in texts and task == "chat":
        turns = ({"role": "user", "content": texts["prompt"]}, {"role": "assistant", "content": texts["completion"]})
        return {"messages": turns}, ""
    if "completion" in texts:
        return {"text": texts["prompt"], "completion": texts["completion"]}, ""
    if task != "classify":
        return {"text": texts["text"]}, ""
    try:
        label = read_label(row.get(columns["label"]))
    except ValueError as error:
        return Bad(number, str(error), columns["label"])
    return {"text": texts["text"]}, label


def _text_problem(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "the text is missing"
    if not isinstance(value, str):
        return f"mixed types: {type(value).__name__} where text was expected"
    if not encodable(value):
        return "the text holds half a character (a lone surrogate)"
    return "" if value.strip() else "the text is empty"


def _messages(value: Any) -> tuple[dict[str, Any], ...] | str:
    """The turns as a chat template takes them, or what is wrong.

    Takes `role` and `content`, and `from` and `value` as some files have.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return "the conversation is text, not a list of messages"
    if not isinstance(value, list) or not value:
        return "the conversation is not a list of messages" if value else "the conversation is empty"
    turns = []
    for index, message in enumerate(value, 1):
        if not isinstance(message, dict):
            return f"message {index} is {type(message).__name__}, not an object with role and content"
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        role = ROLE_NAMES.get(str(role), role)
        if role not in ROLES:
            return f"message {index} has the role {short(role)}, not one of {', '.join(ROLES)}"
        if not isinstance(content, str):
            return f"message {index} has no text as its content"
        if not encodable(content):
            return f"message {index} holds half a character (a lone surrogate)"
        turns.append({"role": str(role), "content": content})
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        return "the conversation has no assistant turn to learn from"
    return tuple(turns)
