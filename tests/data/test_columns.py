"""Which column is which: common names, the one that was probably meant, and where nobody can tell."""

from typing import Any

import pytest

from hatrack.data.columns import COMMON_NAMES, find_columns, find_extra_columns
from hatrack.errors import DataError, RecipeError
from hatrack.recipe import Recipe


@pytest.mark.parametrize("name", COMMON_NAMES["text"])
def test_every_common_name_of_a_text(name: str) -> None:
    assert find_columns(Recipe.make(), [name, "label", "id"], "f.csv") == ("classify", {"text": name, "label": "label"})


@pytest.mark.parametrize("name", COMMON_NAMES["label"])
def test_every_common_name_of_a_label(name: str) -> None:
    assert find_columns(Recipe.make(), ["id", "text", name], "f.csv") == ("classify", {"text": "text", "label": name})


@pytest.mark.parametrize("prompt", COMMON_NAMES["prompt"])
@pytest.mark.parametrize("completion", COMMON_NAMES["completion"])
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


ALPACA = {"instruction": ["name it"], "input": ["Peru"], "output": ["Lima"]}


def _beside(filled: dict[str, list[Any]], **options: str) -> dict[str, str]:
    recipe = Recipe.make(**options)
    task, found = find_columns(recipe, list(filled), "f.jsonl")
    return found | find_extra_columns(task, found, recipe, filled)


@pytest.mark.parametrize(
    ("filled", "found", "words"),
    [
        (
            ALPACA | {"text": ["### Instruction ..."]},
            {"prompt": "instruction", "completion": "output", "input": "input"},
            ["the prompt is 'instruction', then a blank line and 'input' if the row has one", "not read: text\n"],
        ),
        (
            {"question": ["q"], "passage": ["c"], "answer": ["a"], "id": [1]},
            {"prompt": "question", "completion": "answer", "input": "passage"},
            ["the prompt is 'question', then a blank line and 'passage' if the row has one", "not read: id\n"],
        ),
        (
            {"conversations": [[]], "system": ["s"], "tools": ["[]"], "source": ["x"]},
            {"messages": "conversations", "system": "system", "tools": "tools"},
            ["'system' becomes the first turn", "'tools' holds the tools", "not read: source\n"],
        ),
        (
            ALPACA | {"system": ["s"], "history": [[["a", "b"]]], "": [0], "Unnamed: 0": [1], "__index_level_0__": [2]},
            {"prompt": "instruction", "completion": "output"} | {name: name for name in ("input", "system", "history")},
            ["'history' becomes earlier turns, whose answers are learned too"],
        ),
    ],
)  # fmt: skip
def test_common_layouts_are_read_whole_and_said(
    filled: dict[str, list[Any]], found: dict[str, str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _beside(filled) == found
    said = capsys.readouterr().err
    assert all(word in said for word in words) and ("not read" in said) == ("not read" in " ".join(words))


def test_who_names_the_prompt_has_named_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"prompt": "instruction", "completion": "output"}
    assert _beside(ALPACA, **found) == found
    assert capsys.readouterr().err.endswith("not read: input\n")


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("weight", [1, 0.5]), ("weight", [0]), ("train", [True, False]), ("mask", [[0, 1]]), ("loss", ["false"]),
        ("function_call", ["{}"]), ("reasoning_content", ["so"]), ("images", [["a.png"]]), ("label", [True, False]),
        ("tool_calls", [[{}]]), ("Weight", [3]), ("loss_weight", [0]),
        ("trainable", [False]), ("masked", [True]), ("label", [1, 0]), ("label", ["True", "False"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", [{"messages": [[]]}, ALPACA])
def test_a_column_that_means_something_else_is_refused(
    layout: dict[str, list[Any]], column: str, values: list[Any]
) -> None:
    with pytest.raises(DataError, match=rf"the column '{column}' means something .*remove or rename it"):
        _beside(layout | {column: values})


@pytest.mark.parametrize(
    ("column", "values"), [("weight", [1, 1.0]), ("train", ["True"]), ("label", ["a", "b"]), ("label", [1, True])]
)
def test_one_that_says_the_same_of_all_rows_is_only_named(
    column: str, values: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert column not in _beside(ALPACA | {column: values})
    assert f"not read: {column}" in capsys.readouterr().err


def test_two_columns_that_could_be_one_thing_are_refused() -> None:
    with pytest.raises(DataError, match="two columns could be the input; got input, context"):
        _beside(ALPACA | {"context": ["c"]})
    rows = {"instruction": ["be kind"], "prompt": ["q"], "completion": ["a"]}
    with pytest.raises(
        DataError, match=r"two columns could be the prompt; got prompt, instruction; fix: .* leaves 'instr"
    ):
        _beside(rows)
    assert _beside(rows, prompt="prompt", completion="completion") == {"prompt": "prompt", "completion": "completion"}


def test_texts_alone_have_no_first_turn(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="the column 'system' is not used by --task complete"):
        _beside(ALPACA | {"system": ["s"]}, task="complete")
    assert _beside(ALPACA, task="complete")["input"] == "input"
    assert _beside({"text": ["t"], "label": ["a"], "context": ["c"], "weight": [1]}) == {
        "text": "text",
        "label": "label",
    }
    assert "not read: context, weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "fix"),
    [
        (["prompt", "chosen", "rejected"], "learn the better one: --prompt prompt --completion chosen"),
        (["id", "Chosen", "rejected"], "learn the better one: --messages Chosen"),
        (
            ["a", "b", "c"],
            "name them: --text COLUMN --label COLUMN, or --messages COLUMN, or --prompt COLUMN --completion COLUMN, "
            "or --task complete --text COLUMN",
        ),
    ],
)
def test_every_way_out_is_named(columns: list[str], fix: str) -> None:
    with pytest.raises(DataError) as caught:
        find_columns(Recipe.make(), columns, "f.jsonl")
    assert caught.value.fix == fix


@pytest.mark.parametrize(
    ("row", "fix"),
    [
        ({"chosen": "\n\nHuman: hi\n\nAssistant: ho", "rejected": "x"}, "--task complete --text chosen"),
        ({"chosen": [{"role": "user", "content": "hi"}], "rejected": []}, "--messages chosen"),
    ],
)
def test_the_better_of_two_answers_is_named_as_it_is_written(row: dict[str, Any], fix: str) -> None:
    with pytest.raises(DataError, match=rf"got columns chosen, rejected; fix: learn the better one: {fix}$") as caught:
        find_columns(Recipe.make(), list(row), "f.jsonl", row)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["text_pair", "sentence2", "premise"])
def test_half_of_a_pair_is_not_classified_alone(name: str) -> None:
    rows = {"text": ["a"], "label": ["b"], name: ["c"]}
    with pytest.raises(DataError, match=f"the column '{name}' means something that hatrack does not support"):
        _beside(rows)
    assert _beside(rows, text="text", label="label") == {"text": "text", "label": "label"}


def test_a_number_of_rows_is_no_text() -> None:
    with pytest.raises(DataError, match="no clear columns"):
        find_columns(Recipe.make(), ["id", "label"], "f.csv")


def test_what_lies_inside_a_cell_is_told() -> None:
    with pytest.raises(
        DataError, match=r"got columns data \(an object of question, answer\), n; fix: make columns of what is in"
    ):
        find_columns(Recipe.make(), ["data", "n"], "f.jsonl", {"data": {"question": 1, "answer": 2}, "n": 1})
