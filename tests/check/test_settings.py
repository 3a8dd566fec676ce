"""Settings that would waste a run are found, and those next to them are not."""

from dataclasses import replace

import pytest

from hatrack.check import settings
from tests.check.conftest import Make


@pytest.mark.parametrize(("times", "timid", "wild"), [(1 / 40, True, False), (1 / 20, False, False), (12, False, True)])
def test_learning_rates_are_held_to_the_usual_one(facts: Make, times: float, timid: bool, wild: bool) -> None:
    usual = facts().usual_lr
    known = facts(lr=usual * times)
    assert (settings.learning_rate_timid(known) is not None) == timid
    assert (settings.learning_rate_wild(known) is not None) == wild


def test_a_timid_rate_is_told_with_what_to_take_instead(facts: Make) -> None:
    found = settings.learning_rate_timid(facts(lr=1e-8, steps=20))
    assert found is not None and "so low that 20 steps will change almost nothing" in found.what
    assert found.got == "--lr 1e-08, 150,000 times below the usual 0.0015"
    assert found.fix == "--lr 0.0015, or --lr auto to measure it"


def test_a_rate_that_is_to_be_measured_is_neither(facts: Make) -> None:
    known = facts(lr="auto")
    assert settings.learning_rate_timid(known) is None and settings.learning_rate_wild(known) is None


@pytest.mark.parametrize(("r", "alpha", "far"), [(8, None, False), (8, 4, False), (8, 3.9, True), (8, 65, True)])
def test_alpha_is_held_to_2r(facts: Make, r: int, alpha: float | None, far: bool) -> None:
    found = settings.alpha_far_from_2r(facts(r=r, alpha=alpha))
    assert (found is not None) == far
    if found:
        assert "leave --alpha out for 16" in found.fix


def test_rank_is_held_to_what_the_rows_can_teach(facts: Make) -> None:
    assert settings.rank_before_data(facts(r=16)) is None
    found = settings.rank_before_data(facts(r=32))
    known = facts(r=32)
    times = round(2 * known.plan.trainable / len(known.tokens.train))  # two labels: one bit a row
    assert found is not None and f"r 32 has room for {times:,} times" in found.got and "--r 8" in found.fix


def test_float16_is_doubted_for_a_base_of_another_format(facts: Make) -> None:
    assert settings.float16_overflow(facts()) is None
    found = settings.float16_overflow(replace(facts(), dtype="float16"))
    assert found is not None and "stored as F32" in found.got and "--dtype bfloat16" in found.fix


@pytest.mark.parametrize(
    ("compute", "fast", "found"), [("int8", True, True), ("int8", False, False), ("auto", True, False)]
)
def test_rounding_where_bfloat16_is_fast(
    facts: Make, monkeypatch: pytest.MonkeyPatch, compute: str, fast: bool, found: bool
) -> None:
    monkeypatch.setattr("hatrack.cpu.has_fast_bfloat16", lambda: fast)
    told = settings.rounding_slower(facts(compute=compute))
    assert (told is not None) is found
    assert told is None or "--compute int8, which computes everything else in float32" in str(told)
