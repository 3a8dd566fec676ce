"""What a run would take, before any weight is read: for `hatrack plan` and `hatrack.plan`. Imports no torch, except to
convert a base, or to draw one from its config.json alone.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from hatrack.base.description import BaseDescription, describe_local, is_on_hub
from hatrack.base.free_memory import check_bitsandbytes
from hatrack.base.header import check_task, family
from hatrack.base.hub import describe_on_hub
from hatrack.console import format_size, say
from hatrack.data.complaints import BadRows
from hatrack.data.examples import Examples, add_complaints, read_examples
from hatrack.data.limit import choose_max_length, length_limit
from hatrack.data.token_lengths import row_sizes
from hatrack.errors import RecipeError
from hatrack.planning import fit
from hatrack.planning.fit import Plan, PlanRequest, Workload
from hatrack.planning.machine import check_compute, check_device, machine_named, this_machine
from hatrack.recipe import Recipe

ASSUMED_ROWS, ASSUMED_LENGTH = 1000, 256


@dataclass(frozen=True)
class Forecast:
    """What a run would take. `plan` is the way to train that would be chosen (`fits`, `peak_memory_bytes`, `seconds`,
    `micro_batch`, ...), `ways` all of them by name, `change` the one change that makes it fit where it does not.

    `where` is what it was planned for, `base` what is known of the base.
    """

    plan: Plan
    ways: dict[str, Plan]
    change: str | None
    where: PlanRequest
    base: BaseDescription

    def as_json(self) -> dict[str, Any]:
        """The object `hatrack plan --json` prints."""
        machine, work = self.where.machine, self.where.work
        schedule = self.where.schedule(self.plan.micro_batch)
        return {
            "machine": machine.name,
            "memory_bytes": machine.memory,
            "base": self.base.source,
            "dtype": self.where.dtype,
            "rows": len(work.rows),
            "longest": work.longest,
            "steps": schedule.steps,
            "batch_size": schedule.batch_size,
            "to_download": self.base.to_download,
            "time_from": machine.speed.source if machine.speed else None,
            "change": self.change,
            **self.plan.as_json(),
            "ways": {name: way.as_json() for name, way in self.ways.items()},
        }

    def __repr__(self) -> str:
        needed, there = format_size(self.plan.peak_memory_bytes), format_size(self.where.limit)
        verdict = f"fits: {needed} of {there}" if self.plan.fits else f"does not fit: {needed} needed, {there} there"
        time = "" if self.plan.seconds is None else f", {self.plan.seconds:,.0f} s of training"
        return f"Forecast({verdict}{time}{f'; to change: {self.change}' if self.change else ''})"


def plan(recipe: Recipe, on: str | None = None) -> Forecast:
    """What a run of `recipe` would take here, or `on` another machine (rtx4090, a100, m2, 16GiB, ...).

    Raises RecipeError where options are wrong for the machine, ModelError and DataError as training would.
    """
    if recipe.base is None:
        raise RecipeError("--base is missing", fix="add --base or a line 'base:' to the recipe")
    if not on:
        check_device(recipe.device)
        check_bitsandbytes(recipe.quantize)
    machine = machine_named(on) if on else this_machine(recipe.device, recipe.dtype)
    if on and not machine.accelerator:
        say(f"--on {on}: memory that is free on a CPU which multiplies {machine.dtype}; for a GPU or laptop, its name")
    check_compute(recipe.compute, "an accelerator" if machine.accelerator else "cpu")
    base = _peek(recipe)
    where = fit.make_request(recipe, base, _work(recipe, base), machine)
    chosen = fit.choose_plan(where)
    ways = {
        name: fit.plan_run(where, method)
        for name, method in fit.METHODS.items()
        if machine.can_stream or not method.streamed
    }
    return Forecast(chosen, ways, None if chosen.fits else fit.suggest_change(where, chosen), where, base)


def _later(module: str) -> Any:
    """A module that imports torch, which takes a second: only where it is needed."""
    return importlib.import_module(module)


def _peek(recipe: Recipe) -> BaseDescription:
    if is_on_hub(str(recipe.base)):
        return describe_on_hub(str(recipe.base), recipe.revision)
    found = describe_local(str(recipe.base), recipe.revision)
    folder = Path(str(recipe.base)).expanduser()
    if found is None and folder.is_dir() and not any(_weights(folder)) and (folder / "config.json").is_file():
        say("no weights there: planned from the shapes of config.json")
        return cast(BaseDescription, _later("hatrack.base.shapes").describe_shapes(folder, str(recipe.base)))
    if found is None:
        say("this base has to be converted before anything is known of it")
        return cast(BaseDescription, _later("hatrack.base.sources").find_base(str(recipe.base), recipe.revision))
    return found


def _weights(folder: Path) -> Iterator[Path]:
    """The files of a folder that hold a model's weights."""
    return (path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf"))


def _work(recipe: Recipe, peeked: BaseDescription) -> Workload:
    """The rows of the data and how long they are; without data, so many of a usual length."""
    if recipe.data is None:
        task = recipe.task or ("classify" if family(peeked.config) == "encoder" else "chat")
        check_task(peeked.source, peeked.config, task)
        length = min(recipe.max_length or ASSUMED_LENGTH, _max_length(recipe, peeked, task))
        say(f"no --data: {ASSUMED_ROWS:,} rows of {length} tokens are assumed, task {task}")
        rows = np.full((ASSUMED_ROWS, 2), (length, 0 if task == "classify" else length))
        return Workload(task, 2, rows, rows[: ASSUMED_ROWS // 10])

    def sizes(examples: Examples) -> tuple[Examples, np.ndarray, np.ndarray]:
        check_task(peeked.source, peeked.config, examples.task)
        return row_sizes(recipe, examples, peeked.folder, _max_length(recipe, peeked, examples.task))

    try:
        examples = read_examples(recipe)
    except BadRows as error:
        raise add_complaints(error, sizes) from None
    if not (peeked.folder / "tokenizer.json").is_file():
        say("no tokenizer.json there: the rows' lengths are estimated from their letters")
    examples, learn, held_out = sizes(examples)
    return Workload(examples.task, max(len(examples.labels), 1), learn, held_out)


def _max_length(recipe: Recipe, peeked: BaseDescription, task: str) -> int:
    """The longest row. Raises RecipeError where more is asked than the base can take."""
    limit = length_limit(peeked.tokenizer_config.get("model_max_length"), peeked.config)
    return choose_max_length(recipe.max_length, limit, task)[0]
