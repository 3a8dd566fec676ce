"""Base against adapters, and adapters against each other, on the same rows: which is better, by how much, how surely.

Knows nothing of where the rows come from or how the answer is shown.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from hatrack.data.render import TokenRows
from hatrack.evaluate.held_out import FEWEST_ROWS
from hatrack.evaluate.score import Score, ScoreSettings, main_metric, score
from hatrack.inference.hat import Hat

RESAMPLES = 2000


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


@dataclass(frozen=True)
class Comparisons:
    """`adapters`: each by its name, against the base. `pairs`: each pair of names, the second against the first, which
    stands where the base stands else."""

    adapters: dict[str, Comparison]
    pairs: dict[tuple[str, str], Comparison]

    def better(self, pair: tuple[str, str]) -> str | None:
        """The name of the better one of a pair, where that is sure."""
        return {"better": pair[1], "worse": pair[0]}.get(self.pairs[pair].verdict)

    def as_json(self) -> dict[str, Any]:
        """The object `hatrack compare --json` prints: one adapter's comparison, or those of all."""
        if len(self.adapters) == 1:
            return next(iter(self.adapters.values())).as_json()
        return {
            "adapters": [{"name": name, **found.as_json()} for name, found in self.adapters.items()],
            "pairs": [
                {
                    "names": list(pair),
                    "metric": found.metric,
                    "scores": [found.base, found.adapter],
                    "difference": found.difference,
                    "ci95": list(found.ci95),
                    "rows": found.rows,
                    "better": self.better(pair),
                }
                for pair, found in self.pairs.items()
            ],
        }


def compare(hat: Hat, rows: Mapping[str, TokenRows], *, batch_size: int = 16, seed: int = 0) -> Comparisons:
    """Scores the bare base and each adapter in `rows`, which has the same rows for all as their tokens.

    The adapter in use is in use again afterwards.
    """
    before, first = hat.active, next(iter(rows.values()))
    scores: dict[str | None, Score] = {}
    try:
        for name in (None, *rows):
            hat.use(name)
            mine = first if name is None else rows[name]
            scores[name] = score(hat.model, mine, ScoreSettings(hat.task, batch_size, hat.pad_id, hat.base.device))
    finally:
        hat.use(before)
    metric = main_metric(hat.task)
    return Comparisons(
        {name: compare_scores(metric, scores[None], scores[name], seed=seed) for name in rows},
        {
            (one, other): compare_scores(metric, scores[one], scores[other], seed=seed)
            for one, other in combinations(rows, 2)
        },
    )


def compare_scores(metric: str, base: Score, adapter: Score, *, seed: int = 0) -> Comparison:
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
