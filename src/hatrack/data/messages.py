"""Cells that hold conversations -> messages as a chat template takes them, or what is wrong with them.

A message key is honoured, refused, or handed back as not read. Knows nothing of columns, files or templates.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hatrack.console import say_once
from hatrack.data.labels import encodable
from hatrack.errors import short_repr

Turn = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLE_NAMES |= {"ai": "assistant", "model": "assistant", "developer": "system"}
REWRITE = {
    "function_call": "an assistant turn with tool_calls",
    "observation": "a turn with the role tool",
    "function": "a turn with the role tool",
}
"""Roles of calls and their results that no chat template knows, and how they are written today."""

WRAPPERS = ("messages", "conversations", "conversation")
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""One thing by three names: transformers gives templates the first for all of them."""

NAMES = ("name", "tool_call_id")
"""Go to the template, which may write them or not: they say who speaks, not what is said."""

MARKS = ("weight", "train", "training", "loss")
"""Whether a turn is learned: 1 or true, 0 or false."""

REFUSED: tuple[str, ...] = ("function_call", "mask", "masked", "loss_mask", "loss_scale", "loss_weight", "trainable")
REFUSED += ("train_detail", "ignore", "skip", "refusal")
REFUSED += ("image", "images", "audio", "audios", "video", "videos")
YES_OR_NO = {"1": True, "true": True, "0": False, "false": False, "1.0": True, "0.0": False}


class Unusable(ValueError):
    """A cell that cannot be learned from, and why, in words; its `column`, where that is known."""

    def __init__(self, words: str, column: str = "") -> None:
        super().__init__(words)
        self.column = column


@dataclass(frozen=True)
class Talk:
    """A conversation: its turns, the indices of the assistant's that are not learned, and message keys not read."""

    turns: tuple[Turn, ...]
    context_only: tuple[int, ...] = ()
    unread: frozenset[str] = field(default=frozenset())

    def __add__(self, other: "Talk") -> "Talk":
        """One conversation after the other."""
        shifted = tuple(index + len(self.turns) for index in other.context_only)
        return Talk(self.turns + other.turns, self.context_only + shifted, self.unread | other.unread)


def said(role: str, content: str) -> Talk:
    """A conversation of one plain turn."""
    return Talk(({"role": role, "content": content},))


def speaks(turn: Turn) -> bool:
    """Whether a turn is one of the assistant's, with anything in it to learn."""
    return turn["role"] == "assistant" and bool((turn["content"] or "").strip() or any(turn.get(key) for key in SPOKEN))


SPOKEN = ("tool_calls", "reasoning_content")


def read_talk(value: Any) -> Talk:
    """The turns of a cell: a list of messages, JSON text of one, or an object that holds nothing else.

    Takes `role` and `content`, and `from` and `value` as some files have. Raises Unusable.
    """
    value = _opened(value)
    if not isinstance(value, list) or not value:
        raise Unusable(
            f"the conversation is {_kind(value)}, not a list of messages" if value else "the conversation is empty"
        )
    nameless = next((message for message in value if isinstance(message, dict) and not holds(_role(message))), None)
    if nameless is not None:
        raise Unusable(f"a message has no role, only {', '.join(map(str, nameless)) or 'nothing'}")
    strange = [message for message in value if isinstance(message, dict) and _role(message) not in ROLES]
    if strange:
        raise Unusable(_strange_roles(strange))
    turns, context_only, unread = [], [], set[str]()
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise Unusable(f"message {index + 1} is {_kind(message)}, not an object with role and content")
        try:
            turn, learned = _turn(message)
        except Unusable as error:
            raise Unusable(f"message {index + 1} {error}") from error
        turns.append(turn)
        context_only += [] if learned else [index]
        unread |= {str(key) for key, held in message.items() if holds(held) and key not in KNOWN}
    return Talk(tuple(turns), tuple(context_only), frozenset(unread))


KNOWN = {"role", "from", "content", "value", "tool_calls", *REASONING, *NAMES, *MARKS, *REFUSED}


def looks_like_talk(value: Any) -> bool:
    """Whether a cell is a list of messages, or JSON text of one, rather than a text."""
    if isinstance(value, str) and value.lstrip().startswith("[") and '"role"' in value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and _role(turn) for turn in value)


def looks_like_python_talk(value: str) -> bool:
    """Whether a text is a list of messages as Python prints it."""
    return re.match(r"\s*\[\s*\{\s*'(role|from|content|value)'\s*:", value) is not None


def continued(prompt: Talk, completion: Talk) -> Talk:
    """A prompt and its completion as one; where the completion repeats all of the prompt, its turns are there once."""
    repeated = completion.turns[: len(prompt.turns)]
    if [_plain(turn) for turn in repeated] != [_plain(turn) for turn in prompt.turns]:
        return prompt + completion
    say_once("the completions hold the whole conversation, the prompt too: it is read once")
    context_only = tuple(sorted({*prompt.context_only, *completion.context_only}))
    return Talk(completion.turns, context_only, prompt.unread | completion.unread)


def _plain(turn: Turn) -> tuple[str, str]:
    return turn["role"], str(turn["content"]).strip()


def read_history(value: Any) -> Talk:
    """Earlier turns: a list of [question, answer], as ChatGLM and LLaMA-Factory have them. Raises Unusable."""
    talk = Talk(())
    for pair in _parsed(value, "history") or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise Unusable("it is not a list of [question, answer]")
        talk += said("user", pair[0]) + said("assistant", pair[1])
    return talk


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tools as chat templates take them: `{"type": "function", "function": {"name": ...}}` each. Raises Unusable."""
    value = _parsed(value, "tools")
    value = [value] if isinstance(value, dict) and value else value or []
    tools = []
    for tool in value if isinstance(value, list) else [value]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable("the tools are not a list of functions with a name each")
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(tools)


def with_system(talk: Talk, text: str) -> Talk:
    """The conversation with a system turn before it. Raises Unusable where it has another one."""
    own = [turn["content"].strip() for turn in talk.turns if turn["role"] == "system"]
    if own and own != [text.strip()]:
        raise Unusable("the conversation has a system turn of its own, with other words")
    return talk if own else said("system", text) + talk


def with_answer(talk: Talk) -> Talk:
    """The conversation. Raises Unusable where it has nothing to learn."""
    spoken = [index for index, turn in enumerate(talk.turns) if speaks(turn)]
    if not spoken:
        raise Unusable("the conversation has no assistant turn to learn from")
    if not set(spoken) - set(talk.context_only):
        raise Unusable("every assistant turn is marked as not to be learned")
    return talk


def unlearned(talk: Talk) -> Talk:
    """The conversation, read and not learned."""
    return replace(talk, context_only=tuple(i for i, turn in enumerate(talk.turns) if turn["role"] == "assistant"))


def holds(value: Any) -> bool:
    """Whether a cell or the value of a message key holds anything."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null", "<noinput>")  # the last as Alpaca's makers wrote it
    return value is not None and value == value and value != [] and value != {}


def _opened(value: Any) -> Any:
    """The list of messages in a cell that is JSON text, or an object around it."""
    if isinstance(value, str):
        value = _parsed(value, "conversation")
    filled = [key for key, held in value.items() if holds(held)] if isinstance(value, dict) else []
    if len(filled) == 1 and filled[0] in WRAPPERS:
        return _parsed(value[filled[0]], "conversation")
    if filled and "role" not in filled and "from" not in filled:
        raise Unusable(f"it is an object ({', '.join(map(str, filled[:5]))}) where a list of messages was expected")
    return value


def _parsed(value: Any, what: str) -> Any:
    """What JSON text stands for; anything else as it is."""
    if not isinstance(value, str):
        return None if isinstance(value, float) and value != value else value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        if value.lstrip().startswith(("[{'", "{'", "[['")):
            raise Unusable(
                f"the {what} is written in Python's way, with single quotes: write it as JSON (json.dumps)"
            ) from error
        raise Unusable(f"the {what} is text, not a list{' of messages' * (what == 'conversation')}") from error


def _role(message: Mapping[str, Any]) -> Any:
    role = message.get("role") if holds(message.get("role")) else message.get("from")
    name = str(role).strip().lower()
    return ROLE_NAMES.get(name, name) if isinstance(role, str) else role


def _strange_roles(messages: Sequence[Mapping[str, Any]]) -> str:
    roles = list(dict.fromkeys(short_repr(_role(message)) for message in messages))
    told = f"the role{'s' * (len(roles) > 1)} {' and '.join(roles)}"
    wanted = [f"{role} as {form}" for role, form in REWRITE.items() if repr(role) in roles]
    advice = f"; write {', '.join(wanted)}" if wanted else ""
    return f"{told} {'are' if len(roles) > 1 else 'is'} not among {', '.join(ROLES)}{advice}"


def _turn(message: Mapping[str, Any]) -> tuple[Turn, bool]:
    """A message as templates take it, and whether it is learned, where it is the assistant's."""
    refused = next((key for key in REFUSED if holds(message.get(key))), None)
    if refused:
        hint = ": write it as tool_calls" if refused == "function_call" else ""
        raise Unusable(f"has {refused}, which hatrack does not honour{hint}")
    turn: Turn = {"role": _role(message), "content": ""}
    contents = [message[key] for key in ("content", "value") if message.get(key) is not None]
    if len(contents) > 1 and contents[0] != contents[1]:
        raise Unusable("has both content and value")
    if holds(message.get("tool_calls")):
        turn["tool_calls"] = _calls(message["tool_calls"])
    if contents or "tool_calls" not in turn:
        turn["content"] = _content(contents[0] if contents else None)
    for key in (*REASONING, *NAMES):
        if holds(message.get(key)):
            name = "reasoning_content" if key in REASONING else key
            if not isinstance(message[key], str) or not encodable(message[key]):
                raise Unusable(f"has no text as its {key}")
            if turn.setdefault(name, message[key]) != message[key]:
                raise Unusable(f"has both {name} and {key}")
    return turn, _learned(message)


def _content(value: Any) -> str:
    if isinstance(value, list):
        value = _joined(value)
    if isinstance(value, int | float):
        raise Unusable(f"has {_kind(value)} as its content, not text: put it in quotes")
    if not isinstance(value, str):
        raise Unusable("has no text as its content")
    if not encodable(value):
        raise Unusable("holds half a character (a lone surrogate)")
    return value


def _joined(parts: list[Any]) -> str:
    """The text of content given as a list of parts, a part a line."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in TEXT_PARTS or not isinstance(text, str):
            named = short_repr(kind) if kind not in TEXT_PARTS else _kind(text)
            raise Unusable(f"has a part of type {named} in its content, where hatrack learns from text alone")
        texts.append(text)
    say_once("content given as a list of text parts is joined, a part a line")
    return "\n".join(texts)


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls in the form that chat templates are written for: the arguments an object, not the text of one."""
    calls = _parsed(value, "tool_calls")
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise Unusable("has tool_calls that are not a list of functions with name and arguments")
        given = function.get("arguments")
        try:
            arguments = json.loads(given) if isinstance(given, str) and given.strip() else given or {}
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise Unusable("has tool_calls whose arguments are no JSON object")
        more = {"id": call["id"]} if "function" in call and holds(call.get("id")) else {}
        found.append({"type": "function", **more, "function": {"name": function["name"], "arguments": arguments}})
    return found


def _learned(message: Mapping[str, Any]) -> bool:
    """Whether the marks of a message let it be learned."""
    marks = {key: message[key] for key in MARKS if holds(message.get(key))}
    found = {key: YES_OR_NO.get(str(value).strip().lower()) for key, value in marks.items()}
    for key, learned in found.items():
        if learned is None:
            raise Unusable(f"has the {key} {short_repr(marks[key])}: a turn is learned (1, true) or not (0, false)")
        if learned and _role(message) != "assistant":
            raise Unusable(f"is marked to be learned ({key}); hatrack learns only what the assistant says")
    if len(set(found.values())) > 1:
        raise Unusable(f"has marks that contradict each other: {', '.join(found)}")
    return all(found.values())


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "nothing", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
