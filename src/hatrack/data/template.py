"""Conversations as a chat template writes them, and which of the characters the assistant says.

Knows nothing of rows or files. The template is Jinja, run by transformers in its sandbox.
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateSyntaxError

from hatrack.console import say_once
from hatrack.data.messages import Turn, speaks
from hatrack.data.template_coverage import written
from hatrack.errors import DataError, ModelError

THOUGHT = re.compile(r"</?think(ing)?>")
WORD = re.compile(r"\w+")
SHOWN = 20
"""Characters of a text that are shown of the place where something is wrong."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For bases that bring none: `User: ...`, then `Assistant: ...` and the end-of-text token.

The prompt ends before the space, which most tokenizers join to the word after it."""


def chat_template(tokenizer: Any, *, tools: bool = False, today: datetime | None = None) -> tuple[str, bool]:
    """The template to write conversations with, and whether it is the base's own; where it is not, that is said.

    Of several by name it is `tool_use` where the rows have `tools`, else `default`, or the only one. A template that
    writes the time gets it written in: the beginning of `today`, whenever and wherever it is used from then on.
    Raises ModelError where none of several is meant to be used without being asked for.
    """
    own = _chosen(tokenizer.chat_template, tools)
    if own:
        return with_fixed_date(own, today or datetime.now()), True
    say_once("the base has no chat template: conversations are written as 'User: ...' and 'Assistant: ...'")
    return PLAIN_TEMPLATE, False


def _chosen(own: str | dict[str, str] | None, tools: bool) -> str | None:
    """The base's template, of several the one that transformers would take, or the only one."""
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
    """A template whose `strftime_now` tells the beginning of `today` for ever; one that does not ask stays as it is.

    The time becomes part of the text, by a macro in front: whoever has the template has the time it was stopped at.

    >>> with_its_clock_stopped("{{ strftime_now('%d %b') }}", datetime(2026, 5, 4, 15, 30)).splitlines()[0]
    '{% macro strftime_now(format) %}{{ format | replace("%d", "04") | replace("%b", "May") }}{% endmacro %}'
    """
    if not re.search(r"\bstrftime_now\b", template) or "macro strftime_now(" in template:
        return template
    start = today.replace(hour=0, minute=0, second=0, microsecond=0)
    say_once(f"the chat template writes the date: it stays {start:%d %B %Y}, for training and for whoever asks later")
    told = {part: start.strftime(part) for part in sorted(set(re.findall(r"%-?[A-Za-z%]", template)), reverse=True)}
    parts = " ".join(
        f"| replace({json.dumps(part)}, {json.dumps(text)})" for part, text in told.items() if part != text
    )
    return f"{{% macro strftime_now(format) %}}{{{{ format {parts} }}}}{{% endmacro %}}\n{template}"


def chat_prompt(tokenizer: Any, messages: Sequence[dict[str, str]], template: str | None) -> str:
    """The text after which the assistant's next turn follows. Tokenise it without adding special tokens."""
    return _write(tokenizer, list(messages), template or chat_template(tokenizer)[0], prompt=True)


def written_after(tokenizer: Any, answer: str, template: str) -> str:
    """What the template writes after an answer and is learned with it: the end of a turn, without the line break."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
    return _write(tokenizer, turns, template, prompt=False).rpartition(answer)[2].rstrip()


def render_chat(
    messages: Sequence[Turn],
    tokenizer: Any,
    template: str,
    *,
    tools: Sequence[dict[str, Any]] = (),
    context_only: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """A conversation's tokens (int32), and which are learned (bool): the assistant's turns with the token that ends
    each, but for those whose index is in `context_only`. `tools` are those that the assistant could call.

    Raises DataError where the template fails, leaves out anything of the conversation, or does not show where the
    assistant speaks; ModelError where the tokenizer cannot tell which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            "this base's tokenizer cannot tell which characters a token stands for",
            got=type(tokenizer).__name__,
            fix="use a base with a tokenizer.json, or --task complete with prompt and completion",
        )
    whole, spans = spoken(messages, tokenizer, template, tools=tools, context_only=context_only)
    ids, offsets = _tokens(tokenizer, whole, [start for start, _ in spans])
    learn = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        learn |= (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])
    return np.array(ids, dtype=np.int32), learn


def spoken(
    messages: Sequence[Turn],
    tokenizer: Any,
    template: str,
    *,
    tools: Sequence[dict[str, Any]] = (),
    context_only: Sequence[int] = (),
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the template writes it, and where in it the assistant says what is learned. Raises DataError as
    `render_chat` does."""
    turns, whole = written(partial(_write, tokenizer, template=template, prompt=False), list(messages), tools)
    return whole, assistant_spans(tokenizer, turns, template, whole, tools=tools, context_only=context_only)


def _tokens(tokenizer: Any, whole: str, starts: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """The ids of a text, and where in it each token begins and ends (tokens, 2).

    What stands before an answer, which begins at one of `starts`, becomes the tokens that it becomes while there is no
    answer yet. Where the answer would change them (a prompt that ends with a space, say), it is tokenised by itself.
    """
    encode = partial(tokenizer, add_special_tokens=False, verbose=False)
    found = encode(whole, return_offsets_mapping=True)
    ids, offsets = list(found["input_ids"]), list(found["offset_mapping"])
    prompts = (encode(whole[:start])["input_ids"] for start in starts if start)
    if any(ids[: len(prompt)] != list(prompt) for prompt in prompts):
        ids, offsets = [], []
        for start, end in pairwise((0, *starts, len(whole))):
            part = encode(whole[start:end], return_offsets_mapping=True)
            ids += part["input_ids"]
            offsets += [(start + first, start + last) for first, last in part["offset_mapping"]]
    return ids, np.array(offsets, dtype=np.int64).reshape(-1, 2)


def check_deterministic(messages: Sequence[Turn], tokenizer: Any, template: str) -> None:
    """Raises ModelError where the template writes one and the same conversation in two ways: what is asked for later is
    then nothing that was learned. What it refuses is left to others to say."""
    with suppress(DataError):
        first, again = (_write(tokenizer, list(messages), template, prompt=False) for _ in range(2))
        if first != again:
            start = len(_common(first, again))
            raise ModelError(
                "the chat template writes something else each time",
                got=f"{first[start : start + SHOWN]!r}, then {again[start : start + SHOWN]!r}",
                fix="use a base with another template",
                gotcha="template-changes",
            )


def assistant_spans(
    tokenizer: Any,
    turns: list[Turn],
    template: str,
    whole: str,
    *,
    tools: Sequence[dict[str, Any]] = (),
    context_only: Sequence[int] = (),
) -> list[tuple[int, int]]:
    """Where in `whole` the assistant says what is learned, as (start, end) of characters.

    A turn is what lies between the conversation before it, ready for an answer, and the conversation up to it. Some
    templates write earlier turns anew once a later one follows (they drop old reasoning); then only the last counts.
    """
    learned = [index for index, turn in enumerate(turns) if speaks(turn) and index not in context_only]
    write = partial(_write, tokenizer, template=template, tools=tools)
    spans = [_span(write, turns, whole, index) for index in learned]
    if not all(spans) and learned and learned[-1] == len(turns) - 1:
        spans = spans[-1:]
        if spans[0] is not None:
            say_once("the chat template rewrites earlier turns: of such conversations only the last answer is learned")
    if not spans or not all(spans):
        raise DataError(
            "the chat template does not show where the assistant speaks",
            got=f"a template that begins {template[:40]!r}",
            fix="use a base with another template, or --task complete with prompt and completion",
        )
    return [span for span in spans if span is not None]


def _span(write: Callable[..., str], turns: list[Turn], whole: str, index: int) -> tuple[int, int] | None:
    upto = whole if index == len(turns) - 1 else write(turns[: index + 1], prompt=False)
    if not whole.startswith(upto):
        return None
    if index == 0:
        return _first_span(write, turns, upto)
    before = write(turns[:index], prompt=True)
    start, end = len(_common(before, upto)), len(upto.rstrip())  # the end-of-turn token is learned, a line break not
    if not _refuse_left_out(turns[index], upto[start:end] if start == len(before) else upto):
        return None
    if start < len(before):
        since = len(_common(write(turns[:index], prompt=False), before[:start]))
        raise DataError(
            "the chat template asks for answers in another way than it writes them: what is learned is never asked for",
            got=f"asked for after {before[since:]!r}, learned after {before[since:start]!r}",
            fix="use a base with another template, or --task complete with prompt and completion",
            gotcha="prompt-never-trained",
        )
    return (start, end) if end > start else None


def _refuse_left_out(turn: Turn, written: str) -> bool:
    """Raises DataError where the template leaves out words of what the assistant says: they would not be learned.

    False where nothing of it is there at all.
    """
    calls = " ".join(str(call["function"]["name"]) for call in turn.get("tool_calls") or [])
    thoughts = turn.get("reasoning_content", "")
    texts = ((turn["content"] or "", "a part"), (thoughts, "the thoughts"), (calls, "the tool calls"))
    said = [(WORD.findall(THOUGHT.sub(" ", text)), THOUGHT.search(text), what) for text, what in texts]
    there, every = WORD.findall(written), {word for words, _, _ in said for word in words}
    if every and not every & set(there):
        return False
    for words, thinks, what in said:
        rest = iter(there)
        if not all(word in rest for word in words):
            raise DataError(
                f"the chat template leaves out {'the thoughts' if thinks else what} of answers: they are not learned",
                fix="use a base whose template keeps them, or take them out of the rows",
                gotcha="template-leaves-out",
            )
    return True


def _first_span(write: Callable[..., str], turns: list[Turn], upto: str) -> tuple[int, int] | None:
    """Where the assistant speaks first: there is no conversation before it, and templates refuse an empty one.

    What the template adds to ask for an answer is also what it writes before this one.
    """
    asked = write(turns[:1], prompt=True)
    single = write(turns[:1], prompt=False)
    opening = asked.removeprefix(single)
    start, end = upto.find(opening), len(upto.rstrip())
    if not opening or opening == asked or start < 0:
        return None
    _refuse_left_out(turns[0], upto[start:end])
    return (start + len(opening), end) if end > start + len(opening) else None


def _common(one: str, other: str) -> str:
    """The longest beginning that two texts share."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _write(
    tokenizer: Any, turns: list[Turn], template: str, *, prompt: bool, tools: Sequence[dict[str, Any]] = ()
) -> str:
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
            fix="mend it in the base's chat_template.jinja or tokenizer_config.json, or use another base",
        ) from error
    except Exception as error:  # templates raise what they like, for roles they do not know for example
        reason = " ".join(str(error).split())
        raise DataError(
            "the chat template refuses a conversation", got=reason, fix="check its roles and their order"
        ) from error
    return str(text)
