"""Runs commands in a process that lacks what Windows or macOS lack: `python lesser_system.py SYSTEM COMMAND...`.

Commands are separated by an argument `--then`. SYSTEM is Windows, Darwin or Linux. Libraries are imported first, as the
ones of this system; psutil, which is another one on each system, goes on reading /proc.
"""

import builtins
import importlib
import io
import os
import platform
import signal
import sys
from collections.abc import Callable
from typing import Any

MODULES = {"Windows": ["fcntl", "resource", "termios", "pwd", "grp", "readline"], "Darwin": [], "Linux": ["resource"]}
SIGNALS = {"Windows": ["SIGHUP", "SIGKILL", "SIGUSR1", "SIGQUIT", "SIGALRM"], "Darwin": [], "Linux": ["SIGHUP"]}
PLATFORMS = {"Windows": "win32", "Darwin": "darwin", "Linux": "linux"}
FUNCTIONS = ("sendfile", "posix_fadvise", "sched_getaffinity")
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "filelock", "psutil", "rich.progress", "typer")


def become(system: str) -> None:
    """Takes away what `system` lacks."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for name in MODULES[system]:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in SIGNALS[system]:
        delattr(signal, name)
    for name in FUNCTIONS:
        delattr(os, name)
    os.environ["PATH"] = os.environ["CXX"] = ""
    builtins.open = io.open = _without_proc(io.open)
    os.stat = _without_proc(os.stat)
    platform.system = lambda: system
    sys.platform = PLATFORMS[system]


def _without_proc(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).startswith("/proc/") and "psutil" not in sys._getframe(1).f_code.co_filename:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return function(path, *arguments, **options)

    return call


if __name__ == "__main__":
    become(sys.argv[1])
    from hatrack.cli.main import main

    commands: list[list[str]] = [[]]
    for argument in sys.argv[2:]:
        if argument == "--then":
            commands.append([])
        else:
            commands[-1].append(argument)
    for command in commands:
        sys.argv = ["hatrack", *command]
        try:
            main()
        except SystemExit as stopped:
            if stopped.code:
                raise
