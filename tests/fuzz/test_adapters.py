"""Mutated adapter folders: each is loaded and proven, or refused with a HatrackError, soon, and nothing else happens.

make fuzz                                        # 5,000 and more, of all kinds
HATRACK_FUZZ=300 python -m pytest tests/fuzz -q  # so many of each kind; without it a few dozen
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hatrack.adapter.attach import attach, detach
from hatrack.adapter.card import AdapterCard
from hatrack.adapter.files import read_adapter, save_adapter
from hatrack.adapter.place import place
from hatrack.adapter.proof import check_proof, record_proof
from hatrack.base.load import BaseOptions, load_base
from hatrack.base.sources import find_base
from hatrack.errors import HatrackError
from hatrack.recipe import Recipe
from tests.fuzz.watch import JSON, MANY, mutated, outcomes, watched

EVIL: list[Any] = [
    "(a+)+$|((.*)*)*x", "(", "../../up", "/abs/path", "os", {"base_model_class": "system", "parent_library": "os"},
    {"(.*)*(.*)*x": 4}, 10**9, [[0, 2]] * 3, ["q_proj", "../.."], "all-linear", ["model"], ["lm_head"], [0], True,
    "all",
    {"q_proj": 10**6}, [["q_proj"]], "x" * 10_000, float("nan"), [], {}, "pissa", "SEQ_CLS", "model", "a.b", "lora_A",
]  # fmt: skip
VALUE = st.sampled_from(EVIL) | JSON
FILES = ("adapter_config.json", "hatrack.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: Path) -> tuple[Path, Any]:
    """A good adapter with its proof, and the base it belongs on."""
    folder = tmp_path_factory.mktemp("fuzz") / "hat"
    base = load_base(find_base(str(tiny_decoder)), BaseOptions(task="chat", device="cpu", dtype="float32"))
    model = place(base.model, Recipe.make(r=2), task="chat")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    hat = AdapterCard(name="hat", base={"source": str(tiny_decoder)}, task="chat")
    save_adapter(model, folder, hat, base=str(tiny_decoder))
    proof = record_proof(model, read_adapter(folder), base, "none").to_json()
    (folder / "hatrack.json").write_text(
        json.dumps(json.loads((folder / "hatrack.json").read_text()) | {"proof": proof})
    )
    detach(model, "default")
    return folder, base


def _load_and_prove(folder: Path, base: Any, name: str = "fuzzed") -> None:
    """What hatrack.load does once the base is in memory."""
    files = read_adapter(folder)
    model = attach(base.model, folder, name)
    try:
        check_proof(model, files, base, "none")
    finally:
        detach(model, name)


def _refused_or_proven(kind: str, folder: Path, base: Any) -> None:
    with warnings.catch_warnings(), watched(folder):
        warnings.simplefilter("ignore")
        try:
            _load_and_prove(folder, base)
            outcomes[kind, "taken"] += 1
        except HatrackError as error:
            outcomes[kind, "refused"] += 1
            assert str(error).count("\n") == 0 and len(str(error)) < 3000


def _copy(made: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(made, to)
    return to


@MANY
@given(data=st.data())
def test_changed_fields(made: tuple[Path, Any], tmp_path: Path, data: st.DataObject) -> None:
    folder = _copy(made[0], tmp_path / "hat")
    path = folder / data.draw(st.sampled_from(FILES[:2]))
    content = json.loads(path.read_text())
    inner = [content, content.get("proof") or content, content.get("base") or content]
    for _ in range(data.draw(st.integers(1, 3))):
        target = data.draw(st.sampled_from(inner))
        key = data.draw(st.sampled_from(sorted(target) or [""]) | st.text(max_size=8))
        if data.draw(st.booleans()) and key in target:
            del target[key]
        else:
            target[key] = data.draw(VALUE)
    path.write_text(json.dumps(content))
    _refused_or_proven("fields of an adapter's JSON files", folder, made[1])


@MANY
@given(data=st.data())
def test_changed_bytes(made: tuple[Path, Any], tmp_path: Path, data: st.DataObject) -> None:
    folder = _copy(made[0], tmp_path / "hat")
    path = folder / data.draw(st.sampled_from((FILES[2], *FILES)))
    path.write_bytes(mutated(data, path.read_bytes(), within=3000))
    _refused_or_proven("bytes of an adapter's files", folder, made[1])


@MANY
@given(data=st.data())
def test_changed_headers(made: tuple[Path, Any], tmp_path: Path, data: st.DataObject) -> None:
    folder = _copy(made[0], tmp_path / "hat")
    path = folder / FILES[2]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = sorted(name for name in header if name != "__metadata__")
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(names))
        field = data.draw(st.sampled_from(("dtype", "shape", "data_offsets", "name")))
        if name not in header:
            continue
        if field == "name":
            header[data.draw(st.text(max_size=20) | st.sampled_from(names))] = header.pop(name)
        elif field == "dtype":
            header[name][field] = data.draw(
                st.sampled_from(("F64", "I32", "F16", "BF16", "F8_E4M3", "BOOL", "C64", "?"))
            )
        else:
            header[name][field] = data.draw(st.lists(st.integers(-1, 2**40), max_size=3) | JSON)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    _refused_or_proven("the header of an adapter's weights", folder, made[1])


@MANY
@given(kind=st.sampled_from(("gone", "folder", "empty", "device", "loop", "other")), file=st.sampled_from(FILES))
def test_changed_files(made: tuple[Path, Any], tmp_path: Path, kind: str, file: str) -> None:
    folder = _copy(made[0], tmp_path / "hat")
    path = folder / file
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "other":
        path.symlink_to(folder / "README.md")
    _refused_or_proven("an adapter's files gone, empty, a folder, a device, a loop", folder, made[1])


def test_the_good_one_is_proven(made: tuple[Path, Any]) -> None:
    _load_and_prove(*made)


def test_a_pipe_is_not_waited_for(made: tuple[Path, Any], tmp_path: Path) -> None:
    for file in FILES:
        folder = _copy(made[0], tmp_path / "hat")
        (folder / file).unlink()
        os.mkfifo(folder / file)
        with watched(folder), pytest.raises(HatrackError):
            _load_and_prove(folder, made[1])
