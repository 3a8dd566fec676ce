"""What is known of a run before its first step. Reads headers and rows, never a weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hatrack.base.description import BaseDescription
from hatrack.data.examples import Examples
from hatrack.data.tokens import Tokens
from hatrack.planning.fit import Plan
from hatrack.planning.schedule import Schedule, learning_rate
from hatrack.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """A run that could begin: its recipe and all that follows from it. `dtype` is that of the frozen base."""

    recipe: Recipe
    examples: Examples
    files: BaseDescription
    tokenizer: Any
    tokens: Tokens
    plan: Plan
    schedule: Schedule
    dtype: str

    @property
    def task(self) -> str:
        """classify, chat or complete."""
        return self.examples.task

    @property
    def config(self) -> Mapping[str, Any]:
        """The base's own config.json."""
        return self.files.config

    @property
    def usual_lr(self) -> float:
        """The learning rate hatrack would take for a base of this width."""
        return learning_rate(self.files.hidden_size)

    @property
    def stored_dtype(self) -> str:
        """The dtype of most of the base's bytes on disk, as safetensors writes it: "BF16"."""
        return self.files.stored_dtype
