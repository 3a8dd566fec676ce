"""Turns examples into token rows, with the supervised tokens marked. Knows nothing of files or models.

Supervised tokens are those that the loss is computed on. The tokenizer, from transformers, is an argument.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hatrack.console import say, say_once
from hatrack.data.complaints import BadRows
from hatrack.data.examples import Example
from hatrack.data.row_values import BadRow
from hatrack.data.template import render_chat
from hatrack.errors import DataError, MachineError
from hatrack.storage import cache_dir, new_folder

Encoded = tuple[np.ndarray, np.ndarray]
"""The token ids of a row (int32), and its loss mask (bool): True for supervised tokens."""

CACHE_FORMAT = 5
ARRAYS = {"ids": "ids", "offsets": "offsets", "supervised": "learn", "labels": "labels"}
ARRAYS |= {"row_numbers": "rows"}
"""Field of `TokenRows` -> name of its array in a cache file."""
TEXTS_PER_CALL = 1000
ONE_END_FIX = "leave the end token out of the text; the tokenizer must add one itself"


@dataclass(frozen=True)
class RenderSettings:
    """How examples become tokens.

    `task` is classify, chat or complete; rows longer than `max_length` tokens are cut. classify: `labels` is the number
    of classes; a row may have several with `multi_label`. If `end_token` is given, each text must have exactly one.
    chat: `template` is the chat template. `limit`, the longest row that the base takes, is used only in error messages;
    the default is the tokenizer's limit.
    """

    task: str
    max_length: int
    labels: int = 0
    multi_label: bool = False
    template: str | None = None
    end_token: int | None = None
    limit: int | None = None

    def cache_key(self) -> dict[str, Any]:
        """The settings that the tokens depend on."""
        names = ("task", "max_length", "labels", "multi_label", "template")
        return {name: getattr(self, name) for name in names} | {"end": self.end_token}


@dataclass(frozen=True)
class TokenRows:
    """The tokens of n rows, in one array.

    `ids` (tokens,) int32; `offsets` (n + 1,) is where each row begins, and the end; `supervised` (tokens,) bool is the
    loss mask, all False for classify; `labels` is (n,) int64, (n, L) float32 if rows can have several labels, or empty;
    `row_numbers` (n,) are the numbers of the rows in the file; `cut_count` is how many rows were too long and were cut.
    """

    ids: np.ndarray
    offsets: np.ndarray
    supervised: np.ndarray
    labels: np.ndarray
    row_numbers: np.ndarray
    cut_count: int

    def __len__(self) -> int:
        return len(self.row_numbers)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) the token count of each row."""
        return np.diff(self.offsets)

    @property
    def sizes(self) -> np.ndarray:
        """(n, 2) the token count and the supervised-token count of each row."""
        supervised_before = np.concatenate([[0], np.cumsum(self.supervised)])[self.offsets]
        return np.stack([self.lengths, np.diff(supervised_before)], axis=1)

    def first(self, count: int) -> "TokenRows":
        """The first `count` rows, or all if there are fewer."""
        end = self.offsets[min(count, len(self))]
        return replace(
            self,
            ids=self.ids[:end],
            offsets=self.offsets[: count + 1],
            supervised=self.supervised[:end],
            labels=self.labels[:count],
            row_numbers=self.row_numbers[:count],
        )

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, Any]:
        """The token ids of one row, its loss mask, and its label (None if there are no labels)."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[part], self.supervised[part], self.labels[index] if len(self.labels) else None


def render_cached(examples: Sequence[Example], tokenizer: Any, settings: RenderSettings, source: str = "") -> TokenRows:
    """`render`, cached on disk by the examples' content, the tokenizer and the settings.

    A damaged cache file is replaced. If the cache cannot be written, says so and goes on without it.
    """
    try:
        folder = cache_dir("tokens") / _cache_key(examples, tokenizer, settings)
    except (OSError, MachineError) as error:
        say_once(f"the tokens are not cached for the next run: {error}")
        return render(examples, tokenizer, settings, source)
    rows = _read_cache(folder, len(examples))
    if rows is None:
        rows = render(examples, tokenizer, settings, source)
        _write_cache(rows, folder)
    return rows


def _read_cache(folder: Path, count: int) -> TokenRows | None:
    """The `count` rows of a cache folder; None if it is missing or incomplete."""
    try:
        with (folder / "rows.npz").open("rb") as file, np.load(file, allow_pickle=False) as cached:
            arrays = {name: cached[key] for name, key in ARRAYS.items()}
            rows = TokenRows(**arrays, cut_count=int(cached["cut"]))
    except Exception:  # a damaged archive raises almost any exception; each means: tokenize again
        return None
    complete = len(rows) == count and len(rows.offsets) == count + 1 and rows.offsets[-1] == len(rows.ids)
    return rows if complete and len(rows.supervised) == len(rows.ids) else None


def _write_cache(rows: TokenRows, folder: Path) -> None:
    """Caches the rows for the next run, replacing a damaged cache. A failure is only reported."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        with new_folder(folder) as unfinished:
            arrays = {key: getattr(rows, name) for name, key in ARRAYS.items()}
            np.savez(unfinished / "rows.npz", **arrays, cut=np.array(rows.cut_count))
    except (OSError, MachineError) as error:
        say_once(f"the tokens are not cached for the next run: {str(error).replace(str(folder), str(folder.parent))}")


def render(examples: Sequence[Example], tokenizer: Any, settings: RenderSettings, source: str = "") -> TokenRows:
    """Tokenizes the examples. Cuts rows that are longer than `max_length`, and counts them.

    classify: the text; a cut text still has the special tokens that the tokenizer adds at both ends. complete: the text
    and the end-of-text token, all supervised; of a prompt and a completion, only the completion is. chat: the
    conversation as the template writes it; the assistant's turns are supervised. `source` is the file's name in
    messages. Raises BadRows, with every such row, if the template refuses a row or a row has no supervised tokens.
    """
    classify, max_length = settings.task == "classify", settings.max_length
    found: Sequence[Encoded | DataError] = (
        _encode_texts(examples, tokenizer) if classify else _encode_each(examples, tokenizer, settings.template)
    )
    encoded = check_learnable(
        examples, found, replace(settings, limit=settings.limit or tokenizer.model_max_length), source
    )
    too_long = [index for index, (ids, _) in enumerate(encoded) if len(ids) > max_length]
    for index in too_long:
        ids, supervised = encoded[index]
        ids = _truncate(examples[index].text, tokenizer, max_length) if classify else ids[:max_length]
        encoded[index] = ids, supervised[:max_length]
    lengths = [len(ids) for ids, _ in encoded]
    return TokenRows(
        ids=np.concatenate([ids for ids, _ in encoded]).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        supervised=np.concatenate([supervised for _, supervised in encoded]).astype(bool),
        labels=_label_array(examples, settings) if classify else np.empty(0),
        row_numbers=np.array([example.row for example in examples], dtype=np.int64),
        cut_count=len(too_long),
    )


def encode(example: Example, tokenizer: Any, template: str | None) -> Encoded:
    """The token ids of one example, uncut, and its loss mask.

    Raises DataError if the template refuses its conversation, ModelError as `render_chat` does.
    """
    if example.messages:
        return render_chat(
            example.messages, tokenizer, template or "", tools=example.tools, context_only=example.context_only
        )
    return (
        _encode_texts([example], tokenizer)[0] if example.label is not None else _encode_completion(example, tokenizer)
    )


def _encode_texts(examples: Sequence[Example], tokenizer: Any) -> list[Encoded]:
    """Encodes texts to classify, without supervised tokens."""
    encoded = []
    texts = [example.text for example in examples]
    for start in range(0, len(texts), TEXTS_PER_CALL):
        ids = tokenizer(texts[start : start + TEXTS_PER_CALL], verbose=False)["input_ids"]
        encoded += [(np.array(row, dtype=np.int32), np.zeros(len(row), dtype=bool)) for row in ids]
        if start and start % (50 * TEXTS_PER_CALL) == 0:
            say(f"tokenized {start:,} of {len(texts):,} rows")
    return encoded


def _truncate(text: str, tokenizer: Any, max_length: int) -> np.ndarray:
    """The ids of a text that the tokenizer itself cuts, as it does when the adapter is used."""
    return np.array(tokenizer(text, truncation=True, max_length=max_length)["input_ids"], dtype=np.int32)


def _encode_each(examples: Sequence[Example], tokenizer: Any, template: str | None) -> list[Encoded | DataError]:
    """Encodes each example, or returns the error in its place."""
    found = []
    for index, example in enumerate(examples):
        found.append(try_encode(example, tokenizer, template))
        if index and index % 20_000 == 0:
            say(f"tokenized {index:,} of {len(examples):,} rows")
    return found


def try_encode(example: Example, tokenizer: Any, template: str | None) -> Encoded | DataError:
    """`encode`, with the DataError returned instead of raised."""
    try:
        return encode(example, tokenizer, template)
    except DataError as error:
        return error


def check_learnable(
    examples: Sequence[Example], encoded: Sequence[Encoded | DataError], settings: RenderSettings, source: str
) -> list[Encoded]:
    """Returns the encodings of the examples.

    Raises BadRows, with every such row, if one is an error, has no supervised tokens, or is a text that cannot be
    classified.
    """
    found = [
        (example.row, _find_fault(example, each, settings)) for example, each in zip(examples, encoded, strict=True)
    ]
    faults = [(row, fault) for row, fault in found if fault is not None]
    if not faults:
        return [each for each in encoded if not isinstance(each, DataError)]
    fixes = [fault.fix for _, fault in faults if fault.fix]
    needed_length = max(fault.needed_length for _, fault in faults)
    if needed_length:
        fixes.append(
            f"--max-length {needed_length} keeps the answers"
            if settings.limit is None or needed_length <= settings.limit
            else f"shorten what comes before the answers: this model takes {settings.limit:,} tokens"
        )
    gotcha = next((fault.gotcha for _, fault in faults if fault.gotcha), "")
    raise BadRows([(source, [BadRow(row, fault.reason) for row, fault in faults])], len(examples), fixes, gotcha)


@dataclass(frozen=True)
class _Fault:
    """Why a row cannot be learned from. `needed_length`: the `max_length` that would keep its answer, or 0."""

    reason: str
    fix: str = ""
    gotcha: str = ""
    needed_length: int = 0


def _find_fault(example: Example, encoded: Encoded | DataError, settings: RenderSettings) -> _Fault | None:
    if isinstance(encoded, DataError):
        reason = encoded.what + (f" ({encoded.got})" if encoded.got else "")
        return _Fault(reason, encoded.fix or "check their messages", encoded.gotcha)
    if example.label is not None:
        return _find_classification_fault(encoded[0], settings.end_token)
    return _find_answer_fault(encoded, settings.max_length)


def _find_classification_fault(ids: np.ndarray, end_token: int | None) -> _Fault | None:
    if not len(ids):  # the model would read only padding
        return _Fault("the tokenizer returns no tokens for this text", "replace the text")
    count = 1 if end_token is None else int((ids == end_token).sum())
    return None if count == 1 else _Fault(wrong_end_count(count), ONE_END_FIX, "one-end-token")


def _find_answer_fault(encoded: Encoded, max_length: int) -> _Fault | None:
    ids, supervised = encoded
    if supervised[1:max_length].any():  # no token precedes the first, so nothing predicts it
        return None
    if len(ids) > max_length and supervised[max_length:].any():
        reason = f"the answer begins after the {max_length} tokens that are kept"
        return _Fault(reason, needed_length=len(ids))
    return _Fault("no tokens to learn", "add an answer")


def wrong_end_count(count: int) -> str:
    """The complaint about a text that has the end token `count` times, for a base that classifies at its end token."""
    return f"{count or 'no'} end token{'s' * (count > 1)}, but this base classifies at its end token and needs one"


def _encode_completion(example: Example, tokenizer: Any) -> Encoded:
    """The tokens of the prompt, the completion and the end of text; without a completion, the text is supervised."""
    end = tokenizer.eos_token_id
    ids = tokenizer(example.text, verbose=False)["input_ids"]
    ids = ids[:-1] if ids and ids[-1] == end else ids
    prompt = 0
    if example.completion is not None:
        prompt = len(ids)
        ids = ids + tokenizer(example.completion, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [*ids, end] if end is not None else ids
    return np.array(ids, dtype=np.int32), np.arange(len(ids)) >= prompt


def _label_array(examples: Sequence[Example], settings: RenderSettings) -> np.ndarray:
    if not settings.multi_label:
        return np.array([example.label for example in examples], dtype=np.int64)
    array = np.zeros((len(examples), settings.labels), dtype=np.float32)
    for index, example in enumerate(examples):
        array[index, list(example.label) if isinstance(example.label, tuple) else []] = 1
    return array


def _cache_key(examples: Sequence[Example], tokenizer: Any, settings: RenderSettings) -> str:
    """A hash of what the tokens depend on: content, the tokenizer's own definition, settings and cache format."""
    hasher = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # left over from whatever was tokenized last
        definition.pop(state, None)
    names = [type(tokenizer).__name__, str(tokenizer.special_tokens_map), str(tokenizer.truncation_side)]
    described = [CACHE_FORMAT, settings.cache_key(), names, definition]
    hasher.update(json.dumps(described, sort_keys=True).encode("utf-8", "surrogatepass"))
    for example in examples:
        hasher.update(json.dumps([example.row, *example.content]).encode())
    return hasher.hexdigest()[:32]
