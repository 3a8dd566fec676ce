"""How answers end: the tokens, or else the text, that the rows teach at the end of an answer.

Knows nothing of files or models. The tokenizer comes as an argument, from transformers.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from hatrack.data.render import TokenRows
from hatrack.data.template import written_after
from hatrack.errors import DataError

MARK = "Xyzzy"
"""An answer that no template writes anything of its own like."""


@dataclass(frozen=True)
class Stops:
    """What ends an answer: `tokens` that stand for nothing else, or where there are none `strings` of several tokens.

    Both are empty where the rows teach no end.
    """

    tokens: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()


def find_stops(rows: TokenRows, tokenizer: Any, max_length: int, template: str | None) -> Stops:
    """How the answers of `rows` end, those that were cut at `max_length` left out.

    A base's own end token need not be among them: one that was never tuned ends texts with <|endoftext|>, and the
    template it brings may end turns with <|im_end|>.
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
    """How a chat template ends an answer, where no rows tell."""
    try:
        after = written_after(tokenizer, MARK, template)
    except DataError:  # it wants more than a question and its answer
        return Stops()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after.strip() else []
    special, added = _control_tokens(tokenizer)
    if ids and ids[-1] in special | added:
        return Stops(tokens=(int(ids[-1]),))
    return Stops(strings=(after,) if ids else ())


def _control_tokens(tokenizer: Any) -> tuple[set[int], set[int]]:
    """The tokens that stand for nothing that is said, and all that were added to the vocabulary of words."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(token for token, what in added.items() if what.special)}, set(added)


def _last_tokens(rows: TokenRows, max_length: int) -> np.ndarray:
    """The last token of each stretch that is learned, of all rows."""
    ends = np.append(rows.supervised[1:] < rows.supervised[:-1], False)  # learned, and the next is not
    finals = rows.offsets[1:] - 1  # a row's last token has the next row's first after it
    ends[finals] = rows.supervised[finals] & (rows.lengths < max_length)
    last: np.ndarray = rows.ids[ends]
    return last
