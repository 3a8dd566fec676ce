"""The commands, and how each error becomes one line and an exit code."""

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
from hatrack.console import ENDING_SIGNALS, SafeStderr
from hatrack.errors import HatrackError, OptionStyle
from hatrack.recipe import flag, suggest_option

# rich's boxes cost 0.2 s: the options of one command get them, the list of commands does not.
BOXES: Literal["rich"] | None = "rich" if len(sys.argv) > 2 else None

app = typer.Typer(
    epilog="Any command takes --debug (show the traceback of an error) and --help.",
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


app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("plan")(plan.plan)
app.command("check")(check.check)
app.command("predict")(predict.predict)
app.command("chat")(chat.chat)
app.command("compare")(compare.compare)
app.command("list")(rack.list_rack)
app.command("show")(rack.show)
app.command("add")(rack.add)
app.command("rename")(rack.rename)
app.command("remove")(rack.remove)
app.command("cache")(cache.cache)

INTERRUPTED = 130


def main() -> NoReturn:
    """Runs one command. Exit codes: 0 done, 1 the machine failed, 2 the input is wrong or refused, 130 interrupted."""
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
    for number in ENDING_SIGNALS:  # as Ctrl-C does
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup it is
            signal.signal(number, signal.default_int_handler)
    gc.set_threshold(50_000, 20, 20)  # imports make many objects that stay: searching them takes a second
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
    gc.freeze()  # no search at exit
    sys.exit(code if isinstance(code, int) else 0)


def _report_error(error: BaseException) -> int:
    """Prints what went wrong in one line. Returns the exit code."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):  # typer turns it into this
        error = error.__context__
    if isinstance(error, HatrackError):
        return _print_error(str(error), error.exit_code)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return _print_error("interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError):  # the reader of our output has ended, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _print_error(f"the disk is full; got {error}; fix: free some space", 1)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _print_error("out of memory; fix: a smaller --batch-size, a shorter --max-length, or --quantize 4bit", 1)
    # Usage errors are told by name: typer brings its own click under a private name.
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
    """The message for an unknown option: the option that was probably meant, by hatrack's name for it."""
    known = {name.lstrip("-").replace("-", "_") for option in error.ctx.command.params for name in option.opts}
    meant = suggest_option(error.option_name, known)
    if meant is None:
        hint = f"see {error.ctx.command_path} --help"
    else:
        option, _, value = meant.partition(" ")
        hint = f"did you mean {flag(option)}{value and ' '}{value}?" if option in known else f"leave it out: {meant}"
    return f"there is no option {error.option_name}; {hint}"


def _escape_unencodable() -> None:
    """Writes characters that the output's encoding lacks as `\\u2713`, so that no finished run fails on one."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a file that a pipe replaced since
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")


def _print_error(line: str, code: int) -> int:
    print(f"hatrack: {line}", file=SafeStderr())
    return code
