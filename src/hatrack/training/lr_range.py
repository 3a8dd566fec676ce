"""Finds a learning rate by a range test: twenty steps on one batch, each at a higher rate, then undone.

The loss falls while the rate is useful and grows once it is too high (Smith, "Cyclical Learning Rates for Training
Neural Networks", 2017, section 3.3). Knows nothing of recipes or files.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from hatrack.console import say
from hatrack.training.undone_steps import add_gradients, undo_steps

STEPS = 20
LOWEST, HIGHEST = 1 / 30, 100
"""The first and the last rate of the test, as multiples of the usual rate."""
TOO_HIGH = 1.3
"""The test ends once the loss is this many times the lowest loss so far: the rate is too high."""
SAFETY = 4
"""The rate with the lowest loss is divided by this, because training is longer than the test."""


def find_learning_rate(model: Any, batches: Sequence[dict[str, torch.Tensor]], task: str, usual: float) -> float:
    """Measures the peak learning rate for the trainable parameters of `model`, to two digits. Returns `usual` if the
    test is inconclusive.

    `batches` are the micro-batches of one step. Weights, random state and mode are restored.
    """
    say(f"learning rate: trying up to {STEPS} rates on one batch")
    tried = _try_rates(model, batches, task, usual)
    chosen = choose_rate(tried, usual)
    best = min(tried, key=lambda rate_and_loss: rate_and_loss[1])
    say(
        f"learning rate {chosen:g} (measured: the loss fell from {tried[0][1]:.3f} to {best[1]:.3f} until the rate "
        f"reached {best[0]:.1g}; {SAFETY} times lower is taken)"
        if chosen != usual
        else f"learning rate {usual:g} (the usual one: the test of {len(tried)} rates was inconclusive)"
    )
    return chosen


def choose_rate(tried: Sequence[tuple[float, float]], usual: float) -> float:
    """Returns the rate that led to the lowest loss, divided by `SAFETY`; `usual` if no rate lowered the loss.

    `tried` has each rate with the loss before the step at that rate.
    """
    losses = [loss if math.isfinite(loss) else math.inf for _, loss in tried]
    lowest = losses.index(min(losses))
    if lowest == 0:
        return usual
    return float(f"{tried[lowest - 1][0] / SAFETY:.1e}")


def _try_rates(
    model: Any, batches: Sequence[dict[str, torch.Tensor]], task: str, usual: float
) -> list[tuple[float, float]]:
    tried: list[tuple[float, float]] = []
    with undo_steps(model) as parameters:
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
        for step in range(STEPS):
            rate = usual * LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
            loss = add_gradients(model, batches, task)
            tried.append((rate, loss))
            if not loss <= TOO_HIGH * min(earlier for _, earlier in tried) + 0.05:  # also if it is nan
                break
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
    return tried
