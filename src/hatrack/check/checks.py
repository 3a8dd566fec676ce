"""Checks a run for every known gotcha, in the order in which the run would meet them.

What other rooms refuse (an unknown target, rows without labels) is found by calling them. docs/gotchas.md has one
heading per gotcha. Knows nothing of training.
"""

from collections.abc import Sequence
from typing import Any, cast

from hatrack.adapter.count import joined_experts, linear_layers_from_shapes
from hatrack.adapter.targets import ModelLayers, TargetChoice, check_rank, choose_targets
from hatrack.base.code import check_code
from hatrack.base.description import BaseDescription
from hatrack.base.free_memory import check_bitsandbytes
from hatrack.base.header import head_shapes, task_shapes
from hatrack.base.load import choose_device, choose_dtype, dtype_name, load_config, load_tokenizer
from hatrack.base.sources import find_base
from hatrack.check import base, rows, settings
from hatrack.check.finding import Finding, FindingCollector
from hatrack.check.prepared import Prepared
from hatrack.check.reading import read_recipe_examples
from hatrack.console import say
from hatrack.data.examples import Examples
from hatrack.data.tokens import tokenize
from hatrack.errors import RecipeError
from hatrack.planning.fit import Workload, plan_or_raise
from hatrack.planning.machine import check_compute, this_machine
from hatrack.recipe import Recipe, Task

BEFORE_TRAINING = (
    settings.learning_rate_timid,
    settings.learning_rate_wild,
    settings.alpha_far_from_2r,
    settings.rank_before_data,
    settings.float16_overflow,
    rows.labels_are_scores,
    settings.rounding_slower,
    rows.class_imbalance,
    rows.near_duplicates,
    rows.answers_cut,
    rows.template_twice,
    rows.end_never_learned,
    base.wrong_chat_template,
)
"""Fast checks that every run begins with."""

ON_DEMAND = (base.no_chat_template, base.label_count, base.base_already_tuned)
"""Checks for `hatrack check` only: a run reports them elsewhere, or they also hold for many good runs."""


def print_advice(prepared: Prepared) -> None:
    """Runs the fast checks on a run that is about to begin, and prints their findings."""
    for gotcha in BEFORE_TRAINING:
        found = gotcha(prepared)
        if found is not None:
            say(f"advice: {found}")


def check_recipe(recipe: Recipe) -> tuple[list[Finding], Prepared | None]:
    """Returns all findings for a run of `recipe`, and the prepared run, or None if it would be refused.

    Reads rows, headers and the tokenizer, but no weights.
    """
    collector = FindingCollector()
    attempt = collector.attempt
    recipe = recipe.changed(resume=False)
    examples = attempt("rows-refused", _read_rows, recipe)
    files = attempt("base-refused", _find_base, recipe)
    files = attempt("base-code", _with_allowed_code, files)
    task = recipe.task or (examples.task if examples else None)
    labels = examples.labels if examples else ["", ""]  # only their number matters, for the head
    config = attempt("task-and-base", load_config, files, task=cast(Task, task), labels=labels) if task else None
    tokenizer = attempt("tokenizer-refused", load_tokenizer, files)
    shapes = attempt("base-refused", _read_shapes, files, config, task=task, labels=len(labels))
    chosen = attempt("target-names", _choose_targets, recipe, files, config, shapes, task=task)
    attempt("rank-too-large", _check_rank, recipe, chosen)
    tokenized = attempt("nothing-to-learn", tokenize, recipe, examples, tokenizer, config)
    examples, tokens = tokenized or (examples, None)
    dtype = attempt("device-not-there", _choose_dtype, recipe)
    if collector.found or not (examples and files and tokens and dtype and task):
        return collector.found, None
    work = Workload(task, len(examples.labels), tokens.train.sizes, tokens.held_out.sizes)
    planned = attempt("does-not-fit", plan_or_raise, recipe, files, work, this_machine(recipe.device, dtype))
    if planned is None:
        return collector.found, None
    where, plan = planned
    schedule = where.schedule(plan.micro_batch)
    prepared = Prepared(recipe, files, dtype, tokenizer, examples, tokens, plan, schedule)
    return [found for gotcha in (*BEFORE_TRAINING, *ON_DEMAND) if (found := gotcha(prepared)) is not None], prepared


def _read_rows(recipe: Recipe) -> Examples:
    if recipe.data is None:
        raise RecipeError("--data is missing", fix="add --data FILE, or a line 'data: FILE' in the recipe")
    return read_recipe_examples(recipe)


def _find_base(recipe: Recipe) -> BaseDescription:
    if recipe.base is None:
        raise RecipeError("--base is missing", fix="add --base MODEL, or a line 'base: MODEL' in the recipe")
    return find_base(recipe.base, recipe.revision, trust=recipe.trust_remote_code)


def _with_allowed_code(base: BaseDescription) -> BaseDescription:
    check_code(base)
    return base


def _read_shapes(files: BaseDescription, config: Any, *, task: str, labels: int) -> dict[str, tuple[int, ...]]:
    return task_shapes(files.config, files.tensors, task, labels)


def _choose_targets(
    recipe: Recipe, files: BaseDescription, config: Any, shapes: dict[str, tuple[int, ...]], *, task: str
) -> tuple[TargetChoice, dict[str, tuple[int, int]]]:
    """Returns the layers that get an adapter, and all that could: full name -> (d_in, d_out)."""
    heads: Sequence[str] = ()
    if task == "classify":
        heads = sorted({name.rpartition(".")[0] for name in head_shapes(files.config, 1)})
    linears = linear_layers_from_shapes(shapes, str(config.model_type))
    experts = joined_experts(shapes, str(config.model_type))
    return choose_targets(
        ModelLayers(linears, heads=heads, experts=experts), recipe.targets, recipe.top_layers, r=recipe.r
    ), linears


def _check_rank(recipe: Recipe, chosen: tuple[TargetChoice, dict[str, tuple[int, int]]]) -> None:
    check_rank(recipe.r, *chosen)


def _choose_dtype(recipe: Recipe) -> str:
    """Returns the name of the base's dtype on the recipe's device. Raises RecipeError if this machine lacks what the
    recipe asks for."""
    device, _ = choose_device(recipe.device)
    check_compute(recipe.compute, device.type)
    check_bitsandbytes(recipe.quantize)
    return dtype_name(choose_dtype(recipe.dtype, device)[0])
