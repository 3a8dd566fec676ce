"""hatrack cache as a person or a script would use it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hatrack.base import quantized_cache
from hatrack.storage import ABOUT, in_use
from hatrack.training.hidden_states import HiddenStateCache, open_hidden_state_cache
from tests.cli.conftest import Ran

Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "states"


def _kept(base: str, layers: int, rows: int) -> HiddenStateCache:
    made_by = {"fingerprint": base[::-1], "layers": layers, "dtype": "bfloat16", "quantize": "none"}
    found = open_hidden_state_cache(made_by, base, None)
    assert found is not None
    for row in range(rows):
        found.add(row.to_bytes(16, "big"), memoryview(bytes(1000)))
    found.flush()
    return found


def test_what_is_kept_is_shown_and_removed(hatrack: Run, own_cache: Path) -> None:
    empty = hatrack("cache")
    assert empty.code == 0 and empty.out.startswith(f"Nothing is cached in {own_cache.parent}")
    _kept("one-base", 20, 30).close()
    older = _kept("another-base", 4, 5)
    older.close()
    os.utime(older.folder / ABOUT, (0, 0))

    heading, first, second, blank, total = hatrack("cache").out.splitlines()
    assert heading.split("  ")[0] == "BASE" and not blank and total.endswith("hatrack cache clear deletes it")
    cells = [cell.strip() for cell in first.split("  ") if cell.strip()]
    assert cells[:3] == ["one-base", "30 rows after 20 layers", "bfloat16"]
    assert cells[3].endswith("KiB") and cells[4] == "now"
    assert second.split()[0] == "another-base" and second.endswith(" d")

    told = hatrack("cache", "--json").json
    assert told["folder"] == str(own_cache.parent)
    assert [(entry["base"], entry["layers_below"], entry["rows"]) for entry in told["entries"]] == [
        ("one-base", 20, 30),
        ("another-base", 4, 5),
    ]
    sizes = sum(entry["bytes"] for entry in told["entries"])
    assert sizes > 35 * 1000
    assert hatrack("cache", "clear", "--json").json == {"removed": 2, "freed_bytes": sizes, "in_use": 0}
    assert not list(own_cache.iterdir()) and hatrack("cache", "--json").json["entries"] == []


def test_what_a_running_training_uses_stays(hatrack: Run, own_cache: Path) -> None:
    running = _kept("one-base", 20, 3)
    ran = hatrack("cache", "clear")
    assert ran.code == 0 and ran.out == "0 bytes freed; 1 not deleted: running commands use them\n"
    running.close()
    assert "freed" in hatrack("cache", "clear").out and not list(own_cache.iterdir())


def test_quantized_bases_stand_in_the_same_table(hatrack: Run, own_cache: Path) -> None:
    _kept("one-base", 20, 30).close()
    for name in ("weights", ".weights.hatrack-1"):
        (quantized_cache.root() / name).mkdir()
        (quantized_cache.root() / name / "model.safetensors").write_bytes(bytes(5000))
    about = '{"base": "big-base", "quantize": "4bit", "dtype": "float32"}'
    (quantized_cache.root() / "weights" / ABOUT).write_text(about)
    lines = sorted(hatrack("cache").out.splitlines())
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()][:4] for line in lines]
    assert ["big-base", "quantized weights", "float32, 4bit", "4.9 KiB"] in cells
    assert ["(unfinished)", "quantized weights", "4.9 KiB", "now"] in cells
    assert {entry["kind"] for entry in hatrack("cache", "--json").json["entries"]} == {"layers", "weights"}
    with in_use(quantized_cache.root() / ".weights.hatrack-1"):  # somebody is writing it
        assert hatrack("cache", "clear", "--json").json["in_use"] == 1
    assert [path.name for path in quantized_cache.root().iterdir()] == [".weights.hatrack-1"]
    assert hatrack("cache", "clear", "--json").json["removed"] == 1 and not list(quantized_cache.root().iterdir())


def test_a_damaged_entry_is_shown_and_removed(hatrack: Run, own_cache: Path) -> None:
    kept = _kept("one-base", 20, 3)
    kept.close()
    (kept.folder / ABOUT).write_text("{")
    assert "(damaged)" in hatrack("cache").out
    assert hatrack("cache", "clear", "--json").json["removed"] == 1 and not list(own_cache.iterdir())


def test_another_word_is_refused(hatrack: Run) -> None:
    ran = hatrack("cache", "clean")
    assert ran.code == 2 and "unknown action; got clean" in ran.complaint
