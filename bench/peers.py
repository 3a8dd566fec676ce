"""hatrack's training steps against other LoRA trainers that run on a CPU: peft, LitGPT, mlx-lm. One table, JSON.

    .venv/bin/python bench/peers.py [--rounds 2] [--only "q,v"] [--output DIR]

Each trainer is installed, once, in an environment of its own in the cache (LitGPT with torch, about 1 GB); one that
cannot be is left out, with the reason. All take turns, with equal threads, r, alpha, dropout, targets, batch, tokens
and dtype, on SmolLM2-135M or random weights of its shape; the figures are medians. mlx-lm takes part only
where asked for (`--peers litgpt,mlx-lm`): the matmul of mlx's CPU build is hundreds of times slower than
torch's, and a turn takes half an hour.
"""

import argparse
import json
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import torch

from hatrack.base.load import choose_dtype, dtype_name
from hatrack.storage import cache_dir
from sides import ALL_LINEAR, WORKS
from speed import HERE, Worker, machine

PEERS = {"litgpt": ("litgpt==0.5.13", "torch==2.13.0"), "mlx-lm": ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")}


def python_of(peer: str) -> str | None:
    """The Python of a peer's own environment, made now if need be; None, with the reason said, where that fails."""
    folder = cache_dir("peers") / "-".join([peer, PEERS[peer][0].partition("==")[2]])
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"installing {', '.join(PEERS[peer])} into {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEERS[peer]]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            print(f"without {peer}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return None
        ready.touch()
    return str(python)


def measure(work: str, pythons: dict[str, str], rounds: int, threads: int) -> dict[str, Any]:
    """Median seconds a step, and peak bytes, of hatrack, peft and each peer."""
    made = WORKS[work]
    targets = "all-linear" if made["targets"] == ALL_LINEAR else "q,v"
    dtype = dtype_name(choose_dtype("auto", torch.device("cpu"))[0])
    more = {"rows": made["rows"], "tokens": made["tokens"], "targets": targets, "dtype": dtype}
    workers = {side: Worker(work, side, threads) for side in ("hatrack", "peft")}
    for peer, python in pythons.items():
        workers[peer] = Worker(work, peer, threads, (python, str(HERE / "peer_sides.py")), **more)
    times: dict[str, list[float]] = {side: [] for side in workers}
    for _ in range(rounds):
        for side, worker in workers.items():
            times[side] += worker.ask("steps")
    peaks = {side: worker.ask("peak") for side, worker in workers.items()}
    for worker in workers.values():
        worker.end()
    return {"work": work, "dtype": dtype, "seconds": {s: statistics.median(t) for s, t in times.items()}, "peak": peaks}


def row(found: dict[str, Any]) -> list[str]:
    """One line of the table."""
    ours = found["seconds"]["hatrack"]
    sides = [f"{seconds / ours:.2f}x" for side, seconds in found["seconds"].items() if side != "hatrack"]
    return [found["work"], found["dtype"], f"{ours:.2f} s", *sides]


def main() -> None:
    """Installs, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="works whose name holds this")
    parser.add_argument("--peers", default="litgpt", help=f"which of {', '.join(PEERS)}, by comma")
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    pythons = {peer: python for peer in options.peers.split(",") if (python := python_of(peer))}
    told = {**machine(options.threads), **{name: PEERS[name][0] for name in pythons}}
    print(", ".join(f"{name} {value}" for name, value in told.items()))
    for line in (["work", "format", "hatrack", "peft", *pythons], ["---"] * (4 + len(pythons))):
        print("| " + " | ".join(line) + " |")
    results = []
    for work in WORKS:
        if work.startswith("SmolLM2") and options.only in work:
            results.append(measure(work, pythons, options.rounds, options.threads))
            print("| " + " | ".join(row(results[-1])) + " |", flush=True)
            (options.output / "peers.json").write_text(json.dumps({"machine": told, "steps": results}, indent=1))


if __name__ == "__main__":
    main()
