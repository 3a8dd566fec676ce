"""What is known of a run before its first step. Reads headers and rows, never a weight."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from hatrack.base.header import hidden_size, read_config, read_header
from hatrack.base.sources import BaseFiles
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
    files: BaseFiles
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
    def config(self) -> dict[str, Any]:
        """The base's own config.json."""
        return read_config(self.files.folder)

    @property
    def usual_lr(self) -> float:
        """The learning rate hatrack would take for a base of this width."""
        return learning_rate(hidden_size(self.config))

    @property
    def stored_dtype(self) -> str:
        """The number format of most of the base's tensors on disk, as safetensors writes it: "BF16"."""
        return Counter(tensor.dtype for tensor in read_header(self.files.folder).values()).most_common(1)[0][0]
