"""The verdict: paired, in the right direction, and undecided where the rows cannot tell."""

import numpy as np
import pytest

from hatrack.evaluate.compare import compare_scores
from hatrack.evaluate.score import Score


def _accuracy(outcomes: list[float]) -> Score:
    values = np.array(outcomes)
    return Score({"accuracy": float(values.mean())}, values, np.ones(len(values)))


def _loss(per_row: list[float], tokens: list[float]) -> Score:
    return Score({"loss": sum(per_row) / sum(tokens)}, np.array(per_row), np.array(tokens))


def test_more_right_answers_are_better() -> None:
    found = compare_scores("accuracy", _accuracy([0, 0, 1, 0] * 25), _accuracy([1, 1, 1, 0] * 25))
    assert (found.verdict, found.rows) == ("better", 100)
    assert found.difference == pytest.approx(0.5) and found.ci95[0] > 0.35 and found.ci95[1] < 0.65


def test_fewer_are_worse_and_the_same_undecided() -> None:
    right, wrong = _accuracy([1, 1, 1, 0] * 25), _accuracy([0, 0, 1, 0] * 25)
    assert compare_scores("accuracy", right, wrong).verdict == "worse"
    same = compare_scores("accuracy", right, right)
    assert same.verdict == "undecided" and same.ci95 == (0.0, 0.0)
    assert compare_scores("accuracy", _accuracy([1, 0]), _accuracy([0, 1])).verdict == "undecided"


def test_a_lower_loss_is_better_and_weighs_by_tokens() -> None:
    tokens = [1.0, 9.0] * 20
    few = compare_scores("accuracy", _accuracy([0] * 19), _accuracy([1] * 19))
    assert few.verdict == "undecided" and few.ci95 == (1.0, 1.0)
    found = compare_scores("loss", _loss([2.0, 18.0] * 20, tokens), _loss([1.0, 9.0] * 20, tokens))
    assert found.verdict == "better" and found.difference == pytest.approx(-1)
    assert found.ci95 == pytest.approx((-1, -1))


def test_it_is_the_same_every_time() -> None:
    scores = _accuracy([0, 1, 1, 0, 1]), _accuracy([1, 1, 1, 0, 0])
    assert compare_scores("accuracy", *scores) == compare_scores("accuracy", *scores)
    assert list(compare_scores("accuracy", *scores).as_json()) == [
        "metric",
        "base",
        "adapter",
        "difference",
        "ci95",
        "rows",
        "verdict",
    ]
