"""`hatrack plan`: what a run will take, before any weight is read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hatrack.cli.options import Json, with_recipe
from hatrack.cli.spare import leave_out
from hatrack.cli.tables import print_columns
from hatrack.errors import RecipeError
from hatrack.recipe import Recipe
from hatrack.say import say, size

if TYPE_CHECKING:
    from hatrack.base.peek import Peek
    from hatrack.plan.fit import Plan, Setting, Work

ASSUMED_ROWS, ASSUMED_LENGTH = 1000, 256


@with_recipe
def plan(
    recipe: Recipe,
    on: Annotated[
        str | None, typer.Option("--on", metavar="rtx4090|a100|m2|16GiB|...", help="Another machine than this one.")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Measure this machine first, once: some seconds.")] = False,
    as_json: Json = False,
) -> None:
    """Show what training will take, and whether it fits, without reading any weight."""
    from hatrack.plan import fit
    from hatrack.plan.machine import check_compute, check_device, here, named

    if recipe.base is None:
        raise RecipeError("--base is missing", fix="add --base or a line 'base:' to the recipe")
    if probe:
        _measure()
    if not on:
        check_device(recipe.device)
    machine = named(on) if on else here(recipe.device, recipe.dtype)
    if on and not machine.accelerator:
        say(f"--on {on}: memory that is free on a CPU which multiplies {machine.dtype}; for a GPU or laptop, its name")
    check_compute(recipe.compute, "an accelerator" if machine.accelerator else "cpu")
    peeked = _peek(recipe)
    where = fit.setting(recipe, peeked, _work(recipe, peeked), machine)
    chosen = fit.choose(where)
    ways = {
        name: fit.plan_run(where, method) for name, method in fit.WAYS.items() if machine.sweeps or not method.sweep
    }
    cure = None if chosen.fits else fit.change(where, chosen)
    if as_json:
        shown = {name: way.as_json() for name, way in ways.items()}
        facts = {"machine": machine.name, "memory_bytes": machine.memory, "base": peeked.source, "dtype": where.dtype}
        facts |= {"rows": len(where.work.rows), "longest": where.work.longest}
        time = {"time_from": machine.prices.source if machine.prices else None}
        schedule = where.schedule(chosen.micro_batch)
        steps = {"steps": schedule.steps, "batch_size": schedule.batch_size, "to_download": peeked.to_download}
        print(json.dumps({**facts, **steps, **time, "change": cure, **chosen.as_json(), "ways": shown}))
        return
    _show(where, peeked, chosen, ways, cure)


def _measure() -> None:
    """Runs the probe and keeps its result for later plans on the same processor."""
    leave_out(Recipe.make())  # as a run does, whose imports are part of what is measured
    import hatrack.engine.train  # noqa: F401
    from hatrack.cpu import fast_at_bfloat16
    from hatrack.engine.measure import measure
    from hatrack.plan.machine import keep_probe

    say("measuring this machine: some seconds")
    found = measure()
    keep_probe(found)
    speeds = ", ".join(f"{name} {1e-9 / prices.operation:,.0f}" for name, prices in found.prices.items())
    prices = found.prices["bfloat16" if fast_at_bfloat16() else "float32"]
    speeds += "".join(f", {name} {1e-9 / operation:,.0f}" for name, operation in prices.rounded.items())
    say(
        f"products: {speeds} GFLOP/s; beside them {1e9 * prices.number:.2f} s for 10^9 numbers, "
        f"{1e6 * prices.call:.0f} us a call; disk {prices.disk / 1e6:,.0f} MB/s"
    )
    say(f"to start: {prices.start:.1f} s, {size(found.framework)}")


def _peek(recipe: Recipe) -> "Peek":
    from hatrack.base.peek import is_on_hub, peek, peek_folder

    if is_on_hub(str(recipe.base)):
        from hatrack.base.hub import peek_hub

        return peek_hub(str(recipe.base), recipe.revision)
    found = peek(str(recipe.base), recipe.revision)
    folder = Path(str(recipe.base)).expanduser()
    if found is None and folder.is_dir() and not any(weights(folder)) and (folder / "config.json").is_file():
        say("no weights there: planned from the shapes of config.json")
        leave_out(recipe)
        from hatrack.base.shapes import peek_shapes

        return peek_shapes(folder, str(recipe.base))
    if found is None:
        say("this base has to be converted before anything is known of it")
        from hatrack.base.sources import find_base

        found = peek_folder(find_base(str(recipe.base), recipe.revision).folder, str(recipe.base))
    return found


def weights(folder: Path) -> Iterator[Path]:
    """The files of a folder that hold a model's weights."""
    return (path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf"))


def _work(recipe: Recipe, peeked: "Peek") -> "Work":
    """The rows of the data and how long they are; without data, so many of a usual length."""
    import numpy as np

    from hatrack.base.header import family
    from hatrack.plan.fit import Work

    if recipe.data is None:
        task = recipe.task or ("classify" if family(peeked.config) == "encoder" else "chat")
        length = recipe.max_length or ASSUMED_LENGTH
        say(f"no --data: {ASSUMED_ROWS:,} rows of {length} tokens are assumed, task {task}")
        rows = np.full((ASSUMED_ROWS, 2), (length, 0 if task == "classify" else length))
        return Work(task, 2, rows, rows[: ASSUMED_ROWS // 10])
    from hatrack.data.examples import read_examples
    from hatrack.data.light import row_sizes

    examples = read_examples(recipe)
    if not (peeked.folder / "tokenizer.json").is_file():
        say("no tokenizer.json there: the rows' lengths are estimated from their letters")
    most = recipe.max_length or min(512 if examples.task == "classify" else 2048, _limit(peeked))
    examples, learn, held_out = row_sizes(recipe, examples, peeked.folder, most)
    return Work(examples.task, max(len(examples.labels), 1), learn, held_out)


def _limit(peeked: "Peek") -> int:
    most = peeked.config.get("max_position_embeddings")
    return most if isinstance(most, int) and most > 0 else 2048


def _show(where: "Setting", peeked: "Peek", chosen: "Plan", ways: dict[str, "Plan"], cure: str | None) -> None:
    """The verdict first, then the table."""
    from hatrack.adapter.count import line
    from hatrack.plan import fit

    machine, schedule = where.machine, where.schedule(chosen.micro_batch)
    needed, there = size(chosen.peak_memory_bytes), size(where.limit)
    at_a_time = f"{chosen.micro_batch} of {schedule.batch_size} rows at a time"
    again = ", activations computed again" if chosen.method.checkpointing else ""
    again = ", the base left on disk and swept layer by layer" if chosen.method.sweep else again
    if chosen.fits:
        print(f"fits: {needed} of {there} ({at_a_time}{again})")
        if chosen.peak_memory_bytes > where.limit:
            pages = size(chosen.peak_memory_bytes - fit.needed(chosen.memory))
            print(f"           {pages} of it only while loading: pages of files that the system takes back at need")
    else:
        print(f"does not fit: {needed} needed, {there} there ({machine.why})")
        print(f"to change: {cure}" if cure else "to change: a smaller base; no option makes it fit")
    rounded = "" if where.recipe.compute == "auto" else f", products in {where.recipe.compute}"
    print(f"machine    {machine.name}, base in {where.dtype}{rounded}")
    print(f"params     {line(chosen.trainable, chosen.total)}")
    print(
        f"work       {len(where.work.rows):,} rows of up to {where.work.longest} tokens, "
        f"{schedule.steps:,} steps of {schedule.batch_size} rows"
    )
    if machine.prices is not None and chosen.seconds is not None and chosen.whole_seconds is not None:
        print(
            f"time       {_duration(chosen.seconds)} of training, {_duration(chosen.whole_seconds)} in all "
            f"({machine.prices.source}{'' if machine.prices.source == 'probe' else '; --probe measures this machine'})"
        )
    else:
        print("time       unknown for this machine")
    download = f", {size(peeked.to_download)} to download" if peeked.to_download else ""
    kept = f"; results of lower layers {size(chosen.disk['kept'])}" if "kept" in chosen.disk else ""
    kept += f"; the quantised base {size(chosen.disk['packed'])}" if "packed" in chosen.disk else ""
    print(f"disk       base {size(chosen.disk['base'])}{download}; adapter {size(chosen.disk['adapter'])}{kept}\n")
    _table(ways)


def _table(ways: dict[str, "Plan"]) -> None:
    """Ways to train beside each other, memory by term."""
    terms = [term for term in next(iter(ways.values())).memory if any(way.memory[term] for way in ways.values())]
    rows = [["", *ways]]
    rows += [["fits", *("yes" if way.fits else "no" for way in ways.values())]]
    rows += [["trainable", *(f"{way.trainable:,}" for way in ways.values())]]
    rows += [["rows at a time", *(f"{way.micro_batch}" + ("*" * way.method.checkpointing) for way in ways.values())]]
    rows += [["memory", *(size(way.peak_memory_bytes) for way in ways.values())]]
    rows += [[f"  {term}", *(size(way.memory[term]) for way in ways.values())] for term in terms]
    rows += [["read a step", *(size(way.read) for way in ways.values())]]
    rows += [["time a step", *(_duration(way.step_seconds) for way in ways.values())]]
    rows += [["time in all", *(_duration(way.whole_seconds) for way in ways.values())]]
    print_columns(rows)
    if any(way.method.checkpointing for way in ways.values()):
        print("* activations are computed again in the backward pass: less memory, more time")


def _duration(seconds: float | None) -> str:
    """Seconds for people: `0.21 s`, `45 s`, `3.5 min`, `2.1 h`.

    >>> _duration(210.0)
    '3.5 min'
    """
    if seconds is None:
        return "?"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2f} s"
