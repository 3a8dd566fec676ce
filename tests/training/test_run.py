"""The folders of a run: whose they are, and what becomes of them."""

import json
from pathlib import Path

import pytest

from hatrack.adapter import registry
from hatrack.errors import AdapterError, Interrupted, RecipeError
from hatrack.recipe import Recipe
from hatrack.training.run import Run, open_run


def _recipe(output: Path, **options: object) -> Recipe:
    return Recipe.make(**{"base": "b", "data": "reviews.csv", "output": str(output)} | options)


def _saved(run: Run, weights: bytes) -> None:
    run.adapter_folder.mkdir()
    (run.adapter_folder / "adapter_config.json").write_text("{}")
    (run.adapter_folder / "adapter_model.safetensors").write_bytes(weights)


def _checkpoint(run: Run, step: int) -> None:
    (run.folder / f"checkpoint-{step}").mkdir()


def test_a_finished_run_leaves_its_adapter_and_nothing_else(tmp_path: Path) -> None:
    with open_run(_recipe(tmp_path / "hat")) as (run, _):
        _checkpoint(run, 4)
        _saved(run, b"w")
        run.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["hat"]
    assert registry.find_adapter("reviews") == tmp_path / "hat"


def test_a_name_taken_meanwhile_costs_no_adapter(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text("{}")
    with (
        pytest.raises(AdapterError, match="the name reviews was taken meanwhile") as caught,
        open_run(_recipe(tmp_path / "hat")) as (run, _),
    ):
        _saved(run, b"w")
        registry.register("reviews", other)
        run.finish()
    assert caught.value.fix == f"hatrack add {tmp_path / 'hat'} --name ANOTHER"
    assert (tmp_path / "hat/adapter_model.safetensors").read_bytes() == b"w"


def test_what_came_to_lie_in_its_place_stays(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the output exists already"), open_run(_recipe(tmp_path / "hat")) as (run, _):
        _checkpoint(run, 4)
        _saved(run, b"mine")
        (tmp_path / "hat").mkdir()
        (tmp_path / "hat/adapter_model.safetensors").write_bytes(b"theirs")
        run.finish()
    assert (tmp_path / "hat/adapter_model.safetensors").read_bytes() == b"theirs"
    assert (tmp_path / "hat.run/adapter/adapter_model.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("steps", "says"), [([], "stopped before anything was learned"), ([4, 12], "stopped; step 12 is")]
)
def test_an_interrupted_run_says_what_is_left(tmp_path: Path, steps: list[int], says: str) -> None:
    with pytest.raises(Interrupted, match=says), open_run(_recipe(tmp_path / "deep/hat")) as (run, _):
        for step in steps:
            _checkpoint(run, step)
        raise KeyboardInterrupt
    assert (tmp_path / "deep/hat.run").exists() == bool(steps) == (tmp_path / "deep").exists()


def test_a_resumed_run_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), open_run(_recipe(tmp_path / "hat", r=4)) as (run, recipe):
        _checkpoint(run, 4)
        run.save_values(recipe, {"rows": "x"})
        raise KeyboardInterrupt
    (tmp_path / "hat.run/checkpoint-4/trainer_state.json").write_text('{"best_global_step": null}')
    with (
        pytest.raises(RecipeError, match="rows changed since"),
        open_run(Recipe.make(output=str(tmp_path / "hat"), resume=True)) as (run, recipe),
    ):
        assert (run.name, recipe.r, run.resumed) == ("reviews", 4, True)
        run.save_values(recipe, {"rows": "y"})
    assert json.loads((tmp_path / "hat.run/run.json").read_text())["facts"] == {"rows": "x"}


def test_what_an_ended_run_left_is_not_taken_for_a_run(tmp_path: Path) -> None:
    """A process killed while it removed its run's folder: its adapter is in place."""
    (tmp_path / "hat.run/checkpoint-4").mkdir(parents=True)
    with (
        pytest.raises(RecipeError, match="there is no interrupted run to resume"),
        open_run(Recipe.make(output=str(tmp_path / "hat"), resume=True)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "hat.run/checkpoint-4").mkdir(parents=True)
    with open_run(_recipe(tmp_path / "hat")) as (run, _):
        assert run.last_checkpoint() is None


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """It only has the name that a run's folder would have."""
    (tmp_path / "hat.run").mkdir()
    (tmp_path / "hat.run/thesis.tex").write_text("x")
    for recipe in (_recipe(tmp_path / "hat"), Recipe.make(output=str(tmp_path / "hat"), resume=True)):
        with (
            pytest.raises(RecipeError, match=r"has other files; got thesis.tex; fix: choose another"),
            open_run(recipe),
        ):
            pass
    assert [path.name for path in (tmp_path / "hat.run").iterdir()] == ["thesis.tex"]
