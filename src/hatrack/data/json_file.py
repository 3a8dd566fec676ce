"""Reads rows from JSON and JSON Lines. Says so if the layout is not the one of the file's ending.

Knows nothing of encodings, tasks or labels.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from hatrack.console import say_once
from hatrack.data.table import Rows, from_objects
from hatrack.errors import DataError, short_repr

LARGEST_LITERAL = 2**26
"""Characters of the longest text given to Python's parser, which needs many times their memory."""

ARRAY = "holds one array"
"""The usual layout of a .json file."""
_BEGINNING, _BETWEEN = re.compile(r"\s*\[?\s*"), re.compile(r"\s*,?\s*")

JSON_TYPES = {str: "a text", list: "an array", int: "a number", float: "a number", bool: "true or false"}
JSON_TYPES |= {type(None): "null"}

Values = list[Any]
"""The values in a file, normally objects; a ValueError for each line that is not JSON."""

Layout = Callable[[str, Any], tuple[Values, str] | None]
"""Called with a text, and its value or the ValueError of parsing it; returns its values and a name for the layout."""


def read_json_lines(source: str, text: str) -> Rows:
    """The rows of a JSON Lines file: one object per line. Says so if the layout is another one.

    A line that is not an object becomes a problem. Raises DataError if most lines are not.
    """
    values, python_count = _parse_lines(text)
    good = sum(isinstance(value, dict) for value in values)
    layouts = (_one_array, _under_a_key, _one_by_one, _python_list) if good < len(values) else (_under_a_key,)
    found = _other_layout(text, layouts) if good < len(values) or len(values) == 1 else None
    if found:
        say_once(f"{source} {found[1]}, not one object per line: read as such")
        return _make_rows(source, found[0])
    if 2 * good < len(values):
        raise _not_json(source, text, "JSON Lines", values)
    if python_count:
        lines = f"{python_count:,} lines are" if python_count > 1 else "a line is"
        say_once(f"{source}: {lines} not JSON but objects as Python prints them: read as such")
    return _make_rows(source, values)


def read_json_array(source: str, text: str) -> Rows:
    """The rows of a JSON file: one array of objects. Says so if the layout is another one.

    Raises DataError if there are none, with the line in which the text stops being JSON.
    """
    if not text.strip():
        return Rows(source, (), [], [])
    found = _other_layout(text, (_one_array, _under_a_key, _as_columns, _object_lines, _one_by_one, _python_list))
    if found is None or (found[0] and not any(isinstance(value, dict) for value in found[0])):
        raise _not_json(source, text, "JSON", found[0] if found else [])
    if found[1] != ARRAY:
        say_once(f"{source} {found[1]}, not one array of objects: read as such")
    return _make_rows(source, found[0])


def _make_rows(source: str, values: Values) -> Rows:
    rows, problems = [], []
    for number, value in enumerate(values, 1):
        repeated = _find_repeated_key(value)
        if repeated is not None:
            problems.append((number, f"the key {short_repr(repeated)} occurs twice with different values"))
        elif isinstance(value, dict):
            rows.append((number, value))
        elif isinstance(value, ValueError):
            why = (
                f"{value.msg.removesuffix(' at')} at character {value.pos + 1}"
                if isinstance(value, json.JSONDecodeError)
                else value
            )
            problems.append((number, f"malformed JSON: {why}"))
        else:
            problems.append((number, f"{type(value).__name__} where an object was expected"))
    return from_objects(source, rows, problems)


def split_lines(text: str) -> list[str]:
    """The lines of a text, split at `\\r\\n`, `\\r` and `\\n` but not at other line ends of Unicode."""
    return re.split(r"\r\n|\r|\n", text)


def _parse_lines(text: str) -> tuple[Values, int]:
    """The value of each line that is not empty, and how many of them are objects as Python prints them."""
    values: Values = []
    python_count = 0
    for line in split_lines(text):
        if line.strip():
            value = _loads(line)
            if isinstance(value, ValueError) and line.lstrip().startswith("{"):
                literal = _parse_literal(line)
                if isinstance(literal, dict):
                    value, python_count = literal, python_count + 1
            values.append(value)
    return values, python_count


def _other_layout(text: str, layouts: Sequence[Layout]) -> tuple[Values, str] | None:
    """The values and the name of the first layout that fits the whole text."""
    whole = _loads(text)
    for layout in layouts:
        found = layout(text, whole)
        if found:
            return found
    return None


def _one_array(text: str, whole: Any) -> tuple[Values, str] | None:
    return (whole, ARRAY) if isinstance(whole, list) else None


def _under_a_key(text: str, whole: Any) -> tuple[Values, str] | None:
    """`{"data": [{...}, ...]}`. One conversation under `messages` is not a list of rows."""
    if not isinstance(whole, dict) or isinstance(whole, _RepeatedKey):
        return None
    lists = {key: value for key, value in whole.items() if _are_objects(value)}
    keys = [key for key, value in lists.items() if not {"role", "from"} & set(value[0])]
    return (lists[keys[0]], f"has its rows under the key {keys[0]!r}") if len(keys) == 1 == len(lists) else None


def _as_columns(text: str, whole: Any) -> tuple[Values, str] | None:
    """`{"text": {"0": ..., "1": ...}, ...}` as pandas' to_json writes it, or with a list per column."""
    if not isinstance(whole, dict) or isinstance(whole, _RepeatedKey) or len(whole) < 2:
        return None
    if any(_are_objects(value) for value in whole.values()):
        return None
    columns = list(whole.values())
    if set(whole) == {"columns", "index", "data"}:  # pandas' orient="split"
        names, cells = whole["columns"], whole["data"]
        fits = all(isinstance(row, list) and isinstance(names, list) and len(row) == len(names) for row in cells or [])
        return ([dict(zip(map(str, names), row, strict=True)) for row in cells], "holds columns") if fits else None
    if all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        rows = zip(*columns, strict=True)
    elif all(isinstance(column, dict) and column and column.keys() == columns[0].keys() for column in columns):
        if not all(key.isdigit() for key in columns[0]) or any(key.isdigit() for key in whole):
            return None
        rows = zip(*(column.values() for column in columns), strict=True)
    else:
        return None
    return [dict(zip(whole, row, strict=True)) for row in rows], "holds columns"


def _object_lines(text: str, whole: Any) -> tuple[Values, str] | None:
    values, _ = _parse_lines(text)
    fits = len(values) > 1 and _are_objects(values)
    return (values, "holds one object per line") if fits else None


def _one_by_one(text: str, whole: Any) -> tuple[Values, str] | None:
    """Objects over several lines, with or without commas between them and brackets around them."""
    if not isinstance(whole, ValueError):
        return None
    try:
        values, position = _decode_objects(text)
    except (ValueError, RecursionError):
        return None
    opened = text.lstrip().startswith("[")
    words = "holds an array with a comma before its end" if opened else "holds objects one after another"
    return (values, words) if values and text[position:].strip() == ("]" if opened else "") else None


def _decode_objects(text: str) -> tuple[Values, int]:
    """The objects from the beginning of a text, and the position after the last.

    Raises JSONDecodeError if one is malformed.
    """
    values = []
    position = _skip(_BEGINNING, text, 0)
    while text[position : position + 1] == "{":
        value, position = _DECODER.raw_decode(text, position)
        values.append(value)
        position = _skip(_BETWEEN, text, position)
    return values, position


def _skip(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return found.end() if found else position


def _python_list(text: str, whole: Any) -> tuple[Values, str] | None:
    """A list as Python prints it."""
    value: Any = _parse_literal(text) if isinstance(whole, ValueError) else None
    return (value, "holds a list as Python prints it") if _are_objects(value) else None


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _loads(text: str) -> Any:
    """The value of a text, or the ValueError of parsing it."""
    try:
        return _DECODER.decode(text)
    except ValueError as error:
        return error
    except RecursionError:
        return ValueError("nested too deeply")


class _RepeatedKey(dict[str, Any]):
    """An object that has `key` twice with different values. JSON parsers silently use the last."""

    key = ""


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = _RepeatedKey(found)
        for key, value in pairs:
            if value != found[key]:
                repeated.key = key
                return repeated
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_make_object)


def _find_repeated_key(value: Any) -> str | None:
    """A key that occurs twice in an object anywhere in a value."""
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if isinstance(current, _RepeatedKey):
            return current.key
        if isinstance(current, dict | list):
            waiting += current.values() if isinstance(current, dict) else current
    return None


def _parse_literal(text: str) -> Any:
    """The value that Python prints as this text; None if there is none, or JSON cannot hold it."""
    if len(text) > LARGEST_LITERAL or text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a backslash that escapes nothing
            return json.loads(json.dumps(ast.literal_eval(text.strip())))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _not_json(source: str, text: str, wanted: str, values: Values) -> DataError:
    """The error for a text without rows: says where it stops being JSON, or what it holds instead."""
    whole = _loads(text)
    what, fix = f"{source} is not valid {wanted}", "give one object per line, or one array of objects"
    if isinstance(whole, dict):
        what, got = f"{source} must hold one array of objects", f"one object with the keys {', '.join(whole)[:80]}"
        got = f"one object with the key {short_repr(whole.key)} twice" if isinstance(whole, _RepeatedKey) else got
        has_several_lists = sum(_are_objects(value) for value in whole.values()) > 1
        fix = "put the rows of one key into a file of their own" if has_several_lists else "put the rows in [...]"
    elif not isinstance(whole, ValueError) or (values and not any(isinstance(v, ValueError | dict) for v in values)):
        what, first = f"{source} must hold objects", values[0] if values else whole
        got = f"{JSON_TYPES.get(type(first), type(first).__name__)} as the first row"
        fix = "give one object per line" if _are_objects(first) else 'write each row as {"text": ...}'
        if _are_objects(first) and {"role", "from"} & set(first[0]):
            fix = 'write each row as {"messages": [...]}'
    else:
        got = _describe_error(text, whole)
        if not text.lstrip().startswith(("{", "[")):
            fix = "name it .csv if it is a table"
    return DataError(what, got=got, fix=fix, gotcha="json-layout")


def _describe_error(text: str, whole: ValueError) -> str:
    """Describes where a text stops being JSON objects, and why. `whole` is the error of parsing all of it."""
    if not isinstance(whole, json.JSONDecodeError):
        return str(whole)
    try:
        _, position = _decode_objects(text)
        why = "an object was expected"
    except json.JSONDecodeError as error:
        position, why = error.pos, error.msg
    except RecursionError:
        return "nested too deeply"
    line = len(split_lines(text[:position]))
    shown = split_lines(text[position : position + 200])[0].strip()
    if shown.startswith(("//", "/*", "#")):
        why = "a comment, which JSON does not have"
    return f"line {line}: {why}: " + (repr(shown[:40]) if shown else "the end of the file")
