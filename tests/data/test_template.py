"""What the assistant says in a conversation, as several real families of templates write it."""

import re
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hatrack.base.load import BaseOptions, load_base
from hatrack.base.sources import find_base
from hatrack.cli.demo import CHAT_MODEL
from hatrack.data.template import (
    PLAIN_TEMPLATE,
    _apply_template,
    assistant_spans,
    chat_prompt,
    chat_template,
    check_deterministic,
    render_chat,
    with_fixed_date,
    write_conversation,
)
from hatrack.data.token_lengths import LightTokenizer
from hatrack.errors import DataError, ModelError
from tests.conftest import tiny_tokenizer, turns

LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN3 = (  # drops the reasoning of every turn but the last
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [("user", "Hello there"), ("assistant", "Hi!"), ("user", "How are you?"), ("assistant", "Fine, thanks.")]


def _spoken(template: str, talk: list[tuple[str, str]]) -> list[str]:
    tokenizer = tiny_tokenizer(chat=False)
    said = list(turns(*talk))
    whole = tokenizer.apply_chat_template(said, chat_template=template, tokenize=False)
    write = partial(_apply_template, tokenizer, template=template)
    learned = [index for index, turn in enumerate(said) if turn["role"] == "assistant"]
    return [whole[start:end] for start, end in assistant_spans(write, said, str(whole), learned)]


@pytest.mark.parametrize(
    ("template", "end"),
    [(LLAMA3, "<|eot_id|>"), (GEMMA, "<end_of_turn>"), (QWEN3, "<|im_end|>"), (PLAIN_TEMPLATE, "<end>")],
    ids=["llama-3", "gemma", "qwen-3", "plain"],
)
def test_each_turn_with_the_token_that_ends_it(template: str, end: str) -> None:
    assert [turn.lstrip() for turn in _spoken(template, TALK)] == [f"Hi!{end}", f"Fine, thanks.{end}"]


def test_a_template_that_rewrites_history_teaches_the_last_turn() -> None:
    talk = [("user", "a"), ("assistant", "<think>x</think>b"), ("user", "c"), ("assistant", "<think>y</think>d")]
    assert _spoken(QWEN3, talk) == ["<think>y</think>d<|im_end|>"]


def test_what_is_not_learned_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    talk = [("user", "a"), ("assistant", "<think>x</think>b"), ("user", "c"), ("assistant", "<think>y</think>d")]
    _spoken(QWEN3, talk), _spoken(QWEN3, talk)
    assert capsys.readouterr().err.count("only the last answer of such conversations is learned") == 1
    chat_template(tiny_tokenizer(chat=False)), chat_template(tiny_tokenizer(chat=False))
    assert capsys.readouterr().err.count("the base has no chat template") == 1


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(
        ModelError, match=r"cannot tell which characters .*; got Slow; fix: use a base with a tokenizer"
    ):
        render_chat(turns(*TALK), Slow(), PLAIN_TEMPLATE)


def test_a_system_turn_and_an_unanswered_question_are_not_learned() -> None:
    talk = [("system", "Be kind"), *TALK[:2], ("user", "and now?")]
    assert _spoken(LLAMA3, talk) == ["Hi!<|eot_id|>"]


QWEN25 = (  # asks for messages[0] outside its loop, and writes a system turn of its own
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are an assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (LLAMA3, "<|eot_id|>"),
        (GEMMA, "<end_of_turn>"),
        (QWEN3, "<|im_end|>"),
        (QWEN25, "<|im_end|>"),
        (PLAIN_TEMPLATE, "<end>"),
    ],
    ids=["llama-3", "gemma", "qwen-3", "qwen-2.5", "plain"],
)
def test_an_assistant_that_speaks_first_is_learned_from(template: str, end: str) -> None:
    greeting = ("assistant", "a")  # short enough to stand in "assistant" too
    assert [turn.lstrip() for turn in _spoken(template, [greeting, *TALK[:2]])] == [f"a{end}", f"Hi!{end}"]
    assert [turn.lstrip() for turn in _spoken(template, [greeting])] == [f"a{end}"]


def test_a_template_that_lets_nobody_else_begin_says_so() -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + LLAMA3
    with pytest.raises(
        DataError, match="the chat template refuses a conversation; got user first; fix: check its roles"
    ):
        render_chat(turns(("assistant", "a"), *TALK[:2]), tiny_tokenizer(chat=False), template)


def test_templates_that_hide_the_assistant_or_fail_are_refused() -> None:
    assert _spoken("{{ messages | length }} turns", TALK) == []
    unmarked = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="does not show where the assistant speaks"):
        render_chat(turns(("assistant", "a"), *TALK[:1]), tiny_tokenizer(chat=False), unmarked)
    with pytest.raises(DataError, match=r"the chat template refuses a conversation; got .*no system"):
        render_chat(turns(*TALK), tiny_tokenizer(chat=False), "{{ raise_exception('no system turns here') }}")


def test_the_plain_template_is_for_bases_without_one() -> None:
    assert chat_template(tiny_tokenizer(chat=False)) == (PLAIN_TEMPLATE, False)
    own, is_own = chat_template(tiny_tokenizer(chat=True))
    assert is_own and "<start>" in own
    prompt = chat_prompt(tiny_tokenizer(chat=False), [{"role": "user", "content": "hi"}], None)
    assert prompt == "User: hi\nAssistant:"


@pytest.fixture(scope="module")
def smollm() -> Any:
    return load_base(find_base(CHAT_MODEL), BaseOptions(task="chat")).tokenizer


def test_a_real_model_learns_the_answers_and_their_end(smollm: Any) -> None:
    template, own = chat_template(smollm)
    ids, learn = render_chat(turns(*TALK), smollm, template)
    assert own and len(ids) == len(learn)
    spoken = np.split(ids[learn], np.flatnonzero(np.diff(np.flatnonzero(learn)) > 1) + 1)
    assert [smollm.decode(part) for part in spoken] == ["Hi!<|im_end|>", "Fine, thanks.<|im_end|>"]
    assert smollm.decode(ids) == smollm.apply_chat_template(
        [{"role": role, "content": content} for role, content in TALK], tokenize=False
    )
    assert "You are a helpful AI assistant" in smollm.decode(ids[~learn])


@pytest.mark.parametrize(
    "answer", ["\u00e9\u00e8 na\u00efve", "\u4f60\u597d", "\U0001f9e2\U0001f469\u200d\U0001f52c!", "a\n\n  b\n"]
)
def test_answers_of_any_script_are_learned_whole(smollm: Any, answer: str) -> None:
    template, _ = chat_template(smollm)
    ids, learn = render_chat(turns(("user", "\U0001f44b?"), ("assistant", answer)), smollm, template)
    assert smollm.decode(ids[learn]) == answer + "<|im_end|>"


def test_what_is_trained_on_is_what_is_asked_later(smollm: Any) -> None:
    """The tokens before an answer in training are those of the prompt when the adapter is used."""
    template, _ = chat_template(smollm)
    ids, learn = render_chat(turns(*TALK), smollm, template)
    prompt = chat_prompt(smollm, [{"role": role, "content": content} for role, content in TALK[:3]], template)
    asked = smollm(prompt, add_special_tokens=False)["input_ids"]
    last = int(np.flatnonzero(~learn[:-1] & learn[1:])[-1]) + 1
    assert ids[:last].tolist() == asked


TOOLS = (  # in the manner of Qwen 2.5
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}({{ call.function.arguments | tojson }})"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "find_capital", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "find_capital", "arguments": {"land": "Peru"}}}
CALLING = (
    *turns(("user", "Capital of Peru?")),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    *turns(("tool", '{"city": "Lima"}'), ("assistant", "It is Lima.")),
)


def test_tools_are_read_and_calls_are_learned(smollm: Any) -> None:
    ids, learn = render_chat(CALLING, smollm, TOOLS, tools=[TOOL])
    assert '"name": "find_capital"' in smollm.decode(ids[~learn])
    assert smollm.decode(ids[learn]) == '<call>find_capital({"land": "Peru"})<|im_end|>It is Lima.<|im_end|>'


@pytest.mark.parametrize(("context_only", "learned"), [((1,), ["Fine, thanks."]), ((3,), ["Hi!"])])
def test_turns_can_be_read_and_not_learned(context_only: tuple[int, ...], learned: list[str], smollm: Any) -> None:
    ids, learn = render_chat(turns(*TALK), smollm, QWEN3, context_only=context_only)
    assert smollm.decode(ids[learn]) == "".join(f"{text}<|im_end|>" for text in learned)
    assert "Hi!" in smollm.decode(ids)


DATED = "{{ 'Today is ' ~ strftime_now('%-d %B %Y, %H:%M:%S.%f') ~ '\n' if strftime_now is defined }}" + LLAMA3
MAY = datetime(2026, 5, 4, 15, 30, 12, 345678)


@pytest.mark.parametrize("light", [False, True], ids=["transformers", "light"])
def test_a_clock_is_stopped_for_whoever_writes_with_the_template_later(light: bool, tmp_path: Path) -> None:
    tokenizer: Any = tiny_tokenizer(chat=False)
    tokenizer.chat_template = DATED
    if light:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = LightTokenizer(tmp_path)
    template, own = chat_template(tokenizer, today=MAY)
    prompt = chat_prompt(tokenizer, [{"role": "user", "content": "hi"}], template)
    assert own and prompt.startswith("Today is 4 May 2026, 00:00:00.000000\n<|start_header_id|>user")
    assert chat_template(tokenizer, today=MAY.replace(hour=23))[0] == template, "the same all day"
    assert with_fixed_date(template, MAY.replace(day=5)) == template, "stopped once"


@pytest.mark.parametrize(
    "template",
    ["\n\n" + LLAMA3, "  {% set a = 1 %}\n" + LLAMA3, "{%- set a = 1 -%}\n" + LLAMA3, "{# a note #}\n" + LLAMA3],
    ids=["line breaks", "spaces", "minus", "note"],
)
def test_a_stopped_clock_moves_nothing_else(template: str) -> None:
    tokenizer = tiny_tokenizer(chat=False)
    turns = [{"role": "user", "content": "hi"}]
    asking = template + "{% if False %}{{ strftime_now('%Y') }}{% endif %}"
    stopped = with_fixed_date(asking, MAY)
    assert stopped != asking
    assert chat_prompt(tokenizer, turns, stopped) == chat_prompt(tokenizer, turns, template)


def test_a_date_can_be_reckoned_with() -> None:
    template = with_fixed_date("{{ (strftime_now(format='%Y') | int) + 1 }}{{ strftime_now('%d%%') }}", MAY)
    assert chat_prompt(tiny_tokenizer(chat=False), [{"role": "user", "content": "hi"}], template) == "202704%"


def test_of_named_templates_the_default_is_taken_or_the_only_one() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.chat_template = {"rag": GEMMA}
    assert chat_template(tokenizer) == (GEMMA, True)
    tokenizer.chat_template = {"rag": GEMMA, "default": LLAMA3, "tool_use": QWEN3}
    assert chat_template(tokenizer) == (LLAMA3, True)
    assert chat_template(tokenizer, tools=True) == (QWEN3, True)
    tokenizer.chat_template = {"rag": GEMMA, "tool_use": LLAMA3}
    assert chat_template(tokenizer, tools=True) == (LLAMA3, True)
    with pytest.raises(
        ModelError, match=r"several chat templates, .*; got rag, tool_use; fix: name one of them 'default'"
    ):
        chat_template(tokenizer)
    tokenizer.chat_template = {}
    assert chat_template(tokenizer) == (PLAIN_TEMPLATE, False)


CUTS = (  # in the manner of R1's distilled models
    "{% for m in messages %}{% if m.role == 'assistant' %}<bot>{{ m.content.split('</think>')[-1] }}<end>"
    "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>OPENING{% endif %}"
)
KEEPS_LAST = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 "
    "else m.reasoning_content or '' %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHTFUL = "<think>\nNorway lies north.\n</think>\n\nIt is Oslo."
ASKED = ("user", "Capital of Norway?")


@pytest.mark.parametrize("opening", ["", "<think>\n"])
@pytest.mark.parametrize("before", [[], [ASKED, ("assistant", "It is Oslo.")]], ids=["first", "later"])
def test_a_template_that_takes_thoughts_away_is_refused(opening: str, before: list[tuple[str, str]]) -> None:
    talk = [ASKED, ("assistant", THOUGHTFUL), *before]
    with pytest.raises(DataError, match=r"leaves out the thoughts of answers.*\[template-leaves-out\]"):
        _spoken(CUTS.replace("OPENING", opening), talk)


def test_thoughts_in_a_key_of_their_own_are_kept_or_refused() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    talk = [*turns(ASKED), {"role": "assistant", "content": "It is Oslo.", "reasoning_content": "Norway lies north."}]
    with pytest.raises(DataError, match=r"leaves out (the thoughts of answers|reasoning_content)"):
        render_chat(talk, tokenizer, LLAMA3)
    whole, ((start, end),) = write_conversation(talk, tokenizer, KEEPS_LAST)
    assert whole[start:end] == THOUGHTFUL + "<|im_end|>"


def test_a_template_that_drops_calls_is_refused() -> None:
    talk = [*turns(ASKED), {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}]
    with pytest.raises(DataError, match="leaves out tool_calls"):
        render_chat(talk, tiny_tokenizer(chat=False), LLAMA3)


def test_a_template_that_keeps_the_last_thought_teaches_what_is_asked() -> None:
    end = "<|im_end|>"
    assert _spoken(KEEPS_LAST, [ASKED, ("assistant", THOUGHTFUL)]) == [THOUGHTFUL + end]
    assert _spoken(KEEPS_LAST, [ASKED, ("assistant", "It is Oslo.")]) == [f"<think>\n\n</think>\n\nIt is Oslo.{end}"]
    assert _spoken(KEEPS_LAST, [ASKED, ("assistant", THOUGHTFUL)] * 2) == [THOUGHTFUL + end]


@pytest.mark.parametrize("opening", ["<think>\n", "\n", " ", "<think></think>"])
def test_an_answer_that_is_asked_for_in_another_way_than_learned_is_refused(opening: str) -> None:
    said = f"a prompt ends with {'<bot>' + opening!r}, the answers follow '<bot>'"
    with pytest.raises(DataError, match=re.escape(said) + r".*\[prompt-never-trained\]"):
        _spoken(CUTS.replace("OPENING", opening), [ASKED, ("assistant", "It is Oslo.")])
    later = [ASKED, ("assistant", "It is Oslo."), ("user", "And of Peru?"), ("assistant", "Lima.")]
    with pytest.raises(DataError, match=re.escape(said)):
        _spoken(CUTS.replace("OPENING", opening), later)


def test_a_template_that_draws_lots_is_refused() -> None:
    drawn = "{{ range(99999) | random }}" + LLAMA3
    with pytest.raises(ModelError, match=r"differently each time; got '\d+.*\[template-changes\]"):
        check_deterministic(turns(*TALK), tiny_tokenizer(chat=False), drawn)
    check_deterministic(turns(*TALK), tiny_tokenizer(chat=False), LLAMA3)
    check_deterministic(turns(*TALK), tiny_tokenizer(chat=False), "{{ raise_exception('no') }}")


def test_the_tokens_before_an_answer_are_those_that_ask_for_it(smollm: Any) -> None:
    """A space at a prompt's end would go into the answer's first word, and two line breaks into one token."""
    for opening in ("Assistant: ", "Assistant:\n\n", "Assis"):
        template = (
            "{% for m in messages %}{{ 'OPEN' if m.role == 'assistant' else 'User: ' }}{{ m.content }}<|im_end|>\n"
            "{% endfor %}"
            "{% if add_generation_prompt %}OPEN{% endif %}"
        ).replace("OPEN", opening)
        ids, learn = render_chat(turns(*TALK[:2]), smollm, template)
        asked = smollm(chat_prompt(smollm, turns(TALK[0]), template), add_special_tokens=False)["input_ids"]
        assert ids[: len(asked)].tolist() == asked
        assert smollm.decode(ids[learn]) == "Hi!<|im_end|>" and not learn[: len(asked)].any()
