"""Writes conversations with a chat template, and finds the text of the assistant's turns.

Knows nothing of rows or files. The template is Jinja, run by transformers in its sandbox.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateSyntaxError

from hatrack.console import say_once
from hatrack.data.messages import Turn, has_answer
from hatrack.data.template_coverage import Writer, check_answer_written, write_in_full
from hatrack.errors import DataError, ModelError

SHOWN_CHARACTERS = 20
"""Characters of a text that a message shows."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For bases without a template: `User: ...`, then `Assistant: ...` and the end-of-text token.

The prompt ends before the space, because most tokenizers join a space to the word after it."""


def chat_template(tokenizer: Any, *, tools: bool = False, today: datetime | None = None) -> tuple[str, bool]:
    """The template to write conversations with, and whether it is the base's own.

    If the base has several, takes `tool_use` for rows with `tools`, else `default`, or the only one. A template that
    writes the date always gets that of `today`. Raises ModelError if the base has several and no default.
    """
    own = _base_template(tokenizer.chat_template, tools)
    if own:
        return with_fixed_date(own, today or datetime.now()), True
    say_once("the base has no chat template: conversations are written as 'User: ...' and 'Assistant: ...'")
    return PLAIN_TEMPLATE, False


def _base_template(own: str | dict[str, str] | None, tools: bool) -> str | None:
    """The base's template; if it has several, the one that transformers would take, or the only one."""
    if not isinstance(own, dict):
        return own
    if tools and "tool_use" in own:
        return own["tool_use"]
    if "default" in own or len(own) < 2:
        return own.get("default", next(iter(own.values()), None))
    raise ModelError(
        "the base has several chat templates, and none of them is the default",
        got=", ".join(sorted(own)),
        fix="name one of them 'default', in the base's tokenizer_config.json or additional_chat_templates",
        gotcha="several-chat-templates",
    )


def with_fixed_date(template: str, today: datetime) -> str:
    """The template with `strftime_now` replaced by a macro that always gives the start of `today`.

    The date becomes part of the template, so training and later use write the same. A template that does not use
    `strftime_now` is returned unchanged.

    >>> with_fixed_date("{{ strftime_now('%d %b') }}", datetime(2026, 5, 4, 15, 30)).splitlines()[0]
    '{% macro strftime_now(format) %}{{ format | replace("%d", "04") | replace("%b", "May") }}{% endmacro %}'
    """
    if not re.search(r"\bstrftime_now\b", template) or "macro strftime_now(" in template:
        return template
    start = today.replace(hour=0, minute=0, second=0, microsecond=0)
    say_once(f"the chat template writes the date: it stays {start:%d %B %Y}, in training and in later use")
    values = {part: start.strftime(part) for part in sorted(set(re.findall(r"%-?[A-Za-z%]", template)), reverse=True)}
    parts = " ".join(
        f"| replace({json.dumps(part)}, {json.dumps(text)})" for part, text in values.items() if part != text
    )
    return f"{{% macro strftime_now(format) %}}{{{{ format {parts} }}}}{{% endmacro %}}\n{template}"


def chat_prompt(tokenizer: Any, messages: Sequence[dict[str, str]], template: str | None) -> str:
    """The text that asks for the assistant's next turn. Tokenize it without adding special tokens."""
    return _apply_template(tokenizer, list(messages), template or chat_template(tokenizer)[0], prompt=True)


def text_after_answer(tokenizer: Any, answer: str, template: str) -> str:
    """What the template writes after an answer, supervised with it: the end of the turn, without the line break."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
    return _apply_template(tokenizer, turns, template).rpartition(answer)[2].rstrip()


def render_chat(
    messages: Sequence[Turn],
    tokenizer: Any,
    template: str,
    *,
    tools: Sequence[dict[str, Any]] = (),
    context_only: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """The token ids of a conversation (int32), and its loss mask (bool).

    The assistant's turns and the tokens that end them are supervised, except turns whose index is in `context_only`.
    `tools` are the tools that the assistant could call. Raises DataError if the template fails, leaves out anything of
    the conversation, or does not show where the assistant speaks; ModelError if the tokenizer has no offsets.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            "this base's tokenizer cannot tell which characters a token stands for",
            got=type(tokenizer).__name__,
            fix="use a base with a tokenizer.json, or --task complete with prompt and completion",
        )
    conversation, spans = write_conversation(messages, tokenizer, template, tools=tools, context_only=context_only)
    ids, offsets = _tokenize(tokenizer, conversation, [start for start, _ in spans])
    supervised = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        supervised |= (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])
    return np.array(ids, dtype=np.int32), supervised


def write_conversation(
    messages: Sequence[Turn],
    tokenizer: Any,
    template: str,
    *,
    tools: Sequence[dict[str, Any]] = (),
    context_only: Sequence[int] = (),
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the template writes it, and its supervised spans of characters.

    Raises DataError as `render_chat` does.
    """
    write = partial(_apply_template, tokenizer, template=template)
    turns, conversation = write_in_full(write, list(messages), tools)
    supervised = [index for index, turn in enumerate(turns) if has_answer(turn) and index not in context_only]
    spans = assistant_spans(partial(write, tools=tools), turns, conversation, supervised)
    if not spans:
        raise DataError(
            "the chat template does not show where the assistant speaks",
            got=f"a template that begins {template[:40]!r}",
            fix="use a base with another template, or --task complete with prompt and completion",
        )
    return conversation, spans


def _tokenize(tokenizer: Any, conversation: str, starts: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """The token ids of a text, and the start and end of each token in it (tokens, 2).

    What stands before an answer, which begins at one of `starts`, must become the same tokens as without the answer.
    If the answer would change them (a prompt that ends with a space, say), the parts are tokenized separately.
    """
    encode = partial(tokenizer, add_special_tokens=False, verbose=False)
    found = encode(conversation, return_offsets_mapping=True)
    ids, offsets = list(found["input_ids"]), list(found["offset_mapping"])
    prompts = (encode(conversation[:start])["input_ids"] for start in starts if start)
    if any(ids[: len(prompt)] != list(prompt) for prompt in prompts):
        ids, offsets = [], []
        for start, end in pairwise((0, *starts, len(conversation))):
            part = encode(conversation[start:end], return_offsets_mapping=True)
            ids += part["input_ids"]
            offsets += [(start + first, start + last) for first, last in part["offset_mapping"]]
    return ids, np.array(offsets, dtype=np.int64).reshape(-1, 2)


def check_deterministic(messages: Sequence[Turn], tokenizer: Any, template: str) -> None:
    """Raises ModelError if the template writes the same conversation differently each time: prompts would then differ
    from the training rows. A conversation that the template refuses is not checked."""
    with suppress(DataError):
        first, again = (_apply_template(tokenizer, list(messages), template) for _ in range(2))
        if first != again:
            start = len(_shared_prefix(first, again))
            end = start + SHOWN_CHARACTERS
            raise ModelError(
                "the chat template writes the same conversation differently each time",
                got=f"{first[start:end]!r}, then {again[start:end]!r}",
                fix="use a base with another template",
                gotcha="template-changes",
            )


def assistant_spans(
    write: Writer, turns: list[Turn], conversation: str, supervised: Sequence[int]
) -> list[tuple[int, int]]:
    """The (start, end) in `conversation` of each `supervised` turn; empty if the template does not show one of them.

    A turn is the text between the conversation before it with the generation prompt, and the conversation up to it.
    Some templates rewrite earlier turns once a later one follows (they drop old reasoning); then only the last counts.
    """
    spans = [_answer_span(write, turns, conversation, index) for index in supervised]
    if not all(spans) and supervised and supervised[-1] == len(turns) - 1:
        spans = spans[-1:]
        if spans[0] is not None:
            say_once("the chat template rewrites earlier turns: only the last answer of such conversations is learned")
    return [span for span in spans if span is not None] if all(spans) else []


def _answer_span(write: Writer, turns: list[Turn], conversation: str, index: int) -> tuple[int, int] | None:
    text = conversation if index == len(turns) - 1 else write(turns[: index + 1])
    if not conversation.startswith(text):
        return None
    if index == 0:
        return _first_turn_span(write, turns, text)
    before = write(turns[:index], prompt=True)
    start, end = len(_shared_prefix(before, text)), len(text.rstrip())  # with the end-of-turn token, no line break
    if not check_answer_written(turns[index], text[start:end] if start == len(before) else text):
        return None
    if start < len(before):
        since = len(_shared_prefix(write(turns[:index]), before[:start]))
        raise DataError(
            "the chat template's generation prompt differs from what it writes before an answer",
            got=f"a prompt ends with {before[since:]!r}, the answers follow {before[since:start]!r}",
            fix="use a base with another template, or --task complete with prompt and completion",
            gotcha="prompt-never-trained",
        )
    return (start, end) if end > start else None


def _first_turn_span(write: Writer, turns: list[Turn], text: str) -> tuple[int, int] | None:
    """The span of an assistant's turn that begins the conversation: templates refuse to write an empty conversation.

    The generation prompt is therefore the one that the template writes after the turn.
    """
    prompt = write(turns[:1], prompt=True)
    opening = prompt.removeprefix(write(turns[:1]))
    start, end = text.find(opening), len(text.rstrip())
    if not opening or opening == prompt or start < 0:
        return None
    check_answer_written(turns[0], text[start:end])
    return (start + len(opening), end) if end > start + len(opening) else None


def _shared_prefix(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _apply_template(
    tokenizer: Any, turns: list[Turn], template: str, *, prompt: bool = False, tools: Sequence[dict[str, Any]] = ()
) -> str:
    """The text of a conversation; with `prompt`, it ends where the assistant's next turn begins."""
    try:
        text = tokenizer.apply_chat_template(
            turns,
            tools=list(tools) or None,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except TemplateSyntaxError as error:
        raise ModelError(
            "the base's chat template is not valid Jinja",
            got=f"line {error.lineno}: {error.message}",
            fix="correct it in the base's chat_template.jinja or tokenizer_config.json, or use another base",
        ) from error
    except Exception as error:  # templates may raise anything, for unknown roles for example
        reason = " ".join(str(error).split())
        raise DataError(
            "the chat template refuses a conversation", got=reason, fix="check its roles and their order"
        ) from error
    return str(text)
