"""`hatrack check`: every gotcha looked for, in a recipe or in an adapter."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import typer

from hatrack.cli.options import Json, with_recipe
from hatrack.cli.unused_imports import skip_quantizers, skip_unused_imports
from hatrack.errors import AdapterError, HatrackError, WrongBase
from hatrack.recipe import Recipe

if TYPE_CHECKING:
    from hatrack.check.finding import Finding


OPENING = ("base", "device", "dtype", "trust_remote_code")
"""Options that an adapter is opened with."""


def _adapter(adapter: str, given: dict[str, Any], as_json: bool) -> None:
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
            load(adapter, **{name: given[name] for name in OPENING if name in given})
        except HatrackError as error:
            found.append(refusal("other-base" if isinstance(error, WrongBase) else "adapter-refused", error))
    _report(adapter, found, as_json)


@with_recipe(adapter=_adapter)
def check(recipe: Recipe, as_json: Json = False) -> None:
    """Look for every known gotcha before a run, or in an adapter.

    hatrack check RECIPE.yaml, hatrack check FILE --base MODEL, or hatrack check ADAPTER.
    """
    skip_unused_imports(recipe)
    from hatrack.check.checks import check_recipe
    from hatrack.training.one_step import one_step

    found, facts = check_recipe(recipe)
    if facts is not None and not any(finding.refused for finding in found):
        found += one_step(facts)
    _report(str(recipe.name or recipe.data or "the recipe"), found, as_json)


def _report(what: str, found: "list[Finding]", as_json: bool) -> None:
    """Prints the findings, the worst first, and ends with exit code 2 where something would be refused."""
    found = sorted(found, key=lambda finding: not finding.refused)
    refused = sum(finding.refused for finding in found)
    if as_json:
        facts = {"checked": what, "refused": refused, "advice": len(found) - refused}
        print(json.dumps(facts | {"findings": [dataclasses.asdict(finding) for finding in found]}))
    else:
        for finding in found:
            print(f"{'refused' if finding.refused else 'advice':<8} [{finding.gotcha}] {finding.what}")
            for word, text in (("got", finding.got), ("fix", finding.fix)):
                if text:
                    print(f"         {word}: {text}")
        counted = f"{refused} refused, {len(found) - refused} to consider" if found else "nothing found"
        print(f"checked {what}: {counted}" + ("; docs/gotchas.md tells more of each" if found else ""))
    if refused:
        raise typer.Exit(2)
