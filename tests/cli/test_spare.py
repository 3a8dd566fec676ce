"""What a training leaves out of its imports, and when it must not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hatrack.cli.spare import leave_out
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
