"""Reads the conversation in a cell into messages for a chat template.

A message key is read, refused, or reported as not read. Knows nothing of columns, files or templates.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hatrack.console import say_once
from hatrack.data.labels import is_encodable
from hatrack.errors import short_repr

Turn = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLE_NAMES |= {"ai": "assistant", "model": "assistant", "developer": "system"}
ROLE_HINTS = {
    "function_call": "an assistant turn with tool_calls",
    "observation": "a turn with the role tool",
    "function": "a turn with the role tool",
}
"""Older roles of tool calls and their results, and what to write today."""

WRAPPER_KEYS = ("messages", "conversations", "conversation")
TEXT_PART_TYPES = ("text", "input_text", "output_text")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""All three mean the first, which is what chat templates read."""

SPEAKER_KEYS = ("name", "tool_call_id")
"""Passed to the template, which may ignore them: they say who speaks, not what is said."""

LEARN_FLAG_KEYS = ("weight", "train", "training", "loss")
"""Flags for whether a turn is supervised: 1 or true, 0 or false."""

UNSUPPORTED_KEYS: tuple[str, ...] = ("function_call", "mask", "masked", "loss_mask", "loss_scale", "loss_weight")
UNSUPPORTED_KEYS += ("trainable", "train_detail", "ignore", "skip", "refusal")
UNSUPPORTED_KEYS += ("image", "images", "audio", "audios", "video", "videos")
ANSWER_KEYS = ("tool_calls", "reasoning_content")
"""What an assistant turn can say besides its content."""
FLAG_VALUES = {"1": True, "true": True, "0": False, "false": False, "1.0": True, "0.0": False}


class BadCell(ValueError):
    """A cell that cannot be learned from: the reason, and its `column` if known."""

    def __init__(self, reason: str, column: str = "") -> None:
        super().__init__(reason)
        self.column = column


@dataclass(frozen=True)
class Conversation:
    """A conversation: its turns, the indices of assistant turns that are not supervised, and message keys not read."""

    turns: tuple[Turn, ...]
    context_only: tuple[int, ...] = ()
    unread: frozenset[str] = field(default=frozenset())

    def __add__(self, other: "Conversation") -> "Conversation":
        """This conversation, then the other."""
        shifted = tuple(index + len(self.turns) for index in other.context_only)
        return Conversation(self.turns + other.turns, self.context_only + shifted, self.unread | other.unread)


def one_turn(role: str, content: str) -> Conversation:
    """A conversation of one plain turn."""
    return Conversation(({"role": role, "content": content},))


def has_answer(turn: Turn) -> bool:
    """Whether this is an assistant turn that is not empty."""
    if turn["role"] != "assistant":
        return False
    return bool((turn["content"] or "").strip()) or any(turn.get(key) for key in ANSWER_KEYS)


def read_conversation(value: Any) -> Conversation:
    """The conversation in a cell: a list of messages, JSON text of one, or an object that holds nothing else.

    Reads `role` and `content`, or `from` and `value` as in ShareGPT files. Raises BadCell.
    """
    value = _unwrap(value)
    if not isinstance(value, list) or not value:
        raise BadCell(
            f"the conversation is {_type_name(value)}, not a list of messages" if value else "the conversation is empty"
        )
    messages = [message for message in value if isinstance(message, dict)]
    without_role = next((message for message in messages if not has_content(_role(message))), None)
    if without_role is not None:
        raise BadCell(f"a message has no role, only {', '.join(map(str, without_role)) or 'nothing'}")
    unknown = [message for message in messages if _role(message) not in ROLES]
    if unknown:
        raise BadCell(_describe_unknown_roles(unknown))
    turns, context_only, unread = [], [], set[str]()
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadCell(f"message {index + 1} is {_type_name(message)}, not an object with role and content")
        try:
            turn, is_supervised = _read_turn(message)
        except BadCell as error:
            raise BadCell(f"message {index + 1} {error}") from error
        turns.append(turn)
        context_only += [] if is_supervised else [index]
        unread |= {str(key) for key, item in message.items() if has_content(item) and key not in KNOWN_KEYS}
    return Conversation(tuple(turns), tuple(context_only), frozenset(unread))


KNOWN_KEYS = {"role", "from", "content", "value", "tool_calls", *REASONING_KEYS, *SPEAKER_KEYS}
KNOWN_KEYS |= {*LEARN_FLAG_KEYS, *UNSUPPORTED_KEYS}


def looks_like_conversation(value: Any) -> bool:
    """Whether a cell is a list of messages, or JSON text of one, rather than a text."""
    if isinstance(value, str) and value.lstrip().startswith("[") and '"role"' in value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and _role(turn) for turn in value)


def looks_like_python_conversation(value: str) -> bool:
    """Whether a text is a list of messages as Python prints it."""
    return re.match(r"\s*\[\s*\{\s*'(role|from|content|value)'\s*:", value) is not None


def join_completion(prompt: Conversation, completion: Conversation) -> Conversation:
    """The prompt, then its completion; a completion that repeats the whole prompt already is the conversation."""
    repeated = completion.turns[: len(prompt.turns)]
    if [_role_and_text(turn) for turn in repeated] != [_role_and_text(turn) for turn in prompt.turns]:
        return prompt + completion
    say_once("the completions repeat the prompt: it is read once")
    context_only = tuple(sorted({*prompt.context_only, *completion.context_only}))
    return Conversation(completion.turns, context_only, prompt.unread | completion.unread)


def _role_and_text(turn: Turn) -> tuple[str, str]:
    return turn["role"], str(turn["content"]).strip()


def read_history(value: Any) -> Conversation:
    """Earlier turns from a list of [question, answer], as in ChatGLM and LLaMA-Factory files. Raises BadCell."""
    conversation = Conversation(())
    for pair in _parse_json(value, "history") or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadCell("it is not a list of [question, answer]")
        conversation += one_turn("user", pair[0]) + one_turn("assistant", pair[1])
    return conversation


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tools for a chat template, `{"type": "function", "function": {"name": ...}}` each. Raises BadCell."""
    value = _parse_json(value, "tools")
    value = [value] if isinstance(value, dict) and value else value or []
    tools = []
    for tool in value if isinstance(value, list) else [value]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadCell("the tools are not a list of functions with a name each")
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(tools)


def add_system_turn(conversation: Conversation, text: str) -> Conversation:
    """The conversation with a system turn first. Raises BadCell if it has a different one already."""
    own = [turn["content"].strip() for turn in conversation.turns if turn["role"] == "system"]
    if own and own != [text.strip()]:
        raise BadCell("the conversation already has a different system turn")
    return conversation if own else one_turn("system", text) + conversation


def check_answer(conversation: Conversation) -> Conversation:
    """Returns the conversation. Raises BadCell if it has no supervised answer."""
    answers = {index for index, turn in enumerate(conversation.turns) if has_answer(turn)}
    if not answers:
        raise BadCell("the conversation has no assistant turn to learn from")
    if answers <= set(conversation.context_only):
        raise BadCell("every assistant turn is marked as not to be learned")
    return conversation


def as_context(conversation: Conversation) -> Conversation:
    """The conversation without supervised turns."""
    answers = (index for index, turn in enumerate(conversation.turns) if turn["role"] == "assistant")
    return replace(conversation, context_only=tuple(answers))


def has_content(value: Any) -> bool:
    """Whether a cell, or the value of a message key, is not empty."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null", "<noinput>")  # the last is from Alpaca
    return value is not None and value == value and value != [] and value != {}


def _unwrap(value: Any) -> Any:
    """The list of messages in a cell that is JSON text, or an object with only that list."""
    if isinstance(value, str):
        value = _parse_json(value, "conversation")
    filled = [key for key, item in value.items() if has_content(item)] if isinstance(value, dict) else []
    if len(filled) == 1 and filled[0] in WRAPPER_KEYS:
        return _parse_json(value[filled[0]], "conversation")
    if filled and "role" not in filled and "from" not in filled:
        raise BadCell(f"it is an object ({', '.join(map(str, filled[:5]))}) where a list of messages was expected")
    return value


def _parse_json(value: Any, what: str) -> Any:
    """The value of JSON text; any other value unchanged, NaN as None."""
    if not isinstance(value, str):
        return None if isinstance(value, float) and value != value else value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        if value.lstrip().startswith(("[{'", "{'", "[['")):
            raise BadCell(
                f"the {what} is written as Python prints it, with single quotes: write it as JSON (json.dumps)"
            ) from error
        raise BadCell(f"the {what} is text, not a list{' of messages' * (what == 'conversation')}") from error


def _role(message: Mapping[str, Any]) -> Any:
    """The role of a message under its usual name."""
    role = message.get("role") if has_content(message.get("role")) else message.get("from")
    name = str(role).strip().lower()
    return ROLE_NAMES.get(name, name) if isinstance(role, str) else role


def _describe_unknown_roles(messages: Sequence[Mapping[str, Any]]) -> str:
    roles = list(dict.fromkeys(short_repr(_role(message)) for message in messages))
    names = f"the role{'s' * (len(roles) > 1)} {' and '.join(roles)}"
    hints = [f"{role} as {form}" for role, form in ROLE_HINTS.items() if repr(role) in roles]
    advice = f"; write {', '.join(hints)}" if hints else ""
    return f"{names} {'are' if len(roles) > 1 else 'is'} not among {', '.join(ROLES)}{advice}"


def _read_turn(message: Mapping[str, Any]) -> tuple[Turn, bool]:
    """A message for the chat template, and whether it is supervised by its flags."""
    refused = next((key for key in UNSUPPORTED_KEYS if has_content(message.get(key))), None)
    if refused:
        hint = ": write it as tool_calls" if refused == "function_call" else ""
        raise BadCell(f"has {refused}, which hatrack does not support{hint}")
    turn: Turn = {"role": _role(message), "content": ""}
    contents = [message[key] for key in ("content", "value") if message.get(key) is not None]
    if len(contents) > 1 and contents[0] != contents[1]:
        raise BadCell("has both content and value")
    if has_content(message.get("tool_calls")):
        turn["tool_calls"] = _read_tool_calls(message["tool_calls"])
    if contents or "tool_calls" not in turn:
        turn["content"] = _read_content(contents[0] if contents else None)
    for key in (*REASONING_KEYS, *SPEAKER_KEYS):
        if has_content(message.get(key)):
            name = "reasoning_content" if key in REASONING_KEYS else key
            if not isinstance(message[key], str) or not is_encodable(message[key]):
                raise BadCell(f"has no text as its {key}")
            if turn.setdefault(name, message[key]) != message[key]:
                raise BadCell(f"has both {name} and {key}")
    return turn, _is_supervised(message)


def _read_content(value: Any) -> str:
    if isinstance(value, list):
        value = _join_text_parts(value)
    if isinstance(value, int | float):
        raise BadCell(f"has {_type_name(value)} as its content, not text: put it in quotes")
    if not isinstance(value, str):
        raise BadCell("has no text as its content")
    if not is_encodable(value):
        raise BadCell("holds half a character (a lone surrogate)")
    return value


def _join_text_parts(parts: list[Any]) -> str:
    """The text of content given as a list of parts, one part per line."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in TEXT_PART_TYPES or not isinstance(text, str):
            named = short_repr(kind) if kind not in TEXT_PART_TYPES else _type_name(text)
            raise BadCell(f"has a part of type {named} in its content, and hatrack learns from text only")
        texts.append(text)
    say_once("content given as a list of text parts is joined, one part per line")
    return "\n".join(texts)


def _read_tool_calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls in the form that chat templates expect: the arguments are an object, not JSON text."""
    calls = _parse_json(value, "tool_calls")
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise BadCell("has tool_calls that are not a list of functions with name and arguments")
        given = function.get("arguments")
        try:
            arguments = json.loads(given) if isinstance(given, str) and given.strip() else given or {}
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise BadCell("has tool_calls whose arguments are not a JSON object")
        call_id = {"id": call["id"]} if "function" in call and has_content(call.get("id")) else {}
        found.append({"type": "function", **call_id, "function": {"name": function["name"], "arguments": arguments}})
    return found


def _is_supervised(message: Mapping[str, Any]) -> bool:
    """Whether a message is supervised by its flags."""
    flags = {key: message[key] for key in LEARN_FLAG_KEYS if has_content(message.get(key))}
    found = {key: FLAG_VALUES.get(str(value).strip().lower()) for key, value in flags.items()}
    for key, learned in found.items():
        if learned is None:
            raise BadCell(f"has the {key} {short_repr(flags[key])}: a turn is learned (1, true) or not (0, false)")
        if learned and _role(message) != "assistant":
            raise BadCell(f"is marked to be learned ({key}); hatrack learns assistant turns only")
    if len(set(found.values())) > 1:
        raise BadCell(f"has flags that contradict each other: {', '.join(found)}")
    return all(found.values())


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "nothing", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
