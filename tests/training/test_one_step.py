"""The step that `hatrack check` tries is the one that `train` takes, streamed or checkpointed where that is planned."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hatrack.base.load import Base
from hatrack.base.offload import move_all_but_layers
from hatrack.check.checks import check_recipe
from hatrack.check.running import Step
from hatrack.planning import fit
from hatrack.planning.memory import Method
from hatrack.recipe import Recipe
from hatrack.training import adapted_model, one_step
from hatrack.training.layer_streaming import LayerStreaming
from hatrack.training.load import load_run_base
from tests.training.test_layer_streaming import too_large


@contextlib.contextmanager
def _planned(method: Method) -> Iterator[None]:
    original = fit.plan_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "plan_run", lambda where, _=None, rows=None: original(where, method, rows))
        yield


def _step(base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Step:
    """The step that a check of this recipe tries, of which it has nothing to say."""
    steps: list[Step] = []
    monkeypatch.setattr(one_step, "no_gradient", steps.append)
    recipe = Recipe.make(**{"base": str(base), "data": str(data), "device": "cpu"} | options)
    findings, facts = check_recipe(recipe)
    assert facts is not None and not any(finding.refused for finding in findings)
    assert one_step.one_step(facts) == []
    return steps[0]


@pytest.mark.parametrize("options", [{}, {"layers": "top-1"}], ids=str)
@pytest.mark.parametrize("task", ["classify", "chat"])
def test_a_streamed_base_is_checked_by_layer_streaming(
    task: str,
    options: dict[str, Any],
    tiny_encoder: Path,
    half_decoder: Path,
    reviews: Path,
    questions: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, data = (tiny_encoder, reviews) if task == "classify" else (half_decoder, questions)
    plain = _step(base, data, monkeypatch, dtype="float32", **options)
    streamed: list[int] = []
    original = LayerStreaming.step

    def counted(self: LayerStreaming, batches: Any, *rest: Any) -> torch.Tensor:
        streamed.append(len(batches))
        return original(self, batches, *rest)

    monkeypatch.setattr(LayerStreaming, "step", counted)
    with too_large():
        step = _step(base, data, monkeypatch, dtype="float32", **options)
    assert streamed == [1] and step.rows == plain.rows
    assert (step.loss, step.norm) == pytest.approx((plain.loss, plain.norm), rel=1e-4)
    assert step.norm > 0


def test_a_base_that_is_streamed_to_an_accelerator_is_moved_there_as_for_training(
    half_decoder: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What computes on an accelerator is in tests/training/test_gpu.py; here, that the check asks for it."""
    moved: list[str] = []

    def move(*given: Any) -> None:
        moved.append(str(given[-1]))
        move_all_but_layers(*given)

    monkeypatch.setattr(adapted_model, "move_all_but_layers", move)
    with too_large():
        _step(half_decoder, questions, monkeypatch)
    assert moved == ["cpu"]


def test_planned_checkpointing_is_part_of_the_step(
    tiny_decoder: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def watched(*given: Any, **options: Any) -> Base:
        base = load_run_base(*given, **options)
        for number, layer in enumerate(base.model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        return base

    monkeypatch.setattr(adapted_model, "load_run_base", watched)
    plain = _step(tiny_decoder, questions, monkeypatch, dtype="float32")
    once = ran.copy()
    ran.clear()
    with _planned(Method(checkpointing=True)):
        step = _step(tiny_decoder, questions, monkeypatch, dtype="float32")
    assert once and ran == [*once, 1, 0]  # again in the backward pass
    assert (step.loss, step.norm) == pytest.approx((plain.loss, plain.norm), rel=1e-4)


def test_a_gradient_that_is_lost_is_found(tiny_decoder: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*given: Any, **options: Any) -> Base:
        base = load_run_base(*given, **options)
        base.model.model.layers[1].register_forward_hook(lambda _layer, _inputs, output: output.detach() + 0 * output)
        return base

    monkeypatch.setattr(adapted_model, "load_run_base", cut_off)
    recipe = Recipe.make(base=str(tiny_decoder), data=str(questions), device="cpu")
    facts = check_recipe(recipe)[1]
    assert facts is not None
    assert [finding.gotcha for finding in one_step.one_step(facts)] == ["no-gradient"]
