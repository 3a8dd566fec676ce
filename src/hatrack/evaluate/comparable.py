"""Checks that adapters can be compared with each other; imports no torch."""

from collections.abc import Mapping

from hatrack.adapter.card import AdapterCard
from hatrack.errors import AdapterError


def check_comparable(cards: Mapping[str, AdapterCard]) -> None:
    """Raises AdapterError if two adapters have different tasks or labels."""
    (first, first_card), *others = cards.items()
    for name, card in others:
        if _answer_format(first_card) != _answer_format(card):
            raise AdapterError(
                f"{first} and {name} cannot be compared with each other",
                got=f"{_answer_format(first_card)} and {_answer_format(card)}",
                fix=f"compare each with the base: hatrack compare {first}, then hatrack compare {name}",
                gotcha="adapters-not-alike",
            )


def _answer_format(card: AdapterCard) -> str:
    """The task, and for classifiers the labels: `task classify, one of the labels bad, good`."""
    if card.task != "classify":
        return f"task {card.task}"
    kind = "any of the labels" if card.multi_label else "one of the labels"
    return f"task classify, {kind} {', '.join(sorted(card.labels))}"
