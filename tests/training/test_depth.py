"""Depths are compared by small runs that leave nothing behind, and the run that follows is one of the chosen depth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hatrack
from hatrack.adapter.place import place
from hatrack.base.layer_stack import find_layer_stack
from hatrack.base.load import BaseOptions, load_base
from hatrack.base.sources import find_base
from hatrack.errors import RecipeError
from hatrack.evaluate.loss import losses
from hatrack.evaluate.score import Score
from hatrack.layers.fast_lora import LAYER_CLASSES
from hatrack.recipe import Recipe
from hatrack.training import auto_settings
from hatrack.training.depth import (
    DepthTrial,
    MeasuredDepth,
    choose_depth,
    depths_to_try,
    keeps_enough,
    trial_steps,
    try_depths,
)
from hatrack.training.trainer import HatTrainer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "cache"))


def _depth(top: int, loss: float, step: float = 1.0, below: float = 0.0) -> MeasuredDepth:
    return MeasuredDepth(top, 6, Score({"loss": loss}, np.zeros(1), np.ones(1)), step, below)


def test_a_half_a_third_and_a_sixth_are_tried() -> None:
    assert (depths_to_try(30), depths_to_try(6), depths_to_try(2), depths_to_try(1)) == (
        [30, 15, 10, 5],
        [6, 3, 2, 1],
        [2, 1],
        [1],
    )


def test_short_runs_are_not_worth_a_comparison_and_long_ones_bound_it() -> None:
    assert (trial_steps(239), trial_steps(240), trial_steps(400), trial_steps(10_000)) == (0, 48, 80, 128)


def test_the_fastest_depth_that_keeps_enough_is_chosen() -> None:
    everything, half, third = _depth(6, 0.50, 4.0), _depth(3, 0.504, 2.0, 0.01), _depth(2, 0.52, 1.0, 0.02)
    # all layers lowered 0.7 by 0.2; the half by 0.196 (98%), the third by 0.18 (90%)
    assert keeps_enough(half, everything, 0.7) and not keeps_enough(third, everything, 0.7)
    assert choose_depth([everything, half, third], 0.7, 100, 1000) is half
    # 100 steps of 2 s and 30,000 rows of 0.01 s: the layers below cost more than they save
    assert choose_depth([everything, half], 0.7, 100, 30_000) is everything


def test_a_comparison_that_tells_nothing_leaves_all_layers() -> None:
    tried = [_depth(6, 0.695), _depth(3, 0.60)]
    assert choose_depth(tried, 0.7, 100, 10) is tried[0]
    assert choose_depth([_depth(6, float("nan")), _depth(3, 0.6)], 0.7, 100, 10).top == 6


def test_everything_is_put_back(tiny_decoder: Path) -> None:
    torch.manual_seed(3)
    base = load_base(find_base(str(tiny_decoder)), BaseOptions(task="chat", device="cpu", dtype="float32"))
    trunk = find_layer_stack(base.model)
    model: Any = place(base.model, Recipe.make(r=2, dropout=0.1), task="chat", layer_classes=LAYER_CLASSES).eval()
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def scored(found: Any, run: Any) -> Score:
        values = next(iter(run([batch])))[0] if run else losses(found, batch, "chat")[0]
        return Score({"loss": float(values.detach().mean())}, np.zeros(1), np.ones(1))

    state = torch.get_rng_state()
    start = scored(model, None).metrics["loss"]
    tried = list(try_depths(model, trunk, DepthTrial([[batch]] * 20, [[batch]], "chat", 0.05, scored)))
    assert [depth.name for depth in tried] == ["all", "top-1"]
    assert all(depth.loss < start - 0.1 for depth in tried) and tried[0].loss != tried[1].loss  # each learns, by itself
    assert tried[0].seconds_below == 0 < tried[1].seconds_below and all(depth.step_seconds > 0 for depth in tried)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name][0]) and tensor.requires_grad == before[name][1], name
        assert tensor.grad is None
    assert torch.equal(torch.get_rng_state(), state) and not model.training


def _options(base: Path, data: Path, output: Path, **options: Any) -> dict[str, Any]:
    found = {"base": str(base), "data": str(data), "output": str(output), "device": "cpu", "dtype": "float32"}
    return found | {"name": "hat", "lr": 0.02, "batch_size": 8, "layers": "auto"} | options


def test_a_run_measures_and_says_what_it_costs_and_saves(
    tmp_path: Path,
    tiny_encoder: Path,
    reviews: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auto_settings, "keeps_enough", lambda *depths: True)
    monkeypatch.setattr(auto_settings, "choose_depth", lambda tried, *rest: tried[-1])
    hat = hatrack.train(**_options(tiny_encoder, reviews, tmp_path / "hat", steps=250))
    said = capsys.readouterr().err
    assert "layers: trying 50 small steps with adapters on all 2 layers, and on the top 1" in said
    assert "top-1: accuracy" in said and "layers: top-1 lowered the held-out loss by" in said and " s, not " in said
    assert "the first 1 of 2 layers are frozen" in said
    assert hat.cards["hat"].recipe["layers"] == "top-1"
    weights = json.loads((tmp_path / "hat/adapter_config.json").read_text())["target_modules"]
    assert weights and all(".0." not in name for name in weights)
    assert hat.result["eval"]["accuracy"] > hat.result["before"]["accuracy"]


def test_a_short_run_takes_all_layers(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hat = hatrack.train(**_options(tiny_encoder, reviews, tmp_path / "hat", steps=4))
    said = capsys.readouterr().err
    assert "layers: all; a run of 4 steps is too short" in said and said.count("expected peak memory") == 1
    assert hat.cards["hat"].recipe["layers"] == "all"


def test_a_resumed_run_keeps_its_depth(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Any, *rest: Any, **named: Any) -> Any:
        raise RuntimeError("stop here")

    monkeypatch.setattr(auto_settings, "_compare_depths", lambda facts: "top-1")
    options = _options(tiny_encoder, reviews, tmp_path / "hat", epochs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HatTrainer, "score_best", failing)
        with pytest.raises(RuntimeError, match="stop here"):
            hatrack.train(**options)
    monkeypatch.setattr(auto_settings, "_compare_depths", failing)  # not asked again
    assert hatrack.train(**options, resume=True).hats["hat"].recipe["layers"] == "top-1"


def test_a_wrong_depth_is_told() -> None:
    with pytest.raises(RecipeError, match=r"--layers must be all, auto, or top-N such as top-4; got 'some'"):
        Recipe.make(layers="some")
