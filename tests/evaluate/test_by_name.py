"""hatrack.compare: adapters by name, on a file or rows in memory."""

from pathlib import Path

import pytest

import hatrack
from hatrack.errors import RecipeError
from hatrack.evaluate.compare import Comparison, Comparisons


def _new_rows(count: int) -> list[dict[str, str]]:
    """Rows that are in no training file of conftest's."""
    fill = ("red", "blue", "green", "one", "two", "three")
    return [
        {"text": f"who {fill[i % 6]} {fill[i // 6]} {('good', 'bad')[i % 2]}", "label": ("yes", "no")[i % 2]}
        for i in range(count)
    ]


def test_adapters_are_compared_by_name_and_in_memory(
    tiny_encoder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "cache"))
    options = {"base": tiny_encoder, "data": reviews, "steps": 2, "batch_size": 4, "device": "cpu"}
    hatrack.train(**options)
    second = hatrack.train(**options, r=2)
    alone = hatrack.compare("reviews", data=_new_rows(30), device="cpu")
    assert isinstance(alone, Comparison) and alone.rows == 30
    assert alone == hatrack.compare(hatrack.load("reviews", device="cpu"), data=_new_rows(30))
    both = hatrack.compare(["reviews", tmp_path / "reviews-2"], data=_new_rows(30), device="cpu")
    assert isinstance(both, Comparisons) and both.adapters["reviews"] == alone
    assert list(both.pairs) == [("reviews", "reviews-2")]
    held_out = hatrack.compare(second)
    assert isinstance(held_out, Comparison) and held_out.adapter == second.result["eval"]["accuracy"]


def test_what_cannot_be_compared_by_name_is_refused() -> None:
    with pytest.raises(RecipeError, match="no adapter was named"):
        hatrack.compare()
