"""Every option of a run, once: its type, default, help text and the way out when it is wrong.

The command line's flags, the YAML's validation and docs/options.md are generated from these fields.
Knows nothing of models or data: an option left `None` is derived later, where the facts are, and said aloud.
"""

import difflib
import math
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from hatrack.errors import OptionStyle, RecipeError, short_repr
from hatrack.option_aliases import NOT_NEEDED, OTHER_NAMES

Task = Literal["classify", "chat", "complete"]

DEEPEST = 3
"""Options, their lists, and one more, so that a wrong value is told with the option's name."""

UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "kib": 2**10, "m": 10**6, "mb": 10**6, "mib": 2**20}
UNITS |= {"g": 10**9, "gb": 10**9, "gib": 2**30, "t": 10**12, "tb": 10**12, "tib": 2**40}


def parse_size(text: str) -> int:
    """`3GiB` or `800 MB` in bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in UNITS:
        raise ValueError("must be a size such as 3GiB or 800MB")
    return int(float(match[1]) * UNITS[match[2]])


def _memory(value: object) -> object:
    """Turns a size into bytes; what is none is left to the check of its type."""
    if value is None or isinstance(value, bool) or not isinstance(value, str | int):
        return value
    return parse_size(str(value))


def parse_memory(value: str | int | None) -> int | None:
    """The bytes of a size such as `3GiB`, as --memory takes it where there is no recipe. Raises RecipeError."""
    try:
        found = _memory(value)
    except ValueError as error:
        raise RecipeError(f"--memory {error}", got=repr(value), fix="try 4GiB") from error
    if found is not None and type(found) is not int:
        raise RecipeError("--memory must be a size", got=repr(value), fix="try 4GiB")
    return found


def _layers(value: str) -> str:
    if value not in ("all", "auto") and not re.fullmatch(r"top-[1-9][0-9]*", value):
        raise ValueError("must be all, auto, or top-N such as top-4")
    return value


def _path(value: object) -> object:
    """A path as text."""
    return str(value) if isinstance(value, Path) else value


FilePath = Annotated[str | None, BeforeValidator(_path)]


def _names(value: object) -> object:
    """A YAML list of names is the same as names with commas."""
    return ",".join(value) if isinstance(value, list) and all(isinstance(name, str) for name in value) else value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _rate(value: object) -> object:
    """A learning rate: a number above 0, or `auto`."""
    if value is None or value == "auto":
        return value
    try:
        number = float(str(value) if isinstance(value, str | int | float) else "")
    except ValueError as error:
        raise ValueError("must be a number, or auto") from error
    if not math.isfinite(number) or number <= 0:
        raise ValueError("must be greater than 0" if math.isfinite(number) else "must be a finite number")
    return number


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise ValueError("must be letters, digits, '.', '_' or '-', starting with a letter or digit, at most 64")
    return value


RECIPES = (".yaml", ".yml")
"""How the names of recipe files end."""


def option(default: Any, help: str, *, group: str, word: str = "", fix: str = "", **limits: Any) -> Any:
    """A field of the recipe: its help text, the heading it is listed under, the word that stands for its value in the
    help, and the advice when it is wrong."""
    return Field(default, description=help, json_schema_extra={"group": group, "word": word, "fix": fix}, **limits)


class Recipe(BaseModel):
    """What to train, on what, and how. Frozen once made: `recipe.changed(r=16)` gives another one.

    Raises RecipeError, naming every wrong option, when made by `make`, `read` or `changed`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: FilePath = option(
        None,
        "The pretrained model: a hub id, a folder, a .gguf file, pypi:NAME==VERSION or pypi:NAME==VERSION/path.",
        group="Base",
        word="MODEL",
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub base.", group="Base", word="NAME")
    trust_remote_code: str | None = option(
        None,
        "Name of the base once more, where it needs code of its own and may run it. Never kept, and never taken "
        "from a file of the base or an adapter.",
        group="Base",
        word="MODEL",
    )
    task: Task | None = option(
        None,
        "What to learn. Without it, the columns of the data decide.",
        group="Base",
        fix="use classify, chat or complete",
    )

    data: FilePath = option(
        None,
        "Training rows: a .csv, .tsv, .json, .jsonl (also .gz, .bz2) or .parquet file, a hub data set, or "
        "pypi:NAME==VERSION/path.",
        group="Data",
        word="FILE",
    )
    eval_data: FilePath = option(
        None, "Held-out rows. Without it, a part of the training rows is held out.", group="Data", word="FILE"
    )
    text: str | None = option(None, "Column that holds the text.", group="Data", word="COLUMN")
    label: str | None = option(None, "Column that holds the label, or a list of labels.", group="Data", word="COLUMN")
    prompt: str | None = option(None, "Column that holds what the person says.", group="Data", word="COLUMN")
    completion: str | None = option(None, "Column that holds the answer to learn.", group="Data", word="COLUMN")
    messages: str | None = option(None, "Column that holds a whole conversation.", group="Data", word="COLUMN")
    max_length: int | None = option(
        None, "Longest row in tokens; longer ones are cut, and counted.", group="Data", word="N", ge=4, fix="try 512"
    )
    bad_rows: Literal["refuse", "skip"] = option(
        "refuse", "Rows that cannot be learned from: refuse to start, or leave them out.", group="Data"
    )
    merge_labels: bool = option(
        False, "Take labels that differ only in spelling (Yes, yes) for one: the commonest spelling.", group="Data"
    )

    r: int = option(8, "Rank of the adapter: its width.", group="Adapter", word="N", ge=1, fix="try 8")
    alpha: float | None = option(
        None,
        "Scale of the adapter, alpha / r. Default: 2 x r.",
        group="Adapter",
        word="NUMBER",
        gt=0,
        fix="leave it out for 2 x r",
    )
    dropout: float = option(
        0.05, "Dropout inside the adapter.", group="Adapter", word="NUMBER", ge=0, lt=1, fix="try 0.05"
    )
    targets: Annotated[str, BeforeValidator(_names)] = option(
        "auto",
        "Layers that get an adapter: auto (attention and MLP projections), all-linear, or NAME,NAME.",
        group="Adapter",
        word="NAMES",
        min_length=1,
        fix="use auto",
    )
    layers: Annotated[str, AfterValidator(_layers)] = option(
        "all",
        "Depth of the adapter: all, top-N for the last N layers, or auto: as few as a short comparison finds enough.",
        group="Adapter",
        word="all|auto|top-N",
        fix="use all or top-4",
    )
    variant: Literal["lora", "dora", "rslora", "pissa"] = option(
        "lora", "Kind of adapter.", group="Adapter", fix="use lora, dora, rslora or pissa"
    )

    epochs: Annotated[float, AfterValidator(_finite)] | None = option(
        None,
        "Passes over the training rows. Default: derived from their number.",
        group="Training",
        word="NUMBER",
        gt=0,
        fix="try 3",
    )
    steps: int | None = option(
        None, "Optimizer steps, instead of epochs.", group="Training", word="N", ge=1, fix="try 100, or use --epochs"
    )
    lr: Annotated[float | Literal["auto"] | None, BeforeValidator(_rate)] = option(
        None,
        "Peak learning rate, or auto to measure it in 20 steps. Default: derived from the size of the model.",
        group="Training",
        word="NUMBER|auto",
        fix="try 1e-3",
    )
    batch_size: int | None = option(
        None, "Rows a step. Default: derived from their number.", group="Training", word="N", ge=1, fix="try 16"
    )
    seed: int = option(
        0, "Seed of the held-out split, the order and the start values.", group="Training", word="N", ge=0, lt=2**32
    )
    report_to: Annotated[str, BeforeValidator(_names)] = option(
        "none", "Experiment trackers beside metrics.jsonl, such as tensorboard,wandb.", group="Training", word="NAMES"
    )

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$")] = option(
        "auto", "Where to compute: auto, cpu, cuda, mps or xpu.", group="Machine", word="NAME", fix="use auto"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Number format of the frozen base.", group="Machine", fix="use auto"
    )
    quantize: Literal["none", "8bit", "4bit"] = option(
        "none", "Hold the frozen base in fewer bits (needs hatrack[quantize]).", group="Machine"
    )
    compute: Literal["auto", "int16", "int8"] = option(
        "auto",
        "What training multiplies the frozen base's matrices in, on a processor: auto (exact, in the base's number "
        "format), or rounded to int16 or int8, which is faster where the processor has no bfloat16.",
        group="Machine",
        fix="use auto, int16 or int8",
    )
    memory: Annotated[int | None, BeforeValidator(_memory)] = option(
        None, "The most memory the run may take, such as 3GiB.", group="Machine", word="SIZE", gt=0, fix="try 4GiB"
    )
    cache_limit: Annotated[int | None, BeforeValidator(_memory)] = option(
        None,
        "With --layers top-N: the most disk that results of the layers below may take, such as 10GiB; 0 keeps none. "
        "Default: half of what is free.",
        group="Machine",
        word="SIZE",
        ge=0,
        fix="try 10GiB",
    )
    force: bool = option(False, "Start even where the plan says that memory is too little.", group="Machine")

    output: FilePath = option(
        None, "Folder of the finished adapter. Default: the name, in the current folder.", group="Output", word="FOLDER"
    )
    name: Annotated[str, AfterValidator(_name)] | None = option(
        None,
        "Name on the rack. Default: from the data file, with -2, -3, ... where that is taken.",
        group="Output",
        word="NAME",
        fix="use a name such as support-2",
    )
    overwrite: bool = option(
        False, "Replace the adapter that has the output's place or name, once the new one is finished.", group="Output"
    )
    resume: bool = option(
        False,
        "Go on from the checkpoint of an interrupted run: that of --output or --name, or else the only one here.",
        group="Output",
    )

    @classmethod
    def make(cls, **options: Any) -> Self:
        """A recipe from keyword options; every wrong one is reported, not only the first."""
        unknown = [name for name in options if name not in cls.model_fields]
        if unknown:
            raise RecipeError("; ".join(_unknown(name, cls.model_fields) for name in unknown))
        try:
            recipe = cls(**options)
        except ValidationError as error:
            raise RecipeError(" | ".join(_wrong(problem, cls.model_fields) for problem in error.errors())) from error
        recipe._agree()
        if recipe.compute != "auto":  # what is not multiplied with the base's matrices stays exact
            recipe = recipe.model_copy(update={"dtype": "float32"})
        return recipe

    @classmethod
    def read(cls, path: str | Path, **flags: Any) -> Self:
        """A recipe from a YAML file; `flags` win over what the file says."""
        path = Path(path)
        try:
            content = _flat_yaml(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RecipeError("there is no such recipe file", got=path, fix="check the path") from error
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError("the recipe file cannot be read", got=f"{path}: {error}") from error
        except Exception as error:  # of a date or a number that is none, the library raises whatever it met
            problem = " ".join(str(error).split())[:300]
            raise RecipeError(
                "the recipe is not valid YAML", got=f"{path}: {problem}", fix="one 'name: value' a line"
            ) from error
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise RecipeError("a recipe is lines of 'name: value'", got=f"{path}: {type(content).__name__}")
        options = {name.replace("-", "_"): value for name, value in content.items()}
        return cls.make(**(options | flags))

    @classmethod
    def of(cls, path: str | Path, **options: Any) -> Self:
        """The recipe in a .yaml file, or a recipe for the rows in any other one; `options` win.

        Raises RecipeError where the rows are named by `data` too.
        """
        if Path(path).suffix.lower() in RECIPES:
            return cls.read(path, **options)
        if options.get("data") is not None:
            raise RecipeError("the data is named twice", got=f"{path} and {options['data']}", fix="keep one")
        return cls.make(**options | {"data": str(path)})

    def changed(self, **options: Any) -> Self:
        """The same recipe with some options replaced."""
        return self.make(**(self.model_dump(exclude_unset=True) | options))

    def explicit_options(self) -> dict[str, Any]:
        """The options a person set, without the defaults, to be kept; trust is not: it is asked for each time."""
        return self.model_dump(exclude_unset=True, exclude_none=True, exclude={"trust_remote_code"})

    def __repr__(self) -> str:
        """The options a person set."""
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in self.explicit_options().items())})"

    @property
    def effective_alpha(self) -> float:
        """alpha, by default twice the rank, so that the adapter's scale does not move when r does."""
        return 2.0 * self.r if self.alpha is None else self.alpha

    @property
    def top_layers(self) -> int | None:
        """N of `top-N`, or None for all layers, and as long as `auto` has not been decided."""
        return None if self.layers in ("all", "auto") else int(self.layers.removeprefix("top-"))

    def _agree(self) -> None:
        """Raises RecipeError where two options contradict each other."""
        if self.steps is not None and self.epochs is not None:
            raise RecipeError(
                "--steps and --epochs exclude each other", got=f"{self.steps} and {self.epochs}", fix="keep one"
            )
        if self.compute != "auto" and self.dtype not in ("auto", "float32"):
            raise RecipeError(
                f"--compute {self.compute} goes with float32", got=f"--dtype {self.dtype}", fix="leave one of them out"
            )
        if self.compute != "auto" and self.quantize == "8bit":
            raise RecipeError(
                f"--compute {self.compute} and --quantize 8bit exclude each other", fix="keep one, or use 4bit"
            )
        columns = {"text": self.text, "label": self.label, "prompt": self.prompt}
        columns |= {"completion": self.completion, "messages": self.messages}
        taken: dict[str, str] = {}
        for role, column in columns.items():
            if column is not None and column in taken:
                raise RecipeError(
                    f"--{taken[column]} and --{role} name the same column",
                    got=column,
                    fix=f"give --{role} its own column",
                )
            if column is not None:
                taken[column] = role
        if (self.prompt is None) != (self.completion is None):
            missing = "completion" if self.completion is None else "prompt"
            raise RecipeError(
                "--prompt and --completion belong together", got="only one", fix=f"add --{missing} COLUMN"
            )


def _flat_yaml(text: str) -> Any:
    """The content of YAML without deep nesting, which no recipe has, and which takes the library quadratic time."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError("nested too deeply")
    return yaml.safe_load(text)


def flag(name: str, value: object = None) -> str:
    """The option as it is typed, `--eval-data` for `eval_data`. With a value it is in the reader's words already
    (`hatrack.errors.spell_options`), as a name in a sentence could be any word of it.

    >>> flag("eval_data"), flag("eval_data", "new.csv")
    ('--eval-data', 'eval_data="new.csv"')
    """
    option = "--" + name.replace("_", "-")
    if value is None:
        return option
    return f"{option} {shlex.quote(str(value))}" if OptionStyle.flags else f'{name}="{value}"'


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words a field accepts, where it accepts only some; also inside `Optional`."""
    options = get_args(field.annotation)
    if options and not all(isinstance(word, str) for word in options):
        kinds = [part for part in options if part is not type(None)]
        options = get_args(kinds[0]) if len(kinds) == 1 else ()
    return tuple(word for word in options if isinstance(word, str))


def option_detail(field: FieldInfo, what: str) -> str:
    """`group`, `word` or `fix` of a field, as `option` got it."""
    extra = field.json_schema_extra
    return str(extra[what]) if isinstance(extra, dict) else ""


def nearest(name: str, names: Any) -> str | None:
    """The known name that `name` was most likely meant to be."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def suggest_option(name: str, known: Any) -> str | None:
    """The option that a name which is none was most likely meant to be, as `lr` or, with a value, `quantize 4bit`; or
    a sentence where hatrack has no such option on purpose. Names of other tools count: `learning_rate`."""
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip("-")).replace("-", "_").lower()
    meant = OTHER_NAMES.get(plain)
    if meant is not None and meant.partition(" ")[0] in known:
        return meant
    return nearest(plain, known) or (NOT_NEEDED.get(plain) if "lr" in known else None)


def _unknown(name: str, known: Any) -> str:
    meant = suggest_option(name, known)
    if meant is None:
        hint = f"the options are {', '.join(known)}"
    else:
        option, _, value = meant.partition(" ")
        hint = f"did you mean {option}{f': {value}' if value else ''}?" if option in known else f"leave it out: {meant}"
    return f"there is no option {name!r}; {hint}"


def _wrong(problem: Any, fields: dict[str, FieldInfo]) -> str:
    name = str(problem["loc"][0])
    reason = problem["msg"].removeprefix("Value error, ")
    words, value = choices(fields[name]), problem["input"]
    if words:
        guess = nearest(value, words) if isinstance(value, str) else None
        reason = f"must be one of {', '.join(words)}" + (f"; did you mean {guess}?" if guess else "")
    fix = option_detail(fields[name], "fix")
    reason = reason.replace("Input should", "must").replace("String should match", "must match")
    return str(RecipeError(f"{flag(name)} {reason}", got=short_repr(value), fix=fix or None))
