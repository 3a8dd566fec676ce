"""Whether a chat template writes all of a conversation: templates pass over in silence what they do not know.

Knows nothing of tokenizers: what writes comes as an argument.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hatrack.console import say_once
from hatrack.data.messages import NAMES, SPOKEN, Turn
from hatrack.errors import DataError, short_repr


def written(write: Callable[..., str], turns: list[Turn], tools: Sequence[dict[str, Any]]) -> tuple[list[Turn], str]:
    """The conversation in the first form that the template writes whole, and what it writes.

    Templates differ in how they take tool calls: with arguments as an object or as JSON text, beside an empty content
    or none (transformers leaves out what is null). Raises DataError, of the first form, where none is written whole.
    """
    refusal: DataError | None = None
    for form in _forms(turns):
        try:
            whole = write(form, tools=tools)
            missing = _left_out(write, form, tools, whole)
            if not missing:
                return form, whole
            raise DataError(
                f"the chat template leaves out {' and '.join(missing)}",
                got=", ".join(missing.values()),
                fix="use a base whose template writes them, or take them out of the rows",
                gotcha="template-leaves-out",
            )
        except DataError as error:
            refusal = refusal or error
    raise refusal or DataError("the chat template refuses a conversation")


def _forms(turns: list[Turn]) -> list[list[Turn]]:
    """A conversation in the forms that templates take it in: one, where there are no tool calls."""
    if not any("tool_calls" in turn for turn in turns):
        return [turns]
    return [
        [_formed(turn, text=text, content=content) if "tool_calls" in turn else turn for turn in turns]
        for content in ("", None)
        for text in (False, True)
    ]


def _formed(turn: Turn, *, text: bool, content: str | None) -> Turn:
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        if text
        else call
        for call in turn["tool_calls"]
    ]
    return turn | {"tool_calls": calls, "content": turn["content"] or content}


def _left_out(
    write: Callable[..., str], turns: list[Turn], tools: Sequence[dict[str, Any]], whole: str
) -> dict[str, str]:
    """What of a conversation the template does not write, by name, with an example of each.

    What belongs to a turn is looked for in the conversation up to it: templates may drop it again from earlier turns.
    """
    missing: dict[str, str] = {}
    for index, turn in enumerate(turns):
        for key in [key for key in SPOKEN if key in turn]:
            upto = turns[: index + 1]
            bare = [*turns[:index], {name: value for name, value in turn.items() if name != key}]
            if not _shows(write, upto, bare, tools, tools, turn[key]):
                missing.setdefault(key, short_repr(turn[key]))
        said = turn["content"] or ""
        if turn["role"] == "assistant":  # of earlier turns, templates drop what was thought
            said = said.rpartition("</think>")[2]
        if not _stands(said, whole):
            missing.setdefault(f"what a turn of the role {turn['role']} says", short_repr(said))
        for key in NAMES:
            if turn.get(key) and turn[key] not in whole:
                say_once(f"the chat template does not write {key!r} of a message: it is not read")
    if tools and not _shows(write, turns, turns, tools, (), [tool["function"]["name"] for tool in tools]):
        missing["tools"] = short_repr([tool["function"]["name"] for tool in tools])
    return missing


def _shows(
    write: Callable[..., str],
    turns: list[Turn],
    bare: list[Turn],
    tools: Sequence[dict[str, Any]],
    fewer: Sequence[dict[str, Any]],
    value: Any,
) -> bool:
    """Whether the template writes `value`: its words are there, and the text is another without it."""
    text = write(turns, tools=tools)
    try:
        without = write(bare, tools=fewer)
    except DataError:
        without = ""
    return text != without and all(_stands(word, text) for word in _words(value)) and not _as_python(value, text)


def _words(value: Any) -> Iterator[str]:
    """The names and values in tool calls, tools or a text; of a call's other keys (its id, its type) nothing."""
    if isinstance(value, list):
        for item in value:
            yield from _words(item["function"] if isinstance(item, dict) and "function" in item else item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from () if name in ("name", "arguments") else (str(name),)
            yield from _words(item)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _as_python(value: Any, text: str) -> bool:
    """Whether arguments are written as Python prints a dict: no model is to answer so."""
    calls = value if isinstance(value, list) else []
    given = [call["function"].get("arguments") for call in calls if isinstance(call, dict)]
    return any(isinstance(each, dict) and each and str(each) in text for each in given)


def _stands(said: str, text: str) -> bool:
    """Whether a text holds another one, apart from white space, as it is or as JSON writes it."""
    squeezed = "".join(text.split())
    return any("".join(form.split()) in squeezed for form in (said, json.dumps(said, ensure_ascii=False)[1:-1]))
