"""hatrack chat, through a pipe and at a terminal."""

import contextlib
import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hatrack as package
from hatrack.cli import chat as talking
from hatrack.inference.hat import Hat
from tests.cli.conftest import Ran
from tests.training.talking import CHATML, capitals, talking_base

Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters on one base that says "It." to whatever is asked, a, then for ever."""
    folder = tmp_path_factory.mktemp("talk")
    base = talking_base(folder / "base", CHATML, says="\nIt.<|im_end|>a")
    given = {"base": str(base), "data": str(capitals(folder / "capitals.jsonl")), "device": "cpu", "dtype": "float32"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HATRACK_HOME", str(folder / "home"))
        for name in ("one", "two"):
            package.train(**given, steps=1, batch_size=4, lr=1e-4, output=str(folder / name), name=name)
    return folder


@pytest.fixture
def say(home: Path, hatrack: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Pipes lines into `hatrack chat one`."""
    monkeypatch.setenv("HATRACK_HOME", str(home / "home"))

    def run(*lines: str, options: tuple[Any, ...] = ()) -> Ran:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return hatrack("chat", "one", *options)

    return run


def test_a_conversation_through_a_pipe(say: Run) -> None:
    ran = say("hello", "", "  again  ", "/quit", "never said", options=("--json",))
    turns = ran.json["messages"]
    assert ran.code == 0 and ran.json["adapter"] == "one" and ran.json["cut"] == []
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("user", "hello"),
        ("assistant", "It."),
        ("user", "again"),
        ("assistant", "It."),
    ]
    assert say("hello").out == "It.\n"
    assert say().out == "", "nothing but an end of input"


def test_commands_are_not_said(say: Run) -> None:
    ran = say("/halp me", "/", "//usr/bin is a folder", options=("--json",))
    assert ran.json["messages"][0]["content"] == "/usr/bin is a folder" and len(ran.json["messages"]) == 2
    assert "there is no command /halp; /help lists the commands" in ran.err
    assert all(command in say("/help").err for command in ("/use", "/base", "/system", "/reset", "/save", "/quit"))


def test_who_answers_is_changed(say: Run) -> None:
    ran = say("/base", "/use two", "/use nobody", "/hat", "/use", "hello", options=("--json",))
    answering = [line for line in ran.err.splitlines() if line.endswith(" answers")]
    assert answering == ["the base without an adapter answers", "two answers", "two answers"]
    assert "nobody" in ran.err and "use /use NAME: one, two" in ran.err
    assert ran.code == 0 and ran.json["adapter"] == "two" and ran.json["messages"][1]["content"] == "It."


def test_what_is_told_first_stays_when_it_starts_over(say: Run) -> None:
    ran = say("lost", "/system Be brief.", "lost", "/reset", "kept", options=("--json",))
    assert [turn["content"] for turn in ran.json["messages"]] == ["Be brief.", "kept", "It."]
    assert say("/system Be brief.", "lost", "/system", "/new", "a", options=("--json",)).json["messages"][0] == {
        "role": "user",
        "content": "a",
    }


def test_an_answer_that_is_cut_says_so(say: Run) -> None:
    ran = say("hello", options=("--max-new-tokens", 2))
    assert ran.out == "It\n" and "[cut at 2 tokens; --max-new-tokens N allows more]" in ran.err
    assert say("a", "b", options=("--max-new-tokens", 2, "--json")).json["cut"] == [1, 3]


def test_two_adapters_answer_side_by_side(say: Run) -> None:
    assert say("hello", options=("--with", "two")).out == "one: It.\ntwo: It.\n"
    ran = say("hello", options=("--with", "two", "--json"))
    assert ran.json["with"] == "two" and ran.json["others"] == [{"role": "assistant", "content": "It."}]
    assert say("hello", options=("--with", "nobody")).code == 2


def test_a_conversation_is_saved_as_a_row(say: Run, tmp_path: Path) -> None:
    there = tmp_path / "there.txt"
    there.write_text("mine")
    ran = say(
        "/save a.jsonl", "hello", "/save a.jsonl", "/save a.jsonl", "/save /proc/no/a.jsonl", f"/save {there}", "/save"
    )
    assert ran.code == 0 and there.read_text() == "mine"
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["messages"][-1]["content"] == "It."
    for words in ("nothing to save yet", "/proc/no/a.jsonl cannot be written; got", "exists already", "/save FILE"):
        assert words in ran.err


def test_ctrl_c_stops_the_answer_and_not_the_conversation(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        yield "It is "
        raise KeyboardInterrupt

    monkeypatch.setenv("HATRACK_HOME", str(home / "home"))
    hat = package.load("one", device="cpu", dtype="float32")
    monkeypatch.setattr(Hat, "stream", interrupted)
    conversation = talking.Chat(hat, "one", ["one", None], {"max_new_tokens": 9}, at_terminal=True, prints=True)
    talking._answer(conversation, "hello")
    assert capsys.readouterr().out == "one: It is \n"
    assert [turn["content"] for turn in conversation.messages] == ["hello", "It is "]
    conversation.at_terminal = False
    with pytest.raises(KeyboardInterrupt):
        talking._answer(conversation, "hello")


class Screen:
    """What a terminal shows, read on from where it was last read."""

    def __init__(self, number: int) -> None:
        self.number, self.shown = number, ""

    def until(self, words: str) -> str:
        """What is shown until `words` are."""
        assert self.shows(words, 120), self.shown
        found, _, self.shown = self.shown.partition(words)
        return found

    def shows(self, words: str, seconds: float = 5) -> bool:
        """Whether `words` are shown within so many seconds."""
        deadline = time.monotonic() + seconds
        while words not in self.shown and time.monotonic() < deadline:
            if select.select([self.number], [], [], 1)[0]:
                self.shown += os.read(self.number, 4096).decode()
        return words in self.shown


def test_at_a_terminal_lines_are_edited_and_ctrl_c_twice_leaves(home: Path) -> None:
    number, inside = pty.openpty()
    screen = Screen(number)
    environment = os.environ | {"HATRACK_HOME": str(home / "home"), "TERM": "xterm"}
    command = [sys.executable, "-m", "hatrack", "chat", "one", "--device", "cpu", "--dtype", "float32"]
    talk = subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=inside, env=environment, start_new_session=True
    )
    try:
        screen.until("chatting with one; /help lists the commands, /quit leaves")
        screen.until("> ")
        os.write(number, b"hellp\x7fo\n")
        screen.until("It.")
        screen.until("> ")
        os.write(number, b"\x1b[A\n")  # the line before again
        screen.until("It.")
        screen.until("> ")
        for _ in range(20):  # readline misses a signal as it begins to wait
            if screen.shows("press Ctrl-C again to leave"):
                break
            talk.send_signal(2)
        for _ in range(20):
            if talk.poll() is None:
                talk.send_signal(2)
            with contextlib.suppress(subprocess.TimeoutExpired):
                talk.wait(10)
                break
        assert talk.returncode == 0
    finally:
        talk.kill()
        talk.wait()
        os.close(number)
        os.close(inside)
