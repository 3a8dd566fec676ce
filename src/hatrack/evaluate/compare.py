"""Compares adapters with the base and with each other on the same rows, with confidence intervals."""

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
    """One adapter against its base on `rows` rows.

    `metric`: accuracy (classify; higher is better) or loss (lower is better); `base` and `adapter`: its values;
    `difference` = adapter - base; `ci95`: 95% confidence interval of the difference; `verdict`: better, worse, or
    undecided if the interval holds 0 or there are fewer than 20 rows.
    """

    metric: str
    base: float
    adapter: float
    difference: float
    ci95: tuple[float, float]
    rows: int
    verdict: str

    def as_json(self) -> dict[str, Any]:
        """The object that `hatrack compare --json` prints."""
        return {**asdict(self), "ci95": list(self.ci95)}


@dataclass(frozen=True)
class Comparisons:
    """`adapters`: name -> comparison of the adapter with the base. `pairs`: (first, second) -> comparison of the second
    adapter with the first, whose score is in `base`."""

    adapters: dict[str, Comparison]
    pairs: dict[tuple[str, str], Comparison]

    def better(self, pair: tuple[str, str]) -> str | None:
        """The name of the better adapter of a pair; None if that is undecided."""
        return {"better": pair[1], "worse": pair[0]}.get(self.pairs[pair].verdict)

    def as_json(self) -> dict[str, Any]:
        """The object that `hatrack compare --json` prints: for one adapter its comparison, else all comparisons."""
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
    """Scores the bare base and the adapters in `rows`: name -> the same rows, in the tokens of that adapter.

    The adapter in use stays in use.
    """
    previous, first = hat.active, next(iter(rows.values()))
    scores: dict[str | None, Score] = {}
    try:
        for name in (None, *rows):
            hat.use(name)
            tokens = first if name is None else rows[name]
            scores[name] = score(hat.model, tokens, ScoreSettings(hat.task, batch_size, hat.pad_id, hat.base.device))
    finally:
        hat.use(previous)
    metric = main_metric(hat.task)
    return Comparisons(
        {name: compare_scores(metric, scores[None], scores[name], seed=seed) for name in rows},
        {
            (one, other): compare_scores(metric, scores[one], scores[other], seed=seed)
            for one, other in combinations(rows, 2)
        },
    )


def compare_scores(metric: str, base: Score, adapter: Score, *, seed: int = 0) -> Comparison:
    """Compares two scores of the same rows by a paired bootstrap over rows, percentile interval.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. Rows are weighted by their
    tokens, so a mean loss stays a mean over tokens.
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
