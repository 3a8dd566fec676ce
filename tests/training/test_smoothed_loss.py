"""The loss that is shown follows what was learned, whatever lengths the rows of a step have."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hatrack
from hatrack.data.render import TokenRows
from hatrack.training import callbacks
from hatrack.training.smoothed_loss import STEPS, SmoothedLoss


def _rows(*lengths: int, learned: int | None = None) -> TokenRows:
    """Rows of so many tokens, all of them or the last `learned` to learn; none to classify."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    learn = np.zeros(offsets[-1], dtype=bool)
    for end, length in zip(offsets[1:], lengths, strict=True):
        learn[end - (length if learned is None else learned) : end] = learned != 0
    return TokenRows(
        np.zeros(offsets[-1], dtype=np.int32), offsets, learn, np.empty(0), np.arange(len(lengths)), cut_count=0
    )


def test_of_equal_lengths_it_is_the_mean_of_the_last_steps() -> None:
    smoothed = SmoothedLoss(_rows(30, 30))
    losses = [3.0, 2.0, 2.5, 1.0]
    for loss in losses:
        smoothed.add(loss, 30)
    weights = np.exp(-np.arange(4)[::-1] / STEPS)
    assert smoothed.value == pytest.approx(np.average(losses, weights=weights))


def test_the_first_step_is_shown_as_it_is() -> None:
    smoothed = SmoothedLoss(_rows(10, 500))
    assert smoothed.value is None
    smoothed.add(4.5, 10)
    assert smoothed.value == pytest.approx(4.5)


def test_lengths_of_steps_are_not_seen() -> None:
    """Short rows cost 5 nats a token, long ones 1, and all get easier by a nat: what is shown falls by a nat."""
    random = np.random.default_rng(0)
    lengths = random.choice([8, 16, 32, 64, 128, 256], 300)
    smoothed, mean = SmoothedLoss(_rows(*lengths)), 0.0
    shown, plain = [], []
    for step, length in enumerate(lengths):
        loss = 6.5 - 1.0 * np.log(length) - step / 300 + random.normal(0, 0.05)
        smoothed.add(loss, length)
        mean = loss if step == 0 else 0.8 * mean + 0.2 * loss
        assert smoothed.value is not None
        shown.append(smoothed.value)
        plain.append(mean)
    usual = np.average(6.5 - np.log(lengths), weights=lengths)
    assert shown[20] == pytest.approx(usual - 20 / 300, abs=0.1)
    assert shown[299] == pytest.approx(usual - 1, abs=0.15)
    assert np.abs(np.diff(shown[20:])).max() < 0.05 < np.abs(np.diff(plain[20:])).max()
    assert all(later < earlier for earlier, later in zip(shown[20::40], shown[60::40], strict=False))


def test_lengths_close_together_tell_nothing() -> None:
    smoothed = SmoothedLoss(_rows(20, 21, 1000))
    smoothed.add(2.0, 20)
    smoothed.add(3.0, 21)
    assert smoothed.value is not None and 2 < smoothed.value < 3


def test_what_is_learned_decides_which_length_is_usual() -> None:
    assert SmoothedLoss(_rows(10, 100)).usual == pytest.approx((10 * np.log(10) + 100 * np.log(100)) / 110)
    assert SmoothedLoss(_rows(10, 100, learned=5)).usual == pytest.approx((np.log(10) + np.log(100)) / 2)
    assert SmoothedLoss(_rows(10, 100, learned=0)).usual == pytest.approx((np.log(10) + np.log(100)) / 2)


def test_a_loss_that_is_lost_is_not_taken_in() -> None:
    smoothed = SmoothedLoss(_rows(30))
    smoothed.add(2.0, 30)
    smoothed.add(float("nan"), 30)
    smoothed.add(float("inf"), 30)
    assert smoothed.value == pytest.approx(2.0)


def test_a_run_shows_it_and_says_when_it_will_be_scored(
    tmp_path: Path,
    tiny_decoder: Path,
    questions: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(callbacks, "SAY_EVERY_SECONDS", -1)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 4, "epochs": 2, "lr": 1e-3}
    hatrack.train(base=str(tiny_decoder), data=str(questions), output=str(tmp_path / "hat"), name="hat", **options)
    said = capsys.readouterr().err
    losses = [float(found) for found in re.findall(r"step \d+ of \d+, loss (\d+\.\d+),", said)]
    assert len(losses) > 10 and max(abs(b - a) for a, b in pairwise(losses)) < 0.5
    announced, before = said.index("held-out rows are scored after each epoch"), said.index("before training: held-out")
    assert announced < said.index("step 1 of") < before < said.index("epoch 1.00: held-out")
