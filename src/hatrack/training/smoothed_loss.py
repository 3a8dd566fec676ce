"""Smooths the shown training loss, corrected for the length of each step's rows.

A batch has rows of similar length, and the loss of short rows may be several times that of long ones. So a plain mean
over the last steps shows their lengths rather than what was learned. Knows nothing of models.
"""

import math

import numpy as np

from hatrack.data.render import TokenRows

STEPS = 20
"""The weight of a step falls to 1 / e after this many steps."""
SLOPE_PENALTY = 1.0
"""Pulls the slope towards 0, as few steps, or steps of similar length, do not determine it. In squared logarithms."""


class SmoothedLoss:
    """The smoothed loss is `value`: `a` of the line  loss = a + c (log(length) - usual)  through the last steps.

    The line is fitted by least squares, with more weight on recent steps and c pulled towards 0. `usual` is the mean of
    log(length) over the supervised tokens of `rows`. If all lengths are equal, `value` is the weighted mean.
    """

    def __init__(self, rows: TokenRows) -> None:
        weights = np.ones(len(rows)) if not rows.supervised.any() else rows.sizes[:, 1]
        self.usual = float(np.average(np.log(np.maximum(rows.lengths, 1)), weights=weights))
        self.sums = np.zeros(5)
        self.value: float | None = None

    def add(self, loss: float, length: float) -> None:
        """Adds a step's loss, and the length of its rows in tokens."""
        if not math.isfinite(loss):
            return
        x = math.log(max(length, 1.0)) - self.usual
        self.sums = self.sums * math.exp(-1 / STEPS) + [1, x, x * x, loss, x * loss]
        w, x, xx, y, xy = map(float, self.sums)
        xx += SLOPE_PENALTY
        self.value = max((y * xx - x * xy) / (w * xx - x * x), 0.0)
