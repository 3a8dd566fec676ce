"""What `hatrack train` refuses before it reads a weight, `plan` and `check` refuse in the same sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hatrack import cpu
from tests.cli.conftest import Ran

Run = Callable[..., Ran]
FAULTS = {
    "rows longer than an encoder takes": "--base tiny_encoder --data reviews --max-length 65",
    "conversations longer than a decoder takes": "--base tiny_decoder --data questions --max-length 100",
    "rows longer than GPT-2 takes": "--base short --data questions --task complete --max-length 33",
    "a device that is not there": "--base tiny_encoder --data reviews --device mps",
    "products rounded on a CPU without AVX2": "--base tiny_encoder --data reviews --compute int8",
    "targets that match nothing": "--base tiny_encoder --data reviews --targets q_porj",
    "a rank above the layers' width": "--base tiny_encoder --data reviews --r 1000",
    "more layers than there are": "--base tiny_encoder --data reviews --layers top-9",
    "an encoder that is to talk": "--base tiny_encoder --data questions",
    "a base that reads padding": "--base padded --data reviews",
    "one row": "--base tiny_encoder --data few",
    "rows without a label": "--base tiny_encoder --data torn",
    "a conversation without an answer": "--base tiny_decoder --data answerless",
    "a column that is not there": "--base tiny_encoder --data reviews --label stars",
    "a revision beside a folder": "--base tiny_encoder --data reviews --revision main",
    "a base that is not there": "--base nowhere/at/all --data reviews",
    "bits without bitsandbytes": "--base tiny_decoder --data questions --quantize 4bit",
    "code of the base's own": "--base coded --data reviews",
    "trust in another base's code": "--base coded --data reviews --trust-remote-code tiny_encoder",
}
NOT_CHECKED = {
    "a tracker that nobody knows": "--base tiny_encoder --data reviews --report-to tensorbord",
    "a tracker that is not installed": "--base tiny_encoder --data reviews --report-to wandb",
}


@pytest.fixture
def paths(tmp_path: Path, tiny_encoder: Path, tiny_decoder: Path, reviews: Path, questions: Path) -> dict[str, Path]:
    """Bases and rows by the names that stand for them above."""
    found = {"tiny_encoder": tiny_encoder, "tiny_decoder": tiny_decoder, "reviews": reviews, "questions": questions}
    for name, changes in (
        ("short", {"model_type": "gpt2", "n_positions": 32}),
        ("padded", {"model_type": "fnet"}),
        ("coded", {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}),
    ):
        found[name] = shutil.copytree(tiny_encoder, tmp_path / name)
        config = json.loads((tiny_encoder / "config.json").read_text())
        config = {
            key: value for key, value in config.items() if key not in ("max_position_embeddings", "architectures")
        }
        (found[name] / "config.json").write_text(json.dumps(config | changes))
    for name, text in (
        ("few.csv", "text,label\ngood,yes\n"),
        ("torn.csv", reviews.read_text() + "no label here,\n"),
        ("answerless.jsonl", questions.read_text() + '{"prompt": "who", "completion": ""}\n'),
    ):
        found[name.partition(".")[0]] = tmp_path / name
        (tmp_path / name).write_text(text)
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_train_plan_and_check_refuse_in_the_same_words(
    fault: str, hatrack: Run, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "products rounded on a CPU without AVX2":
        monkeypatch.setattr(cpu, "features", lambda: frozenset({"sse4_2"}))
    if fault == "bits without bitsandbytes":
        monkeypatch.setattr("hatrack.base.free_memory.importlib.util.find_spec", lambda name: None)
    options = [paths.get(word, word) for word in FAULTS[fault].split()]
    device = () if "--device" in options else ("--device", "cpu")
    trained, planned = (hatrack(command, *options, *device) for command in ("train", "plan"))
    assert trained.code == planned.code == 2
    assert planned.complaint == trained.complaint and planned.out == ""
    checked = hatrack("check", *options, *device, "--json")
    refused = [finding for finding in checked.json["findings"] if finding["refused"]]
    assert checked.code == 2 and trained.complaint.startswith(tuple(f"hatrack: {each['what']}" for each in refused))


@pytest.mark.parametrize("fault", NOT_CHECKED)
def test_train_and_plan_refuse_in_the_same_words(fault: str, hatrack: Run, paths: dict[str, Path]) -> None:
    options = [paths.get(word, word) for word in NOT_CHECKED[fault].split()]
    trained, planned = (hatrack(command, *options, "--device", "cpu") for command in ("train", "plan"))
    assert trained.code == planned.code == 2
    assert planned.complaint == trained.complaint and planned.out == ""
