"""How answers end, by what the rows teach."""

from dataclasses import replace
from typing import Any

import pytest

from hatrack.data.examples import Example
from hatrack.data.render import RenderSettings, TokenRows, render
from hatrack.data.stop_tokens import Stops, find_stops, stops_of_template
from tests.conftest import turns
from tests.training.talking import CHATML, SPECIAL, byte_tokenizer

END = SPECIAL.index("<|im_end|>")
EOS = SPECIAL.index("<|endoftext|>")
PROMPT = "{% if add_generation_prompt %}BOT{% endif %}"


def _written(end: str, bot: str = "Bot:") -> str:
    body = (
        "{% for m in messages %}{{ 'BOT' if m.role == 'assistant' else 'User: ' }}{{ m.content }}"
        "{{ 'END' if m.role == 'assistant' else '\\n' }}{% endfor %}" + PROMPT
    )
    return body.replace("END", end).replace("BOT", bot)


def _rows(tokenizer: Any, template: str, max_length: int = 200) -> TokenRows:
    answers = ("Oslo is it.", "I say Lima.", "Doha then.")
    examples = [
        Example(row, messages=turns(("user", f"No. {row}"), ("assistant", said), ("user", "And?"), ("assistant", said)))
        for row, said in enumerate(answers, start=1)
    ]
    return render(examples, tokenizer, RenderSettings(task="chat", max_length=max_length, template=template))


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, Stops(tokens=(END,))),
        (_written("<|im_end|>\\n\\n"), Stops(tokens=(END,))),
        (_written("<|im_end|><|endoftext|>"), Stops(tokens=(EOS,))),
        (_written("\\nUser:"), Stops(strings=("\nUser:",))),
        (_written("</s>\\n"), Stops(strings=("</s>",))),
        (_written("\\n"), Stops()),
        (_written("<|im_end|>", bot=" Bot: "), Stops(tokens=(END,))),
    ],
    ids=["chatml", "line breaks after it", "two tokens", "text", "another base's token", "nothing", "spaces"],
)
def test_ends_are_what_the_rows_and_the_template_end_with(template: str, ends: Stops) -> None:
    tokenizer = byte_tokenizer()
    assert find_stops(_rows(tokenizer, template), tokenizer, 200, template) == ends
    assert stops_of_template(tokenizer, template) == ends


def test_a_template_may_end_turns_in_several_ways() -> None:
    template = CHATML.replace("<|im_end|>", "{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}")
    tokenizer = byte_tokenizer()
    rows = _rows(tokenizer, CHATML)
    other = rows.ids.copy()
    other[other == END] = EOS
    both = replace(rows, ids=rows.ids * (rows.offsets[1] > 0))
    both.ids[: rows.offsets[1]] = other[: rows.offsets[1]]
    assert find_stops(both, tokenizer, 200, template) == Stops(tokens=(EOS, END))


def test_rows_that_were_cut_teach_no_end() -> None:
    tokenizer = byte_tokenizer()
    rows = _rows(tokenizer, CHATML, max_length=50)
    assert (rows.lengths == 50).all()
    assert find_stops(rows, tokenizer, 50, None) == Stops(tokens=(END,)), "the first turns are whole"
    texts = [Example(1, text="User: a", completion=" Oslo" * 20), Example(2, text="b", completion=" Lima" * 20)]
    cut = render(texts, tokenizer, RenderSettings(task="complete", max_length=20))
    assert find_stops(cut, tokenizer, 20, None) == Stops()
    whole = render(texts, tokenizer, RenderSettings(task="complete", max_length=200))
    assert find_stops(whole, tokenizer, 200, None) == Stops(tokens=(EOS,))


def test_a_template_that_refuses_a_plain_question_tells_nothing() -> None:
    assert stops_of_template(byte_tokenizer(), "{{ raise_exception('system first') }}") == Stops()
