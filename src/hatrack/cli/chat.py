"""`hatrack chat`: holds a conversation with an adapter, at a terminal or through a pipe."""

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from hatrack.cli.adapter_options import Adapter, LoadHat, with_adapter_options
from hatrack.cli.options import Json
from hatrack.cli.predict import MaxNewTokens, Temperature
from hatrack.console import ENDING_SIGNALS, say
from hatrack.errors import HatrackError, RecipeError

if TYPE_CHECKING:
    from hatrack.inference.hat import Hat

HELP = """/help         show this list
/use NAME     let another adapter answer; loads it if needed
/base         let the base answer without an adapter
/hat          let the adapter answer again
/system TEXT  set the system message and start over; without TEXT, remove it
/reset, /new  start over; the system message stays
/save FILE    add the conversation to FILE, a .jsonl file to train on
/quit         leave (so does Ctrl-D); Ctrl-C stops an answer
//TEXT        send a message that starts with a slash"""
BASE_ALONE = "the base without an adapter"


@dataclass
class Chat:
    """A conversation and the models that answer in it.

    `adapter`: the adapter that `/hat` returns to. `speakers`: the adapters that answer; None is the base without an
    adapter. `messages` continues with the first speaker's answers; `other_answers` holds the second's. `at_terminal`:
    whether a person types the lines. `prints`: whether answers are printed as they are generated. `truncated`: indices
    of the messages that were cut at the token limit.
    """

    hat: "Hat"
    adapter: str | None
    speakers: list[str | None]
    generation: dict[str, Any]
    at_terminal: bool
    prints: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    other_answers: list[dict[str, str]] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)

    def start_over(self, system: str = "") -> None:
        """Clears the conversation and sets the system message; empty means none."""
        self.messages = [{"role": "system", "content": system}] if system else []
        self.other_answers, self.truncated = [], []


@with_adapter_options
def chat(
    adapter: Adapter,
    second: Annotated[
        str | None,
        typer.Option("--with", metavar="ADAPTER", help="A second adapter of the same base, to answer too."),
    ] = None,
    *,
    load_hat: LoadHat,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    as_json: Json = False,
) -> None:
    """Chat with an adapter. Type /help for the commands, /quit to leave."""
    hat = load_hat()
    if hat.task == "classify":
        raise RecipeError(f"{adapter} is a classifier: it cannot chat", fix=f'use hatrack predict {adapter} "a text"')
    speakers: list[str | None] = [hat.active, *([hat.add(second)] if second else [])]
    generation = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    chat = Chat(hat, hat.active, speakers, generation, at_terminal=sys.stdin.isatty(), prints=not as_json)
    if chat.at_terminal:
        say(f"chatting with {' and '.join(map(_label, speakers))}; /help lists the commands, /quit leaves")
    for line in _lines(chat):
        if line == "/quit":
            break
        if line.startswith("/") and not line.startswith("//"):
            _command(chat, line)
        elif line:
            _answer(chat, line[1:] if line.startswith("//") else line)
    if as_json:
        facts: dict[str, Any] = {"adapter": speakers[0], "messages": chat.messages, "cut": chat.truncated}
        print(json.dumps(facts | ({"with": speakers[1], "others": chat.other_answers} if second else {})))


def _lines(chat: Chat) -> Iterator[str]:
    """Yields the lines that are typed or piped in. Ends at end of input, or after Ctrl-C twice at the prompt."""
    prompt = "> " if chat.at_terminal and chat.prints else ""
    if chat.at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # makes input() editable, with a history
        for number in ENDING_SIGNALS:  # they end the chat at once; Ctrl-C does not
            signal.signal(number, _leave)
    pressed_once = False
    while True:
        try:
            line = input(prompt)
        except EOFError:
            if prompt:
                print()
            return
        except KeyboardInterrupt:
            if not chat.at_terminal:
                raise
            try:
                print()
                if pressed_once:
                    return
                pressed_once = True
                say("press Ctrl-C again to leave")
            except KeyboardInterrupt:  # pressed twice at once
                return
            continue
        pressed_once = False
        yield line.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()


def _leave(*_: object) -> NoReturn:
    raise SystemExit(130)


def _label(speaker: str | None) -> str:
    return speaker or BASE_ALONE


def _answer(chat: Chat, line: str) -> None:
    """Lets each speaker answer `line`. The conversation continues with the first speaker's answer."""
    asked = [*chat.messages, {"role": "user", "content": line}]
    answers: list[dict[str, str]] = []
    try:
        for speaker in chat.speakers:
            if len(chat.speakers) > 1 and chat.prints:
                print(f"{_label(speaker)}: ", end="", flush=True)
            text, is_complete = _generate(chat, asked, speaker)
            if not answers and is_complete is False:
                chat.truncated.append(len(asked))
            answers.append({"role": "assistant", "content": text})
            if is_complete is None:
                break
    except HatrackError as error:  # such as a chat template that refuses system messages
        if not chat.at_terminal:
            raise
        say(str(error))
        return
    if is_complete is not None or answers[0]["content"]:
        chat.messages = [*asked, answers[0]]
        chat.other_answers += answers[1:]


def _generate(chat: Chat, asked: list[dict[str, str]], speaker: str | None) -> tuple[str, bool | None]:
    """Generates and prints one answer. Returns it and whether it is complete, None if Ctrl-C stopped it."""
    chat.hat.use(speaker)
    stream, text, is_complete = chat.hat.stream(asked, **chat.generation), "", None
    try:
        while True:
            piece = next(stream)
            text += piece
            if chat.prints:
                print(piece, end="", flush=True)
    except StopIteration as ended:
        is_complete = bool(ended.value)
    except KeyboardInterrupt:
        if not chat.at_terminal:
            raise
        stream.close()
    if chat.prints:
        print(flush=True)
    if not is_complete:
        limit = chat.generation["max_new_tokens"]
        say("[stopped]" if is_complete is None else f"[cut at {limit} tokens; --max-new-tokens N allows more]")
    return text, is_complete


def _command(chat: Chat, line: str) -> None:
    """Runs a line that begins with a slash. Mistakes are reported and do not end the conversation."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/help":
        say(HELP)
    elif name == "/use":
        _use(chat, rest)
    elif name in ("/base", "/hat"):
        chat.speakers[0] = None if name == "/base" else chat.adapter
        say(f"{_label(chat.speakers[0])} answers")
    elif name == "/system":
        chat.start_over(rest)
        say("system message set; started over" if rest else "no system message; started over")
    elif name in ("/reset", "/new"):
        first = chat.messages[0] if chat.messages else {"role": ""}
        chat.start_over(first["content"] if first["role"] == "system" else "")
        say("started over")
    elif name == "/save":
        _save(chat.messages, rest)
    else:
        say(f"there is no command {name}; /help lists the commands, //TEXT sends a text that begins with a slash")


def _use(chat: Chat, name: str) -> None:
    """Lets another adapter answer."""
    if not name:
        say(f"use /use NAME: {', '.join(chat.hat.cards)}, or another adapter of this base (see hatrack list)")
        return
    try:
        chat.adapter = chat.speakers[0] = name if name in chat.hat.cards else chat.hat.add(name)
    except HatrackError as error:
        say(str(error))
        return
    say(f"{chat.adapter} answers")


def _save(messages: list[dict[str, str]], name: str) -> None:
    """Appends the conversation as one row to the .jsonl file `name`, or writes it to a new file."""
    path = Path(name).expanduser()
    if not name or not messages:
        say("use /save FILE, such as /save chats.jsonl" if messages else "there is nothing to save yet")
        return
    if path.exists() and path.suffix != ".jsonl":
        say(f"{path} exists already and is not a .jsonl file: choose another name")
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        say(f"{path} cannot be written; got {error.strerror}; fix: another name or folder")
        return
    say(f"saved in {path}")
