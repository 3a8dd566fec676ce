"""Reads labels from cells, and finds the classes of a label column.

Refuses columns that hold no classes (0/1 vectors, scores), or one class in several spellings. Knows nothing of texts,
files or splits: a label column is a list with one entry per row.
"""

import ast
import contextlib
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from hatrack.console import format_rows, say, say_once
from hatrack.errors import DataError, short_repr
from hatrack.recipe import flag

Label = str | int | float | bool | list[Any]

EMPTY_LIST = "a list"
SHOWN_CLASSES = 20
FEW_LABELS = 10
"""With at most this many different labels, those that occur once are reported one by one."""
MISSING_WORDS = {"none", "null", "nan", "na", "n/a", "<na>", "nil"}
"""How programs write a missing value. One of them may be a class; two of them are the same class."""

BRACKETS = {"[": "]", "(": ")", "{": "}"}
PYTHON_ITEM = r"""(?:'(?:[^'\\]|\\['"\\nrtxuU])*'|"(?:[^"\\]|\\['"\\nrtxuU])*"|[+-]?\d[\d.]*|True|False)"""
PYTHON_LIST = re.compile(rf"[\[({{]\s*{PYTHON_ITEM}(?:\s*,\s*{PYTHON_ITEM})*\s*,?\s*[\])}}]")
"""Lists, tuples and sets as Python prints them, with commas: Python would join texts without one."""

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.IGNORECASE)
BITS = re.compile(r"(?:0|1|true|false)(?:\.0*)?(?:[\s,;|]+(?:0|1|true|false)(?:\.0*)?)+", re.IGNORECASE)


def read_label(value: Any) -> Label:
    """The label in a cell: text (stripped), a number, true or false, or a list of these.

    A list may also be written as text, in JSON or as Python prints it. Raises ValueError with the reason if the cell
    has no label.
    """
    if isinstance(value, str):
        value = value.strip()
        if _looks_like_list(value):
            value = _parse_list(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError("the label is empty")
    if isinstance(value, str) and _comparison_key(value) == "":  # spaces or invisible characters
        raise ValueError("the label is empty")
    if isinstance(value, list):
        return [_read_item(item) for item in value]
    if isinstance(value, bytes | dict) or (isinstance(value, str) and not is_encodable(value)):
        raise ValueError("the label is not a word, a number or a list of them")
    label: Label = value
    return label


def _read_item(value: Any) -> Label:
    """A label in a list. Raises ValueError if it is a list or empty."""
    try:
        item = read_label(value)
    except ValueError:
        item = []
    if isinstance(item, list):
        raise ValueError("the label is not a word, a number or a list of them")
    return item


def _looks_like_list(text: str) -> bool:
    """Whether a text is in brackets. Names may end in round or curly ones, so these need a comma or a quote inside."""
    if not text or BRACKETS.get(text[0]) != text[-1]:
        return False
    return text[0] == "[" or any(mark in text for mark in (",", "'", '"'))


def _parse_list(text: str) -> list[Any]:
    """The list that a text spells. Raises ValueError if it is neither JSON nor as Python prints it."""
    found = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
    if isinstance(found, list):
        return found
    if found is None and PYTHON_LIST.fullmatch(text):
        with contextlib.suppress(ValueError, SyntaxError):  # 1.2.3 or 01, which are not numbers
            found = ast.literal_eval(text)
    if found is None or isinstance(found, dict):
        raise ValueError('the label looks like a list, but is not one in JSON, such as ["a", "b"]')
    say_once("labels such as ['a', 'b'] are read as lists, as Python prints them")
    return (
        sorted(found, key=str)
        if isinstance(found, set)
        else list(found)
        if isinstance(found, tuple | list)
        else [found]
    )


def is_encodable(text: str) -> bool:
    """Whether a text can be encoded: JSON can spell lone surrogates, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def label_names(label: Label) -> list[str]:
    """The names of one row's labels: `true` for True, `1` for 1.0."""
    return [_to_text(item) for item in (label if isinstance(label, list) else [label])]


def _to_text(item: object) -> str:
    if isinstance(item, bool):
        return str(item).lower()
    return str(int(item)) if isinstance(item, float) and item.is_integer() else str(item)


def mixed_type_complaints(labels: Sequence[Label], *, merge: bool = False) -> list[str]:
    """A complaint for each label whose type is not that of most, "" for the others.

    1 among "1"s is a mistake, and it is not clear which one is meant; with `merge` both are the label 1.
    """
    kinds = [_label_type(label, merge) for label in labels]
    ranked = [kind for kind, _ in Counter(kinds).most_common()]
    if len(ranked) < 2:
        return [""] * len(labels)
    usual = ranked[0]
    if usual == EMPTY_LIST:  # fits any list, so it does not show the type of the labels
        usual = next((kind for kind in ranked if kind.startswith("a list of")), EMPTY_LIST)
    fits = {usual, EMPTY_LIST} if usual.startswith("a list") else {usual}
    return [
        "" if kind in fits else f"mixed types in the labels: {short_repr(label)} is {kind}, most are {usual}"
        for label, kind in zip(labels, kinds, strict=True)
    ]


def _label_type(label: object, merge: bool) -> str:
    """The type of a label in words, for a list with the types of its labels."""
    if isinstance(label, list):
        inside = sorted({_label_type(item, merge) for item in label})
        return f"a list of {' and '.join(inside)}" if inside else EMPTY_LIST
    if isinstance(label, str) or merge:
        return "text"
    if isinstance(label, bool):  # before numbers: in Python True is 1
        return "true or false"
    return "a number" if isinstance(label, int | float) else type(label).__name__


def refuse_label_vectors(labels: Sequence[Label], source: str, column: str) -> None:
    """Raises DataError if most labels are lists with a number for each class: 0/1 vectors or scores."""
    given = [label for label in labels if label != []]
    vectors = [vector for label in given if (vector := _as_vector(label))]
    if 2 * len(vectors) <= len(given):
        return
    length, rows = Counter(map(len, vectors)).most_common(1)[0]
    equally_long = length > 1 and 2 * rows > len(vectors)
    repeating = sum(len(set(vector)) < len(vector) for vector in vectors)  # a list of labels has each once
    inside = {number for vector in vectors for number in vector}
    if inside <= {0, 1} and (equally_long or repeating):
        kind = "lists of 0 and 1 with a place for each class, so the classes have no names"
    elif equally_long and (2 * repeating > len(vectors) or not all(map(_is_whole, inside))):
        kind = "lists of numbers, one for each class, which cannot be learned"
    else:
        return
    raise DataError(
        f"{source}, column {column}: the labels are {kind}",
        got=f"{short_repr(given[0])} in the first row",
        fix='give each row the list of its labels, such as ["sports", "politics"] or [0, 2]',
        gotcha="labels-are-vectors",
    )


def warn_of_unsplit_labels(labels: Sequence[Label]) -> None:
    """Warns if most labels are texts joined by the same separator: each is read as one label."""
    texts = [label for label in labels if isinstance(label, str)]
    for separator in ";|":
        joined = [text for text in texts if separator in text.strip(separator)]
        if 2 * len(joined) > len(labels):
            say(f"labels such as {short_repr(joined[0])} are read as one label; give lists for several labels per row")


def refuse_unique_labels(labels: Sequence[Label], source: str, column: str) -> None:
    """Raises DataError if most rows have a label that no other row has: a score or a text."""
    counts = Counter(_to_text(label) for label in labels if not isinstance(label, list))
    alone = [text for text, count in counts.items() if count == 1]
    got = f"{len(counts):,} different labels in {len(labels):,} rows"
    scores = sum(_parse_number(text) is not None for text in alone)
    if len(counts) > FEW_LABELS and 2 * len(alone) > len(labels) and not scores:
        raise DataError(
            f"{source}, column {column}: the labels are nearly all different, and hatrack learns classes only",
            got=got,
            fix=f"name a column of classes with {flag('label')}; if these are texts to write, "
            f"name them with {flag('prompt')} COLUMN {flag('completion')} COLUMN",
        )
    if len(counts) > 2 and 2 * scores > len(labels):
        raise DataError(
            f"{source}, column {column}: the labels are numbers, nearly all different; these look like scores, "
            "and hatrack learns classes only",
            got=got,
            fix=f"name a column of classes with {flag('label')}, or write a class for each range of scores",
            gotcha="labels-are-scores",
        )


def _is_whole(number: Decimal) -> bool:
    return number == number.to_integral_value()


def _as_vector(label: Label) -> list[Decimal]:
    """The numbers of a list of numbers, true and false, or of a text such as `1 0 0` or `011`; else an empty list."""
    if isinstance(label, list):
        words = label_names(label)
    elif isinstance(label, str) and BITS.fullmatch(label):
        words = re.split(r"[\s,;|]+", label)
    elif isinstance(label, str) and re.fullmatch(r"[01]{3,}", label):
        words = list(label) if label[0] == "0" else []
    else:
        return []
    numbers = [_parse_number({"true": "1", "false": "0"}.get(word.lower(), word)) for word in words]
    found = [number for number in numbers if number is not None]
    return found if len(found) == len(words) else []


def _parse_number(text: str) -> Decimal | None:
    """The exact value of a number's text, or None. As floats, 2^53 + 1 and 2^53 would be equal."""
    try:
        return Decimal(text) if NUMBER.fullmatch(text) else None
    except InvalidOperation:
        return None


def is_number(text: str) -> bool:
    """Whether a label is written as a number."""
    return _parse_number(text) is not None


def merge_spellings(labels: Sequence[Label], source: str, column: str, *, merge: bool) -> dict[str, str]:
    """Each label that is spelled in several ways -> its most frequent spelling; says which are merged.

    Without `merge`, raises DataError with the spellings and their counts if there are any.
    """
    counts = Counter(item for label in labels for item in label_names(label))
    alike: dict[object, list[str]] = defaultdict(list)
    for item, key in _comparison_keys(counts).items():
        alike[key].append(item)
    groups = [sorted(group, key=lambda item: -counts[item]) for group in alike.values() if len(group) > 1]
    if not groups:
        return {}
    shown = [" and ".join(f"{short_repr(item)} ({format_rows(counts[item])})" for item in group) for group in groups]
    if not merge:
        raise DataError(
            f"{source}, column {column}: labels that differ in spelling only",
            fix=f"spell them alike, or add {flag('merge_labels')}, which keeps the most frequent spelling",
            gotcha="labels-spelled-twice",
            complaints=shown,
        )
    for group, line in zip(groups, shown, strict=True):
        say(f"labels merged: {line} are {short_repr(group[0])}")
    return {item: group[0] for group in groups for item in group}


def _comparison_keys(found: Collection[str]) -> dict[str, object]:
    """A key for each label that ignores case, spaces, number and Unicode forms, and the word for a missing value."""
    keys: dict[str, object] = {item: _comparison_key(item) for item in found}
    truth = {Decimal(1): "true", Decimal(0): "false"}
    if set(keys.values()) <= {*truth, *truth.values()}:  # 1 is true only if there is nothing else
        return {item: truth.get(key, key) if isinstance(key, Decimal) else key for item, key in keys.items()}
    return keys


def _comparison_key(item: str) -> Decimal | str:
    plain = unicodedata.normalize("NFKC", item).casefold()
    visible = (letter for letter in plain if unicodedata.category(letter) != "Cf" and letter not in "\ufe0e\ufe0f")
    spaced = "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in visible)
    text = unicodedata.normalize("NFKC", " ".join(spaced.split()))
    number = _parse_number(text)
    return "none" if text in MISSING_WORDS else text if number is None else number


def respell(labels: Sequence[Label], spelling: Mapping[str, str]) -> list[Label]:
    """The labels as text, each in the spelling chosen for it."""
    return [
        [spelling.get(item, item) for item in label_names(label)]
        if isinstance(label, list)
        else spelling.get(_to_text(label), _to_text(label))
        for label in labels
    ]


def match_classes(labels: Sequence[Label], classes: Sequence[str]) -> dict[str, str]:
    """Each label that is another spelling of a class -> that class."""
    found = {item for label in labels for item in label_names(label)} - set(classes)
    keys = _comparison_keys({*found, *classes})
    known = {keys[name]: name for name in classes}
    return {item: known[keys[item]] for item in sorted(found) if keys[item] in known}


def find_classes(labels: Sequence[Label]) -> tuple[list[str], bool]:
    """The sorted classes (numbers by value, words by alphabet), and whether a row may have several."""
    multi_label = any(isinstance(label, list) for label in labels)
    found = sorted({item for label in labels for item in label_names(label)})  # sets have another order in each process
    numbers = {item: _parse_number(item) for item in found}
    if all(number is not None for number in numbers.values()):
        found.sort(key=lambda item: numbers[item] or Decimal(0))
    return found, multi_label


def seen_once_complaints(labels: Sequence[Label]) -> list[str]:
    """A complaint for each row whose label no other row has, "" for the others."""
    counts = Counter(item for label in labels for item in set(label_names(label)))
    alone = [next((item for item in label_names(label) if counts[item] == 1), None) for label in labels]
    return [
        "" if item is None else f"label {short_repr(item)} is seen only once, so it cannot be learned and scored"
        for item in alone
    ]


def unknown_label_complaints(labels: Sequence[Label], classes: Sequence[str], multi_label: bool) -> list[str]:
    """A complaint for each row with a label that is not among `classes`, "" for the others."""
    known, spelled = set(classes), match_classes(labels, classes)
    found = []
    for label in labels:
        item = next((item for item in label_names(label) if item not in known), None)
        if item is not None and item in spelled:
            alike = f"spelled {short_repr(spelled[item])} in the training rows ({flag('merge_labels')} merges them)"
            found.append(f"label {short_repr(item)} is {alike}")
        elif item is not None:
            found.append(f"label {short_repr(item)} does not occur in the training rows")
        elif (vector := _as_vector(label)) and len(set(vector)) < len(vector):
            found.append("the label looks like a list with a number for each class, not a list of classes")
        elif isinstance(label, list) and not multi_label:
            found.append(f"several labels ({len(label)}), where the training rows have one each")
        else:
            found.append("")
    return found


def describe_classes(classes: Sequence[str], counts: Mapping[int, int]) -> str:
    """Every class (20 at most, the most frequent first) with its number of rows: `good (12), bad (8)`."""
    ranked = sorted(range(len(classes)), key=lambda index: -counts[index])
    shown = [f"{_quote_if_needed(classes[index])} ({counts[index]:,})" for index in ranked[:SHOWN_CLASSES]]
    more = len(ranked) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def _quote_if_needed(name: str) -> str:
    """A class name, in quotes if it would be misread in a list."""
    return name if re.fullmatch(r"[\w.+-]([\w .+-]{0,38}[\w.+-])?", name) else short_repr(name)
