"""Registers the commands; turns each error into one line and an exit code."""

import contextlib
import errno
import gc
import io
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal, NoReturn

import typer

from hatrack import __version__
from hatrack.cli import cache, chat, check, compare, demo, plan, predict, rack, train
from hatrack.console import ENDING_SIGNALS, SafeStderr
from hatrack.errors import HatrackError, OptionStyle
from hatrack.recipe import flag, suggest_option

# rich's boxes cost 0.2 s: the help of one command has them, the list of commands does not.
BOXES: Literal["rich"] | None = "rich" if len(sys.argv) > 2 else None

app = typer.Typer(
    epilog="Every command accepts --debug (show the traceback of an error) and --help.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=BOXES,
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"hatrack {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fine-tune language models with LoRA on the machine you have. Start with: hatrack demo"""


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "train": train.train,
    "plan": plan.plan,
    "check": check.check,
    "predict": predict.predict,
    "chat": chat.chat,
    "compare": compare.compare,
    "list": rack.list_rack,
    "show": rack.show,
    "add": rack.add,
    "rename": rack.rename,
    "remove": rack.remove,
    "cache": cache.cache,
}
for name, command in COMMANDS.items():  # one line per paragraph: typer keeps a docstring's line breaks
    app.command(name, help=re.sub(r"(?<=\S)\n *(?=\S)", " ", command.__doc__ or ""))(command)

INTERRUPTED = 130


def main() -> NoReturn:
    """Runs one command. Exit codes: 0 done, 1 machine failure, 2 invalid or refused input, 130 interrupted."""
    _escape_unencodable()
    OptionStyle.flags = True
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if not debug:
        warnings.filterwarnings("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it reports missing kernels that are not used
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if "OMP_WAIT_POLICY" not in os.environ:  # threads that spin long slow down other processes (docs/log.md)
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    for number in ENDING_SIGNALS:  # end like Ctrl-C
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    gc.set_threshold(
        50_000, 20, 20
    )  # imports make many long-lived objects; collecting garbage among them takes a second
    try:
        code = app(arguments, prog_name="hatrack", standalone_mode=False)
        if code == INTERRUPTED:  # typer caught the KeyboardInterrupt and printed nothing
            _print_error("interrupted", code)
    except BaseException as error:
        if debug:
            traceback.print_exc()
        code = _report_error(error)
    try:
        sys.stdout.flush()
    except BrokenPipeError as error:
        code = _report_error(error)
    gc.freeze()  # no garbage collection at exit
    sys.exit(code if isinstance(code, int) else 0)


def _report_error(error: BaseException) -> int:
    """Prints what went wrong in one line. Returns the exit code."""
    if isinstance(error, SystemExit) and isinstance(
        error.__context__, BrokenPipeError
    ):  # typer converts the one into the other
        error = error.__context__
    if isinstance(error, HatrackError):
        return _print_error(str(error), error.exit_code)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return _print_error("interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError):  # the reader of our output has exited, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _print_error(f"the disk is full; got {error}; fix: free some space", 1)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _print_error("out of memory; fix: a smaller --batch-size, a shorter --max-length, or --quantize 4bit", 1)
    # Usage errors are recognized by name, because typer bundles click under a private name.
    message = getattr(error, "format_message", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error)
        return 0
    if type(error).__name__ == "NoSuchOption":
        return _print_error(_no_such_option(error), 2)
    if message is not None:
        command = getattr(getattr(error, "ctx", None), "command_path", "hatrack")
        return _print_error(f"{' '.join(message().split())} (see {command} --help)", 2)
    return _print_error(f"unexpected {type(error).__name__}: {error} (this is a bug: --debug shows where)", 1)


def _no_such_option(error: Any) -> str:
    """Formats the message for an unknown option, with the option that was probably meant."""
    known = {name.lstrip("-").replace("-", "_") for option in error.ctx.command.params for name in option.opts}
    meant = suggest_option(error.option_name, known)
    if meant is None:
        hint = f"see {error.ctx.command_path} --help"
    else:
        option, _, value = meant.partition(" ")
        hint = f"did you mean {flag(option)}{value and ' '}{value}?" if option in known else f"leave it out: {meant}"
    return f"there is no option {error.option_name}; {hint}"


def _escape_unencodable() -> None:
    """Makes output write characters that its encoding lacks as `\\u2713`, so that printing a result cannot fail."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the file was replaced by a pipe
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")


def _print_error(line: str, code: int) -> int:
    print(f"hatrack: {line}", file=SafeStderr())
    return code
