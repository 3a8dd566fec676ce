"""Which column is which: common names, the one that was probably meant, and where nobody can tell."""

import pytest

from hatrack.data.columns import COMMON, find_columns
from hatrack.errors import DataError, RecipeError
from hatrack.recipe import Recipe


@pytest.mark.parametrize("name", COMMON["text"])
def test_every_common_name_of_a_text(name: str) -> None:
    assert find_columns(Recipe.make(), [name, "label", "id"], "f.csv") == ("classify", {"text": name, "label": "label"})


@pytest.mark.parametrize("name", COMMON["label"])
def test_every_common_name_of_a_label(name: str) -> None:
    assert find_columns(Recipe.make(), ["id", "text", name], "f.csv") == ("classify", {"text": "text", "label": name})


@pytest.mark.parametrize("prompt", COMMON["prompt"])
@pytest.mark.parametrize("completion", COMMON["completion"])
def test_every_common_pair_of_a_question_and_its_answer(prompt: str, completion: str) -> None:
    found = {"prompt": prompt, "completion": completion}
    assert find_columns(Recipe.make(), ["id", prompt, completion], "f.jsonl") == ("chat", found)


def test_the_plain_name_wins_over_its_likes_and_two_likes_are_ambiguous() -> None:
    columns = ["review", "text", "label"]
    assert find_columns(Recipe.make(), columns, "f.csv")[1] == {"text": "text", "label": "label"}
    with pytest.raises(
        DataError, match=r"no clear columns to learn from .*; got columns review, sentence, label; fix: "
    ):
        find_columns(Recipe.make(), ["review", "sentence", "label"], "f.csv")
    chosen = find_columns(Recipe.make(text="sentence"), ["review", "sentence", "label"], "f.csv")
    assert chosen == ("classify", {"text": "sentence", "label": "label"})


@pytest.mark.parametrize(
    ("options", "missing", "near"),
    [
        ({"text": "reviw"}, "text", "did you mean review?"),
        ({"label": "star"}, "label", "did you mean stars?"),
        ({"messages": "talk"}, "messages", "name one of them with --messages"),
        ({"prompt": "zzz", "completion": "stars"}, "prompt", "name one of them with --prompt"),
        ({"prompt": "review", "completion": "qqq"}, "completion", "name one of them with --completion"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_its_flag_and_the_nearest(
    options: dict[str, str], missing: str, near: str
) -> None:
    with pytest.raises(DataError) as caught:
        find_columns(Recipe.make(**options), ["review", "stars"], "f.csv")
    what = f"f.csv has no column {options[missing]!r} for --{missing}"
    assert str(caught.value) == f"{what}; got columns review, stars; fix: {near}"


def test_a_label_column_that_is_the_text_column_is_refused() -> None:
    with pytest.raises(RecipeError, match="--text and --label name the same column; got a; fix: give --label its own"):
        Recipe.make(text="a", label="a")


def test_what_a_person_named_is_not_said_back(capsys: pytest.CaptureFixture[str]) -> None:
    find_columns(Recipe.make(task="classify", text="a", label="b"), ["a", "b", "c"], "f.csv")
    assert capsys.readouterr().err == ""
    find_columns(Recipe.make(task="classify", text="a"), ["a", "category", "c"], "f.csv")
    assert capsys.readouterr().err == "columns: text = 'a', label = 'category' (guessed; --label to change)\n"
