"""What is trained is what is asked at the end: how a prompt ends and an answer begins, and where it stops."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import hatrack
from hatrack.data import template as templates
from tests.engine.stopping import stopped_at_five
from tests.engine.talking import CHATML, capitals, talking_base

FAST = {"device": "cpu", "dtype": "float32", "lr": 0.01, "batch_size": 4, "steps": 8}
DATED = "{{ 'Today is ' ~ strftime_now('%d %b %Y %H:%M:%S.%f') ~ '\\n' }}" + CHATML


def _on(day: int, patch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2026, 5, day, 15, 30, 12, 345678)

    patch.setattr(templates, "datetime", Clock)


def test_the_date_of_a_run_is_kept_when_it_goes_on_and_when_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"base": str(talking_base(tmp_path / "base", DATED)), "data": str(capitals(tmp_path / "capitals.jsonl"))}
    output = str(tmp_path / "hat")
    _on(4, monkeypatch)
    with stopped_at_five():
        hatrack.train(**given, output=output, name="hat", **FAST)
    _on(5, monkeypatch)
    hat = hatrack.train(output=output, resume=True)
    _on(6, monkeypatch)
    asked = hatrack.load(output)._encode("Capital of Peru?")["input_ids"][0]
    assert hat.base.tokenizer.decode(asked).startswith("Today is 04 May 2026 00:00:00.000000\n<|im_start|>user")
    assert "04" in json.loads((tmp_path / "hat/hatrack.json").read_text())["template"].partition("\n")[0]
