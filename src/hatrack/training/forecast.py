"""`hatrack plan` and `hatrack.plan`: forecasts a run before any weight is read.

Refuses what training would refuse. Imports torch and transformers only where they are needed: to convert a base, to
derive shapes from its config.json alone, and to check for a base's own code or for experiment trackers.
"""

import dataclasses
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
    """The memory, disk space and time that a run would take.

    `plan`: the plan that training would follow (`fits`, `peak_memory_bytes`, `seconds`, ...). `ways`: the plan of each
    training method by name, such as "LoRA, 4-bit base". `change`: the change of options that would make the run fit;
    None if it fits or if no change helps. `where`: the recipe, model, rows and machine of the plan. `base`: the base's
    description.
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
            "rows": len(work.row_sizes),
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
        needed, limit = format_size(self.plan.peak_memory_bytes), format_size(self.where.limit)
        verdict = (
            f"fits: {needed} of {limit}" if self.plan.fits else f"does not fit: {needed} needed, {limit} available"
        )
        time = "" if self.plan.seconds is None else f", {self.plan.seconds:,.0f} s of training"
        return f"Forecast({verdict}{time}{f'; to change: {self.change}' if self.change else ''})"


def plan(recipe: Recipe, on: str | None = None) -> Forecast:
    """Plans a run of `recipe` on this machine, or `on` another machine (rtx4090, a100, m2, 16GiB, ...).

    Raises RecipeError if options do not suit the machine, and the same ModelError and DataError as training.
    """
    if recipe.base is None:
        raise RecipeError("--base is missing", fix="add --base or a line 'base:' to the recipe")
    if recipe.report_to != "none":
        _import("hatrack.training.trackers").check_trackers(recipe)
    if not on:
        check_device(recipe.device)
        check_bitsandbytes(recipe.quantize)
    machine = machine_named(on) if on else this_machine(recipe.device, recipe.dtype)
    if on and not machine.accelerator:
        say(f"--on {on}: memory that is free on a CPU which multiplies {machine.dtype}; for a GPU or laptop, its name")
    check_compute(recipe.compute, "an accelerator" if machine.accelerator else "cpu")
    base = _describe_base(recipe)
    request = fit.make_request(recipe, base, _workload(recipe, base), machine)
    chosen = fit.choose_plan(request)
    ways = {
        name: fit.plan_run(request, method)
        for name, method in fit.METHODS.items()
        if machine.can_stream or not method.streamed
    }
    return Forecast(chosen, ways, None if chosen.fits else fit.suggest_change(request, chosen), request, base)


def _import(module: str) -> Any:
    """Imports a module of hatrack that needs torch or transformers. Called late, because that takes a second."""
    return importlib.import_module(module)


def _describe_base(recipe: Recipe) -> BaseDescription:
    """Reads the small files of the base. Raises ModelError where it needs code of its own that is not trusted."""
    if recipe.trust_remote_code is not None:
        _import("hatrack.base.sources").check_trusted_name(recipe.trust_remote_code, str(recipe.base))
    base = _find_description(recipe)
    is_trusted = recipe.trust_remote_code is not None
    has_code = "auto_map" in base.config or "auto_map" in base.tokenizer_config
    if has_code and not (is_trusted and base.to_download):  # trusted code on the hub is downloaded by training
        _import("hatrack.base.code").check_code(dataclasses.replace(base, trusted=is_trusted))
    return base


def _find_description(recipe: Recipe) -> BaseDescription:
    source = str(recipe.base)
    if is_on_hub(source):
        return describe_on_hub(source, recipe.revision)
    base = describe_local(source, recipe.revision)
    folder = Path(source).expanduser()
    if base is None and folder.is_dir() and not any(_weight_files(folder)) and (folder / "config.json").is_file():
        say("the base's folder has no weights: planned from the shapes in config.json")
        return cast(BaseDescription, _import("hatrack.base.shapes").describe_shapes(folder, source))
    if base is None:
        say("this base has to be converted before it can be planned for")
        return cast(BaseDescription, _import("hatrack.base.sources").find_base(source, recipe.revision))
    return base


def _weight_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf"))


def _workload(recipe: Recipe, base: BaseDescription) -> Workload:
    """Reads the rows' lengths. Without data, assumes 1,000 rows of 256 tokens."""
    if recipe.data is None:
        task = recipe.task or ("classify" if family(base.config) == "encoder" else "chat")
        check_task(base.source, base.config, task)
        length = min(recipe.max_length or ASSUMED_LENGTH, _max_length(recipe, base, task))
        say(f"no --data: {ASSUMED_ROWS:,} rows of {length} tokens are assumed, task {task}")
        rows = np.full((ASSUMED_ROWS, 2), (length, 0 if task == "classify" else length))
        return Workload(task, 2, rows, rows[: ASSUMED_ROWS // 10])

    def count(examples: Examples) -> tuple[Examples, np.ndarray, np.ndarray]:
        check_task(base.source, base.config, examples.task)
        return row_sizes(recipe, examples, base.folder, _max_length(recipe, base, examples.task))

    try:
        examples = read_examples(recipe)
    except BadRows as error:
        raise add_complaints(error, count) from None
    if not (base.folder / "tokenizer.json").is_file():
        say("the base has no tokenizer.json: the rows' lengths are estimated from their characters")
    examples, rows, held_out = count(examples)
    return Workload(examples.task, max(len(examples.labels), 1), rows, held_out)


def _max_length(recipe: Recipe, base: BaseDescription, task: str) -> int:
    """The longest row in tokens. Raises RecipeError where --max-length is more than the base can take."""
    limit = length_limit(base.tokenizer_config.get("model_max_length"), base.config)
    return choose_max_length(recipe.max_length, limit, task)[0]
