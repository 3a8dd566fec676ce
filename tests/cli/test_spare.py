"""What a training leaves out of its imports, and when it must not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hatrack.cli.spare import leave_out, list_models_once
from hatrack.recipe import Recipe

ALL = {"bitsandbytes", "scipy", "datasets"}


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({}, ALL),
        ({"data": "pypi:x==1/rows.csv"}, ALL),
        ({"data": "somebody/rows"}, {"bitsandbytes", "scipy"}),
        ({"eval_data": "somebody/rows"}, {"bitsandbytes", "scipy"}),
        ({"quantize": "4bit"}, {"datasets"}),
        ({"report_to": "tensorboard"}, set()),
        ({"resume": True}, set()),
    ],
)
def test_only_what_the_run_has_no_use_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], left_out: set[str]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.touch()
    modules: dict[str, Any] = {}
    monkeypatch.setattr(sys, "modules", modules)
    leave_out(Recipe.make(**({"data": str(rows)} | options)))
    monkeypatch.undo()
    assert modules == dict.fromkeys(left_out)


def test_training_goes_without_them(tmp_path: Path) -> None:
    """In a process of its own: the main path is imported whole, and none of them with it."""
    script = (
        "import sys; from pathlib import Path\n"
        "from hatrack.cli.spare import leave_out; from hatrack.recipe import Recipe\n"
        "Path('rows.csv').touch(); leave_out(Recipe.make(data='rows.csv')); import hatrack.engine.train\n"
        "print([name for name in ('bitsandbytes', 'scipy', 'datasets', 'pandas', 'sklearn') if sys.modules.get(name)])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_model_files_are_listed_once() -> None:
    """In processes of their own: as many names as without it, and no folder listed a second time."""
    script = (
        "import sys; from hatrack.cli.spare import list_models_once\n"
        "if sys.argv[1:]: list_models_once()\n"
        "import transformers; transformers.AutoModel; import transformers.utils.import_utils as module\n"
        "listed = module.create_import_structure_from_path.cache_info()\n"
        "print(len(dir(transformers)), len(dir(transformers.models)), listed.misses, listed.currsize)"
    )
    plain, once = (
        [int(word) for word in subprocess.check_output([sys.executable, "-c", script, *words], text=True).split()]
        for words in ([], ["once"])
    )
    assert once[:2] == plain[:2]
    assert once[2] == once[3] < plain[2]


def test_listing_is_left_alone_where_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", sys)
    before = list(sys.meta_path)
    list_models_once()
    assert sys.meta_path == before
