"""The cached prefix is held against the plain model: losses, gradients and whole runs, on bases of many shapes."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

import hatrack
from hatrack.adapter.place import place
from hatrack.base.layer_stack import LayerStack, find_layer_stack
from hatrack.base.mapped_layers import MappedLayers
from hatrack.errors import Interrupted
from hatrack.evaluate.loss import Batch, losses
from hatrack.layers.fast_base import speed_up
from hatrack.layers.fast_lora import LAYER_CLASSES
from hatrack.recipe import Recipe
from hatrack.training import hidden_states
from hatrack.training.callbacks import GracefulStop
from hatrack.training.hidden_states import HiddenStateCache, open_hidden_state_cache
from hatrack.training.prefix_cache import FrozenPrefix
from hatrack.training.trainer import HatTrainer as Trainer
from tests.base.tiny import DECODERS, save
from tests.training.test_layer_streaming import too_large

LAYERS = {"DistilBert": "n_layers", "GPT2": "n_layer"}
KINDS = ["Bert", "Roberta", "DistilBert", "Electra", "DebertaV2", "ModernBert", "GPT2", "Llama", "Qwen3", "Gemma2"]
KINDS += ["GPTNeoX", "Phi", "OPT"]
DEPTH = 2


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def kept() -> Iterator[HiddenStateCache]:
    found = open_hidden_state_cache({"layers": DEPTH}, "tiny", 2**20)
    assert found is not None
    yield found
    found.close()


def _task(kind: str) -> str:
    return "chat" if kind in DECODERS else "classify"


def _adapted(folder: Path, kind: str, **options: Any) -> Any:
    """A base of three layers with an adapter on the last one, whose two factors both count, in training mode."""
    head = "causal" if kind in DECODERS else "classify"
    if not folder.exists():
        save(folder, kind, head, **{LAYERS.get(kind, "num_hidden_layers"): 3})
    auto = AutoModelForCausalLM if kind in DECODERS else AutoModelForSequenceClassification
    base = auto.from_pretrained(folder).requires_grad_(False)
    speed_up(base)
    torch.manual_seed(5)
    recipe = Recipe.make(**({"r": 4, "targets": "all-linear", "layers": "top-1"} | options))
    made = place(base, recipe, task=_task(kind), layer_classes=LAYER_CLASSES)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return made.train()


def _prefix(made: Any, kind: str, kept: HiddenStateCache | None, depth: int = DEPTH) -> FrozenPrefix:
    return FrozenPrefix(made, find_layer_stack(made.get_base_model()), depth, task=_task(kind), states=kept)


def _batch(kind: str, rows: list[int], seed: int = 0) -> Batch:
    """A batch of rows of other lengths; row n is the same tokens in every batch."""
    longest = 4 + max(rows)
    ids, real = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for place_of, row in enumerate(rows):
        ids[place_of, : 4 + row] = torch.randint(3, 32, (4 + row,), generator=torch.Generator().manual_seed(row))
        real[place_of, : 4 + row] = 1
    labels = ids.masked_fill(real == 0, -100) if kind in DECODERS else torch.tensor(rows) % 2
    return {"input_ids": ids, "attention_mask": real, "labels": labels}


def _plain(made: Any, kind: str, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradients of the model by itself, without dropout."""
    made.eval()
    made.zero_grad()
    values = losses(made, batch, _task(kind))[0]
    torch.autograd.backward(values.sum())
    return values.detach(), {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


def _given(made: Any, kind: str, prefix: FrozenPrefix, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same with the prefix."""
    with prefix.use_cached(batch):
        return _plain(made, kind, batch)


def _same(found: tuple[torch.Tensor, dict[str, Any]], wanted: tuple[torch.Tensor, dict[str, Any]]) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == wanted[1].keys() and len(found[1]) > 2
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


class _Computed:
    """Counts the rows that are computed in a model's first layer."""

    def __init__(self, trunk: LayerStack) -> None:
        self.rows = 0
        inside = next(m for m in trunk.layers[0].modules() if isinstance(m, torch.nn.Linear | Conv1D))
        inside.register_forward_hook(self._count)

    def _count(self, linear: Any, inputs: Any, output: torch.Tensor) -> None:
        self.rows += len(output)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_the_plain_models(tmp_path: Path, kind: str, kept: HiddenStateCache) -> None:
    """Computed at first, then read, then in batches of other rows and lengths, some of them new."""
    made = _adapted(tmp_path / "base", kind)
    prefix = _prefix(made, kind, kept)
    computed = _Computed(prefix.stack)
    for rows, new in [([1, 5, 3], 3), ([1, 5, 3], 0), ([3, 1], 0), ([5, 8, 2, 1], 2)]:
        batch = _batch(kind, rows)
        computed.rows = 0
        found = _given(made, kind, prefix, batch)
        assert computed.rows == new
        _same(found, _plain(made, kind, batch))
    assert len(kept) == 5


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_what_one_model_kept_another_run_reads(tmp_path: Path, kind: str, kept: HiddenStateCache) -> None:
    """Another rank, other starting values: the layers below are the same."""
    first = _adapted(tmp_path / "base", kind)
    list(_prefix(first, kind, kept).losses([_batch(kind, [1, 2, 3])]))
    other = _adapted(tmp_path / "base", kind, r=2, dropout=0.0)
    prefix = _prefix(other, kind, kept)
    computed = _Computed(prefix.stack)
    _same(_given(other, kind, prefix, _batch(kind, [3, 2])), _plain(other, kind, _batch(kind, [3, 2])))
    assert computed.rows == 2  # those of the plain pass


@pytest.mark.parametrize("kind", ["Bert", "GPT2", "DistilBert"])
def test_dropout_is_off_below_the_adapters_and_on_above(tmp_path: Path, kind: str, kept: HiddenStateCache) -> None:
    """The twin: a model in evaluation mode but for its adapted layer and what comes after, told by name."""
    made = _adapted(tmp_path / "base", kind, dropout=0.3)
    prefix = _prefix(made, kind, kept)
    batch = _batch(kind, [1, 4])
    drawn = []
    for twin in (False, False, True):
        made.zero_grad()
        made.train()
        if twin:
            for name, module in made.named_modules():
                below = any(f".{layer}." in f"{name}." for layer in range(DEPTH))
                module.training = not below and not any(part in name for part in ("embeddings", "drop", "wte"))
            for module in (made, *prefix.stack.layers[DEPTH].modules()):
                module.training = True
            for name, module in made.named_modules():
                module.training |= name.endswith((".model.dropout", "score", "pre_classifier"))
        torch.manual_seed(3)
        if twin:
            values = losses(made, batch, _task(kind))[0]
        else:
            with prefix.use_cached(batch):
                values = losses(made, batch, _task(kind))[0]
        torch.autograd.backward(values.sum())
        drawn.append((values.detach(), {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}))
    computed, read, wanted = drawn
    assert torch.equal(computed[0], read[0])
    _same(read, wanted)
    assert not torch.allclose(read[0], _plain(made, kind, batch)[0], rtol=1e-5)  # dropout there is


def test_states_in_bfloat16_are_kept_to_the_bit(tmp_path: Path, kept: HiddenStateCache) -> None:
    made = _adapted(tmp_path / "base", "Llama", dropout=0.0)
    made.get_base_model().to(torch.bfloat16)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    prefix = _prefix(made, "Llama", kept)
    assert prefix.dtype == torch.bfloat16
    fresh, read = (next(iter(prefix.losses([_batch("Llama", [2, 6])])))[0] for _ in range(2))
    assert torch.equal(fresh, read) and len(kept) == 2


def test_layers_with_something_to_train_below_them_have_no_prefix(tmp_path: Path) -> None:
    made = _adapted(tmp_path / "base", "Bert", layers="all")
    with pytest.raises(ValueError, match="not the same each time"):
        _prefix(made, "Bert", None)
    made = _adapted(tmp_path / "base", "Bert")
    made.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="not the same each time"):
        _prefix(made, "Bert", None)


RUN: dict[str, Any] = {"device": "cpu", "dtype": "float32", "lr": 0.02, "layers": "top-1", "epochs": 3}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter_model.safetensors"))


def _equal(one: Path, other: Path, *, bits: bool = True) -> None:
    first, second = _weights(one), _weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        bound = {"rtol": 0, "atol": 0} if bits else {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(tensor, second[name], **bound, msg=name)


@pytest.mark.parametrize("task", ["classify", "chat"])
def test_a_cached_run_makes_the_adapter_of_an_uncached_one(
    tmp_path: Path, train: Any, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train("plain", task, cache_limit=0)
    assert not (tmp_path / "cache/states").exists()
    first = train("first", task)
    again = train("again", task)
    rows = 120 if task == "classify" else 32
    assert hidden_states.count_rows(hidden_states.list_entries()[0]) <= rows
    for hat in (first, again):
        assert hat.result["train_loss"] == pytest.approx(plain.result["train_loss"], rel=1e-5)
        assert hat.result["eval"] == pytest.approx(plain.result["eval"], rel=1e-4)
    _equal(tmp_path / "first", tmp_path / "again")
    _equal(tmp_path / "first", tmp_path / "plain", bits=False)
    said = capsys.readouterr().err
    assert said.count("the first 1 of 2 layers are frozen, run without dropout") == 3
    assert said.count("(100% of the rows were, by earlier runs)") == 1


def test_layers_below_are_not_computed_from_the_second_epoch_on(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[int] = []
    compute = FrozenPrefix._compute

    def counted(prefix: FrozenPrefix, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        passed.append(len(ids))
        return compute(prefix, ids, mask)

    monkeypatch.setattr(FrozenPrefix, "_compute", counted)
    train("first")
    rows = hidden_states.count_rows(hidden_states.list_entries()[0])
    assert sum(passed) == rows
    passed.clear()
    train("other", r=2, lr=0.01, seed=4, alpha=3)  # another split and order of the same rows
    assert not passed and len(hidden_states.list_entries()) == 1
    train("changed", max_length=6)
    assert sum(passed) > 0


@pytest.mark.parametrize("killed", [False, True])
def test_a_stopped_run_goes_on_to_the_same_bits(
    tmp_path: Path, train: Any, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the first epoch, with rows kept in batches of its own; killed: what came after the checkpoint is
    lost."""
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "other cache"))
    train("straight", batch_size=8)
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        real = GracefulStop.on_step_end

        def stop_at_five(stop: GracefulStop, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stop.stopped |= state.global_step == 5 and not killed
            if killed and state.global_step == 7:
                raise KeyboardInterrupt
            real(stop, args, state, control, **kwargs)
            control.should_save |= killed and state.global_step == 5

        patch.setattr(GracefulStop, "on_step_end", stop_at_five)
        if killed:
            patch.setattr(HiddenStateCache, "close", lambda cache: cache._open.close())
        with pytest.raises(Interrupted, match="step 5 is saved"):
            train("stopped", batch_size=8)
    train("stopped", batch_size=8, resume=True)
    _equal(tmp_path / "straight", tmp_path / "stopped")


def test_micro_batches_share_what_is_kept(tmp_path: Path, train: Any) -> None:
    train("whole", batch_size=8)
    with pytest.MonkeyPatch.context() as patch:
        original = hatrack.planning.fit.plan_run
        patch.setattr("hatrack.planning.fit.plan_run", lambda where, method=None, rows=None: original(where, method, 2))
        train("parts", batch_size=8, dropout=0.0)
        train("plain", batch_size=8, dropout=0.0, cache_limit=0)
    assert len(hidden_states.list_entries()) == 1
    _equal(tmp_path / "parts", tmp_path / "plain", bits=False)


def test_a_full_disk_does_not_stop_training(
    tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train("plain", cache_limit=0)
    write, times = HiddenStateCache._write, [0]

    def full(kept: HiddenStateCache, data: memoryview) -> None:
        times[0] += 1
        if times[0] > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(kept, data)

    monkeypatch.setattr(HiddenStateCache, "_write", full)
    train("full")
    assert capsys.readouterr().err.count("no more hidden states are cached: the disk is full") == 1
    _equal(tmp_path / "plain", tmp_path / "full", bits=False)


def test_a_cache_that_goes_while_training_is_computed_anew(
    tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files cut to nothing by somebody else: no crash, no wrong values."""
    train("plain", cache_limit=0)
    real = GracefulStop.on_step_end

    def cut(stop: GracefulStop, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 9:
            for path in (tmp_path / "cache/states").rglob("*.states"):
                os.truncate(path, 100)
        if state.global_step == 12:
            shutil.rmtree(tmp_path / "cache/states")
        real(stop, args, state, control, **kwargs)

    monkeypatch.setattr(GracefulStop, "on_step_end", cut)
    train("cut")
    _equal(tmp_path / "plain", tmp_path / "cut", bits=False)


def test_the_limit_holds_and_is_said(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train("small", cache_limit="16KiB")
    assert hidden_states.list_entries()[0].bytes <= 20 * 2**10
    assert "the cache of hidden states is full" in capsys.readouterr().err


def test_a_sweep_leaves_out_layers_whose_results_are_kept(
    tmp_path: Path, train: Any, half_decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep's adapter is the ordinary run's, and it keeps for others what others keep for it."""
    shown: list[int] = []
    load = MappedLayers.load

    def watched(layers: MappedLayers, part: int, next_part: int | None = None) -> None:
        shown.extend(number for number in (part, next_part) if number is not None)
        load(layers, part, next_part)

    monkeypatch.setattr(MappedLayers, "load", watched)
    train("plain", "chat", base=str(half_decoder), cache_limit=0)
    with too_large():
        train("streamed", "chat", base=str(half_decoder))
    assert 0 in shown and hidden_states.count_rows(hidden_states.list_entries()[0]) == 32
    finished = Trainer.score_held_out
    after: list[int] = []

    def scored(trainer: Trainer, *rows: Any) -> Any:
        found = finished(trainer, *rows)
        after.append(len(shown))
        return found

    monkeypatch.setattr(Trainer, "score_held_out", scored)
    shown.clear()
    with too_large():
        train("again", "chat", base=str(half_decoder))
    assert 0 not in shown[: after[-1]] and 1 in shown[: after[-1]]  # but for the proof at the end
    train("ordinary", "chat", base=str(half_decoder))
    _equal(tmp_path / "streamed", tmp_path / "again")
    for name in ("streamed", "ordinary"):
        _equal(tmp_path / "plain", tmp_path / name, bits=False)
    assert len(hidden_states.list_entries()) == 1
