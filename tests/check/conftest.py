"""A prepared run on a tiny base, and how to change its options."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hatrack.check.checks import check_recipe
from hatrack.check.prepared import Prepared
from hatrack.recipe import Recipe

Make = Callable[..., Prepared]


@pytest.fixture
def facts(tiny_encoder: Path, tiny_decoder: Path, reviews: Path, questions: Path) -> Make:
    """`facts("classify", lr=1e-8)`: a prepared run on a tiny base."""

    def make(task: str = "classify", **options: Any) -> Prepared:
        base, data = (tiny_encoder, reviews) if task == "classify" else (tiny_decoder, questions)
        recipe = Recipe.make(**({"base": str(base), "data": str(data), "task": task, "device": "cpu"} | options))
        found, known = check_recipe(recipe)
        assert known is not None, found
        return known

    return make
