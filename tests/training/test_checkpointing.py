"""Recomputing layers over frozen inputs: gradients arrive, by the form of it that hatrack asks for."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from hatrack.adapter.place import place
from hatrack.base.load import BaseOptions, load_base
from hatrack.base.sources import find_base
from hatrack.check.running import Step, no_gradient
from hatrack.layers.fast_lora import LAYER_CLASSES
from hatrack.recipe import Recipe
from hatrack.training.adapted_model import CHECKPOINTING

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def _gradients(tiny_decoder: Path, **asked: Any) -> dict[str, torch.Tensor]:
    """Gradient of each trainable tensor; layers are recomputed where something is `asked`."""
    torch.manual_seed(0)
    base = load_base(find_base(str(tiny_decoder)), BaseOptions(task="chat", device="cpu", dtype="float32"))
    model: Any = place(base.model, Recipe.make(r=2, dropout=0), task="chat", layer_classes=LAYER_CLASSES)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    if asked:
        base.model.activation_checkpointing_enable(asked)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_hatrack_recomputes_in_the_form_that_gradients_pass(tiny_decoder: Path) -> None:
    plain, recomputed = _gradients(tiny_decoder), _gradients(tiny_decoder, **CHECKPOINTING)
    assert len(plain) == 28 and all(gradient.abs().sum() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_other_form_loses_them_over_frozen_inputs() -> None:
    """What people run into elsewhere; a run here that came to it would stop at its first step."""
    layer, inputs = torch.nn.Linear(4, 4), torch.ones(1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "None of the inputs have requires_grad=True"
        assert not checkpoint(layer, inputs, use_reentrant=True).requires_grad
    assert checkpoint(layer, inputs, use_reentrant=False).requires_grad
    assert no_gradient(Step(1, 3.7, 0.0, [1], "rows.csv")) is not None
