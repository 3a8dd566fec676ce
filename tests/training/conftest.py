"""Bases and runs that several tests of training share."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hatrack


@pytest.fixture
def half_decoder(tmp_path: Path, tiny_decoder: Path) -> Path:
    """The tiny decoder with its weights in bfloat16, so that its pages are widened when they are shown."""
    folder = tmp_path / "half"
    shutil.copytree(tiny_decoder, folder)
    AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def train(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_encoder: Path,
    tiny_decoder: Path,
    reviews: Path,
    questions: Path,
) -> Any:
    """Trains on the tiny bases into a folder of this name, with the options `RUN` of the test's module."""

    def run(name: str, task: str = "classify", **options: Any) -> Any:
        base, data = (tiny_encoder, reviews) if task == "classify" else (tiny_decoder, questions)
        given = request.module.RUN | {"base": str(base), "data": str(data)} | options
        return hatrack.train(output=str(tmp_path / name), name=name, **given)

    return run
