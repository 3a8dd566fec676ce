"""Rows -> checked examples of a task: labels, duplicates, the held-out split, and every complaint at once.

Knows nothing of tokens or models.
"""

import hashlib
import json
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from hatrack.console import say
from hatrack.data import labels
from hatrack.data.columns import find_columns, find_extra_columns
from hatrack.data.complaints import BadRows, joined, refuse_or_skip
from hatrack.data.labels import Label
from hatrack.data.messages import has_content
from hatrack.data.read import Rows, read_rows
from hatrack.data.row_values import BadRow, read_example
from hatrack.errors import DataError, HatrackError, short_repr
from hatrack.recipe import Recipe

Made = TypeVar("Made")
PLAIN_KEYS = {"role", "content"}
HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 2000


@dataclass(frozen=True)
class Example:
    """One row to learn from; `row` is its number in the file.

    classify: `text`, `label` (an index, or for several labels a row a tuple of indices). complete: `text`, or `text` as
    the prompt and `completion` to learn. chat: `messages` as a chat template takes them (`role`, `content`, and where
    there are any `tool_calls`, `reasoning_content`, ...), the `tools` they could call (JSON schemas), and which of the
    assistant's turns are `context_only`: read, and not learned.
    """

    row: int
    text: str = ""
    label: int | tuple[int, ...] | None = None
    messages: tuple[dict[str, Any], ...] = ()
    completion: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    context_only: tuple[int, ...] = ()

    @property
    def content(self) -> list[Any]:
        """All of it but the row's number, as JSON takes it. Equal for equal examples, in every version of hatrack."""
        plain = [[turn["role"], turn["content"]] if set(turn) == PLAIN_KEYS else turn for turn in self.messages]
        more = [self.tools, self.context_only] if self.tools or self.context_only else []
        return [self.text, self.label, plain, self.completion, *more]

    @property
    def all_text(self) -> str:
        """All of its text, a turn a line."""
        return "\n".join([*(str(turn["content"]) for turn in self.messages), self.text, self.completion or ""])


@dataclass(frozen=True)
class Examples:
    """What a run learns from and is scored on. `digest` changes with any of it. `separate_files`: in two files."""

    task: str
    train: list[Example]
    held_out: list[Example]
    labels: list[str]
    multi_label: bool
    columns: dict[str, str]
    digest: str
    separate_files: bool = False


@dataclass(frozen=True)
class _Part:
    """The rows of one source, read: examples whose labels are still names, and complaints."""

    source: str
    label_column: str
    examples: list[Example]
    names: list[Label]
    bad: list[BadRow]


def read_examples(recipe: Recipe) -> Examples:
    """The examples of the files that a recipe names. Raises DataError, see `make_examples`."""
    rows = read_rows(str(recipe.data))
    examples = make_examples(recipe, rows, read_rows(recipe.eval_data) if recipe.eval_data else None)
    if examples.labels:
        counts = Counter(index for e in (*examples.train, *examples.held_out) for index in _indices(e.label))
        say(f"classes{' (several a row)' if examples.multi_label else ''}: {labels.listed(examples.labels, counts)}")
    return examples


def make_examples(recipe: Recipe, rows: Rows, eval_rows: Rows | None = None) -> Examples:
    """Checked, de-duplicated and split examples.

    Raises DataError with all complaints at once (`add_complaints` adds those of a tokenizer); with `bad_rows: skip`,
    rows that cannot be learned from are left out and format_rows instead.
    """
    task, columns, parts = _read(recipe, [rows] if eval_rows is None else [rows, eval_rows])
    classes: list[str] = []
    multi_label = False
    if task == "classify":
        parts, classes, multi_label = _with_classes(parts, merge=recipe.merge_labels)
    else:
        parts = [_without_duplicates(part) for part in parts]
    divide = partial(_divided, recipe, task, columns, parts, classes, multi_label)
    try:
        _refuse_or_skip(parts, recipe.bad_rows)
    except BadRows as error:
        with suppress(DataError):  # too few rows, or one class: to be seen once these are mended
            error.others = divide()
        raise
    return divide()


def add_complaints(error: BadRows, look: Callable[[Examples], object]) -> BadRows:
    """`error` with what `look` refuses of the rows that could be read: all of it is said at once."""
    try:
        if error.others is not None:
            look(error.others)
    except BadRows as more:
        return joined([error, more], error.total)
    except HatrackError:  # of the base: not what the rows are refused for
        pass
    return error


def _divided(
    recipe: Recipe, task: str, columns: dict[str, str], parts: list[_Part], classes: list[str], multi_label: bool
) -> Examples:
    """The examples to learn from and those held out. Raises DataError where there are too few."""
    if task == "classify":
        _check_classes(parts[0], classes, multi_label)
    if len(parts) == 2:
        train, held_out = _without_leaks(parts[0], parts[1], classes), parts[1].examples
    else:
        train, held_out = split_held_out(
            parts[0].examples, seed=recipe.seed, stratified=task == "classify" and not multi_label
        )
    _check_enough(train, held_out, parts[0].source)
    digest = _digest(train, held_out, classes)
    return Examples(task, train, held_out, classes, multi_label, columns, digest, separate_files=len(parts) == 2)


def map_parts(
    recipe: Recipe, examples: Examples, make: Callable[[list[Example], str], Made]
) -> tuple[Examples, Made, Made]:
    """What `make` makes of the training and of the held-out rows, called with these and the name of their source.

    Rows for which it raises BadRows are refused, those of both parts at once. With `bad_rows: skip` they are left
    out as if they had never been there: what remains is split anew. Returns the examples that remain, too.
    """
    sources = str(recipe.data), str(recipe.eval_data or recipe.data)
    made: list[Made] = []
    gone: list[set[int]] = [set(), set()]
    errors = []
    for index, part in enumerate((examples.train, examples.held_out)):
        try:
            made.append(make(part, sources[index]))
        except BadRows as error:
            errors.append(error)
            gone[index] = {bad.row for _, each in error.bad for bad in each}
    if not errors:
        return examples, made[0], made[1]
    refuse_or_skip(joined(errors, len(examples.train) + len(examples.held_out)), recipe.bad_rows)
    return map_parts(recipe, _left(recipe, examples, gone), make)


def _left(recipe: Recipe, examples: Examples, gone: list[set[int]]) -> Examples:
    """Without the rows `gone` from the training and from the held-out part, and split anew, but for two files."""
    train, held_out = (
        [example for example in part if example.row not in rows]
        for part, rows in zip((examples.train, examples.held_out), gone, strict=True)
    )
    if not examples.separate_files:
        stratified = examples.task == "classify" and not examples.multi_label
        rest = sorted([*train, *held_out], key=lambda example: example.row)
        train, held_out = split_held_out(rest, seed=recipe.seed, stratified=stratified)
    _check_enough(train, held_out, str(recipe.data))
    there = {index for example in train for index in _indices(example.label)}
    missing = [name for index, name in enumerate(examples.labels) if index not in there]
    if missing:
        raise DataError(
            f"no row of label {short_repr(missing[0])} in {recipe.data} can be learned from",
            fix="give it rows that can, or leave the label out",
        )
    digest = _digest(train, held_out, examples.labels)
    return replace(examples, train=train, held_out=held_out, digest=digest)


def _check_enough(train: list[Example], held_out: list[Example], source: str) -> None:
    if not train or not held_out:
        raise DataError(
            f"{source} has too few rows to learn from and to be scored on",
            got=f"{len(train)} and {len(held_out)}",
            fix="give it at least 2 different rows",
        )


def examples_to_score(
    recipe: Recipe, rows: Rows, classes: Sequence[str], multi_label: bool, also: Mapping[str, str]
) -> tuple[str, list[Example]]:
    """The task, and all rows of a file to score an adapter on that knows `classes`; `also` maps other words to them.

    A label that is another spelling of a class counts as that class. Raises DataError as `make_examples` does, and if
    no row has a label that the adapter knows.
    """
    task, _, (part,) = _read(recipe, [rows])
    if task == "classify":
        given = part
        spelling = labels.as_in_training(part.names, classes) | dict(also)
        part = _indexed(_respelled(part, spelling), list(classes), multi_label)
        if given.examples and not part.examples:
            found = sorted({item for name in given.names for item in labels.items(name)})
            raise DataError(
                f"{rows.source}, column {part.label_column}: no label is one that the adapter knows",
                got=", ".join(map(short_repr, found[:10])),
                fix=f"its labels are {', '.join(map(short_repr, classes[:20]))}",
                gotcha="labels-of-another-adapter",
            )
    part = _without_duplicates(part)
    _refuse_or_skip([part], recipe.bad_rows)
    return task, part.examples


def split_held_out(examples: Sequence[Example], *, seed: int, stratified: bool) -> tuple[list[Example], list[Example]]:
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


def _filled(sources: Sequence[Rows]) -> dict[str, list[Any]]:
    """The columns that hold anything in any row, with the values of the rows where they do."""
    names = dict.fromkeys(name for rows in sources for name in rows.columns)
    held = {name: [row[name] for rows in sources for row in rows.rows if has_content(row.get(name))] for name in names}
    return {name: values for name, values in held.items() if values}


def _read(recipe: Recipe, sources: Sequence[Rows]) -> tuple[str, dict[str, str], list[_Part]]:
    """The task, the column of each role, and each source read by these. Columns and message keys not read are said."""
    first = sources[0]
    task, columns = find_columns(recipe, first.columns, first.source, next(iter(first.rows), None))
    for rows in sources[1:]:
        _check_same_columns(first, rows, columns)
    columns |= find_extra_columns(task, columns, recipe, _filled(sources))
    parts, unread = [], set[str]()
    for rows in sources:
        examples, names = [], []
        bad = [BadRow(number, words) for number, words in rows.problems]
        for number, row in zip(rows.numbers, rows.rows, strict=True):
            found = read_example(number, row, task, columns, unread)
            if isinstance(found, BadRow):
                bad.append(found)
            else:
                fields, name = found
                examples.append(Example(number, **fields))
                names.append(name)
        parts.append(_Part(rows.source, columns.get("label", ""), examples, names, bad))
    if unread:
        say(f"not read in the messages: {', '.join(sorted(unread))}")
    return task, columns, parts


def _check_same_columns(first: Rows, rows: Rows, columns: Mapping[str, str]) -> None:
    missing = [column for column in columns.values() if column not in rows.columns]
    if missing:
        raise DataError(
            f"{rows.source} has other columns than {first.source}",
            got=f"columns {', '.join(rows.columns)}, and no {' or '.join(missing)}",
            fix=f"give both files the same columns: {', '.join(columns.values())}",
        )


def _with_classes(parts: list[_Part], *, merge: bool) -> tuple[list[_Part], list[str], bool]:
    """The parts with their labels as indices of the classes of the training rows; these classes, and whether a row may
    have several. Raises DataError where a column of labels is no column of classes."""
    parts = [_without(part, labels.mixed_types(part.names, merge=merge)) for part in parts]
    train = parts[0]
    labels.refuse_vectors(train.names, train.source, train.label_column)
    labels.refuse_scores_and_texts(train.names, train.source, train.label_column)
    spelling = labels.one_spelling(train.names, train.source, train.label_column, merge=merge)
    train = _without_duplicates(_respelled(train, spelling))
    while any(complaints := labels.seen_once(train.names)):  # leaving one out may leave another label alone
        train = _without(train, complaints)
    classes, multi_label = labels.class_names(train.names)
    held_out = [_respelled(part, labels.as_in_training(part.names, classes) if merge else {}) for part in parts[1:]]
    parts = [train, *map(_without_duplicates, held_out)]
    return [_indexed(part, classes, multi_label) for part in parts], classes, multi_label


def _respelled(part: _Part, spelling: dict[str, str]) -> _Part:
    return replace(part, names=labels.respelled(part.names, spelling))


def _indexed(part: _Part, classes: list[str], multi_label: bool) -> _Part:
    """Label names become indices. Complains of labels that are not among `classes`."""
    part = _without(part, labels.unknown(part.names, classes, multi_label))
    index = {name: position for position, name in enumerate(classes)}
    found = [tuple(sorted({index[item] for item in labels.items(name)})) for name in part.names]
    examples = [
        replace(example, label=several if multi_label else several[0])
        for example, several in zip(part.examples, found, strict=True)
    ]
    return replace(part, examples=examples)


def _without(part: _Part, complaints: list[str]) -> _Part:
    """Without the rows whose label there is a complaint of: one a row, "" where it is fine."""
    bad = [
        BadRow(example.row, words, part.label_column)
        for example, words in zip(part.examples, complaints, strict=True)
        if words
    ]
    return _keep(part, [not words for words in complaints], bad)


def _keep(part: _Part, good: list[bool], bad: list[BadRow]) -> _Part:
    examples = [example for example, fine in zip(part.examples, good, strict=True) if fine]
    names = [name for name, fine in zip(part.names, good, strict=True) if fine]
    return replace(part, examples=examples, names=names, bad=[*part.bad, *bad])


def _refuse_or_skip(parts: list[_Part], bad_rows: str) -> None:
    """Raises BadRows with every complaint, or leaves the rows out. Raises DataError where no row is left."""
    total = sum(len(part.examples) + len(part.bad) for part in parts)
    refuse_or_skip(BadRows([(part.source, part.bad) for part in parts], total), bad_rows)
    for part in parts:
        if not part.examples:
            raise DataError(f"{part.source} has no row to learn from", got="0 rows", fix="give it at least 2")


def _check_classes(part: _Part, classes: list[str], multi_label: bool) -> None:
    used = {example.label for example in part.examples}
    if not multi_label and len(used) < 2:
        raise DataError(
            f"{part.source} has only one class",
            got=classes[0] if classes else "none",
            fix="give it rows of at least two labels",
        )
    if multi_label and not classes:
        raise DataError(f"{part.source} has no labels at all", got="empty lists", fix="put labels in the lists")


def _without_duplicates(part: _Part) -> _Part:
    """The first of each text. Copies would be in both parts of a split and make the score a lie."""
    first: dict[str, int] = {}
    conflicting = 0
    for index, example in enumerate(part.examples):
        earlier = first.setdefault(_key(example), index)
        conflicting += set(labels.items(part.names[earlier])) != set(labels.items(part.names[index]))
    dropped = len(part.examples) - len(first)
    if dropped:
        say(f"{part.source}: {dropped:,} duplicate rows dropped")
    if conflicting:
        say(f"{part.source}: {conflicting:,} of them had another label than their first copy, which stays")
    kept = set(first.values())
    return _keep(part, [index in kept for index in range(len(part.examples))], [])


def _without_leaks(train: _Part, held_out: _Part, classes: list[str]) -> list[Example]:
    """The training rows that are not scored. Raises DataError where a label has no row left."""
    scored = {_key(example) for example in held_out.examples}
    kept = [example for example in train.examples if _key(example) not in scored]
    if len(kept) < len(train.examples):
        say(f"{len(train.examples) - len(kept):,} training rows dropped that are also in {held_out.source}")
    left = {item for example in kept for item in _indices(example.label)}
    gone = [name for index, name in enumerate(classes) if index not in left]
    if gone and kept:
        raise DataError(
            f"every training row of label {short_repr(gone[0])} is also in {held_out.source}",
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
        more = [{name: turn[name] for name in sorted(turn.keys() - PLAIN_KEYS)} for turn in example.messages]
        if any(more) or example.tools or example.context_only:
            text += json.dumps([more, example.tools, example.context_only])
    else:
        text = " ".join(example.text.split()) + (
            "\t" + " ".join(example.completion.split()) if example.completion else ""
        )
    return unicodedata.normalize("NFC", text)


def _digest(train: list[Example], held_out: list[Example], classes: list[str]) -> str:
    content = [[example.content for example in part] for part in (train, held_out)]
    text = json.dumps([content, classes], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
