"""Examples -> token rows, with the tokens that are learned marked. Knows nothing of files or models.

The tokenizer comes as an argument, from transformers.
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
"""The tokens of a row (int32), and which of them are learned (bool)."""

CACHE_FORMAT = 5
ARRAYS = {"ids": "ids", "offsets": "offsets", "supervised": "learn", "labels": "labels", "rows": "rows"}
"""Fields of `TokenRows` -> the names of their arrays in a cache file."""
TEXTS_AT_ONCE = 1000
ONE_END_FIX = "leave the end token out of the text; the tokenizer must add one itself"


@dataclass(frozen=True)
class RenderSettings:
    """How examples become tokens.

    `task` is classify, chat or complete; rows longer than `max_length` tokens are cut. classify: `labels` classes, of
    which a row may have several with `multi_label`; each row must have `end_token`, where given, exactly once. chat:
    `template` is the chat template. `limit` is the longest row that the base takes, for messages; default: what the
    tokenizer says.
    """

    task: str
    max_length: int
    labels: int = 0
    multi_label: bool = False
    template: str | None = None
    end_token: int | None = None
    limit: int | None = None

    def cache_key(self) -> dict[str, Any]:
        """All that the tokens depend on."""
        names = ("task", "max_length", "labels", "multi_label", "template")
        return {name: getattr(self, name) for name in names} | {"end": self.end_token}


@dataclass(frozen=True)
class TokenRows:
    """n rows of tokens, one after another.

    `ids` (tokens,) int32; `offsets` (n + 1,) where each row begins; `supervised` (tokens,) bool: the tokens that are
    learned, none to classify; `labels` (n,) int64, (n, L) float32 for several labels a row, or empty; `rows` (n,) the
    row numbers in the file; `cut` counts the rows that were too long.
    """

    ids: np.ndarray
    offsets: np.ndarray
    supervised: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    cut: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each row."""
        return np.diff(self.offsets)

    @property
    def sizes(self) -> np.ndarray:
        """(n, 2) tokens of each row, and how many of these are learned."""
        learned = np.concatenate([[0], np.cumsum(self.supervised)])[self.offsets]
        return np.stack([self.lengths, np.diff(learned)], axis=1)

    def first(self, count: int) -> "TokenRows":
        """The first `count` rows, or all if there are fewer."""
        end = self.offsets[min(count, len(self))]
        offsets, labels, rows = self.offsets[: count + 1], self.labels[:count], self.rows[:count]
        supervised = self.supervised[:end]
        return replace(self, ids=self.ids[:end], offsets=offsets, supervised=supervised, labels=labels, rows=rows)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, Any]:
        """The ids of one row, which of them are learned, and its label."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[part], self.supervised[part], self.labels[index] if len(self.labels) else None


def render_cached(examples: Sequence[Example], tokenizer: Any, settings: RenderSettings, source: str = "") -> TokenRows:
    """`render`, with a cache on disk for rows of the same content, tokenizer and settings.

    A damaged cache file is written again. If the cache cannot be written, the run goes on without it and says so.
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
            rows = TokenRows(**arrays, cut=int(cached["cut"]))
    except Exception:  # a damaged archive raises almost anything, and all of it means the same: tokenize again
        return None
    complete = len(rows) == count and len(rows.offsets) == count + 1 and rows.offsets[-1] == len(rows.ids)
    return rows if complete and len(rows.supervised) == len(rows.ids) else None


def _write_cache(rows: TokenRows, folder: Path) -> None:
    """Writes the rows for the next run, in place of damaged ones. A failure is only reported."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        with new_folder(folder) as unfinished:
            arrays = {key: getattr(rows, name) for name, key in ARRAYS.items()}
            np.savez(unfinished / "rows.npz", **arrays, cut=np.array(rows.cut))
    except (OSError, MachineError) as error:
        say_once(f"the tokens are not cached for the next run: {str(error).replace(str(folder), str(folder.parent))}")


def render(examples: Sequence[Example], tokenizer: Any, settings: RenderSettings, source: str = "") -> TokenRows:
    """Tokenizes every example; rows longer than `max_length` are cut and counted.

    classify: the whole text; a cut one keeps the special tokens that the tokenizer adds around a text. complete: the
    text and the end-of-text token; of a prompt and its completion only the completion is learned. chat: the
    conversation as the template writes it; the assistant's turns are learned. `source` is the file's name in messages.
    Raises BadRows, with every such row, where the template refuses a row or nothing would be learned from it.
    """
    classify, max_length = settings.task == "classify", settings.max_length
    found: Sequence[Encoded | DataError] = (
        _encode_texts(examples, tokenizer) if classify else _encode_each(examples, tokenizer, settings.template)
    )
    encoded = check_learnable(
        examples, found, replace(settings, limit=settings.limit or tokenizer.model_max_length), source
    )
    cut = [(ids[:max_length], learned[:max_length]) for ids, learned in encoded]
    if classify:
        for index, (ids, learned) in enumerate(encoded):
            if len(ids) > max_length:
                cut[index] = _truncate(examples[index].text, tokenizer, max_length), learned[:max_length]
    lengths = [len(ids) for ids, _ in cut]
    return TokenRows(
        ids=np.concatenate([ids for ids, _ in cut]).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        supervised=np.concatenate([learned for _, learned in cut]).astype(bool),
        labels=_label_array(examples, settings) if classify else np.empty(0),
        rows=np.array([example.row for example in examples], dtype=np.int64),
        cut=sum(len(whole) > max_length for whole, _ in encoded),
    )


def encode(example: Example, tokenizer: Any, template: str | None) -> Encoded:
    """One example's tokens, uncut, and which of them are learned.

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
    """The texts to classify, none of whose tokens is learned."""
    encoded = []
    texts = [example.text for example in examples]
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        ids = tokenizer(texts[start : start + TEXTS_AT_ONCE], verbose=False)["input_ids"]
        encoded += [(np.array(row, dtype=np.int32), np.zeros(len(row), dtype=bool)) for row in ids]
        if start and start % (50 * TEXTS_AT_ONCE) == 0:
            say(f"tokenized {start:,} of {len(texts):,} rows")
    return encoded


def _truncate(text: str, tokenizer: Any, max_length: int) -> np.ndarray:
    """A text cut by the tokenizer itself, as it is when the adapter is used."""
    return np.array(tokenizer(text, truncation=True, max_length=max_length)["input_ids"], dtype=np.int32)


def _encode_each(examples: Sequence[Example], tokenizer: Any, template: str | None) -> list[Encoded | DataError]:
    """Each example encoded, or why it cannot be."""
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
    examples: Sequence[Example], found: Sequence[Encoded | DataError], settings: RenderSettings, source: str
) -> list[Encoded]:
    """`found`, what each example was encoded to, if all of them can be learned from.

    Raises BadRows, with every such row, where one could not be encoded or nothing would be learned from it.
    """
    bad, fixes, gotchas, needed = [], [], [], 0
    for example, each in zip(examples, found, strict=True):
        if isinstance(each, DataError):
            reason = each.what + (f" ({each.got})" if each.got else "")
            fix, gotcha = each.fix or "check their messages", each.gotcha
        elif example.label is not None:
            reason, fix, gotcha = _check_classified(each[0], settings.end_token)
        else:
            reason, fix, gotcha = _check_answer(each, settings.max_length)
            needed = max(needed, len(each[0]) if reason and not fix else 0)
        if reason:
            bad.append(BadRow(example.row, reason))
            fixes += [fix] if fix else []
            gotchas.append(gotcha)
    if needed:
        fixes.append(
            f"--max-length {needed} keeps the answers"
            if settings.limit is None or needed <= settings.limit
            else f"shorten what comes before the answers: this model takes {settings.limit:,} tokens"
        )
    if bad:
        raise BadRows([(source, bad)], len(examples), fixes, next(filter(None, gotchas), ""))
    return [each for each in found if not isinstance(each, DataError)]


def _check_classified(ids: np.ndarray, end_token: int | None) -> tuple[str, str, str]:
    """Why a text cannot be classified, the fix and the gotcha; the reason is empty if it can be."""
    if not len(ids):  # a model would be asked to read padding
        return "the tokenizer makes no token of this text", "give them text that this base's tokenizer knows", ""
    count = 1 if end_token is None else int((ids == end_token).sum())
    return ("", "", "") if count == 1 else (wrong_end_count(count), ONE_END_FIX, "one-end-token")


def _check_answer(encoded: Encoded, max_length: int) -> tuple[str, str, str]:
    """Why no answer would be learned, the fix (empty: a larger `max_length`) and the gotcha."""
    ids, learned = encoded
    if learned[1:max_length].any():  # the first token is never predicted from anything
        return "", "", ""
    if len(ids) > max_length and learned[max_length:].any():
        return f"the answer begins after the {max_length} tokens that are kept", "", ""
    return "no tokens to learn", "put an answer in them", ""


def wrong_end_count(count: int) -> str:
    """The complaint about a row that has the end token `count` times, on a base that classifies at its only one."""
    return f"{f'{count} end tokens' if count else 'no end token'} where this base classifies at its only one"


def _encode_completion(example: Example, tokenizer: Any) -> Encoded:
    """The prompt's tokens, then those to learn, then the end of text."""
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
    """A hash of all that the tokens depend on: content, the tokenizer's own definition, settings and cache format."""
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
