"""Plan against actual: `hatrack plan`, then `hatrack train`, on real models and text; memory, seconds, parameters.

    .venv/bin/python bench/plan.py [--probe] [--only WORD | --exact NAME] [--steps 17] [--output DIR]

Each run is planned and trained in processes of its own, from the command line alone. The peak is the kernel's VmHWM of
the training process: resident anonymous and mapped pages together. Seconds are those of training. Results of earlier
calls are kept in DIR/plan.json, so the runs can be measured in pieces, and the table shows all of them. `7B` is two
steps over the base of bench/memory.py (13.5 GB, written once), a quarter of an hour.
"""

import argparse
import bz2
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from hatrack.cli.demo import CHAT_MODEL, ENCODER, QUESTIONS, REVIEWS
from hatrack.wheels import fetch_member
from memory import written

RUNS = {
    "encoder, short rows": "--data reviews.csv",
    "encoder, short rows, q,v, no dropout": "--data reviews.csv --targets query,value --dropout 0",
    "encoder, long rows": "--data long.csv --batch-size 16",
    "encoder, long rows, all-linear": "--data long.csv --targets all-linear --batch-size 8",
    "encoder, long rows, top 2": "--data long.csv --layers top-2 --batch-size 16",
    "encoder, long rows, 1 GiB": "--data long.csv --batch-size 32 --memory 1GiB",
    "chat, short rows": "--data questions.jsonl",
    "chat, short rows, q,v": "--data questions.jsonl --targets q_proj,v_proj",
    "chat, short rows, all-linear, no dropout": "--data questions.jsonl --targets all-linear --dropout 0",
    "complete, 128 tokens": "--data text.jsonl --max-length 128 --batch-size 4",
    "complete, 256 tokens": "--data text.jsonl --batch-size 2",
    "complete, 256 tokens, top 10": "--data text.jsonl --layers top-10 --batch-size 4",
    "complete, 256 tokens, DoRA": "--data text.jsonl --variant dora --targets q_proj,v_proj --batch-size 2",
    "chat, 4-bit": "--data questions.jsonl --quantize 4bit --targets q_proj,v_proj --batch-size 4",
    "chat, 8-bit": "--data questions.jsonl --quantize 8bit --targets q_proj,v_proj --batch-size 4",
    "complete, 256 tokens, streamed": "--data text.jsonl --targets q_proj,v_proj --batch-size 4 --memory 850MiB",
    "encoder, long rows, top 2, cached": "--data long.csv --layers top-2 --batch-size 16",
    "complete, 256 tokens, top 10, cached": "--data text.jsonl --layers top-10 --batch-size 4",
    "7B, streamed": "--data words.jsonl --task complete --targets q_proj,v_proj --batch-size 4 --memory 3GiB",
    "chat, 4-bit, cached": "--data questions.jsonl --quantize 4bit --targets q_proj,v_proj --batch-size 4",
}
"""Name -> options of both commands. A new way to train is one more line. Runs named `cached` come after the same ones;
what these cached is known to `train` alone, so its own plan is held against them."""
HEADER = ["run", "peak", "planned", "off", "seconds", "planned", "off", "trainable"]


def write_data(folder: Path) -> None:
    """Short and long labelled rows, questions with answers, plain text of some 250 tokens a row, words for `7B`."""
    with bz2.open(fetch_member(REVIEWS), "rt", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] != "plot" and row["text"].strip()]
    random.Random(0).shuffle(rows)
    texts = {kind: [row["text"] for row in rows if row["category"] == kind] for kind in ("fresh", "rotten")}
    short = [(row["text"], row["category"]) for row in rows[:1200]]
    long = [(" ".join(texts[kind][n : n + 6]), kind) for kind in texts for n in range(0, 1200, 6)]
    for name, table in (("reviews.csv", short), ("long.csv", long)):
        with (folder / name).open("w", newline="") as out:
            csv.writer(out).writerows([("text", "label"), *table])
    pairs: dict[str, str] = {}
    for path in sorted(fetch_member(QUESTIONS).glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if len(turns) > 1:
                pairs.setdefault(str(turns[0]).strip(), str(turns[1]).strip())
    questions = [{"prompt": asked, "completion": told} for asked, told in pairs.items() if asked and told][:300]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    words = [{"text": " ".join(f"w{(row * 64 + n) % 999}" for n in range(64))} for row in range(12)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    plain = [{"text": " ".join(row["text"] for row in rows[n : n + 8])} for n in range(0, 800, 8)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))


def command(folder: Path, *words: str) -> dict[str, Any]:
    """What a command of hatrack prints with --json."""
    environment = dict(os.environ, HATRACK_HOME=str(folder / "home"))
    line = [sys.executable, "-m", "hatrack", *words, "--json"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout))


def run(folder: Path, name: str, steps: int) -> dict[str, Any]:
    """One plan and the training it is about."""
    base = CHAT_MODEL
    if name.startswith("encoder"):
        base = ENCODER
    elif name.startswith("7B"):
        base, steps = str(written(32, "bfloat16")), 2
    options = ["--base", base, *RUNS[name].split(), "--steps", str(steps), "--device", "cpu"]
    planned = command(folder, "plan", *options)
    actual = command(folder, "train", *options, "--output", "hat-" + "".join(filter(str.isalnum, name)))
    if name.endswith("cached"):
        planned |= actual["planned"]
    found = {"run": name, "trainable_exact": planned["trainable"] == actual["trainable"]}
    found["total_exact"] = planned["total"] == actual["total"]
    for side, result in (("planned", planned), ("actual", actual)):
        found[side] = {key: result[key] for key in ("peak_memory_bytes", "seconds", "trainable", "total")}
    found["terms"], found["from_tokens"] = planned["memory"], actual["planned"]["peak_memory_bytes"]
    return found


def row(found: dict[str, Any]) -> list[str]:
    """One run's line of the table."""
    (peak, seconds), (planned, expected) = (
        (found[side]["peak_memory_bytes"] / 2**20, found[side]["seconds"]) for side in ("actual", "planned")
    )
    exact = "exact" if found["trainable_exact"] and found["total_exact"] else "WRONG"
    memory = [f"{peak:,.0f} MiB", f"{planned:,.0f} MiB", f"{planned / peak - 1:+.0%}"]
    return [found["run"], *memory, f"{seconds:.1f}", f"{expected:.1f}", f"{expected / seconds - 1:+.0%}", exact]


def main() -> None:
    """Measures, prints the table of all that was measured, writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="runs whose name holds this")
    parser.add_argument("--exact", default="", help="the first run whose name begins so, alone")
    parser.add_argument("--steps", type=int, default=17)
    parser.add_argument("--probe", action="store_true", help="measure the machine first")
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "plan.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        if options.probe:
            command(folder, "plan", "--base", ENCODER, "--probe")
        chosen = [work for work in RUNS if options.only in work and work.startswith(options.exact)]
        for work in chosen[:1] if options.exact else chosen:
            found[work] = run(folder, work, options.steps)
            print(" | ".join(row(found[work])), flush=True)
            path.write_text(json.dumps(found, indent=1))
    print("\n".join("| " + " | ".join(line) + " |" for line in [HEADER, ["---"] * 8, *map(row, found.values())]))


if __name__ == "__main__":
    main()
