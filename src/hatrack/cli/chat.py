"""`hatrack chat`: a conversation with an adapter, at a terminal or through a pipe."""

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from hatrack.cli.adapter_options import Adapter, OpenHat, with_hat
from hatrack.cli.options import Json
from hatrack.cli.predict import Length, Temperature
from hatrack.console import say
from hatrack.errors import HatrackError, RecipeError

if TYPE_CHECKING:
    from hatrack.inference.hat import Hat

HELP = """/help         this list
/use NAME     another adapter answers; it is loaded where it is not yet
/base, /hat   the bare base answers; the adapter again
/system TEXT  what the model is told first, or without TEXT nothing; starts over
/reset, /new  start over
/save FILE    write the conversation to FILE, as a row to learn from
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer
//TEXT        say /TEXT"""


@dataclass
class Talk:
    """A conversation: who answers (names of adapters; None for the bare base), and what was said.

    `person` is whether somebody sits at a terminal, `aloud` whether answers are printed as they come. `others` is what
    those beside the first said, `cut` which of the messages broke off at the most tokens allowed.
    """

    hat: "Hat"
    adapter: str | None
    speakers: list[str | None]
    generation: dict[str, Any]
    person: bool
    aloud: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    others: list[dict[str, str]] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)

    def start_over(self, system: str = "") -> None:
        """Forgets what was said; `system` is told first."""
        self.messages = [{"role": "system", "content": system}] if system else []
        self.others, self.cut = [], []


@with_hat
def chat(
    adapter: Adapter,
    beside: Annotated[
        str | None, typer.Option("--with", help="A second adapter, whose answers are shown below the first's.")
    ] = None,
    *,
    open_hat: OpenHat,
    max_new_tokens: Length = 256,
    temperature: Temperature = 0.0,
    as_json: Json = False,
) -> None:
    """Talk with an adapter. /help lists what can be typed besides, /quit leaves."""
    hat = open_hat()
    if hat.task == "classify":
        raise RecipeError(f"{adapter} is a classifier and does not talk", fix=f'use hatrack predict {adapter} "a text"')
    speakers: list[str | None] = [hat.active, *([hat.add(beside)] if beside else [])]
    generation = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    talk = Talk(hat, hat.active, speakers, generation, person=sys.stdin.isatty(), aloud=not as_json)
    if talk.person:
        say(f"talking with {' and '.join(map(_name, speakers))}: /help, /quit")
    for line in _lines(talk):
        if line == "/quit":
            break
        if line.startswith("/") and not line.startswith("//"):
            _command(talk, line)
        elif line:
            _answer(talk, line[1:] if line.startswith("//") else line)
    if as_json:
        told: dict[str, Any] = {"adapter": speakers[0], "messages": talk.messages, "cut": talk.cut}
        print(json.dumps(told | ({"with": speakers[1], "others": talk.others} if beside else {})))


def _lines(talk: Talk) -> Iterator[str]:
    """What is typed or piped in, line by line. Two times Ctrl-C at the prompt leaves."""
    prompt = "> " if talk.person and talk.aloud else ""
    if talk.person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() a line that can be edited, and the lines before it
        for number in (signal.SIGTERM, signal.SIGHUP):  # these end it at once
            signal.signal(number, _leave)
    asked_to_leave = False
    while True:
        try:
            line = input(prompt)
        except EOFError:
            if prompt:
                print()
            return
        except KeyboardInterrupt:
            if not talk.person:
                raise
            try:
                print()
                if asked_to_leave:
                    return
                asked_to_leave = True
                say("Ctrl-C once more leaves, as /quit does")
            except KeyboardInterrupt:  # the second one, pressed at once
                return
            continue
        asked_to_leave = False
        yield line.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()


def _leave(*_: object) -> NoReturn:
    raise SystemExit(130)


def _name(speaker: str | None) -> str:
    return speaker or "the bare base"


def _answer(talk: Talk, line: str) -> None:
    """Has everybody answer, and goes on from the first one's answer."""
    asked = [*talk.messages, {"role": "user", "content": line}]
    said: list[dict[str, str]] = []
    try:
        for speaker in talk.speakers:
            if len(talk.speakers) > 1 and talk.aloud:
                print(f"{_name(speaker)}: ", end="", flush=True)
            text, whole = _said(talk, asked, speaker)
            if not said and whole is False:
                talk.cut.append(len(asked))
            said.append({"role": "assistant", "content": text})
            if whole is None:
                break
    except HatrackError as error:  # a template that takes no system turn, say
        if not talk.person:
            raise
        say(str(error))
        return
    if whole is not None or said[0]["content"]:
        talk.messages = [*asked, said[0]]
        talk.others += said[1:]


def _said(talk: Talk, asked: list[dict[str, str]], speaker: str | None) -> tuple[str, bool | None]:
    """One answer, shown as it comes, and whether it is whole; None where Ctrl-C stopped it."""
    talk.hat.use(speaker)
    stream, text, whole = talk.hat.stream(asked, **talk.generation), "", None
    try:
        while True:
            piece = next(stream)
            text += piece
            if talk.aloud:
                print(piece, end="", flush=True)
    except StopIteration as ended:
        whole = bool(ended.value)
    except KeyboardInterrupt:
        if not talk.person:
            raise
        stream.close()
    if talk.aloud:
        print(flush=True)
    if not whole:
        most = talk.generation["max_new_tokens"]
        say("[stopped]" if whole is None else f"[cut at {most} tokens: --max-new-tokens allows more]")
    return text, whole


def _command(talk: Talk, line: str) -> None:
    """Does what a line with a slash asks for, or says what is wrong with it: a typing error ends no conversation."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/help":
        say(HELP)
    elif name == "/use":
        _use(talk, rest)
    elif name in ("/base", "/hat"):
        talk.speakers[0] = None if name == "/base" else talk.adapter
        say(f"{_name(talk.speakers[0])} answers")
    elif name == "/system":
        talk.start_over(rest)
        say("the model is told that first; started over" if rest else "the model is told nothing first; started over")
    elif name in ("/reset", "/new"):
        first = talk.messages[0] if talk.messages else {"role": ""}
        talk.start_over(first["content"] if first["role"] == "system" else "")
        say("started over")
    elif name == "/save":
        _save(talk.messages, rest)
    else:
        say(f"there is no {name}: /help lists what there is, and //... says a text that begins with a slash")


def _use(talk: Talk, name: str) -> None:
    """Has another adapter answer."""
    if not name:
        say(f"/use NAME, one of {', '.join(talk.hat.cards)}, or any that hatrack list shows for this base")
        return
    try:
        talk.adapter = talk.speakers[0] = name if name in talk.hat.cards else talk.hat.add(name)
    except HatrackError as error:
        say(str(error))
        return
    say(f"{talk.adapter} answers")


def _save(messages: list[dict[str, str]], name: str) -> None:
    """Writes the conversation as a line of JSON, to a new file or at the end of one that has such lines."""
    path = Path(name).expanduser()
    if not name or not messages:
        say("/save FILE, such as talks.jsonl" if messages else "there is nothing to save yet")
        return
    if path.exists() and path.suffix != ".jsonl":
        say(f"{path} exists already and is no .jsonl file: choose another name")
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        say(f"{path} cannot be written; got {error.strerror}; fix: another name or folder")
        return
    say(f"saved in {path}")
