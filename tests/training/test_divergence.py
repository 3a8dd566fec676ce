"""A run whose loss is lost stops before the step that would lose the adapter too, and says where and why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hatrack
from hatrack.errors import Diverged
from hatrack.evaluate.loss import losses
from hatrack.planning import fit
from hatrack.recipe import Recipe
from hatrack.training import trainer
from hatrack.training.divergence import DivergenceWatch

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 4, "lr": 0.002}


def _losing(at_call: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """The loss, changed from the given training batch on."""
    calls = 0

    def changed(model: Any, batch: dict[str, torch.Tensor], task: str) -> Any:
        nonlocal calls
        values, rows, logits = losses(model, batch, task)
        calls += model.training
        return change(values) if model.training and calls >= at_call else values, rows, logits

    return changed


def _run(tmp_path: Path, base: Path, data: Path, **options: Any) -> Diverged:
    with pytest.raises(Diverged) as raised:
        hatrack.train(base=str(base), data=str(data), output=str(tmp_path / "hat"), name="hat", **(OPTIONS | options))
    return raised.value


def test_nan_stops_with_step_rows_cause_and_the_last_good_checkpoint(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "losses", _losing(10, lambda values: values * float("nan")))
    error = _run(tmp_path, tiny_encoder, reviews, epochs=3)
    assert error.exit_code == 2
    checkpoint = max((tmp_path / "hat.run").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert error.what == f"the loss is not a finite number at step 10; the last good checkpoint is {checkpoint}"
    kept = load_file(checkpoint / "adapter_model.safetensors")
    assert kept and all(tensor.isfinite().all() for tensor in kept.values())

    remembered = json.loads((tmp_path / "hat.run/run.json").read_text())["facts"]["schedule"]
    per_epoch = remembered["steps"] // 3
    assert per_epoch < 10  # in the second epoch, whose order is another one
    assert str(error.got).startswith("nan from rows ") and str(error.got).endswith(f" of {reviews}")
    assert str(error.fix).startswith("likely one of these rows, or the learning rate: start again with --lr 0.0007")
    assert not (tmp_path / "hat").exists()


def test_the_rows_named_are_those_of_the_step(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step's rows, as the Trainer saw them and as they are found again, over two epochs and micro-batches."""
    seen: dict[int, list[int]] = {}
    found: dict[int, list[int]] = {}

    def step(self: DivergenceWatch, number: int, loss: float, norm: float, rows: Callable[[], list[int]]) -> None:
        found[number] = rows()

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        number = self.state.global_step + 1
        lengths = inputs["attention_mask"].sum(1).tolist()
        texts = [tuple(ids[:length]) for ids, length in zip(inputs["input_ids"].tolist(), lengths, strict=True)]
        learn = self.rows.train
        by_text = {tuple(learn.row(i)[0].tolist()): int(learn.row_numbers[i]) for i in range(len(learn))}
        seen.setdefault(number, []).extend(by_text[text] for text in texts)
        return plain(self, model, inputs, *args, **kwargs)

    def two_at_a_time(where: fit.PlanRequest, method: Any = None, rows: int | None = None) -> fit.Plan:
        return plan_run(where, method, 2)

    plan_run, plain = fit.plan_run, trainer.HatTrainer.compute_loss
    monkeypatch.setattr(fit, "plan_run", two_at_a_time)
    monkeypatch.setattr(DivergenceWatch, "step", step)
    monkeypatch.setattr(trainer.HatTrainer, "compute_loss", compute_loss)
    hatrack.train(
        base=str(tiny_encoder), data=str(reviews), output=str(tmp_path / "hat"), name="hat", epochs=2, **OPTIONS
    )
    assert len(found) == 14
    assert {number: sorted(rows) for number, rows in seen.items()} == {n: sorted(rows) for n, rows in found.items()}


def test_a_growing_loss_stops(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "losses", _losing(10, lambda values: values * 10))
    error = _run(tmp_path, tiny_encoder, reviews, epochs=3)
    assert error.what.startswith("the loss has grown far above its first value by step 1")
    assert "start again with --lr" in str(error.fix) and "[loss-explodes]" in str(error.fix)


def test_a_gradient_that_never_arrives_stops_at_the_first_step(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(values: torch.Tensor) -> torch.Tensor:
        return values.detach() + 0 * values

    monkeypatch.setattr(trainer, "losses", _losing(1, cut_off))
    error = _run(tmp_path, tiny_encoder, reviews, epochs=1)
    assert error.what == "no gradient reaches the adapter at step 1; no checkpoint had been saved before it"


def test_a_loss_that_stays_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch = DivergenceWatch(Recipe.make(), tmp_path, lr=1e-8, usual_lr=1e-3, dtype="float32")
    watch.start_loss = 0.7

    class State:
        global_step, max_steps = 20, 41

    watch.on_evaluate(None, State(), None, {"eval_loss": 0.7})
    assert capsys.readouterr().err == ""  # not before half of the run
    State.max_steps = 40
    for _ in range(3):
        watch.on_evaluate(None, State(), None, {"eval_loss": 0.7})
    assert capsys.readouterr().err.count("advice: the held-out loss has barely moved in 20 steps") == 1


def test_single_wild_batches_are_no_explosion(tmp_path: Path) -> None:
    watch = DivergenceWatch(Recipe.make(), tmp_path, lr=1e-3, usual_lr=1e-3, dtype="float32")
    for number in range(1, 100):
        watch.step(number, 4.0 if number % 10 == 0 else 0.7, 1.0, lambda: [1])
    with pytest.raises(Diverged, match=r"grown far above its first value by step 10[0-9];"):  # many in a row are one
        for number in range(100, 110):
            watch.step(number, 4.0, 1.0, lambda: [1])


def test_a_checkpoint_of_a_run_that_is_lost_already_is_not_called_good(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wild from the first step, it is lost before the first epoch's checkpoint, which is no good one."""
    monkeypatch.setattr(trainer, "losses", _losing(2, lambda values: values * 30))
    error = _run(tmp_path, tiny_encoder, reviews, epochs=3)
    assert error.what.endswith("by step 6; no checkpoint had been saved before it")


def test_a_run_that_goes_well_waits_for_no_other_rows(tmp_path: Path) -> None:
    watch = DivergenceWatch(Recipe.make(), tmp_path, lr=1e-3, usual_lr=1e-3, dtype="float32")
    asked: list[str] = []
    watch.estimate_start_loss = lambda: asked.append("held-out rows") or 0.7  # type: ignore[func-returns-value]

    def rows() -> list[int]:
        asked.append("row numbers")
        return [1]

    for number in range(1, 20):
        watch.step(number, 0.7, 1.0, rows)
    assert asked == []
    with pytest.raises(Diverged):
        watch.step(20, float("nan"), 1.0, rows)
    assert asked == ["row numbers"]


HARD_AT_LAST = [1.2, 4.36, 4.87, 3.04, 3.68, 3.77, 4.26, 4.0, 3.45, 2.74, 2.85, 3.47, 2.76]


def test_what_a_hard_batch_is_held_against_is_measured_once(tmp_path: Path) -> None:
    """The first batch is easier than all later ones; the rows that are scored then show that nothing was lost."""
    watch = DivergenceWatch(Recipe.make(), tmp_path, lr=1e-3, usual_lr=1e-3, dtype="float32")
    asked: list[int] = []

    def few() -> float:
        asked.append(1)
        return 3.9

    watch.estimate_start_loss = few
    for number, loss in enumerate(HARD_AT_LAST, 1):
        watch.step(number, loss, 1.0, lambda: [1])
    assert len(asked) == 1


BATCHES = [5.43, 4.36, 4.87, 1.04, 3.68, 3.77, 4.26, 1.0, 3.45, 2.74, 2.85, 3.47, 0.76]
"""Losses of SmolLM2's first steps on 270 short conversations, rows of one length each; 2.01 on held-out rows before."""


@pytest.mark.parametrize("lost", [False, True])
def test_batches_that_are_hard_from_the_start_are_no_lost_run(tmp_path: Path, lost: bool) -> None:
    watch = DivergenceWatch(Recipe.make(), tmp_path, lr=1e-3, usual_lr=1e-3, dtype="float32")
    watch.estimate_start_loss = lambda: 2.01
    for number, loss in enumerate(BATCHES, 1):
        watch.step(number, loss, 1.0, lambda: [1])
    if lost:
        with pytest.raises(Diverged, match="the loss has grown far above its first value"):
            for number in range(14, 30):
                watch.step(number, 11.0, 1.0, lambda: [1])
