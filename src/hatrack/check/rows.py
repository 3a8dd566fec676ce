"""Gotchas in the rows and what becomes of them as tokens."""

import re
from collections import Counter

from hatrack.check.finding import Finding
from hatrack.check.prepared import Prepared
from hatrack.data.examples import Example
from hatrack.data.labels import is_number
from hatrack.data.stop_tokens import Stops
from hatrack.errors import short_repr

LOPSIDED = 0.8
MANY_CUT = 0.05
MANY_NUMBERS = 20


def class_imbalance(prepared: Prepared) -> Finding | None:
    """Accuracy is high from the first epoch and says nothing: nearly all rows have the same label."""
    examples = prepared.examples
    if prepared.task != "classify" or examples.multi_label:
        return None
    label, count = Counter(example.label for example in examples.train).most_common(1)[0]
    share = count / len(examples.train)
    if share < LOPSIDED or not isinstance(label, int):
        return None
    return Finding(
        "class-imbalance",
        f"always answering {short_repr(examples.labels[label])} would already be {share:.0%} accurate",
        f"{count:,} of {len(examples.train):,} rows with one label",
        "go by f1, which is shown beside accuracy, or give it more rows of the other labels",
    )


def labels_are_scores(prepared: Prepared) -> Finding | None:
    """There are dozens of classes, each a number with decimals: scores, whose order a classifier does not know."""
    names = prepared.examples.labels
    if len(names) <= MANY_NUMBERS or not all(map(is_number, names)) or not any("." in name for name in names):
        return None
    return Finding(
        "labels-are-scores",
        "the classes are numbers with decimals; if these are scores, a classifier learns nothing of their order",
        f"{len(names)} classes such as {short_repr(names[0])} and {short_repr(names[1])}",
        "write a class for each range of scores",
    )


def near_duplicates(prepared: Prepared) -> Finding | None:
    """The held-out score is too good: rows differ from training rows only in case, spaces or punctuation."""
    examples = prepared.examples
    seen = {_bare(example): example.row for example in examples.train}
    twins = [(example.row, seen[_bare(example)]) for example in examples.held_out if _bare(example) in seen]
    if not twins or not any(_bare(example) for example in examples.held_out):
        return None
    return Finding(
        "near-duplicates",
        "held-out rows differ from training rows only in case, spaces or punctuation: their score flatters",
        f"{len(twins):,} of {len(examples.held_out):,}, first row {twins[0][0]} beside row {twins[0][1]}",
        "remove one of each pair, or bring other rows with --eval-data",
    )


def answers_cut(prepared: Prepared) -> Finding | None:
    """Answers break off: the ends of rows, and with them the ends of what was to be learned, were cut."""
    tokens = prepared.tokens
    cut, rows = tokens.train.cut + tokens.held_out.cut, len(tokens.train) + len(tokens.held_out)
    if cut < MANY_CUT * rows:
        return None
    lost = "the ends of the texts are" if prepared.task == "classify" else "the ends of the answers are"
    return Finding(
        "answers-cut",
        f"{lost} cut off",
        f"{cut:,} of {rows:,} rows longer than {tokens.max_length} tokens",
        "a larger --max-length, a base that takes longer texts, or shorter rows",
    )


def template_twice(prepared: Prepared) -> Finding | None:
    """Answers begin with <|im_start|> or the like: the rows were written with a chat template before it is applied."""
    if prepared.task == "classify":
        return None
    marks = [mark for mark in _marks(prepared) if len(mark) > 2]
    rows = [example.row for example in prepared.examples.train if any(mark in example.all_text for mark in marks)]
    if not rows:
        return None
    mark = next(mark for mark in marks for example in prepared.examples.train if mark in example.all_text)
    twice = prepared.task == "chat"
    return Finding(
        "template-twice",
        "the chat template would be applied twice" if twice else "the text holds the base's control tokens",
        f"{mark} in {len(rows):,} of {len(prepared.examples.train):,} rows, first row {rows[0]}",
        "give plain messages: hatrack applies the template" if twice else "use --task chat with plain messages",
    )


def end_never_learned(prepared: Prepared) -> Finding | None:
    """The tuned model does not stop: no row teaches it a token that ends an answer."""
    if prepared.task == "classify":
        return None
    learn, tokenizer = prepared.tokens.train, prepared.tokenizer
    whole = [index for index in range(len(learn)) if learn.lengths[index] < prepared.tokens.max_length]
    if not whole or prepared.tokens.stops != Stops():
        return None
    last = {int(learn.row(index)[0][learn.row(index)[1]][-1]) for index in whole[:2000]}
    return Finding(
        "end-never-learned",
        "no row teaches where an answer ends: the tuned model will not stop",
        f"answers end with {tokenizer.decode(sorted(last)[:1])!r}, which is no control token of this base",
        "a base whose chat template ends turns with one of its own tokens, or eos_token in its tokenizer_config.json",
    )


def _bare(example: Example) -> str:
    return " ".join(re.findall(r"\w+", example.all_text.casefold()))


def _marks(prepared: Prepared) -> list[str]:
    """The control tokens that the chat template writes; without a template all the base has."""
    known = {str(token) for token in prepared.tokenizer.added_tokens_decoder.values()}
    known |= set(prepared.tokenizer.all_special_tokens)
    template = prepared.tokens.template
    return sorted(mark for mark in known if template is None or mark in template)
