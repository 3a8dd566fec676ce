"""Callbacks of the Trainer: progress bar, metrics.jsonl, graceful stop, memory limit.

Know nothing of models or data.
"""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from hatrack.base.free_memory import resident_bytes, trim_heap
from hatrack.console import ENDING_SIGNALS, console, format_size, say, say_in_signal
from hatrack.storage import machine_errors, write_file
from hatrack.training.trainer import BEST

STOP_SIGNALS = (signal.SIGINT, *ENDING_SIGNALS)
SAVE_EVERY_SECONDS = 600
SAY_EVERY_SECONDS = 15
ABOVE_FIRST_STEP = 1.03
"""Freed memory is returned to the system once the process holds this many times what it held after the first step."""
FAR_ABOVE_PLAN = 1.1
"""The first step's memory is reported if it is more than this many times the planned memory."""
RAISE_BY = 1.01
"""The threshold is raised by this factor each time, so that too low a plan does not slow down every step."""


def format_metrics(metrics: dict[str, float]) -> str:
    """Formats metrics: `accuracy 0.795, loss 0.441`."""
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """A progress bar with the loss and the time left; without a terminal, one line every 15 seconds.

    `loss` returns the loss to show, which is smoothed because the losses of single steps vary too much.
    """

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console(),
            disable=not console().is_terminal,
        )
        self.task: Any = None
        self.loss: Callable[[], float | None] = lambda: None
        self.last_line, self.began, self.first_step = 0.0, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, loss="...")
        self.bar.start()
        self.last_line = self.began = time.monotonic()
        self.first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = self.loss()
        shown = "..." if loss is None else f"{loss:.3f}"
        self.bar.update(self.task, completed=state.global_step, loss=shown)
        now = time.monotonic()
        if self.bar.disable and now - self.last_line > SAY_EVERY_SECONDS:
            left = (now - self.began) / (state.global_step - self.first_step) * (state.max_steps - state.global_step)
            say(f"step {state.global_step} of {state.max_steps}, loss {shown}, {left:,.0f} s left")
            self.last_line = now

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        shown = {name.removeprefix("eval_"): value for name, value in metrics.items() if not name.endswith(BEST)}
        say(f"epoch {state.epoch:.2f}: held-out {format_metrics(shown)}")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Removes the bar and shows the cursor again when the block ends, however it ends."""
        try:
            yield
        finally:
            self.bar.stop()


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """Appends all logged metrics to a JSON-lines file. A resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lines_before = []
        if state.global_step and self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    earlier = json.loads(line)["step"] <= state.global_step
                except (ValueError, KeyError):  # a line cut short when the run was stopped
                    continue
                if earlier:
                    lines_before.append(line + "\n")
        write_file(self.path, "".join(lines_before))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.write(state, logs or {})

    def write(self, state: Any, values: dict[str, Any]) -> None:
        """Appends a line with the current step and `values`."""
        line = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 3), **values}
        with machine_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class GracefulStop(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint every 10 minutes. On Ctrl-C, SIGTERM or a closed terminal, finishes the step, saves a
    checkpoint and stops.

    `stopped`: whether the run was stopped. A second Ctrl-C stops at once; the last checkpoint is kept.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.last_save = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals while the block runs, except signals that the parent process ignores (nohup).

        Does nothing outside the main thread, where Python cannot handle signals.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            asked = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            before = {number: signal.signal(number, self._stop) for number in asked}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        say_in_signal("stopping: this step is finished and saved first (again to stop at once)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps
        control.should_training_stop |= self.stopped
        due = self.stopped or time.monotonic() - self.last_save > SAVE_EVERY_SECONDS
        if due and not self._at_epoch_end(state):
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped and not self._at_epoch_end(state):  # an uninterrupted run has no score in mid-epoch
            control.should_evaluate = control.should_save = control.should_log = False

    def _at_epoch_end(self, state: Any) -> bool:
        """Whether the Trainer is about to score and then save; a checkpoint before that would lack the score."""
        return bool(state.epoch == int(state.epoch) or state.global_step >= state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last_save = time.monotonic()


class TooMuchMemory(Exception):
    """The first step exceeded the memory limit: it `used` more than `limit` bytes."""

    def __init__(self, used: int, limit: int) -> None:
        super().__init__(used, limit)
        self.used, self.limit = used, limit


class MemoryWatch(TrainerCallback):  # type: ignore[misc]
    """Keeps a run on a CPU below its memory limit. `planned` and `limit` are in bytes; None means no limit.

    After the first step, whose first micro-batch is the largest, raises TooMuchMemory if the process holds more than
    `limit` and the micro-batch can be smaller, and reports memory far above `planned`. From then on, returns freed
    memory to the system whenever the process holds more than after the first step, because each new batch shape
    fragments the heap.
    """

    def __init__(self, planned: int, limit: int | None) -> None:
        self.planned, self.limit = planned, limit
        self.threshold: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.use_cpu:
            return
        held = resident_bytes()  # the process keeps freed memory, so this is the step's peak
        if self.threshold is None:
            if state.global_step == 1:
                self._check_first_step(held, args.per_device_train_batch_size)
            self.threshold = max(self.planned, held * ABOVE_FIRST_STEP)
        elif held > self.threshold:
            trim_heap()
            self.threshold *= RAISE_BY

    def _check_first_step(self, held: int, micro_batch: int) -> None:
        if self.limit is not None and held > self.limit and micro_batch > 1:
            raise TooMuchMemory(held, self.limit)
        if held > self.planned * FAR_ABOVE_PLAN:
            planned = format_size(self.planned)
            say(f"the first step, the largest, took {format_size(held)}: more than the {planned} planned")
