"""The exceptions hatrack raises on purpose, and the exit code of each.

HatrackError                    exit code 2: the input is wrong or refused
├── RecipeError(ValueError)       an option is unknown, invalid, or conflicts with another
├── ModelError(ValueError)        a base model is missing, has no weights, or cannot be used
├── DataError(ValueError)         data files or rows are invalid; lists every problem
├── TargetError(ValueError)       a target module name matches nothing
├── AdapterError(ValueError)      an adapter folder is missing, damaged or does not fit
│   └── WrongBase                   the adapter was trained on another base
├── Diverged(ArithmeticError)     the loss is not a number, or grows
├── MachineError(RuntimeError)    exit code 1: disk full, out of memory, no network
└── Interrupted                   exit code 130: the user stopped the run
"""

import re
import reprlib
from collections.abc import Sequence

MAX_COMPLAINTS = 10
MAX_CHARACTERS = 2000
"""Longest part of a message, in characters: names and values from files may be of any length."""
CONTROLS_TO_SPACES = dict.fromkeys([*range(32), 127], " ")
"""For `str.translate`: text from other people's files must not control the terminal."""

SWITCHES_IN_PYTHON = {"no_proof": "prove=False"}
SWITCHES_IN_PYTHON |= {
    name: f"{name}=True" for name in ("resume", "force", "overwrite", "merge_labels", "allow_other_base")
}
"""Flags without a value -> how they are written in Python."""

_OPTION = re.compile(
    r"(?<![\w/.-])--(?P<name>[a-z][a-z0-9]*(?:-[a-z0-9]+)*)"
    r"(?: (?:(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?\b(?!\w))"
    r"|(?P<word>\d\w+|top-\w+|auto|all-linear|all|none|skip|refuse|int8|int16|float32|bfloat16|float16"
    r"|classify|chat|complete|lora|cpu|cuda|mps)\b|(?P<placeholder>[A-Z][A-Z_]*)\b))?"
)
_COMMAND = re.compile(
    r"((?:pip install|hatrack (?:train|plan|check|compare|predict|chat|add|rename|remove|list|show|cache))\b[^;,|]*)"
)

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 80, 80, 40


def short_repr(value: object) -> str:
    """The repr of a value, shortened: a few lines of YAML can expand to a list of gigabytes.

    >>> short_repr("x" * 1000) == f"'{'x' * 37}...{'x' * 38}'"
    True
    """
    return _SHORT.repr(value)


def truncate(text: str) -> str:
    """Cuts the middle out of a text longer than `MAX_CHARACTERS`."""
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS // 2]} ... {text[-MAX_CHARACTERS // 2 :]}"


def join_first(items: Sequence[object], count: int) -> str:
    """The first `count` items with commas, and how many more there are.

    >>> join_first(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = len(items) - count
    return ", ".join(map(str, items[:count])) + (f" and {more:,} more" if more > 0 else "")


class OptionStyle:
    """How messages name options: as flags (`--max-length 512`) or as Python arguments (`max_length=512`)."""

    flags = False


def spell_options(text: str) -> str:
    """Rewrites the flags in a message as Python arguments, unless `OptionStyle.flags`. Shell commands stay as they are.

    >>> spell_options("--max-length 512 keeps the answers, or --bad-rows skip; see hatrack add X --name Y")
    'max_length=512 keeps the answers, or bad_rows="skip"; see hatrack add X --name Y'
    >>> spell_options("leave --alpha out; name it with --text COLUMN, or --resume")
    'leave alpha out; name it with text=COLUMN, or resume=True'
    """
    if OptionStyle.flags or "--" not in text:
        return text
    parts = _COMMAND.split(text)
    return "".join(part if index % 2 else _OPTION.sub(_python_argument, part) for index, part in enumerate(parts))


def _python_argument(option: re.Match[str]) -> str:
    name = option["name"].replace("-", "_")
    if option["word"]:
        return f'{name}="{option["word"]}"'
    value = option["number"] or option["placeholder"]
    return f"{name}={value}" if value else SWITCHES_IN_PYTHON.get(name, name)


class HatrackError(Exception):
    """The base class: what is wrong, what was found (`got`), how to fix it (`fix`).

    `gotcha` is the error's heading in docs/gotchas.md, or "".

    >>> str(HatrackError("--r must be at least 1", got=0, fix="use --r 8"))
    'r must be at least 1; got 0; fix: use r=8'
    >>> str(HatrackError("the labels are scores", fix="give classes", gotcha="labels-are-scores"))
    'the labels are scores; fix: give classes [labels-are-scores]'
    """

    exit_code = 2

    def __init__(self, what: str, *, got: object = None, fix: str | None = None, gotcha: str = "") -> None:
        self.what, self.got, self.gotcha = truncate(spell_options(what)), got, gotcha
        self.fix = None if fix is None else spell_options(fix)
        parts = [self.what]
        if got is not None:
            parts.append(f"got {truncate(str(got))}")
        if self.fix is not None:
            parts.append(f"fix: {self.fix}")
        line = "; ".join(parts) + (f" [{gotcha}]" if gotcha else "")
        super().__init__(line.translate(CONTROLS_TO_SPACES))


class RecipeError(HatrackError, ValueError):
    """An option is unknown, invalid, or conflicts with another one."""


class ModelError(HatrackError, ValueError):
    """A base model is missing, has no weights, or cannot do the task."""


class DataError(HatrackError, ValueError):
    """Data files or rows are invalid.

    `complaints` lists every problem; the message shows the first ten and counts the rest.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        fix: str | None = None,
        gotcha: str = "",
        complaints: Sequence[str] = (),
    ) -> None:
        self.complaints = [truncate(complaint) for complaint in complaints]
        shown = self.complaints[:MAX_COMPLAINTS]
        more = len(self.complaints) - len(shown)
        if len(shown) == 1:
            what = f"{what}: {shown[0]}"
            shown = []
        super().__init__(what, got=got, fix=fix, gotcha=gotcha)
        if shown:
            lines = [str(self), *(f"  {line}" for line in shown)]
            if more:
                lines.append(f"  ... and {more:,} more")
            self.args = ("\n".join(lines),)


class TargetError(HatrackError, ValueError):
    """A target module name matches nothing in this model."""


class AdapterError(HatrackError, ValueError):
    """An adapter folder is missing, damaged, or does not fit the model."""


class WrongBase(AdapterError):
    """The adapter was trained on another base."""


class Diverged(HatrackError, ArithmeticError):
    """The run was stopped because its loss is not a number, or grows. The last good checkpoint is kept."""


class MachineError(HatrackError, RuntimeError):
    """The machine failed: the disk is full, memory ran out, or a download failed."""

    exit_code = 1


class Interrupted(HatrackError):
    """The user stopped the run. A checkpoint is saved."""

    exit_code = 130
