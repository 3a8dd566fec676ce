"""A conversation is written whole, or refused by the name of what the template passes over."""

from functools import partial
from typing import Any

import pytest

from hatrack.data.template import PLAIN_TEMPLATE, _apply_template
from hatrack.data.template_coverage import write_in_full
from hatrack.errors import DataError
from tests.conftest import tiny_tokenizer, turns
from tests.data.test_template import CALLING, GEMMA, LLAMA3, TALK, TOOL, TOOLS

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = "{% for call in m.tool_calls or [] %}{{ call.function.name }} NAMED{% endfor %}"
REPR = "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments }}{% endfor %}"
ADDED = "{% for call in m.tool_calls or [] %}{{ call.function.name + call.function.arguments }}{% endfor %}"
ABSENT = (  # a call only where there is no content at all
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is not defined %}"
    "{% for call in m.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}"
)


def _rendered(template: str, messages: Any = CALLING, tools: Any = ()) -> str:
    write = partial(_apply_template, tiny_tokenizer(chat=False), template=template)
    return write_in_full(write, list(messages), tools)[1]


@pytest.mark.parametrize("template", [LLAMA3, GEMMA, PLAIN_TEMPLATE, HEAD + TAIL])
def test_a_template_without_a_place_for_calls_is_told(template: str) -> None:
    with pytest.raises(DataError, match=r"leaves out tool_calls and tools; got .*find_capital.*template-leaves-out"):
        _rendered(template, tools=[TOOL])
    with pytest.raises(DataError, match=r"the chat template leaves out tools; got \['find_capital'\]"):
        _rendered(template, messages=turns(*TALK), tools=[TOOL])


def test_a_name_that_is_also_said_is_no_sign_of_a_call() -> None:
    spoken = [dict(turn) for turn in CALLING]
    spoken[1]["content"] = "I call find_capital with the land Peru."
    with pytest.raises(DataError, match="leaves out tool_calls"):
        _rendered(HEAD + TAIL, messages=spoken)


def test_a_call_without_its_arguments_is_not_whole() -> None:
    with pytest.raises(DataError, match="leaves out tool_calls"):
        _rendered(HEAD + CALLS + TAIL)


@pytest.mark.parametrize("template", [TOOLS, HEAD + REPR + TAIL, HEAD + ADDED + TAIL, ABSENT + TAIL])
def test_calls_are_given_in_the_form_that_the_template_writes_as_json(template: str) -> None:
    assert '{"land": "Peru"}' in _rendered(template)


def test_what_is_thought_has_to_be_written_too() -> None:
    messages = [*turns(("user", "who ?")), {"role": "assistant", "content": "one", "reasoning_content": "so so"}]
    with pytest.raises(DataError, match="the chat template leaves out reasoning_content; got 'so so'"):
        _rendered(HEAD + TAIL, messages=messages)
    think = HEAD.replace("{{ m.content }}", "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
                                            "{% endif %}{{ m.content }}")  # fmt: skip
    assert "<think>so so</think>one" in _rendered(think + TAIL, messages=messages)


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_turn_that_the_template_passes_over_is_named(role: str) -> None:
    template = "{% for m in messages if m.role != '" + role + "' %}" + (HEAD + TAIL).split("%}", 1)[1]
    messages = turns((role, "Answer in capitals."), ("user", "who ?"), ("assistant", "ONE"))
    with pytest.raises(DataError, match=f"leaves out what a turn of the role {role} says; got 'Answer in capitals.'"):
        _rendered(template, messages=messages)


def test_white_space_and_json_are_no_difference() -> None:
    template = HEAD.replace("{{ m.content }}", "{{ m.content | trim | tojson }}") + TAIL
    assert _rendered(template, messages=turns(("user", ' say "a"\n b '), ("assistant", "one")))


def test_calls_in_a_form_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    named = [{"role": "user", "content": "who ?", "name": "ann"}, *CALLING[1:]]
    assert "find_capital" in _rendered(TOOLS, messages=named)
    assert "the chat template does not write 'name' of a message: it is not read" in capsys.readouterr().err
