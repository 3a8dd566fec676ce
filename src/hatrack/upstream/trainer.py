"""Private names of transformers' Trainer: the hooks that a run needs."""

from pathlib import Path
from typing import Any

import transformers
from transformers import Trainer, TrainerCallback

from hatrack.errors import MachineError
from hatrack.upstream.names import require, supported

NAMES = (
    "transformers.Trainer._get_grad_norm(model, grad_norm)",
    "transformers.Trainer._save_checkpoint(model, trial)",
    "transformers.Trainer._load_best_model()",
    "transformers.Trainer._save_optimizer_and_scheduler(output_dir)",
    "transformers.Trainer._save_scaler(output_dir)",
    "transformers.Trainer._save_rng_state(output_dir)",
    "transformers.Trainer.get_batch_samples(epoch_iterator, num_batches, device)",
    "transformers.Trainer.loss_is_scaled_for_ga",
)
require("transformers", *NAMES)


class HookedTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """transformers' Trainer, with public names for the private methods that hatrack overrides and calls.

    Raises MachineError after a step that was taken without `before_step`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._check = _HookCheck()
        self.add_callback(self._check)

    def before_step(self, norm: float) -> None:
        """Called with the norm of a step's gradients, before the optimizer takes the step. May raise."""

    def write_checkpoint(self) -> None:
        """Called where the Trainer would save a checkpoint of its own."""

    def save_training_state(self, folder: Path) -> None:
        """Saves optimizer, schedule, gradient scaler and random state."""
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))

    def load_best_checkpoint(self) -> None:
        """Loads the adapter of `state.best_model_checkpoint`."""
        self._load_best_model()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._check.called = True
        self.before_step(float(norm))
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.write_checkpoint()


class _HookCheck(TrainerCallback):  # type: ignore[misc]
    called = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.called:
            raise MachineError(
                "hatrack does not work with this version of transformers, whose Trainer does not call _get_grad_norm",
                got=f"transformers {transformers.__version__}",
                fix=f"pip install '{supported('transformers')}'",
            )
        self.called = False
