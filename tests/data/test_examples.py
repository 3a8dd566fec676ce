"""Rows -> examples: what is guessed, what is refused, what is dropped, and the split."""

from collections.abc import Callable
from typing import Any

import pytest

from hatrack.data.columns import find_columns
from hatrack.data.complaints import BadRows
from hatrack.data.examples import Example, Examples, convert_splits, make_examples, split_held_out
from hatrack.data.read import Rows
from hatrack.data.row_values import BadRow
from hatrack.errors import DataError
from hatrack.recipe import Recipe


def _rows(rows: list[dict[str, Any]], source: str = "file.csv", problems: list[tuple[int, str]] | None = None) -> Rows:
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return Rows(source, columns, rows, list(range(1, len(rows) + 1)), problems or [])


def _labelled(count: int = 40, classes: int = 2) -> list[dict[str, Any]]:
    return [{"text": f"text {index}", "label": f"class {index % classes}"} for index in range(count)]


def _prepare(rows: list[dict[str, Any]], eval_rows: list[dict[str, Any]] | None = None, **options: Any) -> Examples:
    return make_examples(Recipe.make(**options), _rows(rows), _rows(eval_rows, "held.csv") if eval_rows else None)


@pytest.mark.parametrize(
    ("columns", "options", "task", "found"),
    [
        (["text", "label"], {}, "classify", {"text": "text", "label": "label"}),
        (["review", "stars"], {}, "classify", {"text": "review", "label": "stars"}),
        (["id", "Sentence", "Category"], {}, "classify", {"text": "Sentence", "label": "Category"}),
        (["a", "b"], {"text": "a"}, "classify", {"text": "a", "label": "b"}),
        (["id", "messages"], {}, "chat", {"messages": "messages"}),
        (["instruction", "output"], {}, "chat", {"prompt": "instruction", "completion": "output"}),
        (["body"], {}, "complete", {"text": "body"}),
        (["text", "label"], {"task": "complete", "text": "text"}, "complete", {"text": "text"}),
        (["q", "a", "x"], {"prompt": "q", "completion": "a"}, "chat", {"prompt": "q", "completion": "a"}),
        (["question", "label"], {}, "classify", {"text": "question", "label": "label"}),
        (["lines"], {}, "complete", {"text": "lines"}),
        (["talk"], {"task": "chat"}, "chat", {"messages": "talk"}),
        (["id", "text"], {"label": "id"}, "classify", {"text": "text", "label": "id"}),
        (["prompt", "completion"], {"task": "complete"}, "complete", {"prompt": "prompt", "completion": "completion"}),
    ],
)
def test_columns_are_guessed_where_one_reading_is_possible(
    columns: list[str], options: dict[str, str], task: str, found: dict[str, str]
) -> None:
    assert find_columns(Recipe.make(**options), columns, "f.csv") == (task, found)


def test_guesses_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    find_columns(Recipe.make(), ["review", "stars"], "f.csv")
    said = capsys.readouterr().err
    assert (
        "task: classify" in said and "text = 'review', label = 'stars' (guessed; --text and --label to change)" in said
    )


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (["a", "b", "c"], {}, r"no clear columns to learn from .*; got columns a, b, c; fix: name them: --text COLUMN"),
        (["text", "x", "y"], {}, "no clear columns"),
        (["id", "text"], {}, "no clear columns to learn from"),  # numbers of rows are no labels
        (["text", "answer"], {}, "no clear columns to learn from"),  # a label, or what is to be said?
        (["text", "label"], {"task": "chat"}, r"no clear columns for chat \(messages or prompt and completion\)"),
        (
            ["text", "label"],
            {"text": "txt"},
            r"no column 'txt' for --text; got columns text, label; fix: did you mean text\?",
        ),
    ],
)
def test_other_columns_are_listed(columns: list[str], options: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_columns(Recipe.make(**options), columns, "f.csv")


def test_every_complaint_comes_at_once_with_row_and_column() -> None:
    rows = _labelled(30)
    rows[3]["text"] = "   "
    rows[5]["label"] = None
    rows[7]["text"] = 12
    rows[9]["label"] = "seen once"
    rows[11]["text"] = None
    with pytest.raises(DataError) as caught:
        make_examples(Recipe.make(), _rows(rows, problems=[(31, "malformed JSON: x")]))
    assert caught.value.complaints == [
        "file.csv row 4, column text: the text is empty",
        "file.csv row 6, column label: the label is empty",
        "file.csv row 8, column text: mixed types: int where text was expected; put it in quotes",
        "file.csv row 10, column label: label 'seen once' is seen only once, so it cannot be learned and scored",
        "file.csv row 12, column text: the text is missing",
        "file.csv row 31: malformed JSON: x",
    ]
    assert str(caught.value).startswith(
        "6 rows cannot be learned from; fix: correct them, or leave them out with --bad-rows skip"
    )


def test_ten_complaints_are_shown_and_the_rest_counted() -> None:
    talks = [[{"role": "user", "content": "hi"}] * index + [{"role": "user"}] for index in range(13)]
    with pytest.raises(DataError) as caught:
        _prepare([{"messages": talk} for talk in talks])
    assert len(caught.value.complaints) == 13 and str(caught.value).endswith("... and 3 more")


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        (
            "chat",
            {"prompt": "[{'role': 'user', 'content': 'hi'}]", "completion": "ho"},
            "as Python prints it, with single",
        ),
        ("complete", {"prompt": "[{'role': 'user'}]", "completion": "ho"}, "as Python prints it, with single quotes"),
        ("complete", {"text": '[{"role": "user", "content": "hi"}]'}, "in JSON, where a text was expected"),
    ],
)
def test_conversations_are_not_learned_as_text(task: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=rf"rows 1-2, column {next(iter(row))}: it is a list of messages {words}"):
        _prepare([row, row], task=task)


@pytest.mark.parametrize("task", ["chat", "complete"])
def test_an_input_that_is_no_text_is_a_complaint_of_its_row(task: str) -> None:
    rows = [{"instruction": f"name {n}", "input": "Peru", "output": f"Lima {n}"} for n in range(5)]
    with pytest.raises(DataError, match=r"file\.csv row 3, column input: mixed types: int where text was expected"):
        _prepare([row | {"input": 5} if n == 2 else row for n, row in enumerate(rows)], task=task)


def test_equal_complaints_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*_labelled(20), *[{"text": "", "label": "class 0"}] * 3, {"text": 1, "label": "class 0"}, {"text": ""}]
    with pytest.raises(DataError) as caught:
        _prepare(rows)
    assert caught.value.complaints == [
        "file.csv rows 21-23, 25, column text: the text is empty",
        "file.csv row 24, column text: mixed types: int where text was expected; put it in quotes",
    ]
    assert str(caught.value).startswith(
        "5 rows cannot be learned from; fix: correct them, or leave them out with --bad"
    )
    _prepare(rows, bad_rows="skip")
    assert "5 rows left out, the first: file.csv rows 21-23, 25, column text" in capsys.readouterr().err


def test_bad_rows_can_be_left_out_and_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*_labelled(40), {"text": "", "label": "class 0"}, {"text": "odd", "label": "once"}]
    found = _prepare(rows, bad_rows="skip")
    assert len(found.train) + len(found.held_out) == 40 and found.labels == ["class 0", "class 1"]
    assert "2 rows left out, the first: file.csv row 41, column text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, "1", 2, 1, 2, 1], "row 2, column label: mixed types in the labels: '1' is text, most are a number"),
        (["a", ["a"], "b", "a", "b"], "mixed types in the labels: ['a'] is a list of text, most are text"),
        (
            [True, 1, 0, 1, 0],
            "row 1, column label: mixed types in the labels: True is true or false, most are a number",
        ),
        ([["1"], [1], ["1"], [], []], "row 2, column label: mixed types in the labels: [1] is a list of a number"),
    ],
)
def test_labels_of_mixed_types(labels: list[Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        _prepare([{"text": f"t{i}", "label": label} for i, label in enumerate(labels)])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["b", "a"], ["a", "b"]),
        ([10, 9], ["9", "10"]),
        (["10", "9"], ["9", "10"]),
        ([1.0, 0.0], ["0", "1"]),
        ([True, False], ["false", "true"]),
        ([2**53, 2**53 + 1], ["9007199254740992", "9007199254740993"]),
        (["9007199254740993", "9007199254740992"], ["9007199254740992", "9007199254740993"]),
        (["0.0", "1.0"], ["0.0", "1.0"]),
        (["nan", "2"], ["2", "nan"]),
        (["a ", " b"], ["a", "b"]),
    ],
)
def test_label_names_and_their_order(values: list[Any], labels: list[str]) -> None:
    found = _prepare([{"text": f"t{index}", "label": values[index % 2]} for index in range(20)])
    assert found.labels == labels and not found.multi_label


@pytest.mark.parametrize("as_text", [False, True])
def test_several_labels_a_row(as_text: bool) -> None:
    lists: list[list[str]] = [["red"], ["blue", "red"], [], ["blue"]]
    rows = [
        {"text": f"t{i}", "label": str(lists[i % 4]).replace("'", '"') if as_text else lists[i % 4]} for i in range(24)
    ]
    found = _prepare(rows)
    assert found.multi_label and found.labels == ["blue", "red"]
    by_row = {example.row: example.label for example in found.train + found.held_out}
    assert [by_row[row] for row in (1, 2, 3, 4)] == [(1,), (0, 1), (), (0,)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}],
            "has only one class; got x; fix: give it rows of at least two",
        ),
        (
            [{"text": "a", "label": "x"}],
            "a row cannot be learned from: file.csv row 1, column label: label 'x' is seen only once",
        ),
    ],
)
def test_too_little_to_learn_from(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError) as caught:
        _prepare(rows)
    assert message in str(caught.value)


def test_one_row_of_text_is_too_few() -> None:
    with pytest.raises(DataError, match="too few rows to learn from and to be scored on; got 1 and 0"):
        _prepare([{"text": "only"}])


def test_duplicates_go_before_the_split(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*_labelled(20), {"text": "  text   3 ", "label": "class 1"}, {"text": "text 4", "label": "class 1"}]
    found = _prepare(rows)
    assert len(found.train) + len(found.held_out) == 20
    said = capsys.readouterr().err
    assert "2 duplicate rows dropped" in said and "1 of them had another label" in said
    composed = [{"text": "caf\u00e9", "label": "a"}, {"text": "cafe\u0301", "label": "a"}]
    assert len(_prepare(_labelled(20) + composed + [{"text": "x", "label": "a"}]).labels) == 3


def test_training_rows_that_are_also_held_out_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    found = _prepare(_labelled(20), _labelled(5))
    assert len(found.held_out) == 5 and len(found.train) == 15
    assert "5 training rows dropped that are also in held.csv" in capsys.readouterr().err
    with pytest.raises(DataError) as caught:
        _prepare(_labelled(20), [{"text": "new", "label": "class 7"}])
    assert "held.csv row 1, column label: label 'class 7' does not occur in the training rows" in str(caught.value)
    with pytest.raises(DataError, match=r"held.csv has other columns than .*no label; fix: give both .*: text, label$"):
        _prepare(_labelled(20), [{"text": "new", "labels": "class 1"}])


def test_the_split_is_stratified_seeded_and_apart() -> None:
    rows = [{"text": f"t{i}", "label": "rare" if i % 25 == 0 else "usual"} for i in range(200)]
    found = _prepare(rows, seed=3)
    assert len(found.held_out) == 20 and sum(example.label == 0 for example in found.held_out) == 1
    assert not {e.row for e in found.train} & {e.row for e in found.held_out}
    assert len(found.train) + len(found.held_out) == 200
    assert _prepare(rows, seed=3, r=64, lr=1e-3) == found
    assert {e.row for e in _prepare(rows, seed=4).held_out} != {e.row for e in found.held_out}
    assert _prepare(rows, seed=4).digest != found.digest


def test_a_label_that_only_copies_have_is_seen_once() -> None:
    with pytest.raises(DataError, match="row 21, column label: label 'rare' is seen only once"):
        _prepare([*_labelled(20), {"text": "same", "label": "rare"}, {"text": " same ", "label": "rare"}])


def test_a_label_all_of_whose_rows_are_held_out_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        _prepare(_labelled(20), [row for row in _labelled(20) if row["label"] == "class 1"])
    assert str(caught.value) == (
        "every training row of label 'class 1' is also in held.csv; got 10 rows in both; "
        "fix: give one of the two other rows"
    )


def test_several_labels_where_rows_have_one_are_refused() -> None:
    with pytest.raises(DataError, match=r"several labels \(2\), where the training rows have one each"):
        _prepare(_labelled(20), [{"text": "new", "label": ["class 0", "class 1"]}])


@pytest.mark.parametrize("label", [{"a": 1}, ["a", None], [["a"]], ["a", ""], b"a", "\ud800"])
def test_what_cannot_be_a_label(label: Any) -> None:
    with pytest.raises(DataError, match="row 21, column label: the label is not a word, a number or a list of them"):
        _prepare([*_labelled(20), {"text": "new", "label": label}])


def test_half_characters_are_refused_before_a_tokenizer_meets_them() -> None:
    with pytest.raises(DataError, match=r"row 21, column text: the text holds half a character"):
        _prepare([*_labelled(20), {"text": "\ud800", "label": "class 0"}])
    talk = [{"messages": [{"role": "user", "content": "\udfff"}, {"role": "assistant", "content": "x"}]}]
    with pytest.raises(DataError, match=r"row 1, column messages: message 1 holds half a character"):
        _prepare(talk)


def test_no_more_than_two_thousand_are_held_out() -> None:
    found = _prepare([{"text": f"t{i}", "label": str(i % 2)} for i in range(30_000)])
    assert len(found.held_out) == 2000
    assert split_held_out(found.train[:2], seed=0, stratified=False)[1] != []


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "hi"}], "the conversation has no assistant turn to learn from"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}], "no assistant turn"),
        ([], "the conversation is empty"),
        ("hello", "the conversation is text, not a list of messages"),
        ([["user", "hi"]], "message 1 is a list, not an object with role and content"),
        (
            [{"role": "wizard", "content": "x"}],
            "the role 'wizard' is not among system, user, assistant, tool",
        ),
        ([{"role": "user"}], "message 1 has no text as its content"),
    ],
)
def test_conversations_that_teach_nothing(messages: Any, message: str) -> None:
    good = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = [{"messages": [*good[:1], {"role": "assistant", "content": str(index)}]} for index in range(10)]
    with pytest.raises(DataError) as caught:
        _prepare([*rows, {"messages": messages}])
    assert message in str(caught.value) and "file.csv row 11, column messages" in str(caught.value)


def test_conversations_of_other_dialects() -> None:
    rows = [{"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a"}]} for i in range(10)]
    found = _prepare(rows)
    assert found.task == "chat" and found.train[0].messages[1] == {"role": "assistant", "content": "a"}
    pairs = _prepare([{"question": f"q{i}", "answer": "a"} for i in range(10)])
    assert [m.messages for m in pairs.train] == [m.messages for m in found.train]


def test_rows_of_plain_turns_keep_the_digest_that_adapters_remember() -> None:
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(10)]
    assert _prepare(rows).digest == "7d15e98a052b57fa"
    assert _prepare(_labelled(20)).digest == "cf5527c25e05e3eb"


def _refusing(*words: str) -> Callable[[list[Example], str], list[int]]:
    """Refuses the examples whose text has one of these words, as a tokenizer would."""

    def make(part: list[Example], source: str) -> list[int]:
        bad = [BadRow(each.row, "not for me") for each in part if set(words) & set(each.all_text.split())]
        if bad:
            raise BadRows([(source, bad)], len(part), ["write other words"])
        return [each.row for each in part]

    return make


@pytest.mark.parametrize("bad", [("3",), ("3", "7", "11"), tuple(map(str, range(0, 30, 2)))])
def test_rows_left_out_late_are_as_if_they_had_never_been_there(
    bad: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe.make(bad_rows="skip", data="file.csv", seed=4)
    rows = [row for row in _labelled(60, classes=2) if row["text"].split()[1] not in bad]
    numbers = [index for index in range(1, 61) if str(index - 1) not in bad]
    without = make_examples(recipe, Rows("file.csv", ("text", "label"), rows, numbers))
    left, train, held_out = convert_splits(recipe, make_examples(recipe, _rows(_labelled(60))), _refusing(*bad))
    assert left == without
    assert train == [each.row for each in left.train] and held_out == [each.row for each in left.held_out]
    assert f"{len(bad)} row{'s' * (len(bad) > 1)} left out, the first: file.csv row" in capsys.readouterr().err


def test_both_parts_are_refused_at_once() -> None:
    recipe = Recipe.make(data="file.csv", eval_data="held.csv")
    examples = make_examples(recipe, _rows(_labelled(20)), _rows([{"text": "x 3", "label": "class 1"}] * 2, "held.csv"))
    with pytest.raises(BadRows) as caught:
        convert_splits(recipe, examples, _refusing("3", "8"))
    assert caught.value.complaints == ["file.csv rows 4, 9: not for me", "held.csv row 1: not for me"]
    assert caught.value.fix == "write other words, or leave them out with --bad-rows skip"
    one = Recipe.make(data="file.csv")
    with pytest.raises(BadRows) as caught:  # wherever the split has put them
        convert_splits(one, make_examples(one, _rows(_labelled(20))), _refusing(*map(str, range(20))))
    assert caught.value.complaints == ["file.csv rows 1-20: not for me"] and caught.value.fix == "write other words"


def test_rows_left_out_late_may_leave_too_little() -> None:
    recipe = Recipe.make(data="file.csv", bad_rows="skip")
    examples = make_examples(recipe, _rows(_labelled(8)))
    with pytest.raises(DataError, match=r"no row of label 'class 0' in file.csv can be learned from"):
        convert_splits(recipe, examples, _refusing("0", "2", "4", "6"))
    with pytest.raises(DataError, match="too few rows to learn from"):
        convert_splits(recipe, examples, _refusing(*map(str, range(8))))
    apart = Recipe.make(data="file.csv", eval_data="held.csv", bad_rows="skip")
    given = make_examples(apart, _rows(_labelled(8)), _rows([{"text": "x 30", "label": "class 1"}] * 2, "held.csv"))
    with pytest.raises(DataError, match="too few rows"):
        convert_splits(apart, given, _refusing("30"))
    assert [each.row for each in convert_splits(apart, given, _refusing("3"))[0].train] == [1, 2, 3, 5, 6, 7, 8]


def _chat(row: dict[str, Any], **options: Any) -> Example:
    rows: list[dict[str, Any]] = [dict(row), dict(row)]
    for index, each in enumerate(rows):  # two different rows, of which the first counts
        if index:
            last = "completion" if "completion" in each else "messages"
            each[last] = (
                [*each[last], {"role": "user", "content": "and now ?"}] if isinstance(each[last], list) else "x"
            )
    found = _prepare(rows, **options)
    return next(example for example in (*found.train, *found.held_out) if example.row == 1)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_prompts_and_completions_of_messages_are_one_conversation() -> None:
    prompt = [_turn("user", "a"), _turn("assistant", "b"), _turn("user", "c")]
    found = _chat({"prompt": prompt, "completion": [_turn("assistant", "d")]})
    assert found.messages == (*prompt, _turn("assistant", "d")) and found.context_only == (1,)
    assert _chat({"prompt": prompt, "completion": "d"}) == found
    assert _chat({"prompt": "a", "completion": [_turn("assistant", "d")]}).messages == (
        _turn("user", "a"),
        _turn("assistant", "d"),
    )
    with pytest.raises(
        DataError, match="mixed types: list where text was expected; a list of messages goes with --task c"
    ):
        _prepare([{"prompt": prompt, "completion": "d"}] * 2, task="complete")
    with pytest.raises(DataError, match="column context: there is text beside a prompt that is a list of messages"):
        _prepare([{"prompt": prompt, "completion": "d", "context": "x"}] * 2)


def test_columns_beside_a_conversation_become_part_of_it() -> None:
    talk = [
        _turn("user", "a"),
        {**_turn("assistant", "b"), "train": False},
        _turn("user", "c"),
        _turn("assistant", "d"),
    ]
    found = _chat({"messages": talk, "system": "Be brief.", "tools": '[{"name": "f"}]', "id": 0})
    assert [turn["content"] for turn in found.messages] == ["Be brief.", "a", "b", "c", "d"]
    assert found.context_only == (2,) and found.tools == ({"type": "function", "function": {"name": "f"}},)
    row = {"instruction": "c", "input": "e", "output": "d", "history": [["a", "b"]], "system": "s", "weight": 1}
    found = _chat(row | {"completion": row.pop("output")})
    assert [turn["content"] for turn in found.messages] == ["s", "a", "b", "c\n\ne", "d"] and found.context_only == ()


def test_what_only_tools_or_marks_tell_apart_is_no_duplicate() -> None:
    talk = [_turn("user", "a"), _turn("assistant", "b"), _turn("user", "c"), _turn("assistant", "d")]
    marked = [talk[0], {**talk[1], "weight": 0}, *talk[2:]]
    rows: list[dict[str, Any]] = [
        {"messages": talk},
        {"messages": marked},
        {"messages": talk, "tools": [{"name": "f"}]},
    ]
    found = _prepare([*rows, {"messages": talk}])
    assert len(found.train) + len(found.held_out) == 3


def test_message_keys_that_are_not_read_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    _prepare([{"prompt": [{**_turn("user", str(i)), "id": i}], "completion": "b"} for i in range(3)])
    assert capsys.readouterr().err.count("message keys not read: id\n") == 1
