"""A path that is no base: one line that says what it is, and names what to give instead."""

import json
from pathlib import Path
from typing import Any

import pytest

from hatrack.base import sources
from hatrack.base.sources import find_base
from hatrack.errors import ModelError

from . import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refused(source: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        find_base(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Paths are given from the test's own folder, and the hub is never asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "snapshot_download", None)
    return tmp_path


def model(folder: str) -> None:
    tiny.save(Path(folder), "Bert")


@pytest.mark.parametrize("source", ["hf", "hf/hub", "hf/hub/models--acme--tiny"])
def test_the_hubs_cache_names_the_snapshot(source: str) -> None:
    snapshot = f"hf/hub/models--acme--tiny/snapshots/{COMMIT}"
    model(snapshot)
    said = refused(source)
    assert said.startswith(f"{source} is the hub's cache, not a model; got ")
    assert f"fix: give --base {snapshot} [base-folder-around]" in said
    assert find_base(snapshot).folder == Path(snapshot)


def test_of_several_snapshots_the_one_that_main_was_is_named() -> None:
    top = Path("models--acme--tiny")
    for commit in (COMMIT, "f" * 40):
        model(str(top / "snapshots" / commit))
    (top / "refs").mkdir()
    (top / "refs/main").write_text("f" * 40)
    assert f"fix: give one of them: --base {top}/snapshots/{'f' * 40}" in refused(top)


def test_a_folder_of_models_names_them() -> None:
    for name in ("many/one", "many/two"):
        model(name)
    assert "many is a folder of models; got one, two; fix: give one of them: --base many/one" in refused("many")


def test_models_two_levels_below_are_found() -> None:
    model("models/acme/tiny")
    assert "got acme/tiny; fix: give --base models/acme/tiny" in refused("models")


def test_of_checkpoints_the_last_is_named_whatever_its_digits() -> None:
    for step in (9, 10):
        model(f"run/checkpoint-{step}")
    Path("run/config.json").write_text("{}")
    assert "got checkpoint-9, checkpoint-10; fix: give one of them: --base run/checkpoint-10" in refused("run")


def test_a_run_of_adapters_names_their_base() -> None:
    Path("run/checkpoint-4").mkdir(parents=True)
    Path("run/checkpoint-4/adapter_config.json").write_text('{"base_model_name_or_path": "acme/tiny"}')
    assert "run holds adapters, not a base; got checkpoint-4; fix: use their base: acme/tiny" in refused("run")


@pytest.mark.parametrize("files", [[], [".gitkeep"], ["README.md", "tokenizer.json"]])
@pytest.mark.parametrize("name", ["acme/tiny", "gpt2", "acme/tiny/"])
def test_a_folder_without_a_model_that_has_a_hub_ids_name(name: str, files: list[str]) -> None:
    Path(name).mkdir(parents=True)
    for file in files:
        (Path(name) / file).touch()
    said = refused(name)
    assert said.startswith(
        f"the folder {name} here has no model in it, and hides the one of that name on the hub; got "
    )
    assert "fix: rename or remove the folder" in said


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["zero_to_fp32.py", "latest"], "was saved in parts by DeepSpeed; got zero_to_fp32.py; fix: join them: python"),
        (["mp_rank_00_model_states.pt"], "was saved in parts by DeepSpeed"),
        (["__0_0.distcp", "__1_0.distcp"], "was saved in parts by FSDP; got __0_0.distcp, __1_0.distcp; fix: join"),
        (["params.json", "consolidated.00.pth"], "is in its maker's own format"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_weights_of_another_format_are_named(files: list[str], said: str, config: bool) -> None:
    folder = Path("base")
    folder.mkdir()
    for name in [*files, *(["config.json"] if config else [])]:
        (folder / name).write_text("{}")
    assert said in refused(folder)


def test_weights_without_a_config_do_not_hide_the_hub() -> None:
    model("acme/tiny")
    Path("acme/tiny/config.json").unlink()
    assert "acme/tiny has no config.json; got model.safetensors" in refused("acme/tiny")


@pytest.mark.parametrize(
    ("source", "got", "fix"),
    [
        ("C:\\Users\\me\\tiny", "a Windows path", "give its path on this machine with --base FOLDER, or its hub id"),
        ("D:/models/tiny", "a Windows path", "give its path on this machine with --base FOLDER, or its hub id"),
        ("/contents-of-colab/drive/tiny", "no folder /contents-of-colab here: a path of another machine", "give its"),
        ("/nowhere/hub/models--acme--tiny/snapshots/abc", "no folder /nowhere here", "give its hub id: --base acme/ti"),
        ("a/b/tiny", "no folder a here", "give its path on this machine with --base FOLDER, or its hub id"),
    ],
)
def test_a_path_of_another_machine(source: str, got: str, fix: str) -> None:
    assert f"there is no base at {source}; got {got}" in refused(source)
    assert f"; fix: {fix}" in refused(source)


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ("https://huggingface.co/acme/tiny/tree/main", "give its hub id: --base acme/tiny"),
        ("hf://acme/tiny", "give its hub id: --base acme/tiny"),
        ("s3://bucket/tiny", "give its path on this machine with --base FOLDER, or its hub id"),
    ],
)
def test_an_address_is_not_a_path(source: str, fix: str) -> None:
    assert refused(source) == f"{source} is an address, not a folder or a hub id; fix: {fix}"


def test_backslashes_to_a_folder_that_is_there() -> None:
    model("many/one")
    assert refused("many\\one") == "there is no base at many\\one; fix: did you mean many/one?"


def test_an_adapter_named_as_a_base_still_names_its_base(tmp_path: Path) -> None:
    config: dict[str, Any] = {"base_model_name_or_path": "acme/tiny"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model("checkpoint-4")
    assert "is an adapter, not a base" in refused(tmp_path)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"fine_tune_type": "lora", "model": "mlx-community/tiny"}, "use its base: mlx-community/tiny"),
        (
            {"peft_type": "LORA", "base_model_name_or_path": None},
            "use its base, which adapter_config.json does not name",
        ),
    ],
)
def test_an_adapter_names_its_base_where_it_is_named(config: dict[str, Any], told: str) -> None:
    Path("run").mkdir()
    Path("run/adapter_config.json").write_text(json.dumps(config))
    assert refused("run") == f"run is an adapter, not a base; got adapter_config.json; fix: {told}"
