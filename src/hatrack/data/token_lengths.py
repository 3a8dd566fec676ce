"""How many tokens rows make, by a base's tokenizer.json and chat template alone: no transformers, and so no torch.

Of a few rows all tokens are counted; of more, an evenly spread sample, and the others by their letters.
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

from hatrack.data.examples import PLAIN_KEYS, Example, Examples, map_parts
from hatrack.data.limit import length_limit
from hatrack.data.render import Encoded, RenderSettings, check_learnable, try_encode
from hatrack.data.template import chat_template, check_deterministic, spoken
from hatrack.errors import DataError
from hatrack.recipe import Recipe

SAMPLE = 300
CHECKED = 5000
"""Conversations of which each is written, whether its tokens are counted or not."""
LETTERS, FEW_LETTERS = 4, 2
"""Letters a token, where a base brings no tokenizer.json; and so few that a row may well have more tokens."""


class LightTokenizer:
    """What `render.encode` asks of transformers' tokenizer, from the files of a `folder`.

    Raises an OSError where it has no tokenizer.json, and whatever tokenizers raises where that is damaged.
    """

    is_fast = True

    def __init__(self, folder: Path) -> None:
        (folder / "tokenizer.json").stat()
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        settings = folder / "tokenizer_config.json"
        kept = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        names = {name: value for name, value in kept.items() if name.endswith("_token")}
        self._named = {
            name: value["content"] if isinstance(value, dict) else value for name, value in names.items() if value
        }
        self.chat_template = _templates(folder, kept.get("chat_template"))
        described = folder / "config.json"
        config = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
        self.model_max_length = length_limit(kept.get("model_max_length"), config) or 10**30
        end = self._named.get("eos_token")
        self.eos_token_id = self._tokenizer.token_to_id(end) if isinstance(end, str) else None
        self._compiled: dict[str, Any] = {}

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **options: Any) -> dict[str, Any]:
        """`input_ids` and `offset_mapping` of a text, or of several."""
        several = [text] if isinstance(text, str) else text
        found = self._tokenizer.encode_batch(several, add_special_tokens=add_special_tokens)
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
        """A conversation as its template writes it, by Jinja's sandbox as transformers sets it up."""
        if chat_template not in self._compiled:
            self._compiled[chat_template] = _sandbox().from_string(GENERATION.sub("", chat_template))
        plain = [{name: value for name, value in turn.items() if value is not None} for turn in turns]
        messages = [
            {"thinking": turn["reasoning_content"]} | turn if "reasoning_content" in turn else turn for turn in plain
        ]
        known = self._named | {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return str(self._compiled[chat_template].render(**known, tools=tools, documents=None))


def _templates(folder: Path, in_settings: Any) -> Any:
    """A base's chat template, or several by their names: files of their own go before tokenizer_config.json."""
    own, more = folder / "chat_template.jinja", sorted((folder / "additional_chat_templates").glob("*.jinja"))
    files = (
        {"default": own, **{path.stem: path for path in more}} if own.is_file() else {path.stem: path for path in more}
    )
    found = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if not found and isinstance(in_settings, list):
        return {each["name"]: each["template"] for each in in_settings}
    return (found["default"] if found.keys() == {"default"} else found) if found else in_settings


GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""transformers' own tags around what the assistant says: they write nothing."""


def _sandbox() -> Any:
    def refuse(message: str) -> None:
        raise TemplateError(message)

    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    found.filters["tojson"] = _json  # Jinja's own escapes < and >, as for a web page
    found.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return found


def _json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def row_sizes(recipe: Recipe, examples: Examples, folder: Path, most: int) -> tuple[Examples, np.ndarray, np.ndarray]:
    """The examples that can be learned from; of each row to learn, (n, 2), the tokens, cut to `most`, and how many of
    these are learned; and the same of the rows held out.

    Raises BadRows with every row that `render` would refuse, unless `bad_rows` is skip. Of more than `CHECKED`
    conversations only those whose tokens are counted are looked at.
    """
    try:
        tokenizer = LightTokenizer(folder)
    except Exception:  # none, or a damaged one: training says which
        return examples, _estimated(examples.train, most), _estimated(examples.held_out, most)
    both = [*examples.train, *examples.held_out]
    tools = any(example.tools for example in both)
    template = chat_template(tokenizer, tools=tools)[0] if examples.task == "chat" else None
    if template:
        check_deterministic(both[0].messages, tokenizer, template)
    return map_parts(recipe, examples, lambda part, source: _sizes(part, tokenizer, template, most, source))


def _estimated(examples: Sequence[Example], most: int) -> np.ndarray:
    """The sizes of rows by their letters alone."""
    sizes = np.maximum(np.array([_letters(example) for example in examples]) / LETTERS, 1)
    learned = [example.label is None for example in examples]
    return np.array(np.minimum(np.stack([sizes, sizes * learned], axis=1), most), np.int64)


def _sizes(examples: Sequence[Example], tokenizer: Any, template: str | None, most: int, source: str) -> np.ndarray:
    """The sizes of rows: of few as they are, of many a sample's, and the others' by their letters between these."""
    letters = np.array([_letters(example) for example in examples])
    order = np.argsort(letters, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(SAMPLE, len(order))).astype(int))]
    if examples[0].label is None and len(examples) <= CHECKED:  # their answers may begin after what is kept
        chosen = np.union1d(chosen, np.flatnonzero(letters > FEW_LETTERS * most))
    chosen = chosen[np.argsort(letters[chosen], kind="stable")]
    others = np.setdiff1d(order, chosen)
    tried = {index: try_encode(examples[index], tokenizer, template) for index in chosen}
    if template and len(examples) <= CHECKED:
        tried |= {index: error for index in others if (error := _refused(examples[index], tokenizer, template))}
    looked = sorted(tried)
    settings = RenderSettings("", most, limit=tokenizer.model_max_length)
    check_learnable([examples[index] for index in looked], [tried[index] for index in looked], settings, source)
    found = np.array([_size(tried[index], most) for index in chosen])
    sizes = np.empty((len(examples), 2))
    sizes[chosen] = found
    for column in range(2):
        sizes[others, column] = np.interp(letters[others], letters[chosen], found[:, column])
    return np.array(np.rint(sizes), np.int64)


def _refused(example: Example, tokenizer: Any, template: str) -> DataError | None:
    """What the template has against a conversation; its tokens are not counted."""
    try:
        spoken(example.messages, tokenizer, template, tools=example.tools, context_only=example.context_only)
    except DataError as error:
        return error
    return None


def _letters(example: Example) -> int:
    more = [{name: turn[name] for name in turn.keys() - PLAIN_KEYS} for turn in example.messages]
    beside = len(json.dumps([more, example.tools])) if any(more) or example.tools else 0
    return len(example.all_text) + beside


def _size(encoded: Encoded | DataError, most: int) -> tuple[int, int]:
    assert not isinstance(encoded, DataError), "what is refused is not counted"
    ids, learn = encoded
    return max(1, min(len(ids), most)), int(learn[:most].sum())
