"""`Prepared`: everything that is known of a run before its weights are loaded.

The checks and training both read it. It is defined here because check/ may not import training/, which makes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hatrack.base.description import BaseDescription
from hatrack.data.examples import Examples
from hatrack.data.tokens import Tokens
from hatrack.planning.fit import Plan
from hatrack.planning.schedule import Schedule, learning_rate
from hatrack.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """A run that can begin: its recipe, and everything that was read and derived for it. No weights are loaded yet.

    `base` describes the frozen base (from its small files); `dtype` is the dtype its weights will be loaded in.
    `examples` are the rows as read, `tokens` the same rows as token ids. With `--lr auto`, `schedule.lr` is the usual
    learning rate until it is measured. `cached_fraction`: the share of rows for which an earlier run cached the outputs
    of the layers below the adapters. `base_record`: what hatrack.json will say about the base; empty in
    `hatrack check`, because it requires reading the weights.
    """

    recipe: Recipe
    base: BaseDescription
    dtype: str
    tokenizer: Any
    examples: Examples
    tokens: Tokens
    plan: Plan
    schedule: Schedule
    cached_fraction: float = 0.0
    base_record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """classify, chat or complete."""
        return self.examples.task

    @property
    def config(self) -> Mapping[str, Any]:
        """The base's config.json."""
        return self.base.config

    @property
    def usual_lr(self) -> float:
        """The learning rate that hatrack derives from the base's hidden size."""
        return learning_rate(self.base.hidden_size)

    @property
    def stored_dtype(self) -> str:
        """The dtype of most of the base's bytes on disk, as safetensors writes it: "BF16"."""
        return self.base.stored_dtype
