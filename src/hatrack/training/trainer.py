"""The one Trainer subclass: batches of like length, losses summed by token, scores without all logits in memory.

Everything else (optimizer, schedule, clipping, checkpoints, trackers, several processes) is transformers' own.
Knows nothing of recipes, data files or how adapters are placed.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hatrack.data.batch import LengthBatches, RowsDataset, collate
from hatrack.data.render import TokenRows
from hatrack.evaluate.loss import Batch, count_losses, losses
from hatrack.evaluate.score import Score, ScoreSettings, score
from hatrack.training import checkpoint
from hatrack.training.layer_streaming import LayerStreaming
from hatrack.training.prefix_cache import FrozenPrefix
from hatrack.training.smoothed_loss import SmoothedLoss
from hatrack.upstream.trainer import HookedTrainer

StepWatch = Callable[[int, float, float, Callable[[], list[int]]], None]
"""Called before each optimizer step with its number (from 1), loss, gradient norm, and a function that returns the
numbers of its rows. May raise: then the step is not taken."""
BEST = "goodness"
"""The metric that selects the best epoch's adapter; higher is better."""
FIRST_ROWS = 32
"""Number of held-out rows that estimate the loss of all, until all are scored."""


@dataclass
class TrainerArguments(TrainingArguments):  # type: ignore[misc]
    """`TrainingArguments` for one adapter on one device; several devices go through accelerate.

    `streamed`: the base's layers are moved to the device one at a time, by `LayerStreaming`.
    """

    streamed: bool = False

    @property
    def n_gpu(self) -> int:
        """At most 1: transformers would wrap the model in DataParallel on a machine with several GPUs."""
        return min(int(super().n_gpu), 1)

    @property
    def place_model_on_device(self) -> bool | None:
        """Whether the Trainer moves the whole model to the device; None leaves it to the Trainer."""
        return False if self.streamed else super().place_model_on_device


@dataclass(frozen=True)
class TrainerRows:
    """The training rows and the held-out rows of a task (classify, chat or complete), as tokens.

    `pad_id` is the padding token.
    """

    train: TokenRows
    held_out: TokenRows
    task: str
    pad_id: int


class HatTrainer(HookedTrainer):
    """Trains the adapter of `model` and scores it on held-out rows.

    `watch` is called before each optimizer step. `on_start_score` is called with the score of the initial adapter. A
    copy of the initial adapter is scored at the first evaluation, so that the first step need not wait for it.
    `streaming` computes steps and scores where the base is larger than memory; `prefix` computes the layers below all
    adapters, or reads their cached outputs. Further keywords go to `Trainer`.
    """

    def __init__(
        self,
        *,
        rows: TrainerRows,
        watch: StepWatch,
        on_start_score: Callable[[Score], None] = lambda score: None,
        streaming: LayerStreaming | None = None,
        prefix: FrozenPrefix | None = None,
        **options: Any,
    ) -> None:
        super().__init__(train_dataset=RowsDataset(rows.train), eval_dataset=RowsDataset(rows.held_out), **options)
        self.accelerator.device_placement = streaming is None
        self.rows, self.watch, self.on_start_score = rows, watch, on_start_score
        self.streaming, self.prefix = streaming, prefix
        self.scores: dict[int, Score] = {}  # by optimizer step; those of this process
        self._start_score: Score | None = None
        self._start_adapter = [parameter.detach().clone() for parameter in self._trained()]
        self.step_loss: torch.Tensor | float = 0.0
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the items of the whole step, not of a micro-batch
        self._micro_batches: list[Batch] = []  # of this step, so far
        self._step_length = 0.0  # tokens of a row in this step, padding included
        self.smoothed = SmoothedLoss(rows.train)

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(self.train_dataset, batch_sampler=self._batches(), collate_fn=self._collate)
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def _batches(self) -> LengthBatches:
        size, by_tokens = self.args.per_device_train_batch_size, self.rows.task != "classify"
        return LengthBatches(self.rows.train.lengths, size, self.args.seed, by_tokens=by_tokens)

    def rows_of_step(self, number: int) -> list[int]:
        """The numbers of the rows of optimizer step `number` (from 1), on all processes together."""
        batches = self._batches()
        per_step = self.args.gradient_accumulation_steps * self.args.world_size
        epoch, index = divmod(number - 1, -(-len(batches) // per_step))
        batches.set_epoch(epoch)
        chosen = list(batches)[index * per_step : (index + 1) * per_step]
        return [int(self.rows.train.row_numbers[row]) for batch in chosen for row in batch]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The micro-batches of the next step, and the number of items (rows or supervised tokens) in all of them."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        counted = torch.tensor(sum(count_losses(batch, self.rows.task) for batch in batches), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counted = self.accelerator.gather(counted).sum()
        return batches, counted.clamp(min=1)

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None) -> Any:
        """Computes the gradients of one micro-batch, or with streaming of all micro-batches of a step, at its last.

        Random numbers depend only on the seed, the step, and the micro-batch's place in the step.
        """
        self._micro_batches.append(inputs)
        seeds = [_seed(self.args.seed, self.state.global_step, place) for place in range(len(self._micro_batches))]
        if self.streaming is None:
            torch.manual_seed(seeds[-1])
            loss = super().training_step(model, inputs, num_items_in_batch)
        elif not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        else:
            model.train()
            loss = self.streaming.step(
                [
                    {name: tensor.to(self.args.device) for name, tensor in batch.items()}
                    for batch in self._micro_batches
                ],
                seeds,
                lambda batch: self.compute_loss(model, batch, num_items_in_batch=num_items_in_batch),
            )
        if self.accelerator.sync_gradients:
            self._step_length = float(np.mean([batch["input_ids"].shape[1] for batch in self._micro_batches]))
            self._micro_batches = []
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The sum of this micro-batch's losses over the number of items in the whole step."""
        with self.prefix.use_cached(inputs) if self.prefix and not self.streaming else nullcontext():
            values, _, logits = losses(model, inputs, self.rows.task)
        loss = values.sum() / (len(values) if num_items_in_batch is None else num_items_in_batch)
        self.step_loss += loss.detach()
        loss = loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss
        return (loss, logits) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores the held-out rows. Metrics are named as transformers does: `eval_loss`."""
        self.score_at_start()
        found = self.scores[self.state.global_step] = self.score_held_out()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.metrics.items()}
        self.log(dict(metrics))
        metrics[f"{metric_key_prefix}_{BEST}"] = _goodness(found, self.rows.task)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score_at_start(self) -> Score:
        """The held-out score of the initial adapter and head, measured once."""
        if self._start_score is None:
            self._start_score = self._score_start_adapter()
            self._start_adapter = []
            self.on_start_score(self._start_score)
        return self._start_score

    def loss_at_start(self) -> float:
        """The held-out loss of the initial adapter; on the first rows only, until all are scored."""
        return (self._start_score or self._score_start_adapter(FIRST_ROWS)).metrics["loss"]

    @contextmanager
    def restarting_on(self, error: type[Exception]) -> Iterator[None]:
        """Restores the initial adapter and head if the block raises `error`, before any score."""
        try:
            yield
        except error:
            self._set_trained(self._start_adapter)
            raise

    @torch.no_grad()
    def _score_start_adapter(self, rows: int | None = None) -> Score:
        trained = [parameter.detach().clone() for parameter in self._trained()]
        try:
            self._set_trained(self._start_adapter)
            return self.score_held_out(rows)
        finally:
            self._set_trained(trained)

    def _trained(self) -> list[torch.Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def _set_trained(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._trained(), values, strict=True):
            parameter.copy_(value)

    def score_best(self) -> Score:
        """Loads the best epoch's adapter and returns its score; measures it if this process has not yet."""
        self.load_best()
        best = self.state.best_global_step
        return self.scores[best] if best in self.scores else self.score_held_out()

    def score_held_out(self, rows: int | None = None) -> Score:
        """Scores the current model on the held-out rows, or on the first `rows` of them. Logs nothing."""
        lower = self.streaming or self.prefix
        return score(
            self.model,
            self.rows.held_out if rows is None else self.rows.held_out.first(rows),
            ScoreSettings(self.rows.task, self.args.per_device_eval_batch_size, self.rows.pad_id, self.args.device),
            lower.losses if lower else None,
        )

    def load_best(self) -> None:
        """Loads the best epoch's adapter. It is found by its step, as the run's folder may have been moved."""
        self.state.best_model_checkpoint = str(checkpoint.folder_of_step(self._run, self.state.best_global_step))
        self.load_best_checkpoint()

    @property
    def _run(self) -> Path:
        return Path(self.args.output_dir)

    def write_checkpoint(self) -> None:
        """Saves everything a resumed run needs: adapter, optimizer, schedule, random state, step and best epoch.

        The order of the data is a function of the seed and the step, and needs no file.
        """
        self.store_flos()
        if self.prefix:
            self.prefix.flush()  # a resumed run must read the hidden states that this one would
        with checkpoint.write_checkpoint(self._run, self.state.global_step) as folder:
            self.save_model(str(folder))
            self.save_training_state(folder)
            self.state.save_to_json(str(folder / checkpoint.STATE))
        checkpoint.prune(self._run, self.state.best_global_step)

    def before_step(self, norm: float) -> None:
        """Called after a step's gradients and before the optimizer step: the last moment to stop a bad step."""
        loss, self.step_loss = float(self.step_loss), 0.0
        number = self.state.global_step + 1
        self.watch(number, loss, norm, lambda: self.rows_of_step(number))
        self.smoothed.add(loss, self._step_length)

    def _collate(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        return collate(rows, self.rows.pad_id, self.rows.task)


def _seed(*path: int) -> int:
    """Derives a seed for torch from a combination of numbers."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0])


def _goodness(score: Score, task: str) -> float:
    """For classifiers, accuracy (ties: lower loss); otherwise minus the loss."""
    loss = score.metrics["loss"]
    return score.metrics["accuracy"] + 1e-6 / (1 + loss) if task == "classify" else -loss
