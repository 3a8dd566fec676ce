"""Rows counted without transformers are as long as transformers makes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hatrack.data.complaints import BadRows
from hatrack.data.examples import Example, Examples
from hatrack.data.render import RenderSettings, encode, render
from hatrack.data.template import PLAIN_TEMPLATE, chat_template
from hatrack.data.token_lengths import SAMPLE_ROWS, LightTokenizer, row_sizes
from hatrack.recipe import Recipe
from tests.conftest import WORDS, turns
from tests.data.test_template import CALLING, GEMMA, LLAMA3, QWEN3, TALK, TOOL, TOOLS

TRACKED = (
    "{{ bos_token }}{%- if tools is not none %}tools{% endif %}\n"
    "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}{{ raise_exception('roles') }}{% endif %}\n"
    "    {{- m['role'] + ' ' }}{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def _saved(tokenizer: PreTrainedTokenizerFast, folder: Path, template: str | None) -> Path:
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def _sizes(examples: list[Example], folder: Path, most: int, bad_rows: str = "refuse") -> Any:
    task = "chat" if examples[0].messages else "classify" if examples[0].label is not None else "complete"
    given = Examples(task, examples, examples[:1], [], False, {}, "", separate_files=True)
    left, learn, held_out = row_sizes(Recipe.make(data="f.jsonl", bad_rows=bad_rows), given, folder, most)
    assert len(left.train) == len(learn) and len(left.held_out) == len(held_out)
    return learn


@pytest.mark.parametrize("template", [None, LLAMA3, GEMMA, QWEN3, TRACKED])
def test_conversations_are_written_as_transformers_writes_them(
    template: str | None, tiny_decoder: Path, tmp_path: Path
) -> None:
    full = AutoTokenizer.from_pretrained(tiny_decoder)
    folder = _saved(full, tmp_path, template)
    light = LightTokenizer(folder)
    example = Example(1, messages=turns(*TALK))
    assert chat_template(light) == chat_template(full)
    used = template or PLAIN_TEMPLATE
    for own, theirs in zip(encode(example, light, used), encode(example, full, used), strict=True):
        np.testing.assert_array_equal(own, theirs)


def test_tools_and_thoughts_are_written_as_transformers_writes_them(tiny_decoder: Path, tmp_path: Path) -> None:
    template = TOOLS.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.thinking }}{{ m.content is defined }}")
    full = AutoTokenizer.from_pretrained(tiny_decoder)
    thought = {"role": "assistant", "content": "one", "reasoning_content": "so"}
    absent = dict(CALLING[1]) | {"content": None}
    options: dict[str, Any] = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
    theirs, own = (
        each.apply_chat_template([*CALLING, absent, thought], tools=[TOOL | {"x": "<a>"}], **options)
        for each in (full, LightTokenizer(_saved(full, tmp_path, TOOLS)))
    )
    assert own == theirs and "<a>" in own and "soso" in own


@pytest.mark.parametrize(
    "example",
    [
        Example(1, text="the film was good", label=1),
        Example(1, text="the film was good"),
        Example(1, text="the film", completion=" was good"),
    ],
)
def test_texts_are_as_many_tokens(example: Example, tiny_encoder: Path) -> None:
    full, light = AutoTokenizer.from_pretrained(tiny_encoder), LightTokenizer(tiny_encoder)
    for own, theirs in zip(encode(example, light, None), encode(example, full, None), strict=True):
        np.testing.assert_array_equal(own, theirs)


def test_sizes_are_those_that_are_trained_on(tiny_decoder: Path) -> None:
    random = np.random.default_rng(0)
    examples = [
        Example(row, messages=turns(("user", "the film"), ("assistant", " ".join(random.choice(WORDS, size)))))
        for row, size in enumerate(random.integers(1, 40, SAMPLE_ROWS))
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    template = chat_template(tokenizer)[0]
    rendered = render(examples, tokenizer, RenderSettings(task="chat", max_length=24, template=template))
    np.testing.assert_array_equal(_sizes(examples, tiny_decoder, 24), rendered.sizes)
    assert rendered.sizes[:, 1].sum() == rendered.supervised.sum() and rendered.sizes[:, 0].max() == 24


def test_of_many_rows_some_are_counted(tiny_decoder: Path) -> None:
    random = np.random.default_rng(0)
    examples = [
        Example(row, text=" ".join(random.choice(WORDS, size))) for row, size in enumerate(random.geometric(0.1, 5000))
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    true = render(examples, tokenizer, RenderSettings(task="complete", max_length=1000)).sizes
    found = _sizes(examples, tiny_decoder, 1000)
    assert abs(found.sum() / true.sum() - 1) < 0.02
    assert found[:, 0].max() == true[:, 0].max()  # the longest row decides how much memory a run takes
    assert np.abs(found - true).mean() < 1


def test_without_a_tokenizer_file_letters_are_counted(tmp_path: Path) -> None:
    examples = [Example(1, text="a" * 80, label=0), Example(2, text="a" * 8000, label=1)]
    assert _sizes(examples, tmp_path, 512).tolist() == [[20, 0], [512, 0]]
    talk = [Example(1, messages=turns(("user", "a" * 40), ("assistant", "b" * 40)))]
    assert _sizes(talk, tmp_path, 512).tolist() == [[20, 20]]


@pytest.mark.parametrize("config", [None, GEMMA, {"default": LLAMA3, "rag": GEMMA}])
@pytest.mark.parametrize("own", [None, QWEN3])
@pytest.mark.parametrize("more", [{}, {"rag": GEMMA}, {"default": GEMMA, "tool_use": LLAMA3}])
def test_templates_are_found_where_transformers_finds_them(
    config: str | dict[str, str] | None, own: str | None, more: dict[str, str], tiny_decoder: Path, tmp_path: Path
) -> None:
    full = AutoTokenizer.from_pretrained(tiny_decoder)
    full.chat_template = config
    full.save_pretrained(tmp_path, save_jinja_files=False)
    if own:
        (tmp_path / "chat_template.jinja").write_text(own)
    for name, template in more.items():
        (tmp_path / "additional_chat_templates").mkdir(exist_ok=True)
        (tmp_path / f"additional_chat_templates/{name}.jinja").write_text(template)
    assert LightTokenizer(tmp_path).chat_template == AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_what_training_refuses_is_refused_and_left_out_before_it(tiny_decoder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + LLAMA3
    folder = _saved(tokenizer, tmp_path, template)
    bad = {2: turns(("system", "so"), ("user", "who ?"), ("assistant", "one"))}
    bad |= {5: turns(("user", "so " * 90), ("assistant", "one"))}
    plain = turns(("user", "what is red ?"), ("assistant", "the film"))
    examples = [Example(row, messages=bad.get(row % SAMPLE_ROWS, plain)) for row in range(1, 2 * SAMPLE_ROWS)]
    refused, cut = "the chat template refuses a conversation (no system turns)", "the answer begins after the 48 tokens"
    with pytest.raises(BadRows) as caught:
        _sizes(examples, folder, 48)
    assert caught.value.complaints[0] == f"f.jsonl rows 2, {SAMPLE_ROWS + 2}: {refused}"
    assert caught.value.complaints[1].startswith(f"f.jsonl rows 5, {SAMPLE_ROWS + 5}: {cut}")
    with pytest.raises(BadRows) as trained:
        render(examples, tokenizer, RenderSettings(task="chat", max_length=48, template=template), source="f.jsonl")
    assert trained.value.complaints == caught.value.complaints and trained.value.fix == caught.value.fix
    assert len(_sizes(examples, folder, 48, "skip")) == 2 * SAMPLE_ROWS - 5
