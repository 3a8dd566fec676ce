"""The command line: which commands there are, and how each error becomes one line and an exit code."""

import contextlib
import errno
import gc
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from typing import Annotated, Any, Literal, NoReturn

import typer

from hatrack import __version__
from hatrack.cli import cache, chat, check, compare, demo, plan, predict, rack, train
from hatrack.console import SafeStderr
from hatrack.errors import HatrackError, OptionStyle
from hatrack.recipe import flag, suggest_option

# The list of commands is to appear at once, and rich's boxes cost 0.2 s; the many options of one command deserve them.
BOXES: Literal["rich"] | None = "rich" if len(sys.argv) > 2 else None

app = typer.Typer(
    epilog="--debug on any command shows the full traceback of an error.",
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
    """Fine-tune a language model on the machine you have. Start with: hatrack demo"""


app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("plan")(plan.plan)
app.command("check")(check.check)
app.command("predict")(predict.predict)
app.command("chat")(chat.chat)
app.command("compare")(compare.compare)
app.command("list")(rack.list_hats)
app.command("show")(rack.show)
app.command("add")(rack.add)
app.command("rename")(rack.rename)
app.command("remove")(rack.remove)
app.command("cache")(cache.cache)

INTERRUPTED = 130


def main() -> NoReturn:
    """Runs one command. Exit codes: 0 done, 1 the machine failed, 2 the input was wrong, 130 interrupted."""
    _escape_what_cannot_be_written()
    OptionStyle.flags = True
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if not debug:
        warnings.filterwarnings("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it reports kernels nobody asked for
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if "OMP_WAIT_POLICY" not in os.environ:  # threads that spin for long starve whatever else runs (docs/log.md)
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    for number in (signal.SIGTERM, signal.SIGHUP):  # both end a command as Ctrl-C does
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    gc.set_threshold(50_000, 20, 20)  # imports make many objects that stay: looking through them takes a second
    try:
        code = app(arguments, prog_name="hatrack", standalone_mode=False)
        if code == INTERRUPTED:  # the parser took the KeyboardInterrupt, and said nothing
            _complain("interrupted", code)
    except BaseException as error:
        if debug:
            traceback.print_exc()
        code = _explain(error)
    try:
        sys.stdout.flush()
    except BrokenPipeError as error:
        code = _explain(error)
    gc.freeze()  # and so does looking through them once more at the end
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: BaseException) -> int:
    """Says what went wrong in one line, and returns the exit code."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):  # the parser's word for it
        error = error.__context__
    if isinstance(error, HatrackError):
        return _complain(str(error), error.exit_code)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return _complain("interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError):  # the reader of our output is gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _complain(f"the disk is full; got {error}; fix: free some space", 1)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _complain("out of memory; fix: a smaller --batch-size, a shorter --max-length, or --quantize 4bit", 1)
    message = getattr(error, "format_message", None)  # a usage error of the command-line parser
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error)
        return 0
    if type(error).__name__ == "NoSuchOption":
        return _complain(_no_such_option(error), 2)
    if message is not None:
        command = getattr(getattr(error, "ctx", None), "command_path", "hatrack")
        return _complain(f"{' '.join(message().split())} (see {command} --help)", 2)
    return _complain(f"unexpected {type(error).__name__}: {error} (this is a bug: --debug shows where)", 1)


def _no_such_option(error: Any) -> str:
    """What to say of an option that the command has not: the one that was meant, by hatrack's name for it."""
    known = {name.lstrip("-").replace("-", "_") for option in error.ctx.command.params for name in option.opts}
    meant = suggest_option(error.option_name, known)
    if meant is None:
        hint = f"see {error.ctx.command_path} --help"
    else:
        option, _, value = meant.partition(" ")
        hint = f"did you mean {flag(option)}{value and ' '}{value}?" if option in known else f"leave it out: {meant}"
    return f"there is no option {error.option_name}; {hint}"


def _escape_what_cannot_be_written() -> None:
    """Has whatever a terminal's or file's encoding does not know written as `\\u2713`: no finished run ends in an error
    over a letter."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a file whose place a pipe has taken since it was opened
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")


def _complain(line: str, code: int) -> int:
    print(f"hatrack: {line}", file=SafeStderr())
    return code
