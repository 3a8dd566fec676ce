"""The main path, on tiny bases: what is trained, saved, proven, stopped and resumed."""

import gc
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import hatrack
import hatrack.adapter.proof
from hatrack.adapter import registry
from hatrack.base import load, quantized_cache
from hatrack.errors import HatrackError, MachineError, RecipeError
from hatrack.planning import fit
from hatrack.planning.memory import Method
from hatrack.training.divergence import DivergenceWatch
from hatrack.training.trainer import HatTrainer
from tests.conftest import WORDS
from tests.training.stopping import stopped_at_five

FAST = {"device": "cpu", "dtype": "float32", "lr": 0.02, "batch_size": 8}


def _train(tmp_path: Path, base: Path, data: Path, **options: Any) -> hatrack.Hat:
    name = options.pop("name", "hat")
    return hatrack.train(base=str(base), data=str(data), output=str(tmp_path / name), name=name, **(FAST | options))


def test_classify_learns_saves_and_proves(tmp_path: Path, tiny_encoder: Path, reviews: Path) -> None:
    hat = _train(tmp_path, tiny_encoder, reviews, epochs=6)
    result = hat.result
    assert result["eval"]["accuracy"] >= 0.9 > result["before"]["accuracy"]
    assert result["adapter"] == str(tmp_path / "hat")
    assert result["steps"] == 6 * -(-json.loads((tmp_path / "hat/hatrack.json").read_text())["data"]["rows"] // 8)
    # 2 layers x r 8 x (q, k, v, output: 4 x 64; up and down: 2 x 96) + the head's 2 x 33
    assert result["trainable"] == 2 * 8 * (4 * 64 + 2 * 96) + 2 * 33 == result["planned"]["trainable"]
    assert result["total"] == result["planned"]["total"]
    assert [answer["label"] for answer in hat.predict(["it was good film plot .", "it was awful film plot !"])] == [
        "yes",
        "no",
    ]
    assert sorted(path.name for path in (tmp_path / "hat").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "hatrack.json",
        "metrics.jsonl",
        "trained_on.bin",
    ]
    assert not (tmp_path / "hat.run").exists()
    logged = [json.loads(line) for line in (tmp_path / "hat/metrics.jsonl").read_text().splitlines()]
    assert sum("eval_accuracy" in line for line in logged) == 6


def test_a_run_of_one_step_learns(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no step to warm up in: an adapter whose only step had rate 0 would be refused as changing nothing."""
    result = _train(tmp_path, tiny_encoder, reviews, steps=1).result
    assert result["eval"]["loss"] != result["before"]["loss"]
    assert "learning rate: 0.02, then linear decay to 0" in capsys.readouterr().err


def test_the_result_has_the_fields_scripts_rely_on(tmp_path: Path, tiny_decoder: Path, questions: Path) -> None:
    result = _train(tmp_path, tiny_decoder, questions, epochs=24).result
    for field in ("adapter", "trainable", "total", "seconds", "steps", "tokens", "tokens_per_second", "train_loss"):
        assert field in result
    assert set(result["eval"]) >= {"loss", "perplexity"}
    assert result["eval"]["loss"] < result["before"]["loss"] - 0.2
    assert result["peak_memory_bytes"] > 2**20 and result["planned"]["peak_memory_bytes"] > 2**20
    # every row of this file is the same length in tokens, so the count is exact: 24 epochs of all rows
    rows = json.loads((tmp_path / "hat/hatrack.json").read_text())["data"]["rows"]
    assert result["tokens"] == 24 * rows * 17


def test_complete_learns_plain_text(tmp_path: Path, tiny_decoder: Path) -> None:
    data = tmp_path / "lines.jsonl"
    data.write_text(
        "".join(
            json.dumps({"text": f"the {w} film was so very {w} ."}) + "\n"
            for w in ("good", "bad", "red", "blue", "fine", "poor")
        )
    )
    hat = _train(tmp_path, tiny_decoder, data, task="complete", epochs=20, batch_size=2)
    assert hat.predict("the red film was so", max_new_tokens=2)[0]["text"].split()[0] == "very"


def test_several_labels_a_row(tmp_path: Path, tiny_encoder: Path) -> None:
    data = tmp_path / "tags.jsonl"
    rows = [
        {"text": " ".join([*words, filler]), "label": [name for name in ("red", "blue") if name in words]}
        for words in (["red", "plot"], ["blue", "plot"], ["red", "blue"], ["film", "plot"])
        for filler in ("a", "the", "it", "so", "very", "and", "was", "is", "not", "one")
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    hat = _train(tmp_path, tiny_encoder, data, epochs=25, batch_size=4, lr=0.003, dropout=0.0)
    assert hat.cards["hat"].multi_label and hat.labels == ["blue", "red"]
    assert [answer["label"] for answer in hat.predict(["red plot it", "red blue was", "film plot the"])] == [
        ["red"],
        ["blue", "red"],
        [],
    ]


@pytest.mark.parametrize("variant", ["lora", "dora", "rslora", "pissa"])
def test_variants_reach_peft(tmp_path: Path, tiny_encoder: Path, reviews: Path, variant: str) -> None:
    """A PiSSA adapter is saved as LoRA of twice the rank: the second half of B is its start, which is not zero."""
    _train(tmp_path, tiny_encoder, reviews, variant=variant, epochs=1, r=4)
    config = json.loads((tmp_path / "hat/adapter_config.json").read_text())
    assert config["use_dora"] == (variant == "dora")
    assert config["use_rslora"] == (variant == "rslora")
    assert config["r"] == (8 if variant == "pissa" else 4)
    tensors = load_file(tmp_path / "hat/adapter_model.safetensors")
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert len(ups) == 12 and all(up.any(axis=0).all() for up in ups)
    assert any("magnitude" in name for name in tensors) == (variant == "dora")


def test_micro_batches_learn_what_whole_batches_do(tmp_path: Path, tiny_decoder: Path) -> None:
    """Every supervised token weighs the same, so a step of 8 rows and one of 8 times 1 row give the same adapter."""
    data, held_out = tmp_path / "data.jsonl", tmp_path / "held_out.jsonl"
    rows = [{"prompt": f"what {w} is", "completion": " ".join([w] * n)} for n, w in enumerate(WORDS[6:15], 1)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    held_out.write_text(json.dumps(rows[8]) + "\n")
    run = {"eval_data": str(held_out), "steps": 4, "dropout": 0.0}
    whole = _train(tmp_path, tiny_decoder, data, name="whole", **run)
    with pytest.MonkeyPatch.context() as patch:
        original = fit.plan_run
        patch.setattr(fit, "plan_run", lambda where, method=None, rows=None: original(where, method, 1))
        split = _train(tmp_path, tiny_decoder, data, name="split", **run)
    assert (whole.result["planned"]["micro_batch"], split.result["planned"]["micro_batch"]) == (8, 1)
    assert split.result["train_loss"] == pytest.approx(whole.result["train_loss"], rel=1e-5)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "split"))
    for name, tensor in one.items():
        np.testing.assert_allclose(other[name], tensor, atol=1e-3, err_msg=name)


def _start(base: Path, data: Path, output: Path, *, resume: bool) -> "subprocess.Popen[str]":
    command = ["-m", "hatrack", "train", "--output", str(output), "--name", output.name]
    if resume:
        command += ["--resume"]
    else:
        command += ["--base", str(base), "--data", str(data), "--device", "cpu", "--dtype", "float32"]
        command += ["--lr", "0.01", "--batch-size", "4", "--epochs", "12"]
    return subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_an_interrupted_run_goes_on_to_the_same_adapter(tmp_path: Path, tiny_encoder: Path, reviews: Path) -> None:
    straight = _start(tiny_encoder, reviews, tmp_path / "straight", resume=False)
    said = straight.communicate(timeout=120)[1]
    assert straight.returncode == 0, said

    stopped = _start(tiny_encoder, reviews, tmp_path / "stopped", resume=False)
    metrics = tmp_path / "stopped.run/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 20):
        assert time.monotonic() < deadline and stopped.poll() is None
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    said = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 130, said
    assert "--resume --output" in said and "Traceback" not in said
    assert not (tmp_path / "stopped").exists()

    resumed = _start(tiny_encoder, reviews, tmp_path / "stopped", resume=True)
    said = resumed.communicate(timeout=120)[1]
    assert resumed.returncode == 0, said
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "stopped"))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    counted = [
        json.loads((tmp_path / name / "hatrack.json").read_text())["metrics"] for name in ("straight", "stopped")
    ]
    assert counted[0] == counted[1]


def test_resume_refuses_another_recipe(tmp_path: Path, tiny_encoder: Path, reviews: Path) -> None:
    with pytest.raises(RecipeError, match="no interrupted run to resume"):
        _train(tmp_path, tiny_encoder, reviews, resume=True)
    folder = tmp_path / "hat.run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"recipe": {"base": "b", "data": "d", "r": 4}, "facts": {}}))
    with pytest.raises(RecipeError, match=r"--r differs from the interrupted run; got 8 \(then: 4\)"):
        hatrack.train(output=str(tmp_path / "hat"), r=8, resume=True)


def test_nothing_is_overwritten(tmp_path: Path, tiny_encoder: Path, reviews: Path) -> None:
    (tmp_path / "hat").mkdir()
    with pytest.raises(RecipeError, match="the output exists already"):
        _train(tmp_path, tiny_encoder, reviews)


@pytest.mark.parametrize("missing", ["base", "data"])
def test_what_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    given = {"base": "b", "data": "d.csv", "output": str(tmp_path / "x")}
    del given[missing]
    with pytest.raises(RecipeError, match=f"--{missing} is missing; fix: add --{missing}"):
        hatrack.train(**given)


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path, tiny_encoder: Path) -> None:
    data = tmp_path / "one.csv"
    data.write_text("text,label\nit was good,yes\n")
    with pytest.raises(HatrackError):
        _train(tmp_path, tiny_encoder, data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.csv"]


def test_a_memory_limit_lowers_the_micro_batch_or_refuses(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hatrack.training.prepare.resident_bytes", lambda: 2**28)  # of the process, the same each time
    monkeypatch.setattr("hatrack.training.callbacks.resident_bytes", lambda: 0)  # what a step takes is another test's
    run: dict[str, Any] = {"batch_size": 32, "steps": 12}
    whole = _train(tmp_path, tiny_encoder, reviews, name="whole", **run).result["planned"]
    limit = whole["peak_memory_bytes"] - 1
    less = _train(tmp_path, tiny_encoder, reviews, name="less", memory=limit, **run).result
    assert whole["micro_batch"] == 28 > less["planned"]["micro_batch"] >= 1 and less["steps"] == 12
    assert less["planned"]["peak_memory_bytes"] <= limit
    with pytest.raises(RecipeError, match="too little even for one row"):
        _train(tmp_path, tiny_encoder, reviews, memory="10MB")
    assert not list(tmp_path.glob("hat*"))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs hatrack[quantize]")
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_a_quantized_base_learns_and_reproduces(
    tmp_path: Path, tiny_decoder: Path, questions: Path, quantize: str
) -> None:
    hat = _train(tmp_path, tiny_decoder, questions, epochs=6, quantize=quantize, dtype="bfloat16")
    assert hat.result["eval"]["loss"] < hat.result["before"]["loss"] - 0.1
    assert hat.cards["hat"].recipe["quantize"] == quantize


def test_a_saved_adapter_is_compared_in_the_arithmetic_of_training(
    tmp_path: Path, tiny_decoder: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading rounds an adapter to bfloat16; DoRA is left to peft's layer, which computes in the adapter's dtype."""
    compared: list[tuple[Any, Any]] = []

    def compare(*pair: Any) -> float:
        compared.append(pair)
        return 0.0

    monkeypatch.setattr("hatrack.training.read_back.mean_max_difference", compare)
    _train(tmp_path, tiny_decoder, questions, steps=4, lr=0.01, variant="dora", dtype="bfloat16")
    assert (compared[0][0] == compared[0][1]).all()


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_a_quantized_base_that_is_kept_trains_the_same_adapter_and_resumes(
    tmp_path: Path, tiny_decoder: Path, questions: Path, quantize: str
) -> None:
    pytest.importorskip("bitsandbytes")
    run = {"epochs": 2, "quantize": quantize}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "_quantized_folder", lambda *_: None)  # quantized at each load
        first = _train(tmp_path, tiny_decoder, questions, name="fresh", **run)
    assert quantized_cache.list_entries() == [] and first.result["planned"]["disk"]["packed"] > 0
    _train(tmp_path, tiny_decoder, questions, name="kept", **run)
    assert len(quantized_cache.list_entries()) == 1
    with stopped_at_five():
        _train(tmp_path, tiny_decoder, questions, name="stopped", **run)
    hatrack.train(output=str(tmp_path / "stopped"), name="stopped", resume=True)
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("fresh", "kept", "stopped")]
    for name, wanted in adapters[0].items():
        np.testing.assert_allclose(adapters[1][name], wanted, atol=2e-3, err_msg=name)
        np.testing.assert_array_equal(adapters[2][name], adapters[1][name], err_msg=name)
    proofs = [json.loads((tmp_path / name / "hatrack.json").read_text())["proof"] for name in ("fresh", "kept")]
    assert proofs[1]["answers"] == proofs[0]["answers"]
    for part in ("base", "adapter"):
        np.testing.assert_allclose(proofs[1][part], proofs[0][part], atol=1e-3)


def test_the_best_epoch_is_the_one_that_stays(tmp_path: Path, tiny_encoder: Path, reviews: Path) -> None:
    hat = _train(tmp_path, tiny_encoder, reviews, epochs=8, lr=0.08)  # too wild to get better every time
    logged = [json.loads(line) for line in (tmp_path / "hat/metrics.jsonl").read_text().splitlines()]
    epochs = [(line["eval_accuracy"], -line["eval_loss"]) for line in logged if "eval_accuracy" in line]
    assert len(epochs) == 8
    kept = hat.result["eval"]
    assert (kept["accuracy"], -kept["loss"]) == pytest.approx(max(epochs))


@pytest.mark.parametrize("variant", ["lora", "pissa"])
def test_what_training_began_with_is_scored_later_and_once(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    train, scored = HatTrainer.train, HatTrainer.score_held_out
    at_once, asked = [], []

    def first_scored(trainer: HatTrainer, **options: Any) -> Any:
        at_once.append(scored(trainer).metrics)
        return train(trainer, **options)

    def counted(trainer: HatTrainer, rows: int | None = None) -> Any:
        asked.append(rows)
        return scored(trainer, rows)

    monkeypatch.setattr(HatTrainer, "train", first_scored)
    monkeypatch.setattr(HatTrainer, "score_held_out", counted)
    result = _train(tmp_path, tiny_encoder, reviews, epochs=2, variant=variant).result
    assert result["before"] == at_once[0] != result["eval"]
    assert asked == [1, None, None, None]  # a row; later those of the beginning, and of each epoch once


def test_what_a_few_rows_lost_before_training_is_found_out_later_and_changes_nothing(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, step, found = HatTrainer.train, DivergenceWatch.step, []

    def first_scored(trainer: HatTrainer, **options: Any) -> Any:
        found.append(trainer.score_held_out(32).metrics["loss"])
        return train(trainer, **options)

    def asks(watch: DivergenceWatch, number: int, *told: Any) -> None:
        if number == 4:
            found.append(watch.estimate_start_loss())
        step(watch, number, *told)

    undisturbed = _train(tmp_path, tiny_encoder, reviews, epochs=2)
    monkeypatch.setattr(HatTrainer, "train", first_scored)
    monkeypatch.setattr(DivergenceWatch, "step", asks)
    asked = _train(tmp_path, tiny_encoder, reviews, epochs=2, name="asks")
    assert found[0] == found[1]
    assert asked.result["eval"] == undisturbed.result["eval"] != asked.result["before"]


def test_searches_for_garbage_are_as_they_were_after_training(
    tmp_path: Path, tiny_encoder: Path, reviews: Path
) -> None:
    before = gc.get_freeze_count()
    _train(tmp_path, tiny_encoder, reviews, epochs=1)
    assert gc.get_freeze_count() == before


def test_an_adapter_that_does_not_reproduce_itself_is_not_registered(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_answers(*args: Any) -> Any:
        return hatrack.adapter.proof.probe_logits(*args).flip(-1)

    monkeypatch.setattr("hatrack.training.train.probe_logits", other_answers)
    with pytest.raises(MachineError, match=r"does not reproduce the trained one; got probabilities .*% apart"):
        _train(tmp_path, tiny_encoder, reviews, epochs=2)
    assert registry.list_adapters() == [] and list((tmp_path / "hat.run").glob("checkpoint-*"))


def test_a_run_that_does_not_fit_is_refused_unless_forced(tmp_path: Path, tiny_encoder: Path, reviews: Path) -> None:
    with pytest.raises(RecipeError, match=r"--memory 95.4 MiB is too little even for one row at a time.*or --force"):
        _train(tmp_path, tiny_encoder, reviews, memory="100MB", epochs=1)
    forced = _train(tmp_path, tiny_encoder, reviews, memory="100MB", epochs=1, force=True)
    planned = forced.result["planned"]
    assert (planned["fits"], planned["micro_batch"], planned["checkpointing"]) == (False, 1, True)


@pytest.mark.parametrize("base", ["tiny_encoder", "tiny_decoder"])
def test_activations_computed_again_give_the_same_adapter(
    tmp_path: Path, base: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout included: the same random numbers are drawn again."""
    ran: list[str] = []

    def count(module: Any, _inputs: Any) -> None:
        if type(module).__name__ in ("BertIntermediate", "LlamaMLP") and module.training and torch.is_grad_enabled():
            ran.append(type(module).__name__)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    request.addfinalizer(hook.remove)
    data = request.getfixturevalue("reviews" if base == "tiny_encoder" else "questions")
    folder = request.getfixturevalue(base)
    kept = _train(tmp_path, folder, data, name="kept", steps=4)
    once = len(ran)
    original = fit.plan_run

    def checkpointed(where: fit.PlanRequest, method: Any = None, rows: int | None = None) -> fit.Plan:
        return original(where, Method(checkpointing=True), rows)

    monkeypatch.setattr(fit, "plan_run", checkpointed)
    again = _train(tmp_path, folder, data, name="again", steps=4)
    assert once == 4 * 2 and len(ran) == once + 2 * once  # steps x layers, and each once more in the backward pass
    assert again.result["planned"]["checkpointing"] and not kept.result["planned"]["checkpointing"]
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("kept", "again"))
    # layers of one input add their gradients in another order when they are computed apart, as they are then
    assert all(np.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_plan_and_cost_are_in_the_result_and_the_adapter(tmp_path: Path, tiny_encoder: Path, reviews: Path) -> None:
    result = _train(tmp_path, tiny_encoder, reviews, epochs=1).result
    cost = json.loads((tmp_path / "hat/hatrack.json").read_text())["cost"]
    assert cost["planned"]["trainable"] == result["trainable"]
    assert cost["actual"]["seconds"] == result["seconds"] > 0
    # Linux counts pages in batches: what it says later may be some pages less
    assert 2**26 < cost["actual"]["peak_memory_bytes"] < result["peak_memory_bytes"] + 2**22
    assert sum(cost["planned"]["memory"].values()) == cost["planned"]["peak_memory_bytes"]


def test_a_base_in_a_hubs_cache_is_found_again_where_it_lies(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter names the hub's model; what it was trained on lies in a folder that no hub library looks into."""
    monkeypatch.chdir(tmp_path)
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = shutil.copytree(tiny_encoder, tmp_path / f"hub/models--acme--tiny/snapshots/{commit}")
    (tmp_path / "acme/tiny").mkdir(parents=True)  # hides the hub's name as well
    hat = _train(tmp_path, snapshot, reviews, steps=2)
    made = next(iter(hat.cards.values()))
    assert (made.base["source"], made.base["revision"]) == ("acme/tiny", commit)
    text = ["it was good film"]
    assert hatrack.load(tmp_path / "hat", device="cpu", dtype="float32").predict(text) == hat.predict(text)
