"""The largest micro-batch that fits a memory limit, and what to change when none does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hatrack.adapter.count import count, linears_from_shapes
from hatrack.adapter.targets import choose
from hatrack.base.header import head_shapes, model_shapes, read_config
from hatrack.errors import RecipeError
from hatrack.plan.memory import shape_of, training_bytes
from hatrack.recipe import Recipe
from hatrack.say import size


@dataclass(frozen=True)
class Plan:
    """What a run is expected to take. `memory` in bytes by term, for `micro_batch` rows at a time."""

    trainable: int
    total: int
    micro_batch: int
    memory: dict[str, int]

    @property
    def peak_memory_bytes(self) -> int:
        """All terms together."""
        return sum(self.memory.values())

    def as_json(self) -> dict[str, object]:
        """The plan as `train --json` shows it."""
        return {
            "trainable": self.trainable,
            "total": self.total,
            "micro_batch": self.micro_batch,
            "peak_memory_bytes": self.peak_memory_bytes,
            "memory": dict(self.memory),
        }


def plan_run(
    recipe: Recipe, folder: Path, *, task: str, labels: int, longest: int, batch_size: int, dtype: str
) -> Plan:
    """The plan of a run on the base in `folder`, whose longest row has `longest` tokens. Reads headers only.

    Raises TargetError or RecipeError where the recipe does not fit the base, or the run the memory limit.
    """
    config = read_config(folder)
    shapes = model_shapes(folder, task, labels)
    heads = sorted({name.rpartition(".")[0] for name in head_shapes(config, labels)}) if task == "classify" else []
    linears = linears_from_shapes(shapes, str(config.get("model_type")))
    choice = choose(linears, recipe.targets, recipe.top_layers, heads=heads)
    counted = count(shapes, [linears[name] for name in choice.names], r=recipe.r, variant=recipe.variant, heads=heads)
    pefts_own = recipe.variant == "dora" or recipe.quantize != "none"
    copied_inputs = sum(linears[name][0] for name in choice.names) if pefts_own else 0

    def memory_for(rows: int) -> dict[str, int]:
        return training_bytes(
            shape_of(config),
            task=task,
            parameters=counted.total - counted.lora,
            trainable=counted.trainable,
            copied_inputs=copied_inputs,
            tokens=rows * longest,
            dtype=dtype,
            quantize=recipe.quantize,
        )

    return fit(
        memory_for,
        batch_size=batch_size,
        limit=recipe.memory,
        trainable=counted.trainable,
        total=counted.total,
    )


def fit(
    memory_for: Callable[[int], Mapping[str, int]], *, batch_size: int, limit: int | None, trainable: int, total: int
) -> Plan:
    """The plan with the most rows at a time that stays under `limit` bytes; `memory_for(rows)` gives bytes by term.

    Raises RecipeError where not even one row at a time fits: what takes the most, and the change that helps.
    """
    for rows in range(batch_size, 0, -1):
        memory = dict(memory_for(rows))
        if batch_size % rows == 0 and (limit is None or sum(memory.values()) <= limit):
            return Plan(trainable, total, rows, memory)
    largest = max(memory, key=lambda term: memory[term])
    cure = {
        "base": "--quantize 4bit, or a smaller base",
        "activations": "a shorter --max-length, or --layers top-4",
        "logits": "a shorter --max-length",
    }.get(largest, "more memory")
    raise RecipeError(
        f"--memory {size(limit or 0)} is too little even for one row at a time",
        got=f"{size(sum(memory.values()))} needed, of which {largest} {size(memory[largest])}",
        fix=cure,
    )
