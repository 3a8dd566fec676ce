"""The rack: names that lead to folders, whoever writes at the same time."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hatrack.adapter import registry
from hatrack.errors import AdapterError


def _adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"task_type": "SEQ_CLS", "base_model_name_or_path": "b"}))
    return folder


def test_a_name_leads_to_its_folder(tmp_path: Path) -> None:
    folder = _adapter(tmp_path / "a")
    registry.register("legal", folder)
    assert (
        registry.find_adapter("legal") == folder.resolve()
        and registry.find_adapter(folder) == folder
        and registry.find_adapter(str(folder)) == folder
    )
    [hat] = registry.list_adapters()
    assert (hat.name, hat.base, hat.task, hat.missing) == ("legal", "b", "SEQ_CLS", False) and hat.size > 0


def test_a_taken_name_stays_where_it_is(tmp_path: Path) -> None:
    one, other = _adapter(tmp_path / "one"), _adapter(tmp_path / "other")
    registry.register("legal", one)
    registry.register("legal", one)
    with pytest.raises(AdapterError, match=r"the name legal is taken on the rack; got .*one; fix: choose another"):
        registry.register("legal", other)
    (one / "adapter_config.json").unlink()
    registry.register("legal", other)  # a name whose adapter is gone is free
    assert registry.find_adapter("legal") == other.resolve()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="there is no such adapter; got legal; fix: hatrack train makes one"):
        registry.find_adapter("legal")
    folder = _adapter(tmp_path / "a")
    registry.register("legal", folder)
    with pytest.raises(AdapterError, match=r"got leagl; fix: did you mean legal\?"):
        registry.find_adapter("leagl")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(
        AdapterError, match=r"legal is on the rack, but its folder is gone; .*; fix: hatrack remove legal"
    ):
        registry.find_adapter("legal")
    assert registry.list_adapters()[0].missing
    with pytest.raises(AdapterError, match=r"has no adapter_config.json; got nothing in it"):
        registry.find_adapter(folder)


@pytest.mark.parametrize("name", ["../up", "/abs", "a/b", "", ".hidden", "x" * 65, "a\0b"])
def test_names_stay_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="invalid adapter name"):
        registry.register(name, _adapter(tmp_path / "a"))


def test_rename_and_take_down(tmp_path: Path) -> None:
    one, other = _adapter(tmp_path / "one"), _adapter(tmp_path / "other")
    registry.register("one", one)
    registry.register("other", other)
    with pytest.raises(AdapterError, match="the name other is taken"):
        registry.rename("one", "other")
    registry.rename("one", "first")
    assert [hat.name for hat in registry.list_adapters()] == ["first", "other"]
    registry.unregister("first")
    assert one.exists()
    registry.unregister("other", delete_files=True)
    assert not other.exists() and registry.list_adapters() == []
    with pytest.raises(AdapterError, match="there is no such adapter"):
        registry.unregister("other")


def test_many_writers_at_once(tmp_path: Path) -> None:
    folders = [_adapter(tmp_path / f"a{index}") for index in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda folder: registry.register(folder.name, folder), folders))
    assert {hat.name: hat.folder for hat in registry.list_adapters()} == {
        folder.name: folder.resolve() for folder in folders
    }


def test_of_many_writers_of_one_name_one_gets_it(tmp_path: Path) -> None:
    folders = [_adapter(tmp_path / f"a{index}") for index in range(24)]

    def register(folder: Path) -> bool:
        try:
            registry.register("legal", folder)
        except AdapterError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(register, folders))
    assert sum(got) == 1
    assert registry.find_adapter("legal") == folders[got.index(True)].resolve()


def test_of_many_renamers_of_one_adapter_one_does_it(tmp_path: Path) -> None:
    registry.register("old", _adapter(tmp_path / "a"))

    def rename(number: int) -> bool:
        try:
            registry.rename("old", f"new-{number}")
        except AdapterError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(rename, range(24)))
    assert [hat.name for hat in registry.list_adapters()] == [f"new-{done.index(True)}"] and sum(done) == 1


def test_a_killed_writer_blocks_nobody(tmp_path: Path) -> None:
    holding = "import time; from hatrack.adapter import registry\n"
    holding += "with registry._locked_rack(): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "held\n"
        writer.kill()
    registry.register("legal", _adapter(tmp_path / "a"))
