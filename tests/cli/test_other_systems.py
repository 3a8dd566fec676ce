"""The main commands run without what only Linux has: modules, signals, functions, /proc and a C++ compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = ("--device", "cpu", "--dtype", "float32", "--lr", "0.02", "--batch-size", "8")
SCRIPT = Path(__file__).with_name("lesser_system.py")


@pytest.mark.parametrize("system", ["Windows", "Darwin", "Linux"])
def test_train_plan_list_and_predict_run(system: str, tiny_encoder: Path, reviews: Path, tmp_path: Path) -> None:
    run = ["--base", str(tiny_encoder), "--data", str(reviews), *QUICK, "--json"]
    commands = [["plan", *run], ["train", *run, "--epochs", "2"], ["list", "--json"]]
    commands += [["predict", "reviews", "it was good film plot .", "--json"]]
    arguments = [argument for command in commands for argument in (*command, "--then")][:-1]
    environment = os.environ | {"HATRACK_HOME": str(tmp_path / "home"), "HATRACK_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, system, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    planned, trained, listed, answered = map(json.loads, done.stdout.splitlines())
    assert planned["fits"] and trained["peak_memory_bytes"] >= 0 and trained["adapter"]
    assert "reviews" in json.dumps(listed)
    assert answered["label"] in ("yes", "no")
    assert not list((tmp_path / "cache").rglob("*.so"))
