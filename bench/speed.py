"""hatrack's training speed against peft's, full fine-tuning's, and the matmuls alone. One table, JSON, a plot.

    make bench                                     or
    .venv/bin/python bench/speed.py [--rounds 4] [--only "q,v"] [--runs] [--output DIR]

Every side runs in a process of its own, and they take turns, a few steps each, so that a busy machine slows all alike;
the figures are medians, with equal threads. `--runs` adds whole trainings of MiniLM on Rotten Tomatoes, three seeds
(`bench/runs.py`), which take half an hour.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sides import OURS, SIDES, WORKS

HERE = Path(__file__).parent
TURNS = (*OURS, "peft", "floor")


class Worker:
    """A side in its own process, which computes only while it is asked."""

    def __init__(
        self,
        work: str,
        side: str,
        threads: int,
        program: tuple[str, ...] = (sys.executable, str(HERE / "sides.py")),
        **more: Any,
    ) -> None:
        asked = json.dumps({"work": work, "side": side, "threads": threads, **more})
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads))
        if side in OURS:
            environment.setdefault("GOMP_SPINCOUNT", "3000")  # as hatrack's command line sets it
        self.process = subprocess.Popen(
            [*program, asked],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.answer()

    def answer(self) -> Any:
        """The next line of JSON from the process."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended early: {' '.join(map(str, self.process.args))}")  # type: ignore[arg-type]
        return json.loads(line)

    def ask(self, command: str) -> Any:
        """Sends a command and waits for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Lets the process finish."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(work: str, rounds: int, threads: int) -> dict[str, Any]:
    """Medians of all sides on one piece of work: seconds a step, bytes saved, peak bytes.

    The sides that are compared most take turns; the others follow one by one, as all at once need more memory than
    there may be.
    """
    times: dict[str, list[float]] = {}
    found: dict[str, Any] = {"work": work, "saved": {}, "peak": {}}

    def finish(side: str, worker: Worker) -> None:
        if side != "floor":
            found["saved"][side], found["peak"][side] = worker.ask("saved"), worker.ask("peak")
        worker.end()

    workers = {side: Worker(work, side, threads) for side in TURNS}
    for _ in range(rounds):
        for side, worker in workers.items():
            times[side] = times.get(side, []) + worker.ask("steps")
    for side, worker in workers.items():
        finish(side, worker)
    for side in [side for side in SIDES if side not in TURNS]:
        worker = Worker(work, side, threads)
        if side != "frozen":
            times[side] = worker.ask("steps")
        finish(side, worker)
    found["seconds"] = {side: statistics.median(steps) for side, steps in times.items()}
    found["spread"] = {side: [min(steps), max(steps)] for side, steps in times.items()}
    return found


def row(found: dict[str, Any]) -> list[str]:
    """One line of the table."""
    seconds, saved = found["seconds"], found["saved"]
    ours = seconds["hatrack"]
    return [
        found["work"],
        *[f"{seconds[side]:.2f} s" for side in OURS],
        *[f"{seconds[side] / ours:.2f}x" for side in ("peft", "textbook", "full")],
        f"{ours / seconds['floor']:.2f}x",
        f"{saved['hatrack'] / 2**20:.0f} MiB",
        f"{saved['hatrack'] / saved['frozen']:.2f}x",
        f"{saved['peft'] / saved['frozen']:.2f}x",
        f"{found['peak']['hatrack'] / 2**30:.1f} / {found['peak']['peft'] / 2**30:.1f} GiB",
    ]


HEADER = [
    "work",
    *OURS,
    "peft takes",
    "textbook",
    "full",
    "of matmuls",
    "saved",
    "of frozen",
    "peft's",
    "peak, peft's",
]


def table(lines: list[list[str]]) -> str:
    """Lines as a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [HEADER, ["---"] * len(HEADER), *lines])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Seconds a step of each side, a group of bars for each work. Skipped where matplotlib is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    sides = ("floor", *OURS, "peft", "full")
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.9 * len(results)))
    for number, side in enumerate(sides):
        places = [group + 0.13 * number for group in range(len(results))]
        axes.barh(places, [found["seconds"][side] for found in results], height=0.12, label=side)
    axes.set_yticks([group + 0.3 for group in range(len(results))], [found["work"] for found in results])
    axes.invert_yaxis()
    axes.set_xlabel("seconds a training step (shorter is better)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def machine(threads: int) -> dict[str, str]:
    """Where and with what it was measured."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    return {
        "processor": models[0].partition(":")[2].strip() if models else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(threads),
        "commit": commit.strip(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="works whose name holds this")
    parser.add_argument("--runs", action="store_true", help="whole trainings too")
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    told = machine(options.threads)
    print(", ".join(f"{name} {value}" for name, value in told.items()))
    results = []
    for work in WORKS:
        if options.only in work:
            results.append(measure(work, options.rounds, options.threads))
            lines = table([row(results[-1])]).splitlines()
            print("\n".join(lines if len(results) == 1 else lines[-1:]), flush=True)
            (options.output / "speed.json").write_text(json.dumps({"machine": told, "steps": results}, indent=1))
    plot(results, options.output / "speed.png")
    if options.runs:
        subprocess.run([sys.executable, str(HERE / "runs.py"), "--output", str(options.output)], check=True)


if __name__ == "__main__":
    main()
