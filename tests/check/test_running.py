"""What losses tell, by their numbers alone."""

import math

import pytest

from hatrack.check.running import (
    LearningSettings,
    Step,
    loss_barely_moves,
    loss_explodes,
    loss_not_a_number,
    no_gradient,
)

USUAL = LearningSettings(1e-3, 1e-3, "float32", 8)
STEP = Step(7, 0.7, 1.0, [30, 2, 11], "rows.csv")


@pytest.mark.parametrize(
    ("number", "lr", "dtype", "cause"),
    [
        (7, 1e-3, "float16", "--dtype bfloat16"),
        (1, 1e-3, "float32", "the base itself"),
        (7, 0.5, "float32", "--lr 0.001"),
        (7, 1e-3, "float32", "--lr 0.0003"),
    ],
)
def test_the_likely_cause_of_a_lost_loss(number: int, lr: float, dtype: str, cause: str) -> None:
    found = loss_not_a_number(
        Step(number, math.nan, 1.0, [30, 2, 11], "rows.csv"), LearningSettings(lr, 1e-3, dtype, 8)
    )
    assert found is not None and found.refused and cause in found.fix
    assert found.what == f"the loss is not a finite number at step {number}"
    assert found.got == "nan from rows 2, 11, 30 of rows.csv"


def test_a_gradient_that_overflows_is_told_apart() -> None:
    found = loss_not_a_number(Step(7, 0.7, math.inf, [1], "rows.csv"), USUAL)
    assert (
        found is not None
        and found.what.startswith("the gradient is not")
        and found.got == "inf from rows 1 of rows.csv"
    )
    assert loss_not_a_number(STEP, USUAL) is None


@pytest.mark.parametrize(
    ("first", "recent", "lost"),
    [(0.9, 1.9, False), (0.7, 2.6, False), (0.7, 2.8, True), (4, 5.9, False), (4, 6.1, True)],
)
def test_losses_that_grow(first: float, recent: float, lost: bool) -> None:
    found = loss_explodes(first, recent, STEP, LearningSettings(0.03, 1e-3, "float32", 8))
    assert (found is not None) == lost
    if found:
        assert "start again with --lr 0.001" in found.fix and "by step 7" in found.what


def test_no_gradient_at_all() -> None:
    assert no_gradient(STEP) is None
    assert no_gradient(Step(1, 0.0, 0.0, [1], "rows.csv")) is None  # nothing left to learn
    found = no_gradient(Step(1, 0.7, 0.0, [1], "rows.csv"))
    assert found is not None and "no gradient reaches the adapter at step 1" in found.what and "--targets" in found.fix


@pytest.mark.parametrize(("now", "told"), [(0.6999, True), (0.70, True), (0.69, False), (0.75, False)])
def test_losses_that_stay(now: float, told: bool) -> None:
    found = loss_barely_moves(0.70, now, 20, LearningSettings(1e-8, 1e-3, "float32", 8))
    assert (found is not None) == told
    if found:
        assert "--lr 0.001 before a larger --r" in found.fix and "barely moved in 20 steps" in found.what


def test_a_rate_that_was_measured_is_not_to_be_measured_again() -> None:
    settings = [LearningSettings(1e-4, 1e-3, "float32", 8, measured) for measured in (False, True)]
    told = [loss_barely_moves(0.7, 0.7, 20, each) for each in settings]
    assert ["--lr auto" in str(found) for found in told] == [True, False]
    assert all("--lr 0.001 before a larger --r, then more --epochs" in str(found) for found in told)


def test_a_task_the_base_knows_already_is_no_failure() -> None:
    assert loss_barely_moves(0.01, 0.01, 20, USUAL) is None
