"""The loss that is shown while a model trains: smoothed, and as if every step had rows of the usual length.

Rows of like length are learned from together, and the loss of short rows may be several times that of long ones: a mean
over the last steps says more of their lengths than of what was learned. Knows nothing of models.
"""

import math

import numpy as np

from hatrack.data.render import TokenRows

STEPS = 20
"""How far back the mean reaches: a step counts for 1 / e after as many more."""
DOUBT = 1.0
"""A pull of the slope towards 0, in squared logarithms: a few steps, or lengths close together, tell nothing of it."""


class SmoothedLoss:
    """`value` after each `add`: `a` of the line  loss = a + c (log(length) - usual)  through the last steps.

    The line is fitted by least squares, each step weighted by how recent it is, with a small pull of c towards 0;
    `usual` is the mean of log(length) over what `rows` have to learn. Of equal lengths it is the weighted mean.
    """

    def __init__(self, rows: TokenRows) -> None:
        learned = np.ones(len(rows)) if not rows.supervised.any() else rows.sizes[:, 1]
        self.usual = float(np.average(np.log(np.maximum(rows.lengths, 1)), weights=learned))
        self.sums = np.zeros(5)
        self.value: float | None = None

    def add(self, loss: float, length: float) -> None:
        """Takes in a step's loss, and the length of its rows in tokens."""
        if not math.isfinite(loss):
            return
        x = math.log(max(length, 1.0)) - self.usual
        self.sums = self.sums * math.exp(-1 / STEPS) + [1, x, x * x, loss, x * loss]
        w, x, xx, y, xy = map(float, self.sums)
        xx += DOUBT
        self.value = max((y * xx - x * xy) / (w * xx - x * x), 0.0)
