"""Rows that were trained on are known again by what they say, in whatever layout, and only those."""

from typing import Any

import numpy as np
import pytest

from hatrack.data import trained_rows
from hatrack.data.examples import Example


def _text(text: str, label: int = 0) -> Example:
    return Example(1, text=text, label=label)


def _chat(*said: str, **more: Any) -> Example:
    roles = ("user", "assistant")
    turns = tuple({"role": roles[index % 2], "content": content} for index, content in enumerate(said))
    return Example(1, messages=turns, **more)


def _system(example: Example, content: str) -> Example:
    return Example(1, messages=({"role": "system", "content": content}, *example.messages))


def _is_seen(row: Example, *trained: Example) -> bool:
    return bool(trained_rows.are_among([row], trained_rows.row_and_turn_keys(trained))[0])


@pytest.mark.parametrize(
    ("trained", "row"),
    [
        (_text("A good film."), _text("A good film.", label=1)),
        (_text("A good film."), _text("  a GOOD\tfilm. \n")),
        (_text("Caf\u00e9 \ufb01ne"), _text("cafe\u0301 fine")),
        (_text("STRASSE"), _text("stra\u00dfe")),
        (_text("\u1e9e"), _text("ss")),
        (_chat("What?", "That."), _chat("what? ", "that.")),
        (_chat("What?", "That."), Example(1, text="What?", completion="That.")),
        (Example(1, text="What?", completion=" That."), _chat("What?", "That.")),
        (_chat("What?", "That."), Example(1, text="What? That.")),
        (_chat("What?", "That."), _system(_chat("What?", "That."), "Be brief.")),
        (_system(_chat("What?", "That."), "Be brief."), _chat("What?", "That.")),
        (_chat("a", "b", "c", "d"), _chat("a", "b")),  # the beginning of what was learned
        (_chat("a", "b"), _chat("a", "b", "and now?")),  # what is asked last is not scored
    ],
)
def test_a_row_is_known_again(trained: Example, row: Example) -> None:
    assert _is_seen(row, _text("another"), trained, _chat("one", "more"))


@pytest.mark.parametrize(
    ("trained", "row"),
    [
        (_text("A good film."), _text("A good film")),
        (_chat("What?", "That."), _chat("What?", "This.")),  # a prompt with another answer is another row
        (_chat("What?", "That."), _chat("Which?", "That.")),
        (_chat("a", "b"), _chat("a", "b", "c", "d")),
        (_chat("a", "b", "c", "d"), _chat("c", "d")),
        (Example(1, text="What?", completion="That."), Example(1, text="What?")),
    ],
)
def test_another_row_is_not(trained: Example, row: Example) -> None:
    assert not _is_seen(row, _text("another"), trained)


def test_calls_of_tools_are_answers() -> None:
    def call(city: str) -> Example:
        calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}]
        return Example(
            1,
            messages=(
                {"role": "user", "content": "Rain?"},
                {"role": "assistant", "content": "", "tool_calls": calls},
            ),
        )

    assert _is_seen(call("Rome"), call("Rome")) and not _is_seen(call("Rome"), call("Oslo"))


def test_the_file_holds_8_bytes_a_row_and_none_of_its_words() -> None:
    rows = [_text(f"secret number {index % 500}") for index in range(1000)]
    content = trained_rows.to_bytes(trained_rows.row_and_turn_keys(rows))
    assert len(content) == 8 * (500 + 1) and b"secret" not in content
    assert np.array_equal(trained_rows.from_bytes(content), trained_rows.row_and_turn_keys(reversed(rows)))
    assert len(trained_rows.from_bytes(trained_rows.to_bytes(trained_rows.row_and_turn_keys([])))) == 0


def test_the_keys_are_the_same_in_every_version() -> None:
    """Adapters are older than the hatrack that compares them."""
    rows = [_text("A good film."), _chat("What?", "That.")]
    assert trained_rows.row_keys(rows).tolist() == [5498938428478882678, 8562319505324887855]


@pytest.mark.parametrize("damage", [lambda c: c[:-8], lambda c: c[:-1], lambda c: b"", lambda c: c[:9] + b"x" + c[10:]])
def test_a_damaged_file_is_seen(damage: Any) -> None:
    with pytest.raises(ValueError, match="do not match their checksum"):
        trained_rows.from_bytes(
            damage(trained_rows.to_bytes(trained_rows.row_and_turn_keys([_text("one"), _text("two")])))
        )


def test_of_a_longer_conversation_the_turns_that_were_trained_on_are_told() -> None:
    known = trained_rows.row_and_turn_keys([_chat("a", "b"), _chat("x", "y", "z", "w")])
    assert trained_rows.seen_turns(_system(_chat("A ", "b", "c", "d"), "Be brief."), known) == (2,)
    assert trained_rows.seen_turns(_chat("x", "y", "z", "w"), known) == (1, 3)
    assert trained_rows.seen_turns(_chat("a", "other", "c", "d"), known) == ()
    assert trained_rows.seen_turns(_text("a b"), known) == ()
