"""Checks that a chat template writes all of a conversation: templates ignore what they do not know.

Knows nothing of tokenizers: the function that writes is an argument.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hatrack.console import say_once
from hatrack.data.messages import ANSWER_KEYS, SPEAKER_KEYS, Turn
from hatrack.errors import DataError, short_repr

Writer = Callable[..., str]
"""Takes turns, and by keyword `tools` and `prompt`; returns the text that the template writes."""

THINK_TAG = re.compile(r"</?think(?:ing)?>")


def write_in_full(write: Writer, turns: list[Turn], tools: Sequence[dict[str, Any]]) -> tuple[list[Turn], str]:
    """Returns the first form of the conversation that the template writes completely, and its text.

    Templates differ in how they take tool calls: arguments as an object or as JSON text, with an empty content or
    none. Raises DataError, about the first form, if no form is written completely.
    """
    refusal: DataError | None = None
    for form in _forms(turns):
        try:
            text = write(form, tools=tools)
            missing = _find_missing(write, form, tools, text)
            if not missing:
                return form, text
            raise _left_out_error(" and ".join(missing), got=", ".join(missing.values()))
        except DataError as error:
            refusal = refusal or error
    raise refusal or DataError("the chat template refuses a conversation")


def check_answer_written(turn: Turn, text: str) -> bool:
    """Whether `text`, the supervised part of a conversation, has the parts of an assistant's turn.

    False if it has none of them. Raises DataError if it has only some.
    """
    content = turn["content"] or ""
    kind = "the thoughts" if THINK_TAG.search(content) else "a part"
    parts = [(part, kind) for part in THINK_TAG.split(content)]
    parts += [(part, "the thoughts") for part in THINK_TAG.split(turn.get("reasoning_content", ""))]
    parts += [(str(call["function"]["name"]), "the tool calls") for call in turn.get("tool_calls") or []]
    written = [(_contains(text, part), what) for part, what in parts if part.strip()]
    if written and not any(found for found, _ in written):
        return False
    missing = next((what for found, what in written if not found), None)
    if missing:
        raise _left_out_error(f"{missing} of answers: they are not learned")
    return True


def _left_out_error(what: str, got: str | None = None) -> DataError:
    return DataError(
        f"the chat template leaves out {what}",
        got=got,
        fix="use a base whose template writes them, or take them out of the rows",
        gotcha="template-leaves-out",
    )


def _forms(turns: list[Turn]) -> list[list[Turn]]:
    """The forms of a conversation that templates may expect; only one if it has no tool calls."""
    if not any("tool_calls" in turn for turn in turns):
        return [turns]
    return [
        [_with_calls(turn, as_text, content) if "tool_calls" in turn else turn for turn in turns]
        for content in ("", None)
        for as_text in (False, True)
    ]


def _with_calls(turn: Turn, as_text: bool, content: str | None) -> Turn:
    """The turn with the arguments of its calls as JSON text or as objects, and `content` if it has none."""
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        if as_text
        else call
        for call in turn["tool_calls"]
    ]
    return turn | {"tool_calls": calls, "content": turn["content"] or content}


def _find_missing(write: Writer, turns: list[Turn], tools: Sequence[dict[str, Any]], text: str) -> dict[str, str]:
    """What the template leaves out of a conversation: name -> example.

    A key of a turn is looked for in the conversation up to that turn: templates may drop it from earlier turns.
    """
    missing: dict[str, str] = {}
    for index, turn in enumerate(turns):
        for key in [key for key in ANSWER_KEYS if key in turn]:
            bare = [*turns[:index], {name: value for name, value in turn.items() if name != key}]
            if not _writes(turn[key], write(turns[: index + 1], tools=tools), _try_write(write, bare, tools)):
                missing.setdefault(key, short_repr(turn[key]))
        content = turn["content"] or ""
        if turn["role"] == "assistant":  # templates drop the thoughts of earlier turns
            content = content.rpartition("</think>")[2]
        if not _contains(text, content):
            missing.setdefault(f"what a turn of the role {turn['role']} says", short_repr(content))
        for key in SPEAKER_KEYS:
            if turn.get(key) and turn[key] not in text:
                say_once(f"the chat template does not write {key!r} of a message: it is not read")
    if tools:
        names = [tool["function"]["name"] for tool in tools]
        if not _writes(names, text, _try_write(write, turns, ())):
            missing["tools"] = short_repr(names)
    return missing


def _try_write(write: Writer, turns: list[Turn], tools: Sequence[dict[str, Any]]) -> str:
    try:
        return write(turns, tools=tools)
    except DataError:
        return ""


def _writes(value: Any, text: str, without: str) -> bool:
    """Whether a template writes `value`: `text` holds its words, and differs from the text `without` it."""
    return (
        text != without
        and all(_contains(text, word) for word in _words(value))
        and not _is_written_as_python(value, text)
    )


def _words(value: Any) -> Iterator[str]:
    """The names and values in tool calls, tools or a text; not a call's id or type."""
    if isinstance(value, list):
        for item in value:
            yield from _words(item["function"] if isinstance(item, dict) and "function" in item else item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from () if name in ("name", "arguments") else (str(name),)
            yield from _words(item)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _is_written_as_python(value: Any, text: str) -> bool:
    """Whether arguments are written as Python prints a dict, which no model should learn."""
    calls = value if isinstance(value, list) else []
    given = [call["function"].get("arguments") for call in calls if isinstance(call, dict)]
    return any(isinstance(each, dict) and each and str(each) in text for each in given)


def _contains(text: str, part: str) -> bool:
    """Whether a text holds another, ignoring white space, as it is or as JSON writes it."""
    squeezed = "".join(text.split())
    return any("".join(form.split()) in squeezed for form in (part, json.dumps(part, ensure_ascii=False)[1:-1]))
