"""Epochs with and without layers below the adapters computed once.

    .venv/bin/python bench/epochs.py [--only WORD] [--output DIR]

`hatrack train` with adapters in all layers, in the top ones alone, and in the top ones with the cache of what
the layers below give, from an empty cache. Seconds are those of whole epochs after the first one, scoring of the
held-out rows and a checkpoint included; the median. Losses with and without the cache are held against each other.

Each run is a process of its own, from the command line alone. Results of earlier calls are kept in DIR/epochs.json, so
the runs can be measured in pieces, and the table shows all of them.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from hatrack.cli.demo import CHAT_MODEL, ENCODER
from hatrack.storage import cache_dir
from plan import command, write_data

CACHED = {
    "MiniLM, top 2 of 6": (ENCODER, "--data reviews.csv --device cpu --epochs 4", "top-2"),
    "SmolLM2, top 10 of 30": (CHAT_MODEL, "--data text.jsonl --max-length 64 --device cpu --epochs 3", "top-10"),
}
"""Name -> base, options, depth."""
HEADER = ["work", "all layers", "top layers", "... cached", "of top", "of all", "train loss", "held out", "cache"]


def epochs(adapter: Path) -> list[float]:
    """Seconds of each epoch after the first, between the scores at their ends."""
    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    ends = [line["time"] for line in lines if "eval_loss" in line]
    return [end - start for start, end in itertools.pairwise(ends)]


def own_cache(folder: Path) -> None:
    """A cache with the fetched bases of the usual one, but no cached layer outputs."""
    usual = cache_dir()
    (folder / "cache").mkdir()
    for path in usual.iterdir():
        if path.name != "states":
            (folder / "cache" / path.name).symlink_to(path)
    os.environ["HATRACK_CACHE"] = str(folder / "cache")


def cached(folder: Path, name: str) -> dict[str, Any]:
    """One piece of work by its three sides."""
    base, options, depth = CACHED[name]
    sides = {"all": "--layers all", "top": f"--layers {depth} --cache-limit 0", "cached": f"--layers {depth}"}
    found: dict[str, Any] = {"work": name, "epochs": {}, "train_loss": {}, "eval_loss": {}}
    for side, layers in sides.items():
        hat = f"{side}-{depth}"
        result = command(
            folder, "train", "--base", base, *options.split(), *layers.split(), "--output", hat, "--name", hat
        )
        found["epochs"][side] = epochs(folder / hat)
        found["train_loss"][side], found["eval_loss"][side] = result["train_loss"], result["eval"]["loss"]
    entries = command(folder, "cache")["entries"]
    found["bytes"] = max(entries, key=lambda entry: str(entry["last_used"]))["bytes"]
    return found


def row(found: dict[str, Any]) -> list[str]:
    """One work's line of the table."""
    seconds = {side: statistics.median(times) for side, times in found["epochs"].items()}
    shares = [f"{seconds['cached'] / seconds[side]:.2f}x" for side in ("top", "all")]
    off = [f"{abs(found[loss]['cached'] - found[loss]['top']):.0e} off" for loss in ("train_loss", "eval_loss")]
    return [
        found["work"],
        *(f"{s:.1f} s" for s in seconds.values()),
        *shares,
        *off,
        f"{found['bytes'] / 2**20:.0f} MiB",
    ]


def main() -> None:
    """Measures, prints the table of all that was measured, writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="works whose name holds this")
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "epochs.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        own_cache(folder)
        for work in CACHED:
            if options.only in work:
                found[work] = cached(folder, work)
                path.write_text(json.dumps(found, indent=1))
    rows = [HEADER, ["---"] * len(HEADER), *map(row, found.values())]
    print("\n".join("| " + " | ".join(line) + " |" for line in rows))


if __name__ == "__main__":
    main()
