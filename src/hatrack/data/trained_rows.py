"""Rows that were trained on, known again by what they say: 8 bytes each, which hold none of their words.

A row to classify is its text, whatever its label. A conversation, or a prompt with its completion, is all that is said
up to its last answer: a prompt with another answer is another row, and the beginning of a conversation that was trained
on is one that was trained on too. System prompts, who speaks, the layout and the columns' names do not count, nor does
case, white space, or how letters are composed.

The file is not secret: it tells whether a row that somebody has was among them. Knows nothing of adapters.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hatrack.data.examples import Example

FILE = "trained_on.bin"
"""Beside an adapter: 8 bytes to check it by, then each row's key, in order."""
FORMAT = b"hatrack rows 1"
BYTES = 8


def keys(examples: Iterable["Example"]) -> np.ndarray:
    """(n,) uint64, in order, each once: what is learned from `examples`, for each answer with all that is before it."""
    return np.unique(np.array([_hash(words) for each in examples for words in _answers(each)], dtype=np.uint64))


def row_keys(examples: Iterable["Example"]) -> np.ndarray:
    """(rows,) uint64: the key of each whole row, which is among `keys` if it was trained on."""
    return np.array([_hash(_answers(each)[-1]) for each in examples], dtype=np.uint64)


def seen_turns(example: "Example", known: np.ndarray) -> tuple[int, ...]:
    """The turns of a conversation that were trained on: the answers that are among the `known` keys."""
    turns = [index for index, turn in enumerate(example.messages) if turn["role"] == "assistant"]
    found = np.isin(np.array([_hash(words) for words in _answers(example)], dtype=np.uint64), known)
    return tuple(index for index, seen in zip(turns, found, strict=False) if seen)


def to_bytes(keys: np.ndarray) -> bytes:
    """The content of the file."""
    content = keys.astype("<u8").tobytes()
    return _digest(content) + content


def from_bytes(content: bytes) -> np.ndarray:
    """The keys in a file's content. Raises ValueError where it is damaged."""
    if len(content) < BYTES or len(content) % BYTES or content[:BYTES] != _digest(content[BYTES:]):
        raise ValueError(f"{len(content):,} bytes that are not what was written")
    return np.frombuffer(content[BYTES:], dtype="<u8").astype(np.uint64)


def _answers(example: "Example") -> list[str]:
    """Everything that is said up to each answer, the last one being the whole row."""
    if not example.messages:
        return [_plain(f"{example.text} {example.completion or ''}")]
    found, said = [], ""
    for turn in example.messages:
        if turn["role"] != "system":
            calls = json.dumps(turn["tool_calls"], sort_keys=True) if turn.get("tool_calls") else ""
            said += f" {turn['content']} {calls}"
        if turn["role"] == "assistant":
            found.append(_plain(said))
    return found or [_plain(said)]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def _hash(text: str) -> int:
    return int.from_bytes(_digest(text.encode("utf-8", "surrogatepass")), "little")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=BYTES, person=FORMAT).digest()
