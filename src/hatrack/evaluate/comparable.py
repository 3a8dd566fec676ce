"""Which adapters can be compared with each other. Imports no torch."""

from collections.abc import Mapping

from hatrack.adapter.card import AdapterCard
from hatrack.errors import AdapterError


def check_comparable(hats: Mapping[str, AdapterCard]) -> None:
    """Raises AdapterError where adapters answer in ways that cannot be compared: of other tasks, with other labels."""
    (first, one), *others = hats.items()
    for name, other in others:
        ours, theirs = _answers_as(one), _answers_as(other)
        if ours != theirs:
            raise AdapterError(
                f"{first} and {name} cannot be compared with each other",
                got=f"{ours} and {theirs}",
                fix=f"compare each with the base: hatrack compare {first}, then hatrack compare {name}",
                gotcha="adapters-not-alike",
            )


def _answers_as(hat: AdapterCard) -> str:
    if hat.task != "classify":
        return f"task {hat.task}"
    kind = "any of the labels" if hat.multi_label else "one of the labels"
    return f"task classify, {kind} {', '.join(sorted(hat.labels))}"
