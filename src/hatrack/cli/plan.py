"""`hatrack plan`: what a run will take, before any weight is read."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from hatrack.cli.options import Json, with_recipe
from hatrack.cli.tables import print_columns
from hatrack.cli.unused_imports import skip_unused_imports
from hatrack.console import format_size, say
from hatrack.recipe import Recipe

if TYPE_CHECKING:
    from hatrack.planning.fit import Plan
    from hatrack.training.forecast import Forecast


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
    skip_unused_imports(recipe)
    from hatrack.training.forecast import plan as forecast

    if probe:
        _measure()
    found = forecast(recipe, on=on)
    if as_json:
        print(json.dumps(found.as_json()))
        return
    _show(found, here=on is None)


def _measure() -> None:
    """Runs the probe and keeps its result for later plans on the same processor."""
    skip_unused_imports(Recipe.make())  # as a run does, whose imports are part of what is measured
    import hatrack.training.train  # noqa: F401
    from hatrack.cpu import has_fast_bfloat16
    from hatrack.planning.machine import save_probe
    from hatrack.training.measure_machine import measure

    say("measuring this machine: some seconds")
    found = measure()
    save_probe(found)
    speeds = ", ".join(f"{name} {1e-9 / speed.seconds_per_operation:,.0f}" for name, speed in found.speeds.items())
    speed = found.speeds["bfloat16" if has_fast_bfloat16() else "float32"]
    speeds += "".join(f", {name} {1e-9 / operation:,.0f}" for name, operation in speed.rounded.items())
    say(
        f"products: {speeds} GFLOP/s; beside them {1e9 * speed.seconds_per_element:.2f} s for 10^9 numbers, "
        f"{1e6 * speed.seconds_per_call:.0f} us a call; disk {speed.disk_bytes_per_second / 1e6:,.0f} MB/s"
    )
    say(f"to start: {speed.start_seconds:.1f} s, {format_size(found.imported_bytes)}")


def _show(found: "Forecast", *, here: bool) -> None:
    """The verdict first, then the table. `here` is whether the plan is for this machine."""
    from hatrack.adapter.count import trainable_line
    from hatrack.planning import fit

    where, peeked, chosen, cure = found.where, found.base, found.plan, found.change
    machine, schedule = where.machine, where.schedule(chosen.micro_batch)
    needed, there = format_size(chosen.peak_memory_bytes), format_size(where.limit)
    at_a_time = f"{chosen.micro_batch} of {schedule.batch_size} rows at a time"
    again = ", activations computed again" if chosen.method.checkpointing else ""
    again = ", the base left on disk and streamed layer by layer" if chosen.method.streamed else again
    if chosen.fits:
        print(f"fits: {needed} of {there} ({at_a_time}{again})")
        if chosen.peak_memory_bytes > where.limit:
            pages = format_size(chosen.peak_memory_bytes - fit.required_bytes(chosen.memory))
            print(f"           {pages} of it only while loading: pages of files that the system takes back at need")
    else:
        print(f"does not fit: {needed} needed, {there} there ({machine.reason})")
        print(f"to change: {cure}" if cure else "to change: a smaller base; no option makes it fit")
    rounded = "" if where.recipe.compute == "auto" else f", products in {where.recipe.compute}"
    print(f"machine    {machine.name}, base in {where.dtype}{rounded}")
    print(f"params     {trainable_line(chosen.trainable, chosen.total)}")
    print(
        f"work       {len(where.work.rows):,} rows of up to {where.work.longest} tokens, "
        f"{schedule.steps:,} steps of {schedule.batch_size} rows"
    )
    if machine.speed is not None and chosen.seconds is not None and chosen.whole_seconds is not None:
        source = machine.speed.source
        hint = "; --probe measures this machine" if here and source != "probe" else ""
        print(
            f"time       {_duration(chosen.seconds)} of training, {_duration(chosen.whole_seconds)} in all "
            f"({source}{hint})"
        )
    else:
        print("time       unknown for this machine")
    download = f", {format_size(peeked.to_download)} to download" if peeked.to_download else ""
    kept = f"; results of lower layers {format_size(chosen.disk['kept'])}" if "kept" in chosen.disk else ""
    kept += f"; the quantised base {format_size(chosen.disk['packed'])}" if "packed" in chosen.disk else ""
    print(
        f"disk       base {format_size(chosen.disk['base'])}{download}; "
        f"adapter {format_size(chosen.disk['adapter'])}{kept}\n"
    )
    _table(found.ways)


def _table(ways: dict[str, "Plan"]) -> None:
    """Ways to train beside each other, memory by term."""
    terms = [term for term in next(iter(ways.values())).memory if any(way.memory[term] for way in ways.values())]
    rows = [["", *ways]]
    rows += [["fits", *("yes" if way.fits else "no" for way in ways.values())]]
    rows += [["trainable", *(f"{way.trainable:,}" for way in ways.values())]]
    rows += [["rows at a time", *(f"{way.micro_batch}" + ("*" * way.method.checkpointing) for way in ways.values())]]
    rows += [["memory", *(format_size(way.peak_memory_bytes) for way in ways.values())]]
    rows += [[f"  {term}", *(format_size(way.memory[term]) for way in ways.values())] for term in terms]
    rows += [["read a step", *(format_size(way.read_per_step) for way in ways.values())]]
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
