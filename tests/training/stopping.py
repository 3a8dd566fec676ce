"""Runs that a person stops."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hatrack.errors import Interrupted
from hatrack.training.callbacks import GracefulStop


@contextmanager
def stopped_at_five() -> Iterator[None]:
    """A run inside the block is stopped after its fifth step, which it has to save and to say."""
    with pytest.MonkeyPatch.context() as patch:
        real = GracefulStop.on_step_end

        def stop_at_five(stop: GracefulStop, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stop.stopped |= state.global_step == 5
            real(stop, args, state, control, **kwargs)

        patch.setattr(GracefulStop, "on_step_end", stop_at_five)
        with pytest.raises(Interrupted, match="step 5 is saved"):
            yield
