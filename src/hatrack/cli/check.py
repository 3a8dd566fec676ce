"""`hatrack check`: looks for known problems in a recipe or an adapter."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import typer

from hatrack.cli.options import Json, with_recipe_options
from hatrack.cli.unused_imports import skip_quantizers, skip_unused_imports
from hatrack.errors import AdapterError, HatrackError, WrongBase
from hatrack.recipe import Recipe

if TYPE_CHECKING:
    from hatrack.check.finding import Finding


LOAD_OPTIONS = ("base", "device", "dtype", "trust_remote_code")
"""Recipe options that are also options of `load`."""


def _check_adapter(adapter: str, given: dict[str, Any], as_json: bool) -> None:
    from hatrack.check.finding import refusal

    try:
        skip_quantizers(adapter)
    except AdapterError as error:
        return _report(adapter, [refusal("adapter-refused", error)], as_json)

    from hatrack.check.folder import check_adapter
    from hatrack.inference.load import load

    found = check_adapter(adapter, given.get("base"), trust=given.get("trust_remote_code"))
    if not any(finding.refused for finding in found):
        try:
            load(adapter, **{name: given[name] for name in LOAD_OPTIONS if name in given})
        except HatrackError as error:
            found.append(refusal("other-base" if isinstance(error, WrongBase) else "adapter-refused", error))
    _report(adapter, found, as_json)


@with_recipe_options(on_adapter=_check_adapter)
def check(recipe: Recipe, as_json: Json = False) -> None:
    """Look for known problems before a run, or in an adapter.

    Usage: hatrack check RECIPE.yaml, hatrack check DATA --base MODEL, or hatrack check ADAPTER. For a run, it loads the
    base and trains one step. Exit code 2: the run or the adapter would be refused.
    """
    skip_unused_imports(recipe)
    from hatrack.check.checks import check_recipe
    from hatrack.training.one_step import one_step

    found, facts = check_recipe(recipe)
    if facts is not None and not any(finding.refused for finding in found):
        found += one_step(facts)
    _report(str(recipe.name or recipe.data or "the recipe"), found, as_json)


def _report(what: str, found: "list[Finding]", as_json: bool) -> None:
    """Prints the findings of `what`, refusals first. Exits with code 2 if there is a refusal."""
    found = sorted(found, key=lambda finding: not finding.refused)
    refused = sum(finding.refused for finding in found)
    if as_json:
        facts = {"checked": what, "refused": refused, "advice": len(found) - refused}
        print(json.dumps(facts | {"findings": [dataclasses.asdict(finding) for finding in found]}))
    else:
        for finding in found:
            print(f"{'refused' if finding.refused else 'advice':<8} [{finding.gotcha}] {finding.what}")
            for label, text in (("got", finding.got), ("fix", finding.fix)):
                if text:
                    print(f"         {label}: {text}")
        summary = f"{refused} refused, {len(found) - refused} to consider" if found else "no problems found"
        print(f"checked {what}: {summary}" + ("; docs/gotchas.md explains each" if found else ""))
    if refused:
        raise typer.Exit(2)
