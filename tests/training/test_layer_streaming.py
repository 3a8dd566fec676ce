"""A sweep is held against the ordinary step: losses and gradients, dropout included, on bases of many shapes."""

import contextlib
import dataclasses
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hatrack
import hatrack.planning.fit
from hatrack.adapter.place import place
from hatrack.base.layer_stack import find_layer_stack
from hatrack.base.mapped_layers import MappedLayers, find_mappings, placeholder_weights, read_ahead, release_pages
from hatrack.errors import MachineError, ModelError, RecipeError
from hatrack.evaluate.loss import Batch, losses
from hatrack.layers.fast_base import speed_up
from hatrack.layers.fast_lora import LAYER_CLASSES
from hatrack.recipe import Recipe
from hatrack.training.layer_streaming import LayerInputs, LayerStreaming
from tests.base.tiny import DECODERS, save
from tests.training.stopping import stopped_at_five

LAYERS = {"DistilBert": "n_layers", "GPT2": "n_layer"}
KINDS = [
    "Bert",
    "DistilBert",
    "Electra",
    "DebertaV2",
    "ModernBert",
    "GPT2",
    "Llama",
    "Qwen3",
    "Gemma2",
    "GPTNeoX",
    "Phi",
]


def _saved(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """A base of three layers on disk."""
    head = "causal" if kind in DECODERS else "classify"
    save(folder, kind, head, **{LAYERS.get(kind, "num_hidden_layers"): 3, "torch_dtype": dtype})
    if dtype != torch.float32:
        auto = AutoModelForCausalLM if kind in DECODERS else AutoModelForSequenceClassification
        auto.from_pretrained(folder).to(dtype).save_pretrained(folder)
    return folder


def _adapted(folder: Path, kind: str, dtype: torch.dtype, *, fast: bool = True, options: dict[str, Any] = {}) -> Any:  # noqa: B006
    """The base with a fresh adapter whose two factors both count, in training mode."""
    auto = AutoModelForCausalLM if kind in DECODERS else AutoModelForSequenceClassification
    base = auto.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    if fast:
        speed_up(base)
    torch.manual_seed(5)
    recipe = Recipe.make(**({"r": 4, "dropout": 0.1, "targets": "all-linear"} | options))
    with placeholder_weights(base.base_model, torch.float32):
        made = place(base, recipe, task=_task(kind), layer_classes=LAYER_CLASSES)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return made.train()


def _batches(kind: str) -> list[Batch]:
    """Three micro-batches of other sizes, one of them with padding."""
    found = []
    for number, (rows, length) in enumerate([(2, 9), (3, 6), (1, 4)]):
        ids = torch.randint(3, 32, (rows, length), generator=torch.Generator().manual_seed(number))
        real = torch.ones_like(ids)
        real[0, length - number :] = 0
        labels = ids.masked_fill(real == 0, -100) if kind in DECODERS else torch.arange(rows) % 2
        found.append({"input_ids": ids, "attention_mask": real, "labels": labels})
    return found


def _sweep(made: Any, kind: str, tmp_path: Path, dtype: torch.dtype, **options: Any) -> LayerStreaming:
    base = made.get_base_model()
    mapped_layers = MappedLayers(base, find_layer_stack(base), dtype, tmp_path / "base")
    return LayerStreaming(made, mapped_layers, _task(kind), LayerInputs(tmp_path, **options))


def _ordinary(made: Any, kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    total = 0.0
    for seed, batch in enumerate(_batches(kind)):
        torch.manual_seed(seed)
        loss = _loss_of(made, kind)(batch)
        loss.backward()
        total += loss.item()
    return total, _gradients(made)


def _swept(made: Any, kind: str, tmp_path: Path, dtype: torch.dtype, **options: Any) -> tuple[float, dict[str, Any]]:
    total = _sweep(made, kind, tmp_path, dtype, **options).step(_batches(kind), [0, 1, 2], _loss_of(made, kind))
    return total.item(), _gradients(made)


def _loss_of(made: Any, kind: str) -> Any:
    return lambda batch: losses(made, batch, _task(kind))[0].sum() / 7


def _task(kind: str) -> str:
    return "chat" if kind in DECODERS else "classify"


def _gradients(made: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in made.named_parameters() if p.requires_grad}


def _same(found: tuple[float, dict[str, Any]], wanted: tuple[float, dict[str, Any]]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1].keys() == wanted[1].keys() and any(value is not None for value in wanted[1].values())
    for name, gradient in wanted[1].items():
        if gradient is None:
            assert found[1][name] is None, name
        else:
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fast", [True, False])
def test_a_sweep_gives_the_gradients_of_the_ordinary_step(tmp_path: Path, kind: str, fast: bool) -> None:
    folder = _saved(tmp_path / "base", kind)
    wanted = _ordinary(_adapted(folder, kind, torch.float32, fast=fast), kind)
    found = _swept(_adapted(folder, kind, torch.float32, fast=fast), kind, tmp_path, torch.float32)
    _same(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_base_is_widened_exactly(tmp_path: Path, kind: str) -> None:
    """Products in float32 give what the base would as a float32 copy, and the mapped weights stay as they are."""
    folder = _saved(tmp_path / "base", kind, torch.bfloat16)
    wanted = _ordinary(_adapted(folder, kind, torch.float32), kind)
    made = _adapted(folder, kind, torch.bfloat16)
    before = {name: p.clone() for name, p in made.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in before.values()} == {torch.bfloat16}
    _same(_swept(made, kind, tmp_path, torch.float32), wanted)
    after = {name: p for name, p in made.named_parameters() if not p.requires_grad}
    assert all(torch.equal(after[name], p) and after[name].dtype == p.dtype for name, p in before.items())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="releasing pages needs Linux")
def test_what_was_touched_is_let_go(tmp_path: Path) -> None:
    """A look at a base, before its first sweep, leaves none of its pages in memory, and every weight as it was."""
    folder = _saved(tmp_path / "base", "Llama")
    base = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    assert _resident(folder) > 0
    mappings = find_mappings(folder)
    assert mappings
    release_pages(mappings)
    assert _resident(folder) == 0
    assert all(torch.equal(weight, before[name]) for name, weight in base.named_parameters())


def _resident(folder: Path) -> int:
    """KiB of mapped weights in `folder` that are in memory (proc(5))."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):
            inside = line.endswith(str(folder / "model.safetensors"))
        elif name == "Rss:" and inside:
            found += int(words[0])
    return found


def test_layers_below_the_first_adapter_are_not_gone_back_through(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "base", "Llama")
    top = {"layers": "top-1", "targets": "q_proj,v_proj"}
    wanted = _ordinary(_adapted(folder, "Llama", torch.float32, options=top), "Llama")
    made = _adapted(folder, "Llama", torch.float32, options=top)
    ran: list[int] = []
    for number, layer in enumerate(made.get_base_model().model.layers):
        layer.mlp.register_forward_hook(lambda *_, n=number: ran.append(n))
    sweep = _sweep(made, "Llama", tmp_path, torch.float32)
    ran.clear()
    total = sweep.step(_batches("Llama"), [0, 1, 2], _loss_of(made, "Llama"))
    _same((total.item(), _gradients(made)), wanted)
    assert ran == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2]  # layer by layer, and only the top one twice


def test_hidden_states_beyond_the_budget_go_through_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _saved(tmp_path / "base", "Llama", torch.bfloat16)
    wanted = _swept(_adapted(folder, "Llama", torch.bfloat16), "Llama", tmp_path, torch.bfloat16)
    written: list[int] = []

    def write(inputs: LayerInputs, hidden: torch.Tensor, real: Any = LayerInputs._write) -> Any:
        written.append(hidden.nbytes)
        return real(inputs, hidden)

    monkeypatch.setattr(LayerInputs, "_write", write)
    found = _swept(_adapted(folder, "Llama", torch.bfloat16), "Llama", tmp_path, torch.bfloat16, budget=600)
    assert len(written) >= 7 and {path.name for path in tmp_path.iterdir()} == {"base"}
    _same(found, wanted)


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_scores_are_those_of_the_ordinary_way(tmp_path: Path, kind: str) -> None:
    folder = _saved(tmp_path / "base", kind, torch.bfloat16)
    made = _adapted(folder, kind, torch.float32).eval()
    with torch.no_grad():
        wanted = [losses(made, batch, _task(kind)) for batch in _batches(kind)]
    for budget in (0, 2**20):
        mapped = _adapted(folder, kind, torch.bfloat16).eval()
        sweep = _sweep(mapped, kind, tmp_path, torch.float32, budget=budget)
        found = list(sweep.losses(_batches(kind)))
        assert len(found) == 3
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


FAST: dict[str, Any] = {"device": "cpu", "dtype": "float32", "lr": 0.02, "batch_size": 8}


@contextlib.contextmanager
def too_large() -> Iterator[None]:
    """No base has room in memory as a whole while the block runs."""
    original = hatrack.planning.fit.plan_run

    def plan_run(where: Any, method: Any = None, rows: int | None = None) -> Any:
        plan = original(where, method, rows)
        return dataclasses.replace(plan, limit=10**12 if plan.method.streamed else 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hatrack.planning.fit.plan_run", plan_run)
        patch.setattr("hatrack.inference.load.fits_in_memory", lambda *_: False)
        yield


def _same_adapter(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("task", ["classify", "chat"])
def test_a_swept_run_makes_the_adapter_of_an_ordinary_one(
    tmp_path: Path, tiny_encoder: Path, half_decoder: Path, reviews: Path, questions: Path, task: str
) -> None:
    base, data = (tiny_encoder, reviews) if task == "classify" else (half_decoder, questions)
    run = {"base": str(base), "data": str(data), "epochs": 3} | FAST
    plain = hatrack.train(output=str(tmp_path / "plain"), name="plain", **run)
    with too_large():
        streamed = hatrack.train(output=str(tmp_path / "streamed"), name="streamed", **run)
    assert streamed.base.streamed and not plain.base.streamed
    assert streamed.result["eval"] == pytest.approx(plain.result["eval"], rel=1e-4)
    assert streamed.result["train_loss"] == pytest.approx(plain.result["train_loss"], rel=1e-4)
    _same_adapter(tmp_path / "plain", tmp_path / "streamed")
    texts = ["it was good film", "what film is red ?"]
    for one, other in zip(plain.predict(texts), streamed.predict(texts), strict=True):
        assert one.get("scores") == (pytest.approx(other["scores"], rel=1e-4) if task == "classify" else None)
        assert one["text"] == other["text"]


def test_micro_batches_do_not_change_what_a_sweep_learns(tmp_path: Path, half_decoder: Path, questions: Path) -> None:
    """Where --memory splits a step: dropout draws from the same seeds, streamed or not."""
    original = hatrack.planning.fit.plan_run

    def two_at_a_time(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(original(*args, **kwargs), micro_batch=2)

    run = {"base": str(half_decoder), "data": str(questions), "epochs": 2} | FAST
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hatrack.planning.fit.plan_run", two_at_a_time)
        hatrack.train(output=str(tmp_path / "plain"), name="plain", **run)
        with too_large():
            hatrack.train(output=str(tmp_path / "streamed"), name="streamed", **run)
    _same_adapter(tmp_path / "plain", tmp_path / "streamed")


def test_a_swept_run_that_was_stopped_goes_on_to_the_same_adapter(
    tmp_path: Path, half_decoder: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"base": str(half_decoder), "data": str(questions), "epochs": 3} | FAST
    with too_large():
        hatrack.train(output=str(tmp_path / "straight"), name="straight", **run)
    with too_large(), stopped_at_five():
        hatrack.train(output=str(tmp_path / "stopped"), name="stopped", **run)
    with too_large():
        hatrack.train(output=str(tmp_path / "stopped"), name="stopped", resume=True)
    _same_adapter(tmp_path / "straight", tmp_path / "stopped")


def test_what_cannot_be_swept_is_refused(tmp_path: Path, questions: Path) -> None:
    base = save(tmp_path / "albert", "Albert", "classify")
    data = tmp_path / "rows.csv"
    data.write_text("text,label\n" + "".join(f"the cat sat on a mat {n},{'ab'[n % 2]}\n" for n in range(40)))
    with too_large(), pytest.raises(ModelError, match="is not one stack of layers"):
        hatrack.train(base=str(base), data=str(data), output=str(tmp_path / "hat"), **FAST)


@pytest.mark.parametrize("option", [{"variant": "dora"}, {"variant": "pissa"}, {"lr": "auto"}])
def test_what_needs_the_whole_base_is_refused(
    tmp_path: Path, half_decoder: Path, questions: Path, option: dict[str, str]
) -> None:
    run, fix = FAST | option, "--variant lora" if "variant" in option else "no --lr auto"
    with too_large(), pytest.raises(RecipeError, match=f"{fix}, and the base streamed layer by layer"):
        hatrack.train(base=str(half_decoder), data=str(questions), output=str(tmp_path / "hat"), **run)


def test_the_system_is_told_to_forget_what_cannot_all_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = _adapted(_saved(tmp_path / "base", "Llama"), "Llama", torch.float32).get_base_model()
    told: list[Any] = []
    monkeypatch.setattr("hatrack.base.mapped_layers.drop_page_cache", told.append)
    for free, forgotten in ((2**40, False), (0, True)):
        monkeypatch.setattr("hatrack.base.mapped_layers.available_memory", lambda free=free: (free, ""))
        window = MappedLayers(base, find_layer_stack(base), torch.float32, tmp_path / "base")
        window.load(0, next_part=1)
        window.load(1)
        assert (told == window.spans[0]) is forgotten


def _bad_disk(*_: Any) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_file_that_was_cut_short_is_found_before_its_pages_are_touched(tmp_path: Path) -> None:
    base = _adapted(_saved(tmp_path / "base", "Llama"), "Llama", torch.float32).get_base_model()
    window = MappedLayers(base, find_layer_stack(base), torch.float32, tmp_path / "base")
    assert len(window.files) == 1 and all(window.spans.values())
    read_ahead(window.spans[1])
    os.truncate(window.files[0].path, 4096)
    with pytest.raises(MachineError, match="cannot be read; got the file was truncated"):
        read_ahead(window.spans[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files are read ahead on Linux")
@pytest.mark.parametrize("harm", ["gone", "changed", "cut short", "unreadable"])
def test_a_base_that_changes_in_a_run_is_told(tmp_path: Path, half_decoder: Path, questions: Path, harm: str) -> None:
    """The run ends with the file's name; the last checkpoint is there, and goes on once the base is back."""
    file, whole = half_decoder / "model.safetensors", (half_decoder / "model.safetensors").read_bytes()
    run = {"base": str(half_decoder), "data": str(questions), "epochs": 2} | FAST
    with too_large(), pytest.MonkeyPatch.context() as patch:
        real = LayerStreaming.step

        def harmed(sweep: LayerStreaming, *args: Any) -> Any:
            if len(list((tmp_path / "hat.run").glob("checkpoint-*"))) == 1:
                if harm == "gone":
                    file.unlink()
                elif harm == "changed":
                    os.utime(file, (0, 0))
                elif harm == "cut short":
                    os.truncate(file, 8192)
                else:
                    patch.setattr(os, "sendfile", _bad_disk)
            return real(sweep, *args)

        patch.setattr(LayerStreaming, "step", harmed)
        said = {"gone": "was removed", "unreadable": "cannot be read; got Input/output error"}.get(harm, "was changed")
        with pytest.raises(MachineError, match=rf"model.safetensors {said}.*fix: check the disk"):
            hatrack.train(output=str(tmp_path / "hat"), name="hat", **run)
    file.write_bytes(whole)
    with too_large():
        assert hatrack.train(output=str(tmp_path / "hat"), name="hat", resume=True).result["steps"]
