"""The range test finds the rate before the loss grows, and leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest
import torch

import hatrack
from hatrack.training import undone_steps
from hatrack.training.lr_range import SAFETY, choose_rate, find_learning_rate


def test_the_rate_before_the_lowest_loss_is_the_one() -> None:
    tried = [(1e-4, 0.70), (2e-4, 0.69), (4e-4, 0.66), (8e-4, 0.50), (16e-4, 0.90)]
    assert choose_rate(tried, 1e-3) == pytest.approx(4e-4 / SAFETY)


@pytest.mark.parametrize(
    "tried", [[(1e-4, 0.7), (2e-4, 0.8)], [(1e-4, float("nan"))], [(1e-4, 0.7), (2e-4, float("nan"))]]
)
def test_a_test_that_tells_nothing_gives_the_usual_rate(tried: list[tuple[float, float]]) -> None:
    assert choose_rate(tried, 1e-3) == 1e-3


class Valley(torch.nn.Module):
    """One weight that wants to be 1 (loss (w - 1)^2), with dropout so that it draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.dropout = torch.nn.Dropout(0.5)


def _loss(model: Valley, batch: dict[str, torch.Tensor], task: str) -> tuple[torch.Tensor, Any, Any]:
    model.dropout(torch.ones(3))
    return (model.weight - 1) ** 2, None, None


def test_everything_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undone_steps, "losses", _loss)
    model = Valley().eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    rate = find_learning_rate(model, [{"labels": torch.zeros(1)}], "classify", 0.1)
    # Adam's first steps move by the rate itself: their sum passes 1, where the weight wants to be, at about 0.4
    assert 0.03 < rate < 0.3
    assert float(model.weight.detach()) == 0 and model.weight.grad is None and not model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_measures_takes_it_and_remembers(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hat = hatrack.train(
        base=str(tiny_encoder),
        data=str(reviews),
        output=str(tmp_path / "hat"),
        name="hat",
        lr="auto",
        epochs=6,
        device="cpu",
        dtype="float32",
        batch_size=8,
    )
    said = capsys.readouterr().err
    assert "learning rate: up to the measured rate (see below)" in said and "(measured: the loss fell from" in said
    assert hat.result["eval"]["loss"] < hat.result["before"]["loss"]
    assert hat.cards["hat"].recipe["lr"] == "auto"
