"""`hatrack plan`: shows a run's memory, disk space and time before any weight is read."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from hatrack.cli.options import Json, with_recipe_options
from hatrack.cli.tables import print_columns
from hatrack.cli.unused_imports import skip_unused_imports
from hatrack.console import format_size, say
from hatrack.recipe import Recipe

if TYPE_CHECKING:
    from hatrack.planning.fit import Plan
    from hatrack.training.forecast import Forecast


@with_recipe_options
def plan(
    recipe: Recipe,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="rtx4090|a100|m2|16GiB|...",
            help="Plan for another machine: a GPU, a laptop, or an amount of memory.",
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Benchmark this machine first (a few seconds) and remember the result.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show how much memory, disk space and time training will take, and whether it fits.

    Computed from the base's configuration and the data: no weights are read. Memory is listed by component.
    """
    skip_unused_imports(recipe)
    from hatrack.training.forecast import plan as forecast

    if probe:
        _measure()
    found = forecast(recipe, on=on)
    if as_json:
        print(json.dumps(found.as_json()))
        return
    _print_plan(found, here=on is None)


def _measure() -> None:
    """Benchmarks this machine and saves the result for later plans on the same CPU."""
    skip_unused_imports(Recipe.make())  # imports are measured too, so skip the same ones as a run
    import hatrack.training.train  # noqa: F401
    from hatrack.cpu import has_fast_bfloat16
    from hatrack.planning.machine import save_probe
    from hatrack.training.measure_machine import measure

    say("measuring this machine: takes a few seconds")
    found = measure()
    save_probe(found)
    speeds = ", ".join(f"{name} {1e-9 / speed.seconds_per_operation:,.0f}" for name, speed in found.speeds.items())
    speed = found.speeds["bfloat16" if has_fast_bfloat16() else "float32"]
    speeds += "".join(f", {name} {1e-9 / operation:,.0f}" for name, operation in speed.rounded.items())
    say(
        f"matmuls: {speeds} GFLOP/s; other operations: {1e9 * speed.seconds_per_element:.2f} s per 10^9 elements, "
        f"{1e6 * speed.seconds_per_call:.0f} us per call; disk: {speed.disk_bytes_per_second / 1e6:,.0f} MB/s"
    )
    say(f"start-up: {speed.start_seconds:.1f} s, {format_size(found.imported_bytes)}")


def _print_plan(found: "Forecast", *, here: bool) -> None:
    """Prints the verdict, then the table. `here`: whether the plan is for this machine."""
    from hatrack.adapter.count import trainable_line
    from hatrack.planning import fit

    where, base, chosen, suggestion = found.where, found.base, found.plan, found.change
    machine, schedule = where.machine, where.schedule(chosen.micro_batch)
    needed, available = format_size(chosen.peak_memory_bytes), format_size(where.limit)
    at_a_time = f"{chosen.micro_batch} of {schedule.batch_size} rows at a time"
    how = ", with activation checkpointing" if chosen.method.checkpointing else ""
    how = ", the base streamed from disk layer by layer" if chosen.method.streamed else how
    if chosen.fits:
        print(f"fits: {needed} of {available} ({at_a_time}{how})")
        if chosen.peak_memory_bytes > where.limit:
            pages = format_size(chosen.peak_memory_bytes - fit.required_bytes(chosen.memory))
            print(
                f"           {pages} of it only while loading: file pages that the kernel frees when memory is needed"
            )
    else:
        print(f"does not fit: {needed} needed, {available} available ({machine.reason})")
        print(f"fix: {suggestion}" if suggestion else "fix: use a smaller base; no option makes it fit")
    rounded = "" if where.recipe.compute == "auto" else f", matmuls in {where.recipe.compute}"
    print(f"machine    {machine.name}, base in {where.dtype}{rounded}")
    print(f"params     {trainable_line(chosen.trainable, chosen.total)}")
    print(
        f"work       {len(where.work.row_sizes):,} rows of up to {where.work.longest} tokens, "
        f"{schedule.steps:,} steps of {schedule.batch_size} rows"
    )
    if machine.speed is not None and chosen.seconds is not None and chosen.whole_seconds is not None:
        source = machine.speed.source
        hint = "; --probe measures this machine" if here and source != "probe" else ""
        print(
            f"time       {_duration(chosen.seconds)} of training, {_duration(chosen.whole_seconds)} in total "
            f"({source}{hint})"
        )
    else:
        print("time       unknown for this machine")
    download = f", {format_size(base.to_download)} to download" if base.to_download else ""
    cached = f"; cached hidden states {format_size(chosen.disk['kept'])}" if "kept" in chosen.disk else ""
    cached += f"; quantized base {format_size(chosen.disk['packed'])}" if "packed" in chosen.disk else ""
    print(
        f"disk       base {format_size(chosen.disk['base'])}{download}; "
        f"adapter {format_size(chosen.disk['adapter'])}{cached}\n"
    )
    _print_table(found.ways)


def _print_table(ways: dict[str, "Plan"]) -> None:
    """Prints the training methods side by side, with their memory by component."""
    components = [name for name in next(iter(ways.values())).memory if any(way.memory[name] for way in ways.values())]
    rows = [["", *ways]]
    rows += [["fits", *("yes" if way.fits else "no" for way in ways.values())]]
    rows += [["trainable", *(f"{way.trainable:,}" for way in ways.values())]]
    rows += [["rows at a time", *(f"{way.micro_batch}" + ("*" * way.method.checkpointing) for way in ways.values())]]
    rows += [["memory", *(format_size(way.peak_memory_bytes) for way in ways.values())]]
    rows += [[f"  {name}", *(format_size(way.memory[name]) for way in ways.values())] for name in components]
    rows += [["read per step", *(format_size(way.read_per_step) for way in ways.values())]]
    rows += [["time per step", *(_duration(way.step_seconds) for way in ways.values())]]
    rows += [["total time", *(_duration(way.whole_seconds) for way in ways.values())]]
    print_columns(rows)
    if any(way.method.checkpointing for way in ways.values()):
        print("* with activation checkpointing: less memory, more time")


def _duration(seconds: float | None) -> str:
    """Formats seconds: `0.21 s`, `45 s`, `3.5 min`, `2.1 h`.

    >>> _duration(210.0)
    '3.5 min'
    """
    if seconds is None:
        return "?"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2f} s"
