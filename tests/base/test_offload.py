"""Layers lent to an accelerator: here the processor plays it, with streams and events that only keep the order."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hatrack.base.layer_stack import LayerStack, find_layer_stack
from hatrack.base.mapped_layers import NON_LAYER_WEIGHTS
from hatrack.base.offload import OffloadedLayers
from tests.base.tiny import save

LAYERS = 4


class Played:
    """A stream or an event: work is done at once, and noted."""

    notes: list[str] = []  # noqa: RUF012

    def __init__(self, device: Any = None) -> None:
        self.recorded = 0

    def record(self, stream: Any) -> None:
        self.recorded += 1

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: "Played") -> None:
        self.notes.append(f"waits for {event.recorded}")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


@pytest.fixture
def lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, LayerStack, OffloadedLayers]:
    """A model, its layers, and the window that lends them; the model computes in float32, its file is bfloat16."""
    folder = save(tmp_path / "base", "Llama", "causal", num_hidden_layers=LAYERS)
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    real = torch.empty

    def unlocked(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return real(*args, **options)

    monkeypatch.setattr(torch, "empty", unlocked)
    monkeypatch.setattr(torch, "Stream", Played)
    monkeypatch.setattr(torch, "Event", Played)
    monkeypatch.setattr(torch.accelerator, "current_stream", Played)
    trunk = find_layer_stack(model)
    window = OffloadedLayers(model, trunk, torch.float32, folder, torch.device("cpu"))
    return model, trunk, window


def _weights(trunk: LayerStack, number: int) -> list[torch.Tensor]:
    return [weight.data.clone() for weight in trunk.layers[number].parameters()]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3, 0]], ids=["up", "down", "not as told"])
def test_a_layer_that_is_shown_holds_its_own_weights(
    lent: tuple[Any, LayerStack, OffloadedLayers], order: list[int]
) -> None:
    _, trunk, window = lent
    stored = [_weights(trunk, number) for number in range(LAYERS)]
    for number, then in zip(order, [*range(1, LAYERS), NON_LAYER_WEIGHTS, NON_LAYER_WEIGHTS], strict=False):
        window.load(number, next_part=then)
        for found, wanted in zip(_weights(trunk, number), stored[number], strict=True):
            assert found.dtype == torch.float32 and torch.equal(found, wanted.float())
    window.unload()
    for number in range(LAYERS):
        assert all(map(torch.equal, _weights(trunk, number), stored[number]))


def test_the_next_layer_never_goes_where_the_shown_one_is(lent: tuple[Any, LayerStack, OffloadedLayers]) -> None:
    _, trunk, window = lent
    window.dtype = torch.bfloat16  # no copy is made, so that weights lie in their places
    for number in (0, 1, 2, 3, 2, 1, 0):
        window.load(number, next_part=(number + 1) % LAYERS)
        before = _weights(trunk, number)
        for reading in window._pending_reads.values():
            reading.result()
        assert all(map(torch.equal, _weights(trunk, number), before))
        assert len({weight.data_ptr() for weight in trunk.layers[number].parameters()}) == len(before)


def test_a_pass_through_the_model_lends_each_layer(
    lent: tuple[Any, LayerStack, OffloadedLayers], tmp_path: Path
) -> None:
    model, _, window = lent
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    for weight in {id(weight): weight for weight in model.parameters() if weight.dtype != torch.float32}.values():
        if not any(weight is each for layer in window.layer_stack.layers for each in layer.parameters()):
            weight.data = weight.data.float()  # as `move_all_but_layers` leaves it on an accelerator
    window.stream()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(input_ids=ids).logits, wanted(input_ids=ids).logits)
