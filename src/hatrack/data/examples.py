"""Turns rows into examples: checks labels, drops duplicates and splits off held-out rows.

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
from typing import Any, TypeVar

from hatrack.console import say
from hatrack.data import labels
from hatrack.data.columns import find_columns, find_extra_columns
from hatrack.data.complaints import BadRows, join_errors, refuse_or_skip
from hatrack.data.in_memory import source_name
from hatrack.data.labels import Label
from hatrack.data.messages import has_content
from hatrack.data.read import Rows, read_rows
from hatrack.data.row_values import BadRow, read_example
from hatrack.errors import DataError, HatrackError, short_repr
from hatrack.recipe import Recipe

Converted = TypeVar("Converted")
PLAIN_KEYS = {"role", "content"}
HELD_OUT_SHARE, HELD_OUT_MAX = 0.1, 2000


@dataclass(frozen=True)
class Example:
    """One row to learn from; `row` is its number in the file.

    classify: `text` and `label` (an index, or a tuple of indices if rows can have several). complete: `text`, or
    `text` as the prompt and `completion` to learn. chat: `messages` for a chat template (`role`, `content`, and maybe
    `tool_calls`, `reasoning_content`, ...), `tools` (JSON schemas), and `context_only`, the indices of assistant turns
    that are not supervised.
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
        """All but the row number, as JSON values. Equal for equal examples, in every version of hatrack."""
        plain = [[turn["role"], turn["content"]] if set(turn) == PLAIN_KEYS else turn for turn in self.messages]
        extra = [self.tools, self.context_only] if self.tools or self.context_only else []
        return [self.text, self.label, plain, self.completion, *extra]

    @property
    def all_text(self) -> str:
        """All of its text, one turn per line."""
        return "\n".join([*(str(turn["content"]) for turn in self.messages), self.text, self.completion or ""])


@dataclass(frozen=True)
class Examples:
    """What a run is trained and scored on.

    `digest` depends on the content of both splits and on the classes. `separate_files`: the held-out rows come from a
    file of their own.
    """

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
    """The rows of one source: the examples, the label of each as read (a name or several), and the bad rows.

    `Example.label` is None until `_indexed` sets it.
    """

    source: str
    label_column: str
    examples: list[Example]
    label_names: list[Label]
    bad: list[BadRow]


@dataclass(frozen=True)
class _Sources:
    """The rows that were read: a part to train on and, if `eval_data` is given, a part to score."""

    task: str
    columns: dict[str, str]
    parts: list[_Part]
    classes: list[str]
    multi_label: bool

    @property
    def stratified(self) -> bool:
        """Whether each class gets its share of the held-out rows."""
        return self.task == "classify" and not self.multi_label


def read_examples(recipe: Recipe) -> Examples:
    """The examples of the files that a recipe names. Raises DataError, see `make_examples`."""
    rows = read_rows(str(recipe.data))
    examples = make_examples(recipe, rows, read_rows(recipe.eval_data, "eval_data") if recipe.eval_data else None)
    if examples.labels:
        counts = Counter(
            index for example in (*examples.train, *examples.held_out) for index in _indices(example.label)
        )
        shown = labels.describe_classes(examples.labels, counts)
        say(f"classes{' (several per row)' if examples.multi_label else ''}: {shown}")
    return examples


def make_examples(recipe: Recipe, rows: Rows, eval_rows: Rows | None = None) -> Examples:
    """Checks the rows, drops duplicates and splits off held-out rows.

    Raises BadRows with the complaints about all bad rows; `add_complaints` adds those that need a tokenizer. With
    `bad_rows: skip`, bad rows are left out and counted instead. Raises DataError if columns or labels cannot be used,
    or if too few rows are left.
    """
    sources = _read(recipe, [rows] if eval_rows is None else [rows, eval_rows])
    if sources.task == "classify":
        sources = _with_classes(sources, merge=recipe.merge_labels)
    else:
        sources = replace(sources, parts=[_without_duplicates(part) for part in sources.parts])
    try:
        _refuse_or_skip(sources.parts, recipe.bad_rows)
    except BadRows as error:
        with suppress(DataError):  # too few good rows, or only one class: reported once the bad rows are corrected
            error.good_examples = _split(sources, recipe.seed)
        raise
    return _split(sources, recipe.seed)


def add_complaints(error: BadRows, check: Callable[[Examples], object]) -> BadRows:
    """Joins `error` with the BadRows that `check` raises about the good rows, so that all are reported at once."""
    try:
        if error.good_examples is not None:
            check(error.good_examples)
    except BadRows as more:
        return join_errors([error, more], error.total)
    except HatrackError:  # about the base, not the rows
        pass
    return error


def _split(sources: _Sources, seed: int) -> Examples:
    """Splits the examples into training and held-out rows. Raises DataError if there are too few."""
    parts, classes = sources.parts, sources.classes
    if sources.task == "classify":
        _check_classes(parts[0], classes, sources.multi_label)
    if len(parts) == 2:
        train, held_out = _without_leaks(parts[0], parts[1], classes), parts[1].examples
    else:
        train, held_out = split_held_out(parts[0].examples, seed=seed, stratified=sources.stratified)
    _check_enough(train, held_out, parts[0].source)
    return Examples(
        task=sources.task,
        train=train,
        held_out=held_out,
        labels=classes,
        multi_label=sources.multi_label,
        columns=sources.columns,
        digest=_digest(train, held_out, classes),
        separate_files=len(parts) == 2,
    )


def convert_splits(
    recipe: Recipe, examples: Examples, convert: Callable[[list[Example], str], Converted]
) -> tuple[Examples, Converted, Converted]:
    """Converts the training rows and the held-out rows. `convert` gets the rows and the name of their source.

    Returns the examples and both results. If `convert` raises BadRows, raises one BadRows with the bad rows of both
    splits. With `bad_rows: skip`, leaves these rows out, splits and converts the others again, and returns them.
    """
    source = source_name(str(recipe.data))
    sources = source, source_name(recipe.eval_data, "eval_data") if recipe.eval_data else source
    converted: list[Converted] = []
    dropped: list[set[int]] = [set(), set()]
    errors = []
    for index, split in enumerate((examples.train, examples.held_out)):
        try:
            converted.append(convert(split, sources[index]))
        except BadRows as error:
            errors.append(error)
            dropped[index] = {bad.row for _, each in error.bad for bad in each}
    if not errors:
        return examples, converted[0], converted[1]
    refuse_or_skip(join_errors(errors, len(examples.train) + len(examples.held_out)), recipe.bad_rows)
    return convert_splits(recipe, _without_rows(recipe, examples, dropped), convert)


def _without_rows(recipe: Recipe, examples: Examples, dropped: list[set[int]]) -> Examples:
    """The examples without the `dropped` training and held-out rows, split again unless they come from two files."""
    train, held_out = (
        [example for example in part if example.row not in rows]
        for part, rows in zip((examples.train, examples.held_out), dropped, strict=True)
    )
    if not examples.separate_files:
        stratified = examples.task == "classify" and not examples.multi_label
        remaining = sorted([*train, *held_out], key=lambda example: example.row)
        train, held_out = split_held_out(remaining, seed=recipe.seed, stratified=stratified)
    source = source_name(str(recipe.data))
    _check_enough(train, held_out, source)
    missing = _classes_without_rows(train, examples.labels)
    if missing:
        raise DataError(
            f"no row of label {short_repr(missing[0])} in {source} can be learned from",
            fix="give it rows that can, or leave the label out",
        )
    digest = _digest(train, held_out, examples.labels)
    return replace(examples, train=train, held_out=held_out, digest=digest)


def _classes_without_rows(examples: list[Example], classes: list[str]) -> list[str]:
    used = {index for example in examples for index in _indices(example.label)}
    return [name for index, name in enumerate(classes) if index not in used]


def _check_enough(train: list[Example], held_out: list[Example], source: str) -> None:
    if not train or not held_out:
        raise DataError(
            f"{source} has too few rows to learn from and to be scored on",
            got=f"{len(train)} and {len(held_out)}",
            fix="give it at least 2 different rows",
        )


def examples_to_score(
    recipe: Recipe, rows: Rows, classes: Sequence[str], multi_label: bool, aliases: Mapping[str, str]
) -> tuple[str, list[Example]]:
    """The task, and the rows of a file to score an adapter of these `classes` on, without duplicates.

    A label that is another spelling of a class counts as that class; `aliases` maps further labels to classes. With
    `bad_rows: skip`, bad rows are left out. Raises BadRows as `make_examples` does, DataError if no row has a label
    that the adapter knows.
    """
    sources = _read(recipe, [rows])
    [part] = sources.parts
    if sources.task == "classify":
        names = part.label_names
        spelling = labels.match_classes(names, classes) | dict(aliases)
        part = _indexed(_respelled(part, spelling), list(classes), multi_label)
        if names and not part.examples:
            found = sorted({item for name in names for item in labels.label_names(name)})
            raise DataError(
                f"{rows.source}, column {part.label_column}: no label is one that the adapter knows",
                got=", ".join(map(short_repr, found[:10])),
                fix=f"its labels are {', '.join(map(short_repr, classes[:20]))}",
                gotcha="labels-of-another-adapter",
            )
    part = _without_duplicates(part)
    _refuse_or_skip([part], recipe.bad_rows)
    return sources.task, part.examples


def split_held_out(examples: Sequence[Example], *, seed: int, stratified: bool) -> tuple[list[Example], list[Example]]:
    """Returns the rows to train on and the held-out rows: a tenth of all rows, at most 2,000.

    `stratified` holds out the same share of each class, but at least one row of each class that has two: with many
    classes these can be more than 2,000. Both results keep the order of the file. The same seed gives the same rows.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        groups[example.label if stratified else None].append(index)
    share = min(HELD_OUT_SHARE, HELD_OUT_MAX / max(len(examples), 1))
    shuffle = random.Random(seed).shuffle
    chosen: set[int] = set()
    for _, members in sorted(groups.items(), key=lambda item: str(item[0])):
        shuffle(members)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        chosen.update(members[:count])
    held_out = [example for index, example in enumerate(examples) if index in chosen]
    return [example for index, example in enumerate(examples) if index not in chosen], held_out


def _filled_columns(sources: Sequence[Rows]) -> dict[str, list[Any]]:
    """Column -> its values that are not empty, for columns that have any."""
    names = dict.fromkeys(name for rows in sources for name in rows.columns)
    found = {name: [row[name] for rows in sources for row in rows.rows if has_content(row.get(name))] for name in names}
    return {name: values for name, values in found.items() if values}


def _read(recipe: Recipe, sources: Sequence[Rows]) -> _Sources:
    """The task, the column of each role, and the examples of each source. Says which columns and keys are not read."""
    first = sources[0]
    task, columns = find_columns(recipe, first.columns, first.source, next(iter(first.rows), None))
    for rows in sources[1:]:
        _check_same_columns(first, rows, columns)
    columns |= find_extra_columns(task, columns, recipe, _filled_columns(sources))
    parts, unread = [], set[str]()
    for rows in sources:
        examples, names = [], []
        bad = [BadRow(number, reason) for number, reason in rows.problems]
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
        say(f"message keys not read: {', '.join(sorted(unread))}")
    return _Sources(task, columns, parts, classes=[], multi_label=False)


def _check_same_columns(first: Rows, rows: Rows, columns: Mapping[str, str]) -> None:
    missing = [column for column in columns.values() if column not in rows.columns]
    if missing:
        raise DataError(
            f"{rows.source} has other columns than {first.source}",
            got=f"columns {', '.join(rows.columns)}, and no {' or '.join(missing)}",
            fix=f"give both files the same columns: {', '.join(columns.values())}",
        )


def _with_classes(sources: _Sources, *, merge: bool) -> _Sources:
    """The sources with their labels as indices of the classes of the training rows.

    Raises DataError if the labels are not classes.
    """
    parts = [_drop_bad(part, labels.mixed_type_complaints(part.label_names, merge=merge)) for part in sources.parts]
    train = parts[0]
    labels.refuse_label_vectors(train.label_names, train.source, train.label_column)
    labels.warn_of_unsplit_labels(train.label_names)
    labels.refuse_unique_labels(train.label_names, train.source, train.label_column)
    spelling = labels.merge_spellings(train.label_names, train.source, train.label_column, merge=merge)
    train = _without_duplicates(_respelled(train, spelling))
    # Again, as a dropped row with several labels may leave another label with a single row.
    while any(complaints := labels.seen_once_complaints(train.label_names)):
        train = _drop_bad(train, complaints)
    classes, multi_label = labels.find_classes(train.label_names)
    held_out = [
        _respelled(part, labels.match_classes(part.label_names, classes) if merge else {}) for part in parts[1:]
    ]
    parts = [train, *map(_without_duplicates, held_out)]
    parts = [_indexed(part, classes, multi_label) for part in parts]
    return replace(sources, parts=parts, classes=classes, multi_label=multi_label)


def _respelled(part: _Part, spelling: dict[str, str]) -> _Part:
    return replace(part, label_names=labels.respell(part.label_names, spelling))


def _indexed(part: _Part, classes: list[str], multi_label: bool) -> _Part:
    """The part with indices for label names, without the rows whose labels are not among `classes`."""
    part = _drop_bad(part, labels.unknown_label_complaints(part.label_names, classes, multi_label))
    index = {name: position for position, name in enumerate(classes)}
    found = [tuple(sorted({index[item] for item in labels.label_names(name)})) for name in part.label_names]
    examples = [
        replace(example, label=several if multi_label else several[0])
        for example, several in zip(part.examples, found, strict=True)
    ]
    return replace(part, examples=examples)


def _drop_bad(part: _Part, complaints: list[str]) -> _Part:
    """The part without the rows whose label is bad. `complaints` has one text per row: "" if its label is good."""
    bad = [
        BadRow(example.row, reason, part.label_column)
        for example, reason in zip(part.examples, complaints, strict=True)
        if reason
    ]
    return _select(part, [not reason for reason in complaints], bad)


def _select(part: _Part, good: list[bool], bad: list[BadRow]) -> _Part:
    examples = [example for example, fine in zip(part.examples, good, strict=True) if fine]
    names = [name for name, fine in zip(part.label_names, good, strict=True) if fine]
    return replace(part, examples=examples, label_names=names, bad=[*part.bad, *bad])


def _refuse_or_skip(parts: list[_Part], bad_rows: str) -> None:
    """Raises BadRows with every complaint, or reports the rows left out. Raises DataError if no row is left."""
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
    """The part with one row per text, the first: copies could be both trained on and held out."""
    first: dict[str, int] = {}
    conflicting = 0
    for index, example in enumerate(part.examples):
        earlier = first.setdefault(_text_key(example), index)
        one, other = part.label_names[earlier], part.label_names[index]
        conflicting += set(labels.label_names(one)) != set(labels.label_names(other))
    dropped = len(part.examples) - len(first)
    if dropped:
        say(f"{part.source}: {dropped:,} duplicate rows dropped")
    if conflicting:
        say(f"{part.source}: {conflicting:,} of them had another label than the first copy, which is used")
    chosen = set(first.values())
    return _select(part, [index in chosen for index in range(len(part.examples))], [])


def _without_leaks(train: _Part, held_out: _Part, classes: list[str]) -> list[Example]:
    """The training rows whose text is not held out. Raises DataError if a label has no row left."""
    scored = {_text_key(example) for example in held_out.examples}
    kept = [example for example in train.examples if _text_key(example) not in scored]
    if len(kept) < len(train.examples):
        say(f"{len(train.examples) - len(kept):,} training rows dropped that are also in {held_out.source}")
    missing = _classes_without_rows(kept, classes)
    if missing and kept:
        raise DataError(
            f"every training row of label {short_repr(missing[0])} is also in {held_out.source}",
            got=f"{len(train.examples) - len(kept):,} rows in both",
            fix="give one of the two other rows",
        )
    return kept


def _indices(label: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return label if isinstance(label, tuple) else () if label is None else (label,)


def _text_key(example: Example) -> str:
    """Equal for rows of the same text, apart from white space and the way letters are composed."""
    if example.messages:
        text = "\n".join(f"{turn['role']}\t{' '.join(turn['content'].split())}" for turn in example.messages)
        extra = [{name: turn[name] for name in sorted(turn.keys() - PLAIN_KEYS)} for turn in example.messages]
        if any(extra) or example.tools or example.context_only:
            text += json.dumps([extra, example.tools, example.context_only])
    else:
        text = " ".join(example.text.split()) + (
            "\t" + " ".join(example.completion.split()) if example.completion else ""
        )
    return unicodedata.normalize("NFC", text)


def _digest(train: list[Example], held_out: list[Example], classes: list[str]) -> str:
    content = [[example.content for example in part] for part in (train, held_out)]
    text = json.dumps([content, classes], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
