"""Rows -> checked examples of a task: labels, duplicates, the held-out split, and every complaint at once.

Knows nothing of tokens or models.
"""

import hashlib
import json
import math
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hatrack.data.columns import find_columns
from hatrack.data.read import Rows, read_rows
from hatrack.data.values import Bad, Label, read_example
from hatrack.errors import DataError, short
from hatrack.recipe import Recipe
from hatrack.say import say

EMPTY_LIST = "a list"
PLAIN = {"role", "content"}
HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 2000


@dataclass(frozen=True)
class Example:
    """One row to learn from; `row` is its number in the file.

    classify: `text`, `label` (an index, or for several labels a row a tuple of indices). complete: `text`, or `text` as
    the prompt and `completion` to learn. chat: `messages` as a chat template takes them (`role`, `content`, and where
    there are any `tool_calls`, `reasoning_content`, ...), the `tools` they could call (JSON schemas), and which of the
    assistant's turns are `read_only`: read, and not learned.
    """

    row: int
    text: str = ""
    label: int | tuple[int, ...] | None = None
    messages: tuple[dict[str, Any], ...] = ()
    completion: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    read_only: tuple[int, ...] = ()

    @property
    def content(self) -> list[Any]:
        """All of it but the row's number, as JSON takes it. Equal for equal examples, in every version of hatrack."""
        plain = [[turn["role"], turn["content"]] if set(turn) == PLAIN else turn for turn in self.messages]
        more = [self.tools, self.read_only] if self.tools or self.read_only else []
        return [self.text, self.label, plain, self.completion, *more]

    @property
    def words(self) -> str:
        """All of its text, a turn a line."""
        return "\n".join([*(str(turn["content"]) for turn in self.messages), self.text, self.completion or ""])


@dataclass(frozen=True)
class Examples:
    """What a run learns from and is scored on. `digest` changes with any of it."""

    task: str
    train: list[Example]
    held_out: list[Example]
    labels: list[str]
    multi_label: bool
    columns: dict[str, str]
    digest: str


@dataclass(frozen=True)
class _Part:
    """The rows of one source, read: examples whose labels are still names, and complaints."""

    source: str
    label_column: str
    examples: list[Example]
    names: list[Label]
    bad: list[Bad]


def read_examples(recipe: Recipe) -> Examples:
    """The examples of the files that a recipe names. Raises DataError, see `prepare`."""
    rows = read_rows(str(recipe.data))
    return prepare(recipe, rows, read_rows(recipe.eval_data) if recipe.eval_data else None)


def prepare(recipe: Recipe, rows: Rows, eval_rows: Rows | None = None) -> Examples:
    """Checked, de-duplicated and split examples.

    Raises DataError with every complaint at once; with `bad_rows: skip` rows that cannot be learned from are left out
    and counted instead.
    """
    task, columns = find_columns(recipe, rows.columns, rows.source)
    parts = [_read(rows, task, columns)]
    if eval_rows is not None:
        find_columns(recipe.changed(task=task, **columns), eval_rows.columns, eval_rows.source)
        parts.append(_read(eval_rows, task, columns))
    parts = [_without_duplicates(_with_one_type(part)) for part in parts]
    labels: list[str] = []
    multi_label = False
    if task == "classify":
        parts[0] = _without_lone_labels(parts[0])
        labels, multi_label = _labels(parts[0])
        parts = [_indexed(part, labels, multi_label) for part in parts]
    _refuse_or_skip(parts, recipe.bad_rows)
    if task == "classify":
        _check_classes(parts[0], labels, multi_label)
    if len(parts) == 2:
        train, held_out = _without_leaks(parts[0], parts[1], labels), parts[1].examples
    else:
        train, held_out = split(parts[0].examples, seed=recipe.seed, stratified=task == "classify" and not multi_label)
    if not train or not held_out:
        raise DataError(
            f"{rows.source} has too few rows to learn from and to be scored on",
            got=f"{len(train)} and {len(held_out)}",
            fix="give it at least 2 different rows",
        )
    return Examples(task, train, held_out, labels, multi_label, columns, _digest(train, held_out, labels))


def split(examples: Sequence[Example], *, seed: int, stratified: bool) -> tuple[list[Example], list[Example]]:
    """A tenth of the rows (at most 2,000, at least one a class if `stratified`) held out; both parts keep file order.

    The same rows for the same seed, whatever else a run does.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        groups[example.label if stratified else None].append(index)
    share = min(HELD_OUT_SHARE, HELD_OUT_MOST / max(len(examples), 1))
    shuffle = random.Random(seed).shuffle
    chosen: set[int] = set()
    for _, members in sorted(groups.items(), key=lambda item: str(item[0])):
        shuffle(members)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        chosen.update(members[:count])
    held_out = [example for index, example in enumerate(examples) if index in chosen]
    return [example for index, example in enumerate(examples) if index not in chosen], held_out


def _read(rows: Rows, task: str, columns: dict[str, str]) -> _Part:
    examples, names = [], []
    bad = [Bad(number, words) for number, words in rows.problems]
    for number, row in zip(rows.numbers, rows.rows, strict=True):
        found = read_example(number, row, task, columns)
        if isinstance(found, Bad):
            bad.append(found)
        else:
            fields, name = found
            examples.append(Example(number, **fields))
            names.append(name)
    return _Part(rows.source, columns.get("label", ""), examples, names, bad)


def _with_one_type(part: _Part) -> _Part:
    """Complains of labels whose type is not that of most: 1 among "1"s is a mistake, and nobody can tell which."""
    kinds = [_kind(name) for name in part.names]
    ranked = [kind for kind, _ in Counter(kinds).most_common()]
    if len(ranked) < 2:
        return part
    usual = ranked[0]
    if usual == EMPTY_LIST:  # fits lists of anything, so it does not say what the labels are
        usual = next((kind for kind in ranked if kind.startswith("a list of")), EMPTY_LIST)
    fits = {usual, EMPTY_LIST} if usual.startswith("a list") else {usual}
    odd = [
        Bad(example.row, f"mixed types in the labels: {short(name)} is {kind}, most are {usual}", part.label_column)
        for example, name, kind in zip(part.examples, part.names, kinds, strict=True)
        if kind not in fits
    ]
    return _keep(part, [kind in fits for kind in kinds], odd)


def _kind(name: object) -> str:
    """The type of a label in words; of a list, with the types of what is in it."""
    if isinstance(name, list):
        inside = sorted({_kind(item) for item in name})
        return f"a list of {' and '.join(inside)}" if inside else EMPTY_LIST
    if isinstance(name, bool):  # before numbers: Python takes True for 1
        return "true or false"
    return "text" if isinstance(name, str) else "a number" if isinstance(name, int | float) else type(name).__name__


def _labels(part: _Part) -> tuple[list[str], bool]:
    """The label names in order (numbers by value, words by the alphabet), and whether a row may have several."""
    several = any(isinstance(name, list) for name in part.names)
    # Sorted as text first: a set has another order in every process, and "1" and "1.0" are equal as numbers
    found = sorted({item for name in part.names for item in _items(name)})
    return sorted(found, key=float) if all(_is_number(item) for item in found) else found, several


def _is_number(item: str) -> bool:
    """Whether a label is a number with a place among others; "nan" is one that has none."""
    try:
        return math.isfinite(float(item))
    except ValueError:
        return False


def _shown(item: object) -> str:
    """A label as text: `true` for True, `1` for 1.0."""
    if isinstance(item, bool):
        return str(item).lower()
    return str(int(item)) if isinstance(item, float) and item.is_integer() else str(item)


def _without_lone_labels(part: _Part) -> _Part:
    """Complains of rows whose label no other row has; leaving one out may leave another label alone."""
    while True:
        counts = Counter(item for name in part.names for item in set(_items(name)))
        lone = [next((item for item in _items(name) if counts[item] == 1), None) for name in part.names]
        bad = [
            Bad(
                example.row,
                f"label {short(item)} is seen only once, so it cannot be learned and scored",
                part.label_column,
            )
            for example, item in zip(part.examples, lone, strict=True)
            if item is not None
        ]
        if not bad:
            return part
        part = _keep(part, [item is None for item in lone], bad)


def _items(name: Label) -> list[str]:
    """The labels of one row as text."""
    return [_shown(item) for item in (name if isinstance(name, list) else [name])]


def _indexed(part: _Part, labels: list[str], multi_label: bool) -> _Part:
    """Label names become indices. Complains of labels that are not among `labels`."""
    index = {name: position for position, name in enumerate(labels)}
    bad, good, examples = [], [], []
    for example, name in zip(part.examples, part.names, strict=True):
        unknown = [item for item in _items(name) if item not in index]
        problem = ""
        if unknown:
            problem = f"label {short(unknown[0])} does not occur in the training rows"
        elif isinstance(name, list) and not multi_label:
            problem = f"several labels ({len(name)}), where the training rows have one each"
        if problem:
            bad.append(Bad(example.row, problem, part.label_column))
        good.append(not problem)
        found = tuple(sorted({index[item] for item in _items(name) if item in index}))
        examples.append(replace(example, label=found if multi_label else found[0] if found else None))
    return _keep(replace(part, examples=examples), good, bad)


def _keep(part: _Part, good: list[bool], bad: list[Bad]) -> _Part:
    examples = [example for example, fine in zip(part.examples, good, strict=True) if fine]
    names = [name for name, fine in zip(part.names, good, strict=True) if fine]
    return replace(part, examples=examples, names=names, bad=[*part.bad, *bad])


def counted(rows: int) -> str:
    """How many rows, in words: `a row`, `1,200 rows`."""
    return f"{rows:,} rows" if rows > 1 else "a row"


def _refuse_or_skip(parts: list[_Part], bad_rows: str) -> None:
    complaints = [
        f"{part.source} row {bad.row}" + (f", column {bad.column}" if bad.column else "") + f": {bad.words}"
        for part in parts
        for bad in sorted(part.bad, key=lambda bad: bad.row)
    ]
    if complaints and bad_rows == "refuse":
        count = counted(len(complaints))
        fix = (
            "mend them, or leave them out with --bad-rows skip"
            if len(complaints) > 1
            else "mend it, or --bad-rows skip"
        )
        raise DataError(f"{count} cannot be learned from", fix=fix, complaints=complaints)
    if complaints:
        say(f"{len(complaints):,} rows left out, the first: {complaints[0]}")
    for part in parts:
        if not part.examples:
            raise DataError(f"{part.source} has no row to learn from", got="0 rows", fix="give it at least 2")


def _check_classes(part: _Part, labels: list[str], multi_label: bool) -> None:
    used = {example.label for example in part.examples}
    if not multi_label and len(used) < 2:
        raise DataError(
            f"{part.source} has only one class",
            got=labels[0] if labels else "none",
            fix="give it rows of at least two labels",
        )
    if multi_label and not labels:
        raise DataError(f"{part.source} has no labels at all", got="empty lists", fix="put labels in the lists")


def _without_duplicates(part: _Part) -> _Part:
    """The first of each text. Copies would be in both parts of a split and make the score a lie."""
    first: dict[str, int] = {}
    conflicting = 0
    for index, example in enumerate(part.examples):
        earlier = first.setdefault(_key(example), index)
        conflicting += set(_items(part.names[earlier])) != set(_items(part.names[index]))
    dropped = len(part.examples) - len(first)
    if dropped:
        say(f"{part.source}: {dropped:,} duplicate rows dropped")
    if conflicting:
        say(f"{part.source}: {conflicting:,} of them had another label than their first copy, which stays")
    kept = set(first.values())
    return _keep(part, [index in kept for index in range(len(part.examples))], [])


def _without_leaks(train: _Part, held_out: _Part, labels: list[str]) -> list[Example]:
    """The training rows that are not scored. Raises DataError where a label has no row left."""
    scored = {_key(example) for example in held_out.examples}
    kept = [example for example in train.examples if _key(example) not in scored]
    if len(kept) < len(train.examples):
        say(f"{len(train.examples) - len(kept):,} training rows dropped that are also in {held_out.source}")
    left = {item for example in kept for item in _indices(example.label)}
    gone = [name for index, name in enumerate(labels) if index not in left]
    if gone and kept:
        raise DataError(
            f"every training row of label {short(gone[0])} is also in {held_out.source}",
            got=f"{len(train.examples) - len(kept):,} rows in both",
            fix="give other rows to one of the two",
        )
    return kept


def _indices(label: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return label if isinstance(label, tuple) else () if label is None else (label,)


def _key(example: Example) -> str:
    """What makes two rows the same: their words, apart from white space and the way letters are composed."""
    if example.messages:
        text = "\n".join(f"{turn['role']}\t{' '.join(turn['content'].split())}" for turn in example.messages)
        more = [{name: turn[name] for name in sorted(turn.keys() - PLAIN)} for turn in example.messages]
        if any(more) or example.tools or example.read_only:
            text += json.dumps([more, example.tools, example.read_only])
    else:
        text = " ".join(example.text.split()) + (
            "\t" + " ".join(example.completion.split()) if example.completion else ""
        )
    return unicodedata.normalize("NFC", text)


def _digest(train: list[Example], held_out: list[Example], labels: list[str]) -> str:
    content = [[example.content for example in part] for part in (train, held_out)]
    text = json.dumps([content, labels], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
