"""Bases that several tests of training share."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture
def half_decoder(tmp_path: Path, tiny_decoder: Path) -> Path:
    """The tiny decoder with its weights in bfloat16, so that its pages are widened when they are shown."""
    folder = tmp_path / "half"
    shutil.copytree(tiny_decoder, folder)
    AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder
