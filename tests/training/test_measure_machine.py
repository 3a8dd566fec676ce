"""The probe: prices that are found again, and that a machine cannot have below nothing."""

import numpy as np
import pytest
import torch

from hatrack.planning.memory import Method, MicroBatch
from hatrack.planning.time import MachineSpeed, step_counts
from hatrack.training import measure_machine


def test_prices_are_found_again() -> None:
    parts = np.array([[1.0, 5.0], [3.0, 1.0], [2.0, 2.0], [7.0, 0.5]])
    assert measure_machine.fit_not_negative(parts, parts @ np.array([0.3, 0.02])) == pytest.approx((0.3, 0.02))
    assert measure_machine.fit_not_negative(parts, parts @ np.array([0.3, -0.02]))[1] == 0
    assert measure_machine.fit_not_negative(parts, parts @ np.array([-0.3, 0.2]))[0] == 0
    assert measure_machine.fit_not_negative(parts, -parts[:, 0]) == (0, 0)


def test_the_small_models_take_real_steps() -> None:
    """All their linear layers are adapted, and what the plan counts of them is what they have."""
    for model, anatomy, task in (measure_machine._decoder(torch.float32), measure_machine._encoder(torch.float32)):
        adapted = sum(hasattr(module, "lora_A") for module in model.modules())
        assert adapted == anatomy.adapted_layers == anatomy.linear_layers == (21 if task == "chat" else 18)
        measure_machine._train_step(model, measure_machine._batch(2, 8, task), task)
        assert all(p.grad is None for p in model.parameters())
        small, large = (step_counts(anatomy, Method(), MicroBatch(rows, 8, 7 * rows)) for rows in (1, 4))
        assert large.operations == 4 * small.operations and large.calls == small.calls
        assert small.seconds(MachineSpeed(1.0, 0.0, 0.0, 1.0, 1.0, "")) == small.operations
