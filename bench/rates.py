"""Which learning rates learn: short runs at multiples of the usual rate, and what `--lr auto` would take.

    python bench/rates.py encoder
    python bench/rates.py decoder --steps 30

Prints a line a run: the held-out loss (and accuracy) before and after so many steps, or why it was stopped.
Half a minute a run. Bases and texts are those of `hatrack demo`.
"""

import argparse
import bz2
import csv
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import yaml

import hatrack
from hatrack.base.header import hidden_size, read_config
from hatrack.base.sources import find_base
from hatrack.cli.demo import CHAT_MODEL, ENCODER, QUESTIONS, REVIEWS
from hatrack.errors import HatrackError
from hatrack.planning.schedule import learning_rate
from hatrack.wheels import fetch_member

TIMES = (1 / 1000, 1 / 100, 1 / 30, 1 / 10, 1 / 3, 1, 3, 10, 30, 100)


def main() -> None:
    """Runs all trials."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", choices=("encoder", "decoder"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--times", type=float, nargs="*", default=TIMES, help="of the usual rate")
    parser.add_argument("--auto", action="store_true", help="also what --lr auto takes, and how that does")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hatrack-rates-") as empty:
        here = Path(empty)
        os.environ |= {"HATRACK_HOME": str(here / "home"), "HATRACK_QUIET": "1"}
        settings = _encoder(here) if options.base == "encoder" else _decoder(here)
        usual = learning_rate(hidden_size(read_config(find_base(settings["base"]).folder)))
        print(f"usual rate {usual:g}, {options.steps} steps\n")
        print("| rate | of the usual | before | after |\n| --- | --- | --- | --- |")
        for times in options.times:
            rate = float(f"{usual * times:.2g}")
            print(f"| {rate:g} | {times:.3g} | {_run(here, rate, settings, options.steps)} |", flush=True)
        if options.auto:
            ended = _run(here, "auto", settings, options.steps)
            lines = (here / "lr-auto/metrics.jsonl").read_text().splitlines()
            peak = max(json.loads(line).get("learning_rate", 0) for line in lines)
            print(f"| auto: {peak:.2g} | {peak / usual:.3g} | {ended} |", flush=True)


def _run(here: Path, rate: Any, settings: dict[str, Any], steps: int) -> str:
    """What a run at this rate did to the held-out score."""
    name = f"lr-{rate}"
    try:
        result = hatrack.train(**settings, lr=rate, steps=steps, output=str(here / name), name=name).result
    except HatrackError as error:
        return f"| {error.what[:150]}"
    return f"{_shown(result['before'])} | {_shown(result['eval'])}"


def _shown(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {metrics[name]:.3f}" for name in ("loss", "accuracy") if name in metrics)


def _encoder(here: Path) -> dict[str, Any]:
    """600 reviews, to classify."""
    with bz2.open(fetch_member(REVIEWS), "rt", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] != "plot" and row["text"].strip()]
    chosen = random.Random(0).sample(rows, 600)
    with (here / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([row["text"], row["category"]] for row in chosen)])
    return {"base": ENCODER, "data": str(here / "reviews.csv"), "batch_size": 16}


def _decoder(here: Path) -> dict[str, Any]:
    """Questions and answers, to chat."""
    turns = yaml.safe_load((fetch_member(QUESTIONS) / "ai.yml").read_text())["conversations"]
    pairs = {turn[0]: turn[1] for turn in turns if len(turn) == 2}
    with (here / "questions.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in pairs.items())
    return {"base": CHAT_MODEL, "data": str(here / "questions.jsonl"), "batch_size": 4}


if __name__ == "__main__":
    main()
