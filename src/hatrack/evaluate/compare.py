"""Base against adapter on the same held-out rows: which is better, by how much, and how sure that is.

Knows nothing of where the rows come from or how the answer is shown.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hatrack.data.render import TokenRows
from hatrack.evaluate.score import Score, main_metric, score
from hatrack.hat import Hat

RESAMPLES = 2000
FEWEST_ROWS = 20
"""A bootstrap of fewer rows is surer than it has reason to be, so there is no verdict."""


@dataclass(frozen=True)
class Comparison:
    """`difference` = adapter - base of `metric`, with its 95% confidence interval over `rows` rows.

    `verdict` is better, worse, or undecided where the interval holds 0 or the rows are too few to tell.
    """

    metric: str
    base: float
    adapter: float
    difference: float
    ci95: tuple[float, float]
    rows: int
    verdict: str

    def as_json(self) -> dict[str, Any]:
        """The object `hatrack compare --json` prints."""
        return {**asdict(self), "ci95": list(self.ci95)}


def compare(hat: Hat, rows: TokenRows, *, batch_size: int = 16, seed: int = 0) -> Comparison:
    """Scores the bare base and the adapter in use on `rows`; the adapter is in use again afterwards."""
    name = hat.active
    scores = {}
    for choice in (None, name):
        hat.use(choice)
        scores[choice] = score(
            hat.model, rows, task=hat.task, batch_size=batch_size, pad_id=hat.pad_id, device=hat.base.device
        )
    return decide(main_metric(hat.task), scores[None], scores[name], seed=seed)


def decide(metric: str, base: Score, adapter: Score, *, seed: int = 0) -> Comparison:
    """The verdict from two scores of the same rows: a paired bootstrap over rows, percentile interval.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. A row is drawn with its weight,
    so the mean of a loss stays a mean over tokens.
    """
    gains = adapter.outcomes - base.outcomes  # (rows,)
    draws = np.random.default_rng(seed).integers(len(gains), size=(RESAMPLES, len(gains)))
    means = gains[draws].sum(1) / np.maximum(adapter.weights[draws].sum(1), 1e-12)
    low, high = (float(value) for value in np.quantile(means, [0.025, 0.975]))
    verdict = "better" if (low > 0) == (metric == "accuracy") else "worse"
    if low <= 0 <= high or len(gains) < FEWEST_ROWS:
        verdict = "undecided"
    before, after = base.metrics[metric], adapter.metrics[metric]
    return Comparison(metric, before, after, after - before, (low, high), len(gains), verdict)
