"""Gotchas in the rows and in their tokens."""

import re
from collections import Counter

from hatrack.check.finding import Finding
from hatrack.check.prepared import Prepared
from hatrack.data.examples import Example
from hatrack.data.labels import is_number
from hatrack.data.stop_tokens import Stops
from hatrack.errors import short_repr

IMBALANCED = 0.8
"""Classes are imbalanced if at least this share of the rows has one label."""
MANY_CUT = 0.05
"""Truncation is reported if at least this share of the rows is cut."""
MANY_CLASSES = 20
"""Up to this many distinct numbers may be classes; more are likely scores."""


def class_imbalance(prepared: Prepared) -> Finding | None:
    """Accuracy is high from the first epoch and means nothing: nearly all rows have the same label."""
    examples = prepared.examples
    if prepared.task != "classify" or examples.multi_label:
        return None
    label, count = Counter(example.label for example in examples.train).most_common(1)[0]
    share = count / len(examples.train)
    if share < IMBALANCED or not isinstance(label, int):
        return None
    return Finding(
        "class-imbalance",
        f"always answering {short_repr(examples.labels[label])} would already be {share:.0%} accurate",
        f"{count:,} of {len(examples.train):,} rows with one label",
        "look at f1, which is shown beside accuracy, or add rows of the other labels",
    )


def labels_are_scores(prepared: Prepared) -> Finding | None:
    """There are dozens of classes, all numbers with decimals: likely scores, whose order a classifier ignores."""
    names = prepared.examples.labels
    if len(names) <= MANY_CLASSES or not all(map(is_number, names)) or not any("." in name for name in names):
        return None
    return Finding(
        "labels-are-scores",
        "the classes are numbers with decimals; if these are scores, a classifier ignores their order",
        f"{len(names)} classes such as {short_repr(names[0])} and {short_repr(names[1])}",
        "replace the scores by one class per range of scores",
    )


def near_duplicates(prepared: Prepared) -> Finding | None:
    """The held-out score is too good: rows differ from training rows only in case, spaces or punctuation."""
    examples = prepared.examples
    seen = {_normalize(example): example.row for example in examples.train}
    twins = [(example.row, seen[_normalize(example)]) for example in examples.held_out if _normalize(example) in seen]
    if not twins or not any(_normalize(example) for example in examples.held_out):
        return None
    return Finding(
        "near-duplicates",
        "held-out rows differ from training rows only in case, spaces or punctuation: their score is too good",
        f"{len(twins):,} of {len(examples.held_out):,}, first row {twins[0][0]} beside row {twins[0][1]}",
        "remove one of each pair, or give other rows with --eval-data",
    )


def answers_cut(prepared: Prepared) -> Finding | None:
    """Answers break off, because the ends of rows were cut off."""
    tokens = prepared.tokens
    cut, rows = tokens.train.cut_count + tokens.held_out.cut_count, len(tokens.train) + len(tokens.held_out)
    if cut < MANY_CUT * rows:
        return None
    cut_off = "the ends of the texts are" if prepared.task == "classify" else "the ends of the answers are"
    return Finding(
        "answers-cut",
        f"{cut_off} cut off",
        f"{cut:,} of {rows:,} rows longer than {tokens.max_length} tokens",
        "a larger --max-length, a base with a larger limit, or shorter rows",
    )


def template_twice(prepared: Prepared) -> Finding | None:
    """Answers begin with <|im_start|> or the like: the rows were written with a chat template before it is applied."""
    if prepared.task == "classify":
        return None
    marks = [mark for mark in _control_tokens(prepared) if len(mark) > 2]
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
    train, tokenizer = prepared.tokens.train, prepared.tokenizer
    whole = [index for index in range(len(train)) if train.lengths[index] < prepared.tokens.max_length]
    if not whole or prepared.tokens.stops != Stops():
        return None
    last = {int(train.row(index)[0][train.row(index)[1]][-1]) for index in whole[:2000]}
    return Finding(
        "end-never-learned",
        "no row teaches where an answer ends: the tuned model will not stop",
        f"answers end with {tokenizer.decode(sorted(last)[:1])!r}, which is not a control token of this base",
        "a base whose chat template ends turns with one of its own tokens, or eos_token in its tokenizer_config.json",
    )


def _normalize(example: Example) -> str:
    return " ".join(re.findall(r"\w+", example.all_text.casefold()))


def _control_tokens(prepared: Prepared) -> list[str]:
    """The control tokens in the chat template; without a template, all control tokens of the base."""
    tokens = {str(token) for token in prepared.tokenizer.added_tokens_decoder.values()}
    tokens |= set(prepared.tokenizer.all_special_tokens)
    template = prepared.tokens.template
    return sorted(mark for mark in tokens if template is None or mark in template)
