"""Measures the time from the start of `hatrack train` to its first step, in seconds.

    .venv/bin/python bench/start.py [--rounds 3] [--output DIR]

MiniLM on 4,000 rows of Rotten Tomatoes, 1,000 more held out, adapters in all linear layers. Prints when each line was
printed, medians over processes after one that is not counted, which reads the files into memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runs import BATCH, ENCODER, write_rows

STEPS = 20
"""Few enough that each is logged."""


def start(folder: Path) -> dict[str, float]:
    """The first words of each line that one process prints -> the seconds after its start."""
    command = [sys.executable, "-m", "hatrack", "train", "--base", ENCODER, "--data", "learn.csv"]
    command += ["--eval-data", "held_out.csv", "--targets", "all-linear", "--steps", str(STEPS), "--lr", "1e-3"]
    command += ["--batch-size", str(BATCH), "--name", f"hat-{time.time_ns()}"]
    environment = dict(os.environ, HATRACK_HOME=str(folder / "home"))
    began, found, line = time.time(), {}, ""
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            found.setdefault(" ".join(line.split()[:3]).rstrip(":,"), time.time() - began)
    if process.returncode:
        raise SystemExit(f"hatrack train ended with {process.returncode}: {line}")
    log = next(folder.glob(f"{command[-1]}/metrics.jsonl")).read_text().splitlines()
    found["first step taken"] = json.loads(log[0])["time"] - began
    return dict(sorted(found.items(), key=lambda said: said[1]))


def main() -> None:
    """Runs the processes, prints the medians and writes start.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        found = [start(folder) for _ in range(options.rounds + 1)][1:]
    common = [
        said for said in found[0] if all(said in times for times in found)
    ]  # not every line is printed in every run
    medians = {said: statistics.median(times[said] for times in found) for said in common}
    print("\n".join(f"{seconds:6.2f} s  {said}" for said, seconds in medians.items()))
    (options.output / "start.json").write_text(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
