"""Examples -> tokens, and which of them are learned from. Knows nothing of files, batches or models.

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
from hatrack.data.complaints import Unlearnable
from hatrack.data.examples import Example
from hatrack.data.row_values import Bad
from hatrack.data.template import render_chat
from hatrack.errors import DataError, MachineError
from hatrack.storage import cache_dir, new_folder

Encoded = tuple[np.ndarray, np.ndarray]
"""The tokens of a row (int32), and which of them are learned (bool)."""

CACHE_FORMAT = 5
TEXTS_AT_ONCE = 1000
ONE_END = "leave the end token out of the text; the tokenizer must add one itself"


@dataclass(frozen=True)
class TokenRows:
    """n rows of tokens, end to end.

    `ids` (tokens,) int32; `offsets` (n + 1,) where each row begins; `learn` (tokens,) bool, all False to classify;
    `labels` (n,) int64, (n, L) float32 for several labels a row, or empty; `rows` (n,) the row numbers in the file;
    `cut` counts the rows that were too long.
    """

    ids: np.ndarray
    offsets: np.ndarray
    learn: np.ndarray
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
        learned = np.concatenate([[0], np.cumsum(self.learn)])[self.offsets]
        return np.stack([self.lengths, np.diff(learned)], axis=1)

    def first(self, count: int) -> "TokenRows":
        """The first `count` rows, or all where there are fewer."""
        end = self.offsets[min(count, len(self))]
        offsets, labels, rows = self.offsets[: count + 1], self.labels[:count], self.rows[:count]
        return replace(self, ids=self.ids[:end], offsets=offsets, learn=self.learn[:end], labels=labels, rows=rows)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, Any]:
        """ids, learn and label of one row."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[part], self.learn[part], self.labels[index] if len(self.labels) else None


def render_cached(examples: Sequence[Example], tokenizer: Any, **settings: Any) -> TokenRows:
    """`render`, but what was tokenised once with the same content, tokenizer and settings is read back from the cache.

    A damaged cache file is made anew. Where the cache cannot be written the run goes on without it, which is said.
    """
    try:
        final = cache_dir("tokens") / _cache_key(examples, tokenizer, settings)
    except (OSError, MachineError) as error:
        say_once(f"the tokens are not kept for the next run: {error}")
        return render(examples, tokenizer, **settings)
    rows = _kept(final, len(examples))
    if rows is None:
        rows = render(examples, tokenizer, **settings)
        _keep(rows, final)
    return rows


def _kept(final: Path, count: int) -> TokenRows | None:
    """The rows of a cache folder; None where it has none, or not all of them."""
    try:
        with (final / "rows.npz").open("rb") as file, np.load(file, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in ("ids", "offsets", "learn", "labels", "rows")}
            rows = TokenRows(**arrays, cut=int(kept["cut"]))
    except Exception:  # a damaged archive raises almost anything, and all of it means the same: tokenise again
        return None
    whole = len(rows) == count and len(rows.offsets) == count + 1 and rows.offsets[-1] == len(rows.ids)
    return rows if whole and len(rows.learn) == len(rows.ids) else None


def _keep(rows: TokenRows, final: Path) -> None:
    """Writes the rows for the next run, in place of damaged ones. Where that fails, it is said and nothing more."""
    try:
        if final.exists():
            shutil.rmtree(final)
        with new_folder(final) as folder:
            np.savez(folder / "rows.npz", **{name: getattr(rows, name) for name in TokenRows.__dataclass_fields__})
    except (OSError, MachineError) as error:
        say_once(f"the tokens are not kept for the next run: {str(error).replace(str(final), str(final.parent))}")


def render(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    task: str,
    max_length: int,
    labels: int = 0,
    multi_label: bool = False,
    template: str | None = None,
    source: str = "",
    limit: int | None = None,
    end: int | None = None,
) -> TokenRows:
    """Tokenises every example; rows longer than `max_length` are cut, and counted.

    classify: the whole text; a cut one keeps the tokens that the tokenizer puts around a text. complete: the text and
    the end-of-text token, or of a prompt and its completion only the latter is learned. chat: the conversation as
    `template` writes it, learning what the assistant says.
    `source` and `limit`, the most that the model can take, are for complaints; `end` is a token that each row to
    classify must have exactly once.
    Raises Unlearnable, with every such row, where the template refuses a row or nothing would be learned from it.
    """
    found = _plain(examples, tokenizer) if task == "classify" else _each(examples, tokenizer, template)
    encoded = learnable(examples, found, max_length, limit or tokenizer.model_max_length, source, end)
    cut = [(ids[:max_length], learn[:max_length]) for ids, learn in encoded]
    if task == "classify":
        for index, (ids, learn) in enumerate(encoded):
            if len(ids) > max_length:
                cut[index] = _shorter(examples[index].text, tokenizer, max_length), learn[:max_length]
    lengths = [len(ids) for ids, _ in cut]
    return TokenRows(
        ids=np.concatenate([ids for ids, _ in cut]).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        learn=np.concatenate([learn for _, learn in cut]).astype(bool),
        labels=_label_array(examples, labels, multi_label) if task == "classify" else np.empty(0),
        rows=np.array([example.row for example in examples], dtype=np.int64),
        cut=sum(len(whole) > max_length for whole, _ in encoded),
    )


def encode(example: Example, tokenizer: Any, template: str | None) -> tuple[np.ndarray, np.ndarray]:
    """One example's tokens (int32), however many they are, and which of them are learned (bool).

    Raises DataError where the template refuses its conversation, ModelError as `render_chat` does.
    """
    if example.messages:
        return render_chat(
            example.messages, tokenizer, template or "", tools=example.tools, read_only=example.read_only
        )
    return _plain([example], tokenizer)[0] if example.label is not None else _continued(example, tokenizer)


def _plain(examples: Sequence[Example], tokenizer: Any) -> list[Encoded]:
    encoded = []
    texts = [example.text for example in examples]
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        ids = tokenizer(texts[start : start + TEXTS_AT_ONCE], verbose=False)["input_ids"]
        encoded += [(np.array(row, dtype=np.int32), np.zeros(len(row), dtype=bool)) for row in ids]
        if start and start % (50 * TEXTS_AT_ONCE) == 0:
            say(f"tokenised {start:,} of {len(texts):,} rows")
    return encoded


def _shorter(text: str, tokenizer: Any, max_length: int) -> np.ndarray:
    """A text cut by the tokenizer itself, as it is when the adapter is used."""
    return np.array(tokenizer(text, truncation=True, max_length=max_length)["input_ids"], dtype=np.int32)


def _each(examples: Sequence[Example], tokenizer: Any, template: str | None) -> list[Encoded | DataError]:
    """Every example encoded, or why it cannot be."""
    found = []
    for index, example in enumerate(examples):
        found.append(attempt(example, tokenizer, template))
        if index and index % 20_000 == 0:
            say(f"tokenised {index:,} of {len(examples):,} rows")
    return found


def attempt(example: Example, tokenizer: Any, template: str | None) -> Encoded | DataError:
    """One example encoded, or why it cannot be."""
    try:
        return encode(example, tokenizer, template)
    except DataError as error:
        return error


def learnable(
    examples: Sequence[Example],
    found: Sequence[Encoded | DataError],
    max_length: int,
    limit: int,
    source: str,
    end: int | None = None,
) -> list[Encoded]:
    """What was `found` for each example. `limit`: the tokens that the tokenizer says its model takes; `end`: the token
    that a row to classify must have exactly once.

    Raises Unlearnable, with every such row, where a row could not be encoded, or nothing would be learned from it.
    """
    bad, fixes, gotchas, needed = [], [], [], 0
    for example, each in zip(examples, found, strict=True):
        words = ""
        if isinstance(each, DataError):
            words = each.what + (f" ({each.got})" if each.got else "")
            fixes.append(each.fix or "check their messages")
            gotchas.append(each.gotcha)
        elif example.label is not None:
            if not len(each[0]):  # a model would be asked to read padding
                words = "the tokenizer makes no token of this text"
                fixes.append("give them text that this base's tokenizer knows")
            elif end is not None and (count := int((each[0] == end).sum())) != 1:
                words = wrong_ends(count)
                fixes.append(ONE_END)
                gotchas.append("one-end-token")
        elif not each[1][1:max_length].any():  # the first token is never predicted from anything
            long = len(each[0]) > max_length and bool(each[1][max_length:].any())
            words = f"the answer begins after the {max_length} tokens that are kept" if long else "no tokens to learn"
            needed = max(needed, len(each[0]) if long else 0)
            fixes += [] if long else ["put an answer in them"]
        bad += [Bad(example.row, words)] if words else []
    if needed:
        fixes.append(
            f"--max-length {needed} keeps the answers"
            if needed <= limit
            else f"shorten what comes before the answers: this model takes {limit:,} tokens"
        )
    if bad:
        raise Unlearnable([(source, bad)], len(examples), fixes, next(filter(None, gotchas), ""))
    return [each for each in found if not isinstance(each, DataError)]


def wrong_ends(count: int) -> str:
    """What is wrong with a row to classify that has the end token so often, on a base that answers where it stands."""
    return f"{'no end token' if not count else f'{count} end tokens'} where this base classifies at its only one"


def _continued(example: Example, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """A text to go on with: the prompt's tokens, then those to learn, then the end of text."""
    end = tokenizer.eos_token_id
    ids = tokenizer(example.text, verbose=False)["input_ids"]
    ids = ids[:-1] if ids and ids[-1] == end else ids
    prompt = 0
    if example.completion is not None:
        prompt = len(ids)
        ids = ids + tokenizer(example.completion, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [*ids, end] if end is not None else ids
    learn = np.arange(len(ids)) >= prompt
    return np.array(ids, dtype=np.int32), learn


def _label_array(examples: Sequence[Example], labels: int, multi_label: bool) -> np.ndarray:
    if not multi_label:
        return np.array([example.label for example in examples], dtype=np.int64)
    array = np.zeros((len(examples), labels), dtype=np.float32)
    for index, example in enumerate(examples):
        array[index, list(example.label) if isinstance(example.label, tuple) else []] = 1
    return array


def _cache_key(examples: Sequence[Example], tokenizer: Any, settings: dict[str, Any]) -> str:
    """What the tokens depend on: the content, the tokenizer's own definition, the settings, and this format."""
    hasher = hashlib.sha256()
    settings = {name: value for name, value in settings.items() if name not in ("source", "limit")}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # left over from whatever was tokenised last
        definition.pop(state, None)
    names = [type(tokenizer).__name__, str(tokenizer.special_tokens_map), str(tokenizer.truncation_side)]
    described = [CACHE_FORMAT, settings, names, definition]
    hasher.update(json.dumps(described, sort_keys=True).encode("utf-8", "surrogatepass"))
    for example in examples:
        hasher.update(json.dumps([example.row, *example.content]).encode())
    return hasher.hexdigest()[:32]
