"""One base in memory, many adapters: switched, added and dropped while it lives; what cannot share is refused."""

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners._buffer_dict import BufferDict

import hatrack
from hatrack.adapter import registry
from hatrack.adapter.attach import peft_adapter_name
from hatrack.base.description import describe_folder
from hatrack.errors import AdapterError, ModelError, RecipeError, WrongBase
from hatrack.inference.generate import generation_options, prompt_ids

TEXTS = ["it was good", "the film was so very bad !", "a red scene"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> dict[str, Path]:
    """Three classifiers with 2, 3 and 4 labels on one base, in folders."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["good", "bad", "red", "blue"]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HATRACK_HOME", str(folder / "home"))
        for count in (2, 3, 4):
            data = folder / f"{count}.csv"
            rows = [f"the {words[i % count]} film {'so ' * (i // count)},{words[i % count]}" for i in range(12 * count)]
            data.write_text("text,label\n" + "\n".join(rows) + "\n")
            name = f"of-{count}"
            settings: dict[str, Any] = {"epochs": 2, "lr": 0.02, "device": "cpu", "dtype": "float32", "seed": count}
            hatrack.train(base=str(tiny_encoder), data=str(data), output=str(folder / name), name=name, **settings)
            found[name] = folder / name
    return found


def _scores(hat: hatrack.Hat) -> list[dict[str, float]]:
    return [answer["scores"] for answer in hat.predict(TEXTS)]


def _base_digest(hat: hatrack.Hat) -> str:
    hasher = hashlib.sha256()
    for name, tensor in sorted(hat.model.get_base_model().state_dict().items()):
        if "lora_" not in name and ".modules_to_save." not in name:
            hasher.update(tensor.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def test_each_gives_what_it_gives_alone_whatever_came_before(trained: dict[str, Path]) -> None:
    alone = {name: hatrack.load(folder, dtype="float32") for name, folder in trained.items()}
    expected = {name: _scores(hat) for name, hat in alone.items()}
    for name, scores in expected.items():
        assert len(scores[0]) == int(name[-1])

    hat = hatrack.load([trained["of-3"], trained["of-2"]], dtype="float32")
    assert hat.active == "of-3" and list(hat.cards) == ["of-3", "of-2"]
    bare, digest = _bare(hat), _base_digest(hat)
    for step in ("of-2", "of-3", "+of-4", "of-2", "-of-3", "of-4", "+of-3", "of-3", "-of-4", "of-2"):
        name = step.lstrip("+-")
        if step.startswith("+"):
            before = hat.active
            assert hat.add(trained[name]) == name and hat.active == before
        elif step.startswith("-"):
            hat.drop(name)
        else:
            hat.use(name)
            assert hat.labels == list(expected[name][0])
        for one, other in zip(_scores(hat), expected[str(hat.active)] if hat.active else bare, strict=True):
            assert one == pytest.approx(other, abs=1e-6)
        assert _base_digest(hat) == digest
        if hat.active:
            assert _bare(hat) == bare


def _bare(hat: hatrack.Hat) -> list[dict[str, float]]:
    before = hat.active
    hat.use(None)
    scores = _scores(hat)
    hat.use(before)
    return scores


def test_dropping_the_one_in_use_leaves_the_bare_base(trained: dict[str, Path]) -> None:
    hat = hatrack.load([trained["of-2"], trained["of-3"]], dtype="float32")
    bare = _bare(hat)
    hat.drop("of-2")
    assert hat.active is None and _scores(hat) == bare
    hat.use("of-3")
    hat.drop("of-3")
    assert hat.active is None and hat.cards == {} and _scores(hat) == bare
    hat.add(trained["of-3"])
    hat.use("of-3")
    assert hat.labels == ["bad", "good", "red"]


def test_switching_takes_milliseconds(trained: dict[str, Path]) -> None:
    hat = hatrack.load([trained["of-2"], trained["of-3"]], dtype="float32")
    began = time.perf_counter()
    for _ in range(50):
        hat.use("of-3")
        hat.use("of-2")
    assert (time.perf_counter() - began) / 100 < 0.05


def test_names_on_the_rack_do_as_well(trained: dict[str, Path]) -> None:
    registry.register("legal", trained["of-2"])
    assert hatrack.load("legal").hats.keys() == {"legal"}


def test_an_adapter_may_be_called_anything(trained: dict[str, Path]) -> None:
    """Names that torch's containers, the base or peft have for something else, and names with dots."""
    hat = hatrack.load(trained["of-3"], dtype="float32")
    bare, expected = _bare(hat), _scores(hat)
    attributes = {name for kind in CONTAINERS for name in dir(kind())}
    modules = {part for name, _ in hat.base.model.named_modules() for part in name.split(".")}
    names = sorted(name for name in attributes | modules if re.fullmatch("[a-z][a-z_]*", name)) + PEFTS
    assert {"train", "eval", "half", "cpu", "items", "pop", "keys", "encoder", "classifier"} <= set(names)
    for name in names:
        assert hat.add(trained["of-3"], name=name, prove=False) == name
        hat.use(name)
        assert hat.active == name and name in hat.cards
        if name in ("train", "pop", "classifier", "v1.5"):
            for one, other in zip(_scores(hat), expected, strict=True):
                assert one == pytest.approx(other, abs=1e-6)
        hat.use("of-3")
        hat.drop(name)
    assert _bare(hat) == bare


PEFTS = [
    "default",
    "lora_A",
    "lora",
    "base_layer",
    "modules_to_save",
    "original_module",
    "0",
    "a-b",
    "a_b",
    "v1.5",
    "A",
]
CONTAINERS = (torch.nn.ModuleDict, torch.nn.ParameterDict, BufferDict)


def test_no_two_names_are_one_inside_a_model() -> None:
    names = ["".join(letters) for length in (1, 2, 3, 4) for letters in itertools.product("a-_.", repeat=length)]
    inside = {peft_adapter_name(name) for name in names}
    assert len(inside) == len(names) and not any("." in name for name in inside)
    attributes = {name for kind in CONTAINERS for name in dir(kind())}
    assert not attributes & {peft_adapter_name(name) for name in attributes}


def test_one_name_everywhere(trained: dict[str, Path], tmp_path: Path) -> None:
    """After a change of name, the rack, hatrack.json, the card and what is loaded say the same."""
    folder = shutil.copytree(trained["of-2"], tmp_path / "copied")
    registry.register("train", folder)
    assert hatrack.load("train").active == hatrack.load(folder).active == "train"
    registry.rename("train", "pop.v2")
    content = json.loads((folder / "hatrack.json").read_text())
    card = (folder / "README.md").read_text()
    assert content["name"] == "pop.v2" and "\n# pop.v2\n" in card and 'hatrack.load("pop.v2")' in card
    assert "of-2" not in card
    hat = hatrack.load("pop.v2")
    assert list(hat.cards) == ["pop.v2"] == list(hatrack.load(folder).hats)
    registry.register("other", trained["of-3"])
    assert hat.add("other") == "other" and hat.add(trained["of-4"]) == "of-4"
    with pytest.raises(AdapterError, match=r"no adapter named x is attached; got pop.v2, other, of-4"):
        hat.use("x")


def test_what_is_not_there_is_said(trained: dict[str, Path], tmp_path: Path) -> None:
    hat = hatrack.load(trained["of-2"])
    with pytest.raises(AdapterError, match="no adapter named of-3 is attached; got of-2; fix: attach it with add"):
        hat.use("of-3")
    with pytest.raises(AdapterError, match="an adapter of that name is attached already; got of-2"):
        hat.add(trained["of-2"])
    assert hat.add(trained["of-2"], name="twice") == "twice"
    with pytest.raises(AdapterError, match="there is no such adapter; got nobody"):
        hatrack.load("nobody")
    with pytest.raises(AdapterError, match="no adapter was named"):
        hatrack.load([])
    with pytest.raises(AdapterError, match="a classifier does not generate text; fix: use predict"):
        next(hat.stream("hello"))


def test_options_that_predict_does_not_have_are_refused_before_any_work(trained: dict[str, Path]) -> None:
    hat = hatrack.load(trained["of-2"])
    never = (pytest.fail("the texts were read") for _ in range(1))
    with pytest.raises(RecipeError, match="predict has no option 'temprature' for the task classify; got temprature=1"):
        hat.predict(never, temprature=1)
    with pytest.raises(RecipeError, match="fix: leave it out: a classifier takes no options"):
        hat.predict(TEXTS, temperature=1)
    with pytest.raises(RecipeError, match=r"did you mean temperature\? the options are max_new_tokens, temperature"):
        generation_options("chat", {"temprature": 1})
    for given in ({"max_new_tokens": 0}, {"max_new_tokens": 2.5}, {"temperature": -1}, {"temperature": "hot"}):
        with pytest.raises(RecipeError, match=f"{next(iter(given))} must be a .*number of at least"):
            generation_options("complete", given)


def test_memory_is_a_size_in_words_too(trained: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert hatrack.load(trained["of-2"], memory="8GiB", dtype="float32").mapped_layers is None
    hat = hatrack.load(trained["of-2"], memory="100KiB", dtype="float32")
    assert hat.mapped_layers is not None and "stays on disk" in capsys.readouterr().err
    for memory in ("lots", 1.5):
        with pytest.raises(RecipeError, match=r"memory .*fix: try 4GiB"):
            hatrack.load(trained["of-2"], memory=memory)  # type: ignore[arg-type]


def test_another_base_is_refused_and_a_moved_one_found(
    trained: dict[str, Path], tiny_encoder: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_encoder, moved)
    assert _scores(hatrack.load(trained["of-2"], base=str(moved), dtype="float32"))
    changed = tmp_path / "changed"
    shutil.copytree(tiny_encoder, changed)
    weights = changed / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(WrongBase, match=r"was trained on other weights: .*; got .*changed, .*; fix: give the base it"):
        hatrack.load(trained["of-2"], base=str(changed))
    assert _scores(hatrack.load(trained["of-2"], base=str(changed), allow_other_base=True))
    loaded = hatrack.load(trained["of-2"])
    base = dataclasses.replace(loaded.base, description=describe_folder(changed))  # as if loaded from there
    hat = hatrack.Hat(base, loaded.model, loaded.adapters)
    with pytest.raises(WrongBase):
        hat.add(trained["of-3"])
    assert hat.add(trained["of-3"], allow_other_base=True) == "of-3"
    with pytest.raises(ModelError):
        hatrack.load(trained["of-2"], base=str(tmp_path / "nowhere"))


def test_a_generator_and_a_classifier_do_not_share_a_base(
    trained: dict[str, Path], tiny_decoder: Path, questions: Path, tmp_path: Path
) -> None:
    chat = hatrack.train(
        base=str(tiny_decoder),
        data=str(questions),
        output=str(tmp_path / "chat"),
        epochs=1,
        device="cpu",
        dtype="float32",
    )
    with pytest.raises(
        AdapterError, match="of-2 cannot share this base in memory, which was loaded for the task chat; got task"
    ):
        chat.add(trained["of-2"])
    pieces = list(chat.stream([{"role": "user", "content": "what film is red ?"}], max_new_tokens=5))
    assert "".join(pieces) == chat.predict("what film is red ?", max_new_tokens=5)[0]["text"]
    torch.manual_seed(0)
    assert chat.predict("what film is red ?", max_new_tokens=5, temperature=5.0)[0]["prompt"] == "what film is red ?"
    stream = chat.stream("what film is red ?", max_new_tokens=30)
    next(stream)
    stream.close()  # stops generating, and does not hang

    completing = shutil.copytree(tmp_path / "chat", tmp_path / "completing")
    content = json.loads((completing / "hatrack.json").read_text())
    (completing / "hatrack.json").write_text(json.dumps(content | {"task": "complete"}))
    chat.use(chat.add(completing, name="completing"))
    assert chat.task == "complete"
    assert prompt_ids(chat.active_model, "what film") == chat.tokenizer("what film")["input_ids"]
    chat.use("questions")
    assert chat.task == "chat" and len(prompt_ids(chat.active_model, "what film")) > 2


def test_an_adapter_made_elsewhere_is_used_with_a_word_about_it(
    trained: dict[str, Path], tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(trained["of-3"], foreign)
    (foreign / "hatrack.json").unlink()
    hat = hatrack.load(foreign, dtype="float32")
    assert hat.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert "was not made by hatrack: it fits" in capsys.readouterr().err
    expected = [list(scores.values()) for scores in _scores(hatrack.load(trained["of-3"], dtype="float32"))]
    assert [list(scores.values()) for scores in _scores(hat)] == expected
