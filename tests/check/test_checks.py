"""All that is wrong with a recipe, at once; nothing with a good one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hatrack.check.checks import check_recipe
from hatrack.check.finding import Finding, FindingCollector
from hatrack.errors import DataError, RecipeError
from hatrack.recipe import Recipe


def _found(**options: object) -> dict[str, Finding]:
    return {finding.gotcha: finding for finding in check_recipe(Recipe.make(**options))[0]}


def test_a_good_recipe_has_nothing(tiny_encoder: Path, tiny_decoder: Path, reviews: Path, questions: Path) -> None:
    assert _found(base=str(tiny_encoder), data=str(reviews)) == {}
    assert _found(base=str(tiny_decoder), data=str(questions), task="chat") == {}


def test_everything_wrong_is_found_in_one_go(tiny_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\ngood,\nbad,no\n")
    found = _found(base=str(tiny_encoder), data=str(tmp_path / "rows.csv"), task="classify", targets="qery", r=99)
    assert set(found) == {"rows-refused", "target-names"}
    assert "row 2" in found["rows-refused"].what or "row 1" in found["rows-refused"].what
    assert found["target-names"].what == "'qery' matches no layer (did you mean query?)"
    assert all(finding.refused for finding in found.values())
    wide = _found(base=str(tiny_encoder), data=str(tmp_path / "rows.csv"), task="classify", r=99)
    assert wide["rank-too-large"].fix == "at most --r 32"


def test_nothing_named(tiny_encoder: Path) -> None:
    found = check_recipe(Recipe.make())[0]
    assert [finding.what for finding in found] == ["--data is missing", "--base is missing"]


@pytest.mark.parametrize("task", ["chat", "complete"])
def test_a_task_the_base_cannot_do(tiny_encoder: Path, questions: Path, task: str) -> None:
    found = _found(base=str(tiny_encoder), data=str(questions), task=task)
    assert "is an encoder: it cannot generate text" in found["task-and-base"].what


def test_answers_beyond_what_is_kept(tiny_decoder: Path, questions: Path) -> None:
    found = _found(base=str(tiny_decoder), data=str(questions), task="chat", max_length=8)["nothing-to-learn"]
    assert "the answer begins after the 8 tokens that are kept" in found.what
    assert found.fix == "--max-length 17 keeps the answers" and "fix:" not in found.what


def test_memory_that_is_too_little(tiny_encoder: Path, reviews: Path) -> None:
    found = _found(base=str(tiny_encoder), data=str(reviews), memory="1MB")["does-not-fit"]
    assert "too little even for one row" in found.what and found.fix


def test_a_base_saved_with_its_adapter_unmerged(tiny_encoder: Path, reviews: Path, tmp_path: Path) -> None:
    folder = tmp_path / "carrying"
    folder.mkdir()
    for path in tiny_encoder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.0.attention.self.query.lora_A.default.weight"] = torch.ones(2, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = _found(base=str(folder), data=str(reviews))["base-with-adapters"]
    assert "carries an adapter already" in found.what and found.got.startswith("1 tensors such as")
    assert found.fix == "merge it first, or start from the bare base"


def test_looking_goes_on_past_what_it_cannot_find() -> None:
    collector = FindingCollector()

    def refuse() -> int:
        raise RecipeError("no", got=1, fix="yes")

    assert collector.attempt("one", refuse) is None
    assert collector.attempt("two", lambda known: known, None) is None
    assert collector.attempt("three", lambda known: known + 1, 1) == 2
    assert collector.found == [Finding("one", "no", "1", "yes", refused=True)]


def test_many_complaints_stay_together() -> None:
    collector = FindingCollector()

    def refuse() -> None:
        raise DataError("2 rows cannot be read", fix="mend them", complaints=["row 1: empty", "row 2: empty"])

    collector.attempt("rows-refused", refuse)
    assert collector.found[0].what.splitlines()[1:] == ["  row 1: empty", "  row 2: empty"]
