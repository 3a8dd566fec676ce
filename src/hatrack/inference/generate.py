"""Generates the answers of a language model, piece by piece, up to where they end."""

import math
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from queue import Queue
from typing import Any

import numpy as np
import torch
from transformers import TextIteratorStreamer

from hatrack.base.load import Base
from hatrack.data.stop_tokens import Stops, stops_of_template
from hatrack.data.template import chat_prompt, chat_template
from hatrack.data.tokens import check_prompt_tokens
from hatrack.errors import DataError, RecipeError
from hatrack.inference.active import ActiveModel
from hatrack.recipe import nearest

DEFAULT_NEW_TOKENS = 128
Prompt = str | Sequence[dict[str, str]]
"""A text, or the messages of a conversation (`role` and `content` each)."""


@dataclass(frozen=True)
class GenerationOptions:
    """`max_new_tokens`: at least 1. `temperature`: 0 takes the likeliest token each time; above 0 samples."""

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise RecipeError("max_new_tokens must be a whole number of at least 1", got=repr(self.max_new_tokens))
        if not isinstance(self.temperature, int | float) or not 0 <= self.temperature < math.inf:
            raise RecipeError("temperature must be a number of at least 0", got=repr(self.temperature))


def generation_options(task: str, given: Mapping[str, Any]) -> GenerationOptions:
    """Checks the options that `predict` was given by name. Raises RecipeError for unknown ones; a classifier has none.

    >>> generation_options("chat", {"temperature": 0.7}).temperature
    0.7
    """
    accepted = [] if task == "classify" else [field.name for field in fields(GenerationOptions)]
    unknown = [name for name in given if name not in accepted]
    if unknown:
        guess = nearest(unknown[0], accepted)
        raise RecipeError(
            f"predict has no option {unknown[0]!r} for the task {task}",
            got=", ".join(f"{name}={given[name]!r}" for name in unknown),
            fix=(f"did you mean {guess}? " if guess else "")
            + (f"the options are {', '.join(accepted)}" if accepted else "leave it out: a classifier takes no options"),
        )
    return GenerationOptions(**given)


def stream_answer(active: ActiveModel, prompt: Prompt, options: GenerationOptions) -> Generator[str, None, bool]:
    """Yields the answer piece by piece; returns whether it is complete: False if it was cut at `max_new_tokens`.

    Generation runs in a thread of its own and stops when the generator is closed. Raises DataError if the prompt
    leaves no room for an answer.
    """
    tokenizer = active.tokenizer
    input_ids, stops = prompt_ids(active, prompt), _answer_stops(active)
    stop_tokens = all_end_tokens(active.base, [*stops.tokens, tokenizer.eos_token_id])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = torch.tensor([input_ids], device=active.base.device)
    sampling = {"temperature": options.temperature} if options.temperature > 0 else {}
    failures: Queue[BaseException] = Queue()
    stopped = threading.Event()
    last_token: list[int] = []

    def generate() -> None:
        try:
            with torch.no_grad():
                found = active.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=bool(sampling),
                    **sampling,
                    max_new_tokens=min(options.max_new_tokens, active.max_positions - len(input_ids)),
                    streamer=streamer,
                    eos_token_id=stop_tokens,
                    pad_token_id=active.pad_id,
                    stopping_criteria=[
                        lambda ids, scores: torch.full((len(ids),), stopped.is_set(), device=ids.device)
                    ],
                )
                last_token.append(int(found[0, -1]))
        except BaseException as error:  # raised again in the reading thread, which would otherwise see a normal end
            failures.put(error)
            streamer.end()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        pieces = streamer if active.card.task == "complete" else _strip_start(streamer)
        at_stop_string = yield from until_stop(_stop_strings(tokenizer, stops), filter(None, pieces))
    finally:
        stopped.set()
        thread.join()
    if not failures.empty():
        raise failures.get()
    return at_stop_string or last_token[0] in stop_tokens


def all_end_tokens(base: Base, learned: Iterable[int | None]) -> list[int]:
    """All tokens that end an answer: those in `learned`, and those of the base's tokenizer and generation settings."""
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*learned, *ends, base.tokenizer.eos_token_id] if token is not None})


def until_stop(stops: Sequence[str], pieces: Iterable[str]) -> Generator[str, None, bool]:
    """Yields the text up to the first of `stops`; returns whether there was one. Text that may be the beginning of one
    is held back until the next piece decides."""
    held = ""
    for piece in pieces:
        held += piece
        found = min((place for stop in stops if (place := held.find(stop)) >= 0), default=None)
        if found is not None:
            if found:
                yield held[:found]
            return True
        longest = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        ready, held = held[: len(held) - longest], held[len(held) - longest :]
        if ready:
            yield ready
    if held:
        yield held
    return False


def _strip_start(pieces: Iterable[str]) -> Iterator[str]:
    """Removes white space before the first word, which chat templates leave to the answer."""
    started = False
    for piece in pieces:
        piece = piece if started else piece.lstrip()
        started = started or bool(piece)
        yield piece


def prompt_ids(active: ActiveModel, prompt: Prompt) -> list[int]:
    """The token ids of a prompt: of the text itself for the task complete, else as the chat template writes it."""
    tokenizer = active.tokenizer
    if active.card.task == "complete" and isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers add an end token; this text is to be continued
            ids = ids[:-1]
        ids = ids or [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = chat_prompt(tokenizer, messages, active.card.template)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) >= active.max_positions:
        raise DataError(
            "the prompt leaves no room for an answer",
            got=f"{len(ids):,} tokens",
            fix=f"fewer than {active.max_positions:,}",
        )
    check_prompt_tokens(np.array([ids]), tokenizer, active.base.model.config, active.card.task)
    return list(ids)


def _answer_stops(active: ActiveModel) -> Stops:
    """How answers end: as the adapter's card says, else as the chat template ends them."""
    card = active.card
    if card.end_tokens or card.stop_strings:
        return Stops(tuple(card.end_tokens), tuple(card.stop_strings))
    if card.task != "chat":
        return Stops()
    return stops_of_template(active.tokenizer, card.template or chat_template(active.tokenizer)[0])


def _stop_strings(tokenizer: Any, stops: Stops) -> list[str]:
    """The texts that end an answer, and those end tokens that the tokenizer decodes to visible text."""
    visible = [token for token in stops.tokens if token not in tokenizer.all_special_ids]
    return [*stops.strings, *(tokenizer.decode([token]) for token in visible)]
