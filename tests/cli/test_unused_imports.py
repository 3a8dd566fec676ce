"""Which imports a command skips, and when it must not."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hatrack.adapter.card import AdapterCard
from hatrack.cli.unused_imports import skip_quantizers, skip_unused_imports
from hatrack.errors import AdapterError
from hatrack.recipe import Recipe

ALL = {"bitsandbytes", "scipy", "datasets"}


@pytest.fixture
def skipped_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Plays a process that has not imported transformers yet; returns which packages it skips."""
    there = {name: module for name, module in sys.modules.items() if name not in {*ALL, "transformers"}}
    monkeypatch.setattr(sys, "modules", there)
    return lambda: {name for name, module in there.items() if module is None}


@pytest.mark.parametrize(
    ("options", "skipped"),
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
    tmp_path: Path, skipped_here: Callable[[], set[str]], options: dict[str, Any], skipped: set[str]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.touch()
    skip_unused_imports(Recipe.make(**({"data": str(rows)} | options)))
    assert skipped_here() == skipped


@pytest.mark.parametrize(
    ("recipe", "skipped"), [({}, {"bitsandbytes", "scipy"}), ({"quantize": "4bit"}, set()), (None, set())]
)
def test_quantizers_are_skipped_for_a_base_that_was_not_quantized(
    tmp_path: Path, skipped_here: Callable[[], set[str]], recipe: dict[str, Any] | None, skipped: set[str]
) -> None:
    if recipe is not None:
        hat = AdapterCard(name="hat", base={"source": "somewhere"}, task="classify", recipe=recipe)
        (tmp_path / "hatrack.json").write_text(hat.to_json())
    (tmp_path / "adapter_config.json").touch()
    skip_quantizers(str(tmp_path))
    with pytest.raises(AdapterError, match="no such adapter"):
        skip_quantizers("no-such-adapter")
    assert skipped_here() == skipped


def test_training_goes_without_them(tmp_path: Path) -> None:
    """In a process of its own: the main path is imported whole, and none of them with it."""
    script = (
        "import sys; from pathlib import Path\n"
        "from hatrack.cli.unused_imports import skip_unused_imports; from hatrack.recipe import Recipe\n"
        "Path('rows.csv').touch(); skip_unused_imports(Recipe.make(data='rows.csv')); import hatrack.training.train\n"
        "print([name for name in ('bitsandbytes', 'scipy', 'datasets', 'pandas', 'sklearn') if sys.modules.get(name)])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_predicting_goes_without_the_trainer(tmp_path: Path) -> None:
    """transformers' Trainer imports datasets and pandas: 55 MiB."""
    script = (
        "import sys, hatrack.inference.load\n"
        "print([name for name in ('transformers.trainer', 'datasets', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
