"""A quantized base from the disk is the base as quantized; nothing else there is ever used."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hatrack import storage
from hatrack.base import load, quantized_cache
from hatrack.base.description import describe_folder
from hatrack.base.header import read_tensors
from hatrack.base.load import Base
from hatrack.errors import ModelError
from tests.base import tiny
from tests.base.test_load import load_tiny

pytest.importorskip("bitsandbytes")
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
BITS = pytest.mark.parametrize("quantize", ["4bit", "8bit"])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "base", "Llama", "causal", **WIDE)


@pytest.fixture
def unkept(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Base]:
    """Loads without the disk: quantized then and there, as the plain twin of what is kept."""

    def load_fresh(*given: Any, **options: Any) -> Base:
        with monkeypatch.context() as there:
            there.setattr(load, "_quantized_folder", lambda *_: None)
            base: Base = load_tiny(*given, **options)
            return base

    return load_fresh


def _answers(base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a few tokens, and the gradient of their squares where a base takes it: at the embeddings."""
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        logits = base.model(ids).logits
    entered = base.model.get_input_embeddings()(ids).detach().requires_grad_(True)
    base.model(inputs_embeds=entered).logits.square().sum().backward()
    assert entered.grad is not None and entered.grad.abs().max() > 0
    return logits, entered.grad


def _same(wanted: tuple[torch.Tensor, ...], found: tuple[torch.Tensor, ...], quantize: str = "4bit") -> bool:
    """Up to what products round: mapped weights begin at other addresses, which changes the order they sum in. 8-bit
    products round their input once more, to steps of a hundredth."""
    most = {"4bit": 1e-5, "8bit": 1e-2}[quantize]
    pairs = zip(wanted, found, strict=True)
    return all(bool((mine - theirs).abs().max() <= most * mine.abs().max()) for mine, theirs in pairs)


@BITS
@pytest.mark.parametrize(
    ("kind", "head", "task"),
    [
        ("Llama", "causal", "chat"),
        ("Llama", "causal", "classify"),
        ("Bert", "masked", "classify"),
        ("GPT2", "causal", "chat"),
        ("Albert", "body", "classify"),
    ],
)
def test_what_is_kept_is_what_was_quantized(
    kind: str, head: str, task: str, quantize: str, tmp_path: Path, unkept: Callable[..., Base]
) -> None:
    folder = tiny.save(tmp_path, kind, head)
    fresh, first, later = (make(folder, task, quantize=quantize, seed=5) for make in (unkept, load_tiny, load_tiny))
    assert len(quantized_cache.list_entries()) == 1
    wanted, plain = _answers(fresh), fresh.model.state_dict()
    for base in (first, later):
        assert _same(wanted, _answers(base), quantize)
        state = base.model.state_dict()
        assert state.keys() == plain.keys() and all(torch.equal(state[name], plain[name]) for name in plain)
        assert base.model.name_or_path == fresh.model.name_or_path == str(folder)
        assert base.model.config.to_dict() == fresh.model.config.to_dict()
        assert type(base.model) is type(fresh.model)
        assert [type(module) for module in base.model.modules()] == [type(m) for m in fresh.model.modules()]


@BITS
def test_the_weights_are_pages_of_the_file(llama: Path, quantize: str) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs Linux's /proc")
    load_tiny(llama, "chat", quantize=quantize)
    base = load_tiny(llama, "chat", quantize=quantize)
    file = quantized_cache.list_entries()[0].folder / "model.safetensors"
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    weights = [p for p in base.model.parameters() if p.ndim == 2]
    weights += [p.quant_state.absmax for p in weights if getattr(p, "quant_state", None) is not None]
    assert len(weights) > 15
    assert all(any(start <= weight.data_ptr() < end for start, end in spans) for weight in weights)


@BITS
def test_a_head_is_fresh_by_the_seed_and_its_own_where_it_fits(
    quantize: str, tmp_path: Path, unkept: Callable[..., Base]
) -> None:
    """One base with a head for three labels: whichever number of labels quantized it first."""
    folder = tiny.save(tmp_path, "Bert", "classify", num_labels=3)
    heads = {}
    for labels, seed in ((2, 1), (2, 2), (3, 1)):
        names = tuple("abc"[:labels])
        bases = [make(folder, "classify", labels=names, quantize=quantize, seed=seed) for make in (load_tiny, unkept)]
        found, wanted = (base.model.classifier.weight for base in bases)
        assert found.shape[0] == labels and torch.equal(found, wanted)
        heads[labels, seed] = found
    assert not torch.equal(heads[2, 1], heads[2, 2])
    assert torch.equal(heads[3, 1], tiny.model("Bert", "classify", num_labels=3).classifier.weight)
    kept = quantized_cache.list_entries()
    assert len(kept) == 1
    assert "classifier.weight" in read_tensors(kept[0].folder)


@BITS
def test_nothing_fresh_is_kept(quantize: str, tmp_path: Path) -> None:
    load_tiny(tiny.save(tmp_path, "Bert", "masked"), "classify", quantize=quantize)
    names = read_tensors(quantized_cache.list_entries()[0].folder)
    assert names and not any(name.startswith(("classifier", "bert.pooler", "cls")) for name in names)


def test_each_thing_that_changes_the_weights_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "one", "Llama", "causal", **WIDE)
    other = tiny.save(tmp_path / "two", "Llama", "causal", seed=1, **WIDE)
    same = Path(shutil.copytree(folder, tmp_path / "same"))
    for base, task, quantize, dtype in (
        (folder, "chat", "4bit", "float32"),
        (folder, "complete", "4bit", "float32"),  # the same model
        (same, "chat", "4bit", "float32"),  # the same base
        (other, "chat", "4bit", "float32"),
        (folder, "classify", "4bit", "float32"),
        (folder, "chat", "8bit", "float32"),
        (folder, "chat", "4bit", "bfloat16"),
    ):
        load_tiny(base, task, quantize=quantize, dtype=dtype)
    assert len(quantized_cache.list_entries()) == 5
    made = quantized_cache.cache_key(
        describe_folder(folder), task="chat", quantize="4bit", dtype="float32", device="cpu"
    )
    assert quantized_cache.find_cached(made) and not quantized_cache.find_cached(made | {"device": "cuda"})
    assert not quantized_cache.find_cached(made | {"versions": made["versions"] | {"bitsandbytes": "0"}})


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def _flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_about(folder: Path) -> None:
    (folder / storage.ABOUT).unlink()


def _other_about(folder: Path) -> None:
    about = folder / storage.ABOUT
    about.write_text(about.read_text().replace("4bit", "8bit"))


@pytest.mark.parametrize("damage", [_cut, _flip, _no_weights, _no_about, _other_about])
def test_a_damaged_one_is_said_and_made_again(
    llama: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = _answers(load_tiny(llama, "chat", quantize="4bit"))
    folder = quantized_cache.list_entries()[0].folder
    damage(folder)
    capsys.readouterr()
    found = _answers(load_tiny(llama, "chat", quantize="4bit"))
    said = capsys.readouterr().err
    assert f"{folder} is damaged: it is not used" in said and "quantizing" in said
    assert _same(wanted, found)
    load_tiny(llama, "chat", quantize="4bit")
    assert "as quantized before" in capsys.readouterr().err


def test_what_a_killed_process_began_is_not_looked_at(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_tiny(llama, "chat", quantize="4bit")
    folder = quantized_cache.list_entries()[0].folder
    folder.rename(folder.with_name(f".{folder.name}.hatrack-1"))
    capsys.readouterr()
    load_tiny(llama, "chat", quantize="4bit")
    assert "quantizing" in capsys.readouterr().err


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(quantized_cache.root())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))


def _fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "save_file", _full)


def _unwritable(monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, how: how != os.W_OK and access(path, how))


def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    file = quantized_cache.root() / "file"
    file.write_text("")
    monkeypatch.setattr(quantized_cache, "root", lambda: storage.cache_dir("packed"))
    monkeypatch.setenv("HATRACK_CACHE", str(file))


@pytest.mark.parametrize("trouble", [_no_room, _fills_up, _unwritable, _no_cache])
def test_without_room_on_disk_it_goes_on_and_says_so_once(
    llama: Path,
    trouble: Callable[[pytest.MonkeyPatch], None],
    unkept: Callable[..., Base],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = _answers(unkept(llama, "chat", quantize="4bit"))
    trouble(monkeypatch)
    for _ in range(2):
        found = _answers(load_tiny(llama, "chat", quantize="4bit"))
        assert _same(wanted, found)
    assert capsys.readouterr().err.count("the quantized base is not cached") == 1


def test_a_base_that_lacks_weights_is_refused_and_not_kept(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "Bert", "masked")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ModelError, match="lacks 16 of the tensors"):
        load_tiny(folder, "classify", quantize="4bit")
    assert quantized_cache.list_entries() == []


def test_one_that_is_being_opened_is_not_removed(llama: Path) -> None:
    load_tiny(llama, "chat", quantize="4bit")
    entry = quantized_cache.list_entries()[0]
    with quantized_cache.folder_to_load(entry.folder, llama) as whole:
        assert not quantized_cache.remove_entry(entry)
        assert {path.name for path in whole.iterdir()} == {path.name for path in llama.iterdir()}
    assert quantized_cache.remove_entry(entry) and quantized_cache.list_entries() == []


@pytest.fixture(autouse=True)
def no_temporary_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    yield
    assert not list((tmp_path / "temporary").iterdir())
