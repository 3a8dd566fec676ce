"""Every error hatrack raises on purpose, each with the exit code a shell sees.

HatrackError                  exit 2: the input was wrong, or was refused
├── RecipeError(ValueError)     an option: unknown, out of range, or at odds with another
├── ModelError(ValueError)       a base that is not there, has no weights, or cannot be used
├── DataError(ValueError)       data files and their rows; carries every complaint at once
├── TargetError(ValueError)     layer names that match nothing
├── AdapterError(ValueError)    an adapter folder that is missing, damaged or does not fit
│   └── WrongBase                 ... because it belongs to another base
├── Diverged(ArithmeticError)    a run whose loss is lost: not a number, or growing; its last good checkpoint stays
├── MachineError(RuntimeError)  exit 1: the machine failed: disk full, out of memory, no network
└── Interrupted                 exit 130: stopped by the person, with a checkpoint saved
"""

import re
import reprlib
from collections.abc import Sequence

SHOWN_COMPLAINTS = 10
LONGEST = 2000
"""Characters of a part of a message: names and values in it come from files, and may be of any length."""
ONE_LINE = dict.fromkeys([*range(32), 127], " ")
"""Control characters, as in names from strangers' files: none reaches a terminal."""

SWITCHES = {"no_proof": "prove=False"}
SWITCHES |= {name: f"{name}=True" for name in ("resume", "force", "overwrite", "merge_labels", "allow_other_base")}
"""What options without a value are in Python."""

_OPTION = re.compile(
    r"(?<![\w/.-])--(?P<name>[a-z][a-z0-9]*(?:-[a-z0-9]+)*)"
    r"(?: (?:(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?\b(?!\w))"
    r"|(?P<word>\d\w+|top-\w+|auto|all-linear|all|none|skip|refuse|int8|int16|float32|bfloat16|float16"
    r"|classify|chat|complete|lora|cpu|cuda|mps)\b|(?P<stand_in>[A-Z][A-Z_]*)\b))?"
)
_COMMAND = re.compile(
    r"((?:pip install|hatrack (?:train|plan|check|compare|predict|chat|add|rename|remove|list|show|cache))\b[^;,|]*)"
)

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 80, 80, 40


def short(value: object) -> str:
    """A value of any size in a few words: a few lines of YAML can stand for a list of gigabytes.

    >>> short("x" * 1000) == f"'{'x' * 37}...{'x' * 38}'"
    True
    """
    return _SHORT.repr(value)


def cut(text: str) -> str:
    """A text of at most `LONGEST` characters, the middle of a longer one left out."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


class Words:
    """Whose words messages are in: `flags` says whether options are written as they are typed at a command line."""

    flags = False


def in_words(text: str) -> str:
    """A message about options, written with their flags, in the words of whoever reads it: at the command line as it
    stands, in Python with the options as keyword arguments. Whole commands of a shell stay.

    >>> in_words("--max-length 512 keeps the answers, or --bad-rows skip; see hatrack add X --name Y")
    'max_length=512 keeps the answers, or bad_rows="skip"; see hatrack add X --name Y'
    >>> in_words("leave --alpha out; name it with --text COLUMN, or --resume")
    'leave alpha out; name it with text=COLUMN, or resume=True'
    """
    if Words.flags or "--" not in text:
        return text
    parts = _COMMAND.split(text)
    return "".join(part if index % 2 else _OPTION.sub(_argument, part) for index, part in enumerate(parts))


def _argument(option: re.Match[str]) -> str:
    name = option["name"].replace("-", "_")
    if option["word"]:
        return f'{name}="{option["word"]}"'
    value = option["number"] or option["stand_in"]
    return f"{name}={value}" if value else SWITCHES.get(name, name)


class HatrackError(Exception):
    """An error a person can act on: what was asked, what was found, how to fix it.

    `gotcha` is its heading in docs/gotchas.md, where it has one of its own.

    >>> str(HatrackError("--r must be at least 1", got=0, fix="use --r 8"))
    'r must be at least 1; got 0; fix: use r=8'
    >>> str(HatrackError("the labels are scores", fix="give classes", gotcha="labels-are-scores"))
    'the labels are scores; fix: give classes [labels-are-scores]'
    """

    exit_code = 2

    def __init__(self, what: str, *, got: object = None, fix: str | None = None, gotcha: str = "") -> None:
        self.what, self.got, self.gotcha = cut(in_words(what)), got, gotcha
        self.fix = None if fix is None else in_words(fix)
        parts = [self.what]
        if got is not None:
            parts.append(f"got {cut(str(got))}")
        if self.fix is not None:
            parts.append(f"fix: {self.fix}")
        line = "; ".join(parts) + (f" [{gotcha}]" if gotcha else "")
        super().__init__(line.translate(ONE_LINE))


class RecipeError(HatrackError, ValueError):
    """An option is unknown, out of range, or at odds with another one."""


class ModelError(HatrackError, ValueError):
    """A base model is not where it was said to be, has no weights, or cannot do the task."""


class DataError(HatrackError, ValueError):
    """Rows that cannot be learned from.

    Holds every complaint (`complaints`); the message shows the first ten and how many more there are.
    A single complaint stays on one line.
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
        self.complaints = [cut(complaint) for complaint in complaints]
        shown = self.complaints[:SHOWN_COMPLAINTS]
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
    """A target layer name matches nothing in this model."""


class AdapterError(HatrackError, ValueError):
    """An adapter folder is missing, damaged, or does not fit the model."""


class WrongBase(AdapterError):
    """An adapter was asked onto a base it was not trained on."""


class Diverged(HatrackError, ArithmeticError):
    """A run was stopped because its loss is lost: not a number, or growing. The last good checkpoint stays."""


class MachineError(HatrackError, RuntimeError):
    """The machine failed, not the input: the disk is full, memory ran out, a download broke."""

    exit_code = 1


class Interrupted(HatrackError):
    """The person stopped the run; what was learned so far is in a checkpoint."""

    exit_code = 130
