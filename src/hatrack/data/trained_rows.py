"""Hashes of the rows that were trained on, 8 bytes each, to recognize them later by their text.

The key of a row to classify is its text, without the label. The key of a conversation, or of a prompt with its
completion, is all of the text up to its last answer: a prompt with another answer is another row, and the beginning of
a conversation that was trained on counts as trained on. System prompts, roles, layout and column names do not count,
nor do case, white space or the way letters are composed.

The file holds none of the text, but whoever has a row can tell whether it was among them. Knows nothing of adapters.
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
"""The file beside an adapter: a checksum of 8 bytes, then the sorted keys."""
FORMAT = b"hatrack rows 1"
KEY_BYTES = 8


def row_and_turn_keys(examples: Iterable["Example"]) -> np.ndarray:
    """(n,) uint64, sorted and unique: a key for each answer in `examples`, of all text up to it."""
    return np.unique(
        np.array([_hash(text) for each in examples for text in _texts_up_to_answers(each)], dtype=np.uint64)
    )


def row_keys(examples: Iterable["Example"]) -> np.ndarray:
    """(rows,) uint64: the key of each whole row. Trained rows have theirs among their `row_and_turn_keys`."""
    return np.array([_hash(_texts_up_to_answers(each)[-1]) for each in examples], dtype=np.uint64)


def are_among(examples: Iterable["Example"], keys: np.ndarray) -> np.ndarray:
    """(rows,) bool: whether the key of each whole row is in `keys`."""
    return np.isin(row_keys(examples), keys, kind="sort")  # numpy 2.0's other way overflows on uint64


def seen_turns(example: "Example", known: np.ndarray) -> tuple[int, ...]:
    """The indices of the turns that were trained on: the answers whose keys are in `known`."""
    turns = [index for index, turn in enumerate(example.messages) if turn["role"] == "assistant"]
    found = np.isin(np.array([_hash(text) for text in _texts_up_to_answers(example)], dtype=np.uint64), known)
    return tuple(index for index, seen in zip(turns, found, strict=False) if seen)


def to_bytes(keys: np.ndarray) -> bytes:
    """The content of the file."""
    content = keys.astype("<u8").tobytes()
    return _checksum(content) + content


def from_bytes(content: bytes) -> np.ndarray:
    """The keys in a file's content. Raises ValueError if it is damaged."""
    if len(content) < KEY_BYTES or len(content) % KEY_BYTES or content[:KEY_BYTES] != _checksum(content[KEY_BYTES:]):
        raise ValueError(f"{len(content):,} bytes that do not match their checksum")
    return np.frombuffer(content[KEY_BYTES:], dtype="<u8").astype(np.uint64)


def _texts_up_to_answers(example: "Example") -> list[str]:
    """The normalized text up to each answer; the last is the whole row."""
    if not example.messages:
        return [_normalize(f"{example.text} {example.completion or ''}")]
    found, text = [], ""
    for turn in example.messages:
        if turn["role"] != "system":
            calls = json.dumps(turn["tool_calls"], sort_keys=True) if turn.get("tool_calls") else ""
            text += f" {turn['content']} {calls}"
        if turn["role"] == "assistant":
            found.append(_normalize(text))
    return found or [_normalize(text)]


def _normalize(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def _hash(text: str) -> int:
    return int.from_bytes(_checksum(text.encode("utf-8", "surrogatepass")), "little")


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=KEY_BYTES, person=FORMAT).digest()
