"""Tokenizes the training and the held-out rows of a run. Knows nothing of files or batches."""

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hatrack.console import say
from hatrack.data.examples import Examples, convert_splits
from hatrack.data.limit import choose_max_length, length_limit
from hatrack.data.render import ONE_END_FIX, RenderSettings, TokenRows, render_cached, wrong_end_count
from hatrack.data.stop_tokens import Stops, find_stops
from hatrack.data.template import chat_template, check_deterministic
from hatrack.errors import DataError, ModelError
from hatrack.recipe import Recipe


@dataclass(frozen=True)
class Tokens:
    """The training and the held-out rows, and how they were made: the chat `template`, None for other tasks, and the
    `max_length` of a row. `stops` is how the answers end."""

    train: TokenRows
    held_out: TokenRows
    template: str | None
    max_length: int
    stops: Stops = field(default_factory=Stops)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids of the tokens that end an answer."""
        return self.stops.tokens


def tokenize(
    recipe: Recipe, examples: Examples, tokenizer: Any, config: Any, *, template: str | None = None
) -> tuple[Examples, Tokens]:
    """`examples` as tokens of the base that `tokenizer` and transformers' `config` belong to.

    Conversations are written with `template`, by default the base's own. With `bad_rows: skip`, rows that cannot be
    learned from are left out. Also returns the remaining examples. Says how many rows were cut. Raises RecipeError if
    `max_length` is more than the base can take, BadRows if a row cannot be learned from.
    """
    if examples.task == "chat" and template is None:
        tools = any(example.tools for part in (examples.train, examples.held_out) for example in part)
        template = chat_template(tokenizer, tools=tools)[0]
    if template is not None:
        check_deterministic(examples.train[0].messages, tokenizer, template)
    limit = length_limit(tokenizer.model_max_length, config.to_dict())
    max_length, why = choose_max_length(recipe.max_length, limit, examples.task)
    settings = render_settings(
        examples, max_length, template, single_end_token(tokenizer, config, examples.task), limit
    )
    examples, train, held_out = render_both(recipe, examples, tokenizer, settings)
    for part in (train, held_out):
        check_known_tokens(part, tokenizer, config)
    if train.cut_count or held_out.cut_count:
        say(f"{train.cut_count + held_out.cut_count:,} rows are longer than {max_length} tokens ({why}) and were cut")
    stops = Stops() if examples.task == "classify" else find_stops(train, tokenizer, max_length, template)
    return examples, Tokens(train, held_out, template, max_length, stops)


def render_settings(
    examples: Examples, max_length: int, template: str | None, end_token: int | None, limit: int | None = None
) -> RenderSettings:
    """How `examples` become tokens."""
    labels, multi_label = len(examples.labels), examples.multi_label
    return RenderSettings(examples.task, max_length, labels, multi_label, template, end_token, limit)


def render_both(
    recipe: Recipe, examples: Examples, tokenizer: Any, settings: RenderSettings
) -> tuple[Examples, TokenRows, TokenRows]:
    """Tokenizes both parts. Returns the remaining examples, the training rows and the held-out rows.

    Raises BadRows with all rows that cannot be learned from, unless `bad_rows` is skip.
    """
    return convert_splits(recipe, examples, lambda part, source: render_cached(part, tokenizer, settings, source))


def check_known_tokens(rows: TokenRows, tokenizer: Any, config: Any) -> None:
    """Raises ModelError if a row has a token that the base has no embedding for."""
    count = _embedding_count(config)
    if not len(rows.ids) or rows.ids.max() < count:
        return
    position = int((rows.ids >= count).argmax())
    row = rows.row_numbers[np.searchsorted(rows.offsets, position, side="right") - 1]
    raise ModelError(
        "the tokenizer has tokens that the base has no embedding for",
        got=f"{_describe_token(tokenizer, int(rows.ids[position]), count)} in row {row}",
        fix="use tokenizer and weights of one model, or weights whose embeddings were resized for it",
        gotcha="token-without-embedding",
    )


def check_prompt_tokens(ids: np.ndarray, tokenizer: Any, config: Any, task: str) -> None:
    """Raises DataError if the base cannot take a row of `ids` (rows, tokens), which may be padded."""
    count = _embedding_count(config)
    if (ids >= count).any():
        raise DataError(
            "the text has a token that the base has no embedding for",
            got=_describe_token(tokenizer, int(ids[ids >= count][0]), count),
            fix="leave it out",
            gotcha="token-without-embedding",
        )
    end = single_end_token(tokenizer, config, task)
    for ends in (ids == end).sum(1) if end is not None else ():
        if ends != 1:
            raise DataError(wrong_end_count(int(ends)), fix=ONE_END_FIX, gotcha="one-end-token")


def single_end_token(tokenizer: Any, config: Any, task: str) -> int | None:
    """The token that each row to classify must have exactly once; None for most bases.

    An encoder-decoder classifies at its end token. Raises ModelError if such a base pads with that token.
    """
    if task != "classify" or not getattr(config, "is_encoder_decoder", False):
        return None
    end: int = config.eos_token_id
    if tokenizer.pad_token_id == end:
        raise ModelError(
            "this base classifies at its end token, and pads with the same token",
            got=f"{tokenizer.pad_token!r} as {end:,}",
            fix="set another pad_token in its tokenizer_config.json",
            gotcha="one-end-token",
        )
    return end


def _embedding_count(config: Any) -> int:
    """The number of embeddings of a base; `sys.maxsize` if its config does not say."""
    found = getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
    return found or sys.maxsize


def _describe_token(tokenizer: Any, token: int, embeddings: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(token)!r} as {token:,}, and {embeddings:,} embeddings"
