"""`Prepared`: a run before its first step, complete when made, and handed on whole.

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
    """A run that can begin: its recipe, and all that was read and derived for it. No weight has been loaded.

    `base` is the frozen base as described by its small files, `dtype` what its weights will be loaded in. `examples`
    are the rows as read, `tokens` the same rows as token ids. `schedule.lr` is the usual learning rate where the recipe
    leaves it to be measured. `cached_fraction`: the share of rows for which an earlier run cached the outputs of the
    layers below the adapters. `lineage`: what hatrack.json says of the base. It needs the weights to be read, which
    `hatrack check` does not do: there it is empty.
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
    lineage: Mapping[str, Any] = field(default_factory=dict)

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
        """The learning rate that hatrack derives for a base of this width."""
        return learning_rate(self.base.hidden_size)

    @property
    def stored_dtype(self) -> str:
        """The dtype of most of the base's bytes on disk, as safetensors writes it: "BF16"."""
        return self.base.stored_dtype
