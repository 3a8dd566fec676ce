"""All of a run's rows as tokens, those to learn from and those held out. Knows nothing of files or batches."""

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from hatrack.console import say
from hatrack.data.examples import Examples, of_both
from hatrack.data.limit import choose_max_length, length_limit
from hatrack.data.render import ONE_END, TokenRows, render_cached, wrong_ends
from hatrack.data.stop_tokens import Ends, find_ends
from hatrack.data.template import chat_template, check_steady
from hatrack.errors import DataError, ModelError
from hatrack.recipe import Recipe


@dataclass(frozen=True)
class Tokens:
    """The rows of both parts, and how they came to be: `template` of conversations, `max_length` of a row; `ends` is
    how the answers to learn end."""

    learn: TokenRows
    held_out: TokenRows
    template: str | None
    max_length: int
    ends: Ends = field(default_factory=Ends)


def tokenise(
    recipe: Recipe, examples: Examples, tokenizer: Any, config: Any, *, template: str | None = None
) -> tuple[Examples, Tokens]:
    """`examples` as tokens of the base that `tokenizer` and transformers' `config` belong to.

    With `bad_rows: skip` rows that cannot be learned from are left out, and the examples that remain come back too.

    Conversations are written with `template`, that of the run that goes on, or else with the base's own. Says how many
    rows were cut. Raises RecipeError where rows are to be longer than the base can take, Unlearnable where nothing
    would be learned from a row.
    """
    if examples.task == "chat" and template is None:
        tools = any(example.tools for part in (examples.train, examples.held_out) for example in part)
        template = chat_template(tokenizer, tools=tools)[0]
    if template is not None:
        check_steady(examples.train[0].messages, tokenizer, template)
    limit = length_limit(tokenizer.model_max_length, config.to_dict())
    length, why = choose_max_length(recipe.max_length, limit, examples.task)
    examples, learn, held_out = render_both(
        recipe,
        examples,
        tokenizer,
        template=template,
        max_length=length,
        limit=limit,
        end=only_end(tokenizer, config, examples.task),
    )
    for part in (learn, held_out):
        check_embedded(part, tokenizer, config)
    if learn.cut or held_out.cut:
        say(f"{learn.cut + held_out.cut:,} rows are longer than {length} tokens ({why}) and were cut")
    ends = Ends() if examples.task == "classify" else find_ends(learn, tokenizer, length, template)
    return examples, Tokens(learn, held_out, template, length, ends)


def render_both(
    recipe: Recipe,
    examples: Examples,
    tokenizer: Any,
    *,
    template: str | None,
    max_length: int,
    limit: int | None = None,
    end: int | None = None,
) -> tuple[Examples, TokenRows, TokenRows]:
    """The examples that can be learned from, those of the training part as tokens, and those held out.

    Raises Unlearnable with all that cannot, unless `bad_rows` is skip.
    """
    make = partial(
        render_cached,
        tokenizer=tokenizer,
        task=examples.task,
        max_length=max_length,
        labels=len(examples.labels),
        multi_label=examples.multi_label,
        template=template,
        limit=limit,
        end=end,
    )
    return of_both(recipe, examples, lambda part, source: make(part, source=source))


def check_embedded(part: TokenRows, tokenizer: Any, config: Any) -> None:
    """Raises ModelError where a row has a token that the base has no embedding for."""
    known = _embeddings(config)
    if not len(part.ids) or part.ids.max() < known:
        return
    place = int((part.ids >= known).argmax())
    row = part.rows[np.searchsorted(part.offsets, place, side="right") - 1]
    raise ModelError(
        "the tokenizer has tokens that the base has no embedding for",
        got=f"{_without(tokenizer, int(part.ids[place]), known)} in row {row}",
        fix="use tokenizer and weights of one model, or weights whose embeddings were resized for it",
        gotcha="token-without-embedding",
    )


def check_ids(ids: np.ndarray, tokenizer: Any, config: Any, task: str) -> None:
    """Raises DataError where the base cannot be asked one of these rows of tokens (rows, tokens), padded or not."""
    known = _embeddings(config)
    if (ids >= known).any():
        raise DataError(
            "the text has a token that the base has no embedding for",
            got=_without(tokenizer, int(ids[ids >= known][0]), known),
            fix="leave it out",
            gotcha="token-without-embedding",
        )
    end = only_end(tokenizer, config, task)
    for count in (ids == end).sum(1) if end is not None else ():
        if count != 1:
            raise DataError(wrong_ends(int(count)), fix=ONE_END, gotcha="one-end-token")


def only_end(tokenizer: Any, config: Any, task: str) -> int | None:
    """The token that a row to classify must have exactly once, as an encoder-decoder reads its answer there; None for
    other bases and tasks. Raises ModelError where rows are padded with that token."""
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


def _embeddings(config: Any) -> int:
    found = getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
    return found or sys.maxsize


def _without(tokenizer: Any, token: int, known: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(token)!r} as {token:,}, and {known:,} embeddings"
