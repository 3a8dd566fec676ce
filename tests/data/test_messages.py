"""What a conversation's cell may hold: each key honoured, refused by name, or handed back as not read."""

import json
from typing import Any

import pytest

from hatrack.data.messages import (
    BadCell,
    Conversation,
    add_system_turn,
    as_context,
    check_answer,
    join_completion,
    one_turn,
    read_conversation,
    read_history,
    read_tools,
)
from tests.conftest import turns

ASK = {"role": "user", "content": "Capital of Peru?"}
ANSWER = {"role": "assistant", "content": "Lima."}
FUNCTION = {"name": "find_capital", "arguments": {"land": "Peru"}}
CALL = {"id": "c1", "type": "function", "function": FUNCTION}


def _read(*messages: dict[str, Any]) -> Conversation:
    return check_answer(read_conversation(list(messages)))


@pytest.mark.parametrize(
    ("role", "read"),
    [
        ("User", "user"), ("human", "user"), ("prompter", "user"), ("ASSISTANT", "assistant"), ("gpt", "assistant"),
        ("model", "assistant"), ("developer", "system"), (" system ", "system"), ("tool", "tool"),
    ],
)  # fmt: skip
def test_roles_in_other_spellings(role: str, read: str) -> None:
    assert read_conversation([{"role": role, "content": "x"}]).turns == turns((read, "x"))
    assert read_conversation([{"from": role, "value": "x"}]).turns == turns((read, "x"))


@pytest.mark.parametrize(
    "cell",
    [
        json.dumps([ASK, ANSWER]),
        {"messages": [ASK, ANSWER]},
        json.dumps({"messages": [ASK, ANSWER]}),
        {"conversations": json.dumps([ASK, ANSWER]), "id": None, "tools": []},
        [ASK | {"name": None, "tool_calls": None, "weight": None, "function_call": None}, ANSWER],
    ],
)
def test_the_same_conversation_in_other_wrappers(cell: Any) -> None:
    assert read_conversation(cell) == Conversation(turns(("user", "Capital of Peru?"), ("assistant", "Lima.")))


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (str([ASK, ANSWER]), "the conversation is written as Python prints it, with single quotes: write it as JSON"),
        ({"messages": [ASK], "tools": [CALL]}, r"an object \(messages, tools\) where a list of messages was expected"),
        ({"data": 1}, r"an object \(data\) where a list of messages was expected"),
        (ASK, "the conversation is an object, not a list of messages"),
        (7, "the conversation is a number, not a list of messages"),
        ("[" * 3000, "the conversation is text, not a list of messages"),
        ([{"speaker": "bot", "text": "Lima."}], "a message has no role, only speaker, text"),
        ([ASK, "Lima."], "message 2 is text, not an object with role and content"),
        ([ASK, {"role": "function_call", "content": "{}"}], "'function_call' is not among .*turn with tool_calls"),
        (
            [{"from": "observation", "value": ""}, {"from": "function", "value": ""}],
            "the roles 'observation' and 'function' are not among .*write observation as a turn with the role tool",
        ),
        ([ASK | {"value": "another"}], "message 1 has both content and value"),
        ([ASK, ANSWER | {"content": 42}], "message 2 has a number as its content, not text: put it in quotes"),
        ([ASK, ANSWER | {"content": {"text": "Lima."}}], "message 2 has no text as its content"),
        ([ASK, ANSWER | {"content": None}], "message 2 has no text as its content"),
    ],
)  # fmt: skip
def test_what_is_no_conversation(cell: Any, words: str) -> None:
    with pytest.raises(BadCell, match=words):
        read_conversation(cell)


@pytest.mark.parametrize(
    "key",
    [
        "function_call", "mask", "masked", "loss_mask", "loss_scale", "loss_weight", "trainable", "train_detail",
        "ignore", "refusal", "images", "audio",
    ],
)  # fmt: skip
@pytest.mark.parametrize("index", [0, 1])
def test_keys_that_mean_something_are_refused_by_name(key: str, index: int) -> None:
    messages = [dict(ASK), dict(ANSWER)]
    messages[index][key] = "x"
    with pytest.raises(BadCell, match=f"message {index + 1} has {key}, which hatrack does not support"):
        read_conversation(messages)


def test_other_keys_are_handed_back_unless_they_hold_nothing() -> None:
    talk = _read(ASK | {"id": "m1", "audio": None}, ANSWER | {"timestamp": 3, "score": 0, "tags": [], "note": " "})
    assert talk.unread == {"id", "timestamp", "score"} and talk.turns == (ASK, ANSWER)


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize(("value", "learned"), [(0, False), (False, False), ("false", False), (0.0, False),
                                                (1, True), (True, True), ("1", True), (1.0, True)])  # fmt: skip
def test_marks_say_which_turns_are_learned(key: str, value: Any, learned: bool) -> None:
    talk = _read(ASK, ANSWER | {key: value}, ASK, ANSWER)
    assert talk.context_only == (() if learned else (1,)) and talk.turns[1] == ANSWER
    assert _read(ASK | {key: False}, ANSWER).turns == (ASK, ANSWER)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (ANSWER | {"weight": 0.5}, r"message 2 has the weight 0.5: a turn is learned \(1, true\) or not \(0, false\)"),
        (ANSWER | {"weight": 2}, "message 2 has the weight 2"),
        (ANSWER | {"train": "maybe"}, "message 2 has the train 'maybe'"),
        (ASK | {"train": True}, r"message 2 is marked to be learned \(train\); hatrack learns assistant turns only"),
        (ANSWER | {"weight": 1, "train": False}, "message 2 has flags that contradict each other: weight, train"),
        (ANSWER | {"train": False}, "every assistant turn is marked as not to be learned"),
    ],
)
def test_marks_that_cannot_be_followed(message: dict[str, Any], words: str) -> None:
    with pytest.raises(BadCell, match=words):
        _read(ASK, message)


def test_text_in_parts_is_joined_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    parts = [{"type": "text", "text": "Capital of Peru?"}, {"type": "text", "text": "One word."}]
    assert _read(ASK | {"content": parts}, ANSWER | {"content": [{"type": "output_text", "text": "Lima."}]}).turns == (
        ASK | {"content": "Capital of Peru?\nOne word."},
        ANSWER,
    )
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "image", "text": None}):
        with pytest.raises(BadCell, match=f"message 1 has a part of type '{part['type']}' in its content"):
            read_conversation([ASK | {"content": [*parts, part]}])
    with pytest.raises(BadCell, match="message 1 has a part of type nothing"):
        read_conversation([ASK | {"content": [{"type": "text", "text": None}]}])


@pytest.mark.parametrize("content", [None, "", "I look."])
@pytest.mark.parametrize("call", [CALL, FUNCTION, {"function": FUNCTION | {"arguments": '{"land": "Peru"}'}}])
@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_have_one_form(content: str | None, call: dict[str, Any], as_text: bool) -> None:
    talk = _read(
        ASK, {"role": "assistant", "content": content, "tool_calls": json.dumps([call]) if as_text else [call]}
    )
    turn = talk.turns[1]
    assert turn["content"] == (content or "") and turn["tool_calls"][0]["function"] == FUNCTION


@pytest.mark.parametrize(
    "calls", [["find_capital"], [{"function": {"arguments": {}}}], [{"name": " "}], "find_capital", 3]
)
def test_what_is_no_tool_call(calls: Any) -> None:
    with pytest.raises(BadCell, match=r"tool_calls"):
        read_conversation([ASK, ANSWER | {"tool_calls": calls}])
    with pytest.raises(BadCell, match="tool_calls whose arguments are not a JSON object"):
        read_conversation([ASK, ANSWER | {"tool_calls": [{"name": "f", "arguments": "{land: Peru}"}]}])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_what_is_thought_has_one_name(key: str) -> None:
    talk = _read(ASK, ANSWER | {key: "Peru is in ..."})
    assert talk.turns[1] == ANSWER | {"reasoning_content": "Peru is in ..."}
    with pytest.raises(BadCell, match="message 1 has both reasoning_content and thinking"):
        read_conversation([ANSWER | {"reasoning_content": "a", "thinking": "b"}])
    with pytest.raises(BadCell, match="message 1 has no text as its reasoning_content"):
        read_conversation([ANSWER | {"reasoning_content": ["a"]}])


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_have_one_form(bare: bool, as_text: bool) -> None:
    tool = {"name": "find_capital", "parameters": {}}
    cell = [tool if bare else {"type": "function", "function": tool}]
    assert read_tools(json.dumps(cell) if as_text else cell) == ({"type": "function", "function": tool},)


@pytest.mark.parametrize("cell", [None, "", "[]", [], float("nan"), {}, "null"])
def test_no_tools(cell: Any) -> None:
    assert read_tools(cell) == () and read_history(cell) == Conversation(())


@pytest.mark.parametrize("cell", ["find_capital", ["find_capital"], [{"function": {}}], 3, "[{'name': 'f'}]"])
def test_what_are_no_tools(cell: Any) -> None:
    with pytest.raises(BadCell, match=r"the tools (are not a list of functions|is (text|written))"):
        read_tools(cell)


def test_a_system_text_comes_first_and_once() -> None:
    talk = read_conversation([ASK, ANSWER | {"train": False}, ASK, ANSWER])
    led = add_system_turn(talk, "Be brief.")
    assert led.turns[0] == {"role": "system", "content": "Be brief."} and led.context_only == (2,)
    assert add_system_turn(led, " Be brief. ") == led
    with pytest.raises(BadCell, match="already has a different system turn"):
        add_system_turn(led, "Be kind.")


@pytest.mark.parametrize("as_text", [False, True])
def test_history_is_earlier_turns(as_text: bool) -> None:
    cell = [["a", "b"], ["c", "d"]]
    talk = read_history(json.dumps(cell) if as_text else cell) + one_turn("user", "e")
    assert talk.turns == turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"))
    with pytest.raises(BadCell, match=r"it is not a list of \[question, answer\]"):
        read_history([["a"]])


def test_a_completion_that_repeats_its_prompt_holds_all_of_it() -> None:
    prompt = as_context(one_turn("user", "a ") + one_turn("assistant", "b") + one_turn("user", "c"))
    rest = one_turn("assistant", "d")
    whole = join_completion(prompt, one_turn("user", "a") + one_turn("assistant", "b") + one_turn("user", "c") + rest)
    assert whole.turns == turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert whole.context_only == (1,)
    assert join_completion(prompt, rest) == prompt + rest
    other = one_turn("user", "e") + rest
    assert join_completion(prompt, other) == prompt + other
