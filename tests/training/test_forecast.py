"""hatrack.plan: what a run would take, asked in Python."""

import json
from pathlib import Path

import pytest

import hatrack
from hatrack.errors import ModelError, OptionStyle, RecipeError


def test_a_plan_in_python_is_what_the_command_says(
    tiny_encoder: Path, reviews: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hatrack.cli.main import app

    found = hatrack.plan(base=tiny_encoder, data=reviews, r=4, device="cpu")
    arguments = ["plan", "--base", str(tiny_encoder), "--data", str(reviews), "--r", "4", "--device", "cpu", "--json"]
    capsys.readouterr()
    app(arguments, standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    there = {"memory_bytes", "limit_bytes", "peak_memory_bytes", "memory"}  # what is free moves between two looks
    ours = json.loads(json.dumps(found.as_json()))
    assert {name: value for name, value in ours.items() if name not in {*there, "ways"}} == {
        name: value for name, value in said.items() if name not in {*there, "ways"}
    }
    assert found.plan.fits and found.change is None
    assert repr(found).startswith("Forecast(fits: ")
    assert callable(hatrack.plan), "no room of that name takes the function's place"


def test_rows_in_memory_are_planned_for(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"a film {index}", "label": ("good", "bad")[index % 2]} for index in range(40)]
    assert hatrack.plan(base=tiny_encoder, data=rows, device="cpu").as_json()["rows"] == 36


def test_another_machine_is_named(tiny_encoder: Path, reviews: Path) -> None:
    assert hatrack.plan(base=tiny_encoder, data=reviews, on="t4").as_json()["machine"] == "t4"
    with pytest.raises(RecipeError):
        hatrack.plan(base=tiny_encoder, data=reviews, on="abacus")


def test_what_training_refuses_is_refused_in_pythons_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OptionStyle, "flags", False)
    with pytest.raises(RecipeError, match=r"^base is missing"):
        hatrack.plan(data="reviews.csv")
    with pytest.raises(ModelError):
        hatrack.plan(base=tmp_path / "nowhere", data="reviews.csv")
