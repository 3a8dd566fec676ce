"""Reads `--report-to`: which experiment trackers a recipe names, and whether they are installed."""

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from hatrack.errors import RecipeError
from hatrack.recipe import Recipe, nearest


def tracker_names(recipe: Recipe) -> list[str]:
    """The trackers that `report_to` names."""
    return [name.strip() for name in recipe.report_to.split(",") if name.strip() not in ("", "none")]


def check_trackers(recipe: Recipe) -> None:
    """Raises RecipeError if a tracker is unknown or not installed."""
    installed = get_available_reporting_integrations()
    for name in tracker_names(recipe):
        if name not in INTEGRATION_TO_CALLBACK:
            guess = nearest(name, INTEGRATION_TO_CALLBACK)
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise RecipeError(
                f"--report-to does not know {name}", fix=f"did you mean {guess}?" if guess else f"use {known}"
            )
        if name not in installed:
            raise RecipeError(f"--report-to {name} needs its package", got="not installed", fix=f"pip install {name}")
