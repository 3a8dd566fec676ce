"""Estimates how many tokens rows have, from tokenizer.json and the chat template alone. Imports no torch.

Tokenizes all rows if they are few. Otherwise tokenizes a sample, and estimates the others from their characters.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from hatrack.data.examples import PLAIN_KEYS, Example, Examples, convert_splits
from hatrack.data.limit import length_limit
from hatrack.data.render import Encoded, RenderSettings, check_learnable, try_encode
from hatrack.data.template import chat_template, check_deterministic, write_conversation
from hatrack.errors import DataError
from hatrack.recipe import Recipe

SAMPLE_ROWS = 300
MAX_TEMPLATE_CHECKS = 5000
"""With at most this many conversations, all are written with the template, to find every one that it refuses."""
CHARACTERS_PER_TOKEN, MIN_CHARACTERS_PER_TOKEN = 4, 2
"""A typical value, for bases without a tokenizer.json; and a lower bound for nearly all rows."""


class LightTokenizer:
    """The part of transformers' tokenizer that `render.encode` uses, made from the files of a `folder`.

    Raises OSError if it has no tokenizer.json, or what tokenizers raises if that is damaged.
    """

    is_fast = True

    def __init__(self, folder: Path) -> None:
        (folder / "tokenizer.json").stat()
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        settings = folder / "tokenizer_config.json"
        config = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        names = {name: value for name, value in config.items() if name.endswith("_token")}
        self._special_tokens = {
            name: value["content"] if isinstance(value, dict) else value for name, value in names.items() if value
        }
        self.chat_template = _read_templates(folder, config.get("chat_template"))
        path = folder / "config.json"
        base_config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.model_max_length = length_limit(config.get("model_max_length"), base_config) or 10**30
        end = self._special_tokens.get("eos_token")
        self.eos_token_id = self._tokenizer.token_to_id(end) if isinstance(end, str) else None
        self._compiled: dict[str, Any] = {}

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **options: Any) -> dict[str, Any]:
        """`input_ids` and `offset_mapping` of a text or of several."""
        texts = [text] if isinstance(text, str) else text
        found = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        ids, offsets = [each.ids for each in found], [each.offsets for each in found]
        one = isinstance(text, str)
        return {"input_ids": ids[0] if one else ids, "offset_mapping": offsets[0] if one else offsets}

    def apply_chat_template(
        self,
        turns: list[dict[str, Any]],
        *,
        chat_template: str,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """A conversation as the template writes it, in Jinja's sandbox set up as in transformers."""
        if chat_template not in self._compiled:
            self._compiled[chat_template] = _jinja_sandbox().from_string(GENERATION_TAG.sub("", chat_template))
        plain = [{name: value for name, value in turn.items() if value is not None} for turn in turns]
        messages = [
            {"thinking": turn["reasoning_content"]} | turn if "reasoning_content" in turn else turn for turn in plain
        ]
        context = self._special_tokens | {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return str(self._compiled[chat_template].render(**context, tools=tools, documents=None))


def _read_templates(folder: Path, in_config: Any) -> Any:
    """A base's chat template, or several by name; template files win over tokenizer_config.json."""
    default, named = folder / "chat_template.jinja", sorted((folder / "additional_chat_templates").glob("*.jinja"))
    files = (
        {"default": default, **{path.stem: path for path in named}}
        if default.is_file()
        else {path.stem: path for path in named}
    )
    found = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if not found and isinstance(in_config, list):
        return {each["name"]: each["template"] for each in in_config}
    return (found["default"] if found.keys() == {"default"} else found) if found else in_config


GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""transformers' own tags around the assistant's text, which write nothing."""


def _jinja_sandbox() -> Any:
    def refuse(message: str) -> None:
        raise TemplateError(message)

    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    found.filters["tojson"] = _dump_json  # Jinja's own escapes < and >
    found.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return found


def _dump_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def row_sizes(
    recipe: Recipe, examples: Examples, folder: Path, max_length: int
) -> tuple[Examples, np.ndarray, np.ndarray]:
    """The examples that can be learned from, and the sizes of the training and of the held-out rows.

    Sizes are (n, 2): token count, at most `max_length`, and supervised-token count. Raises BadRows with every row that
    `render` would refuse, unless `bad_rows` is skip. With more than `MAX_TEMPLATE_CHECKS` conversations, only the
    sample is checked.
    """
    try:
        tokenizer = LightTokenizer(folder)
    except Exception:  # missing or damaged: training reports which
        return examples, _estimate_sizes(examples.train, max_length), _estimate_sizes(examples.held_out, max_length)
    both = [*examples.train, *examples.held_out]
    tools = any(example.tools for example in both)
    template = chat_template(tokenizer, tools=tools)[0] if examples.task == "chat" else None
    if template:
        check_deterministic(both[0].messages, tokenizer, template)
    return convert_splits(
        recipe, examples, lambda part, source: _measure_sizes(part, tokenizer, template, max_length, source)
    )


def _estimate_sizes(examples: Sequence[Example], max_length: int) -> np.ndarray:
    """Estimates the sizes of rows from their characters alone."""
    sizes = np.maximum(np.array([_count_characters(example) for example in examples]) / CHARACTERS_PER_TOKEN, 1)
    is_supervised = [example.label is None for example in examples]
    return np.array(np.minimum(np.stack([sizes, sizes * is_supervised], axis=1), max_length), np.int64)


def _measure_sizes(
    examples: Sequence[Example], tokenizer: Any, template: str | None, max_length: int, source: str
) -> np.ndarray:
    """Measures the sizes of a sample of the rows, or of all if they are few; interpolates the others by characters."""
    characters = np.array([_count_characters(example) for example in examples])
    order = np.argsort(characters, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(SAMPLE_ROWS, len(order))).astype(int))]
    if examples[0].label is None and len(examples) <= MAX_TEMPLATE_CHECKS:  # their answers may begin after the cut
        chosen = np.union1d(chosen, np.flatnonzero(characters > MIN_CHARACTERS_PER_TOKEN * max_length))
    chosen = chosen[np.argsort(characters[chosen], kind="stable")]
    others = np.setdiff1d(order, chosen)
    encoded = {index: try_encode(examples[index], tokenizer, template) for index in chosen}
    if template and len(examples) <= MAX_TEMPLATE_CHECKS:
        encoded |= {
            index: error for index in others if (error := _template_error(examples[index], tokenizer, template))
        }
    checked = sorted(encoded)
    settings = RenderSettings("", max_length, limit=tokenizer.model_max_length)
    check_learnable([examples[index] for index in checked], [encoded[index] for index in checked], settings, source)
    found = np.array([_encoded_size(encoded[index], max_length) for index in chosen])
    sizes = np.empty((len(examples), 2))
    sizes[chosen] = found
    for column in range(2):
        sizes[others, column] = np.interp(characters[others], characters[chosen], found[:, column])
    return np.array(np.rint(sizes), np.int64)


def _template_error(example: Example, tokenizer: Any, template: str) -> DataError | None:
    """The template's error about a conversation, if any; counts no tokens."""
    try:
        write_conversation(
            example.messages, tokenizer, template, tools=example.tools, context_only=example.context_only
        )
    except DataError as error:
        return error
    return None


def _count_characters(example: Example) -> int:
    extra = [{name: turn[name] for name in turn.keys() - PLAIN_KEYS} for turn in example.messages]
    extra_length = len(json.dumps([extra, example.tools])) if any(extra) or example.tools else 0
    return len(example.all_text) + extra_length


def _encoded_size(encoded: Encoded | DataError, max_length: int) -> tuple[int, int]:
    assert not isinstance(encoded, DataError), "refused rows are not counted"
    ids, supervised = encoded
    return max(1, min(len(ids), max_length)), int(supervised[:max_length].sum())
