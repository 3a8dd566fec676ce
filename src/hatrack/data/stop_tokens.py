"""Finds the tokens or texts that end the answers in the rows: generation stops there.

Knows nothing of files or models. The tokenizer comes as an argument, from transformers.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from hatrack.data.render import TokenRows
from hatrack.data.template import text_after_answer
from hatrack.errors import DataError

SAMPLE_ANSWER = "Xyzzy"
"""A text that no template contains."""


@dataclass(frozen=True)
class Stops:
    """What ends an answer: control `tokens`, or if there are none `strings` of several tokens.

    Both are empty if no end was found.
    """

    tokens: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()


def find_stops(rows: TokenRows, tokenizer: Any, max_length: int, template: str | None) -> Stops:
    """Finds how the answers in `rows` end. Ignores answers that were cut at `max_length`.

    The base's own end token need not be among the stops: an untuned base ends texts with <|endoftext|>, while its
    template may end turns with <|im_end|>.
    """
    last = _last_tokens(rows, max_length)
    special, added = _control_tokens(tokenizer)
    counts = Counter(last.tolist())
    tokens = [
        token for token, count in counts.items() if token in special or (token in added and 2 * count >= len(last))
    ]
    if tokens or template is None or not len(last):
        return Stops(tuple(sorted(tokens)))
    return stops_of_template(tokenizer, template)


def stops_of_template(tokenizer: Any, template: str) -> Stops:
    """How a chat template ends an answer."""
    try:
        after = text_after_answer(tokenizer, SAMPLE_ANSWER, template)
    except DataError:  # the template needs more than a question and an answer
        return Stops()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after.strip() else []
    special, added = _control_tokens(tokenizer)
    if ids and ids[-1] in special | added:
        return Stops(tokens=(int(ids[-1]),))
    return Stops(strings=(after,) if ids else ())


def _control_tokens(tokenizer: Any) -> tuple[set[int], set[int]]:
    """The special tokens, and all tokens that were added to the vocabulary."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(token for token, kind in added.items() if kind.special)}, set(added)


def _last_tokens(rows: TokenRows, max_length: int) -> np.ndarray:
    """The last token of each supervised span, in all rows."""
    ends = np.append(rows.supervised[1:] < rows.supervised[:-1], False)  # supervised, and the next token is not
    finals = rows.offsets[1:] - 1  # after a row's last token comes another row
    ends[finals] = rows.supervised[finals] & (rows.lengths < max_length)
    last: np.ndarray = rows.ids[ends]
    return last
