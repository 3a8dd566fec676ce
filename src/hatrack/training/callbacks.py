"""What happens beside the training loop: the progress bar, metrics.jsonl, and stopping without losing anything.

Knows nothing of models or data; it is told by the Trainer what step it is.
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
from hatrack.console import console, format_size, say, say_in_signal
from hatrack.storage import machine_errors, write_file
from hatrack.training.trainer import BEST

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVE_EVERY_SECONDS = 600
SAY_EVERY_SECONDS = 15
ABOVE_FIRST, FAR_ABOVE = 1.03, 1.1
MORE = 1.01
"""Each time memory is given back, so much more is allowed: a plan that is too low does not slow every step."""


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """A bar with the loss and the time left; where there is no terminal, a line now and then.

    `loss` gives what is to be shown of it: single steps jump too much to be read.
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
        self.said, self.began, self.first_step = 0.0, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, loss="...")
        self.bar.start()
        self.said = self.began = time.monotonic()
        self.first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = self.loss()
        shown = "..." if loss is None else f"{loss:.3f}"
        self.bar.update(self.task, completed=state.global_step, loss=shown)
        now = time.monotonic()
        if self.bar.disable and now - self.said > SAY_EVERY_SECONDS:
            left = (now - self.began) / (state.global_step - self.first_step) * (state.max_steps - state.global_step)
            say(f"step {state.global_step} of {state.max_steps}, loss {shown}, {left:,.0f} s left")
            self.said = now

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        shown = ", ".join(
            f"{name.removeprefix('eval_')} {value:.3f}" for name, value in metrics.items() if not name.endswith(BEST)
        )
        say(f"epoch {state.epoch:.2f}: held-out {shown}")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """However the block ends, the terminal is as it was: the bar gone, the cursor back."""
        try:
            yield
        finally:
            self.bar.stop()


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """Appends everything that is logged to a JSON-lines file; after a resume, lines past the checkpoint are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = []
        if state.global_step and self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    earlier = json.loads(line)["step"] <= state.global_step
                except (ValueError, KeyError):  # a line cut short when the run was stopped
                    continue
                if earlier:
                    kept.append(line + "\n")
        write_file(self.path, "".join(kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.write(state, logs or {})

    def write(self, state: Any, what: dict[str, Any]) -> None:
        """Appends a line about the step that the run is at."""
        line = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 3), **what}
        with machine_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class GracefulStop(TrainerCallback):  # type: ignore[misc]
    """Turns Ctrl-C, SIGTERM and a closed terminal into a checkpoint at the end of the step, and saves one now and then.

    `stopped` says whether the run was stopped. A second Ctrl-C stops at once, with the checkpoint before.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.saved = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over while the block runs, but for those that whoever started us chose to ignore (nohup).

        Outside the main thread nothing can be taken over.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            asked = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
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
        due = self.stopped or time.monotonic() - self.saved > SAVE_EVERY_SECONDS
        if due and not self._at_epoch_end(state):
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped and not self._at_epoch_end(state):  # no score in the middle of an epoch: a resumed run has none
            control.should_evaluate = control.should_save = control.should_log = False

    def _at_epoch_end(self, state: Any) -> bool:
        """At an epoch's end the Trainer scores and then saves; a checkpoint before that would lose the score."""
        return bool(state.epoch == int(state.epoch) or state.global_step >= state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = time.monotonic()


class TooMuchMemory(Exception):
    """The first step took more than the run may: `took` of `limit` bytes."""

    def __init__(self, took: int, limit: int) -> None:
        super().__init__(took, limit)
        self.took, self.limit = took, limit


class MemoryWatch(TrainerCallback):  # type: ignore[misc]
    """Holds a run on a processor to its memory, from its first step on, whose first micro-batch is the largest.

    What that took is said where it is far from what was `planned`; TooMuchMemory is raised where it is above `limit`
    and fewer rows at a time are possible. Afterwards freed memory is handed back to the system when the process holds
    more between two steps: holes between blocks grow with every new shape of batch.
    """

    def __init__(self, planned: int, limit: int | None) -> None:
        self.planned, self.limit = planned, limit
        self.most: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.use_cpu:
            return
        held = resident_bytes()  # freed memory is kept, so it is what the step held at its fullest
        if self.most is None:
            if state.global_step == 1:
                self._look(held, args.per_device_train_batch_size)
            self.most = max(self.planned, held * ABOVE_FIRST)
        elif held > self.most:
            trim_heap()
            self.most *= MORE

    def _look(self, held: int, rows: int) -> None:
        if self.limit is not None and held > self.limit and rows > 1:
            raise TooMuchMemory(held, self.limit)
        if held > self.planned * FAR_ABOVE:
            say(
                f"the first step, the largest, took {format_size(held)}: "
                f"more than the {format_size(self.planned)} planned"
            )
