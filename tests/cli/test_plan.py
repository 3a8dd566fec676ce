"""`hatrack plan` as a person or a script would use it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hatrack.console import format_size
from tests.cli.conftest import Ran

Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured of this machine before does not matter here."""
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "cache"))


def test_the_plan_is_of_the_run_that_follows(hatrack: Run, tiny_encoder: Path, reviews: Path) -> None:
    options = ("--base", tiny_encoder, "--data", reviews, "--device", "cpu", "--dtype", "float32", "--batch-size", 8)
    planned = hatrack("plan", *options, "--epochs", 2, "--json").json
    trained = hatrack("train", *options, "--epochs", 2, "--json").json
    for fact in ("trainable", "total", "steps"):
        assert planned[fact] == trained[fact], fact
    assert planned["micro_batch"] == trained["planned"]["micro_batch"] == 8
    assert planned["memory"]["activations"] == trained["planned"]["memory"]["activations"]  # the same tokens
    assert planned["fits"] is True and planned["change"] is None
    ways = planned["ways"]
    assert list(ways) == ["full", "LoRA", "LoRA, 8-bit base", "LoRA, 4-bit base", "LoRA, streamed"]
    assert ways["full"]["trainable"] == planned["total"] - planned["trainable"]
    assert "not measured" in planned["time_from"]


def test_conversations_are_planned_as_their_template_writes_them(
    hatrack: Run, tiny_decoder: Path, questions: Path
) -> None:
    options = ("--base", tiny_decoder, "--data", questions, "--device", "cpu", "--dtype", "float32", "--steps", 2)
    planned = hatrack("plan", *options, "--json").json["memory"]
    trained = hatrack("train", *options, "--json").json["planned"]["memory"]
    for term in ("activations", "logits"):
        assert planned[term] == trained[term], term


def test_the_verdict_comes_first_with_the_one_change(hatrack: Run, tiny_decoder: Path, questions: Path) -> None:
    fits = hatrack("plan", "--base", tiny_decoder, "--data", questions, "--on", "t4").out.splitlines()
    assert not any("--probe" in line for line in fits)  # which measures this machine, not a T4
    assert fits[0].startswith("fits: ") and "rows at a time" in fits[0]
    assert fits[1].startswith("machine    t4, base in float16")
    small = hatrack("plan", "--base", tiny_decoder, "--on", "600MiB").out.splitlines()
    assert small[0].startswith("fits: ") and "time       unknown for this machine" in small
    none = hatrack("plan", "--base", tiny_decoder, "--on", "200MiB")
    verdict = none.out.splitlines()[0]
    assert none.code == 0 and verdict.startswith("does not fit: ") and "190.0 MiB available" in verdict
    assert none.out.splitlines()[1].startswith("fix: ")
    assert "1,000 rows of 64 tokens are assumed, task chat" in none.err  # 256, or what the base takes


def test_what_is_asked_wrongly(hatrack: Run, tiny_encoder: Path) -> None:
    for arguments, what in (
        ((), "--base is missing"),
        (("--base", tiny_encoder, "--on", "rtx4O90"), "--on does not know rtx4O90; fix: did you mean rtx4090?"),
        (
            ("--base", tiny_encoder, "--device", "cuda:9"),
            "--device cuda:9 is not in this machine; got cpu; fix: use --device cpu",
        ),
        (("--base", "nowhere/at/all"), "there is no base at nowhere/at/all"),
        (("--base", tiny_encoder, "--targets", "q_porj"), "'q_porj' matches no layer"),
    ):
        ran = hatrack("plan", *arguments)
        assert ran.code == 2 and what in ran.complaint and ran.out == ""


def test_torch_is_not_imported(tiny_encoder: Path, reviews: Path) -> None:
    script = (
        "import sys; from hatrack.cli.main import app\n"
        f"app(['plan', '--base', {str(tiny_encoder)!r}, '--data', {str(reviews)!r}, '--json'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trainable"] > 0


def test_config_json_alone_is_enough(hatrack: Run, tiny_decoder: Path, questions: Path, tmp_path: Path) -> None:
    """The same parameters and memory as with the weights there; lengths are estimated, and that is said."""
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny_decoder / "config.json", tmp_path / "bare/config.json")
    whole = hatrack("plan", "--base", tiny_decoder, "--device", "cpu", "--json").json
    bare = hatrack("plan", "--base", tmp_path / "bare", "--device", "cpu", "--json")
    for fact in ("trainable", "total", "memory", "micro_batch"):
        assert bare.json[fact] == whole[fact], fact
    assert "planned from the shapes in config.json" in bare.err
    lengths = hatrack("plan", "--base", tmp_path / "bare", "--data", questions, "--device", "cpu")
    assert lengths.code == 0 and "lengths are estimated from their characters" in lengths.err


def test_one_figure_for_the_peak(hatrack: Run, tiny_encoder: Path, reviews: Path) -> None:
    options = ("plan", "--base", tiny_encoder, "--data", reviews, "--device", "cpu")
    lines = hatrack(*options).out.splitlines()
    memory = next(line for line in lines if line.startswith("memory ")).split()
    peak = format_size(hatrack(*options, "--json").json["peak_memory_bytes"])
    assert lines[0].startswith(f"fits: {peak} of ") and peak in " ".join(memory)


AS_A_COMMAND = "import sys; from hatrack.cli.main import main; sys.argv[1:1] = ['train']; main()"
IN_PYTHON = """
import json, sys, pandas, hatrack
pairs = dict(zip(sys.argv[1::2], sys.argv[2::2]))
options = {name[2:].replace("-", "_"): value for name, value in pairs.items() if name != "--json"}
print(json.dumps(hatrack.train(**options | {"steps": int(options["steps"])}).result))
"""


@pytest.mark.parametrize("script", [AS_A_COMMAND, IN_PYTHON], ids=["command", "python"])
def test_a_run_of_a_tiny_base_takes_what_was_planned(
    script: str, tiny_decoder: Path, questions: Path, tmp_path: Path
) -> None:
    """Nearly all of it is imports, what is loaded while running, and compiled matmuls: of processes of their own."""
    given = {"base": tiny_decoder, "data": questions, "device": "cpu", "steps": 4, "output": tmp_path / "hat"}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-c", script, *options, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak_memory_bytes"] == pytest.approx(found["planned"]["peak_memory_bytes"], rel=0.1)
