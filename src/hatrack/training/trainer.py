"""The one Trainer subclass: batches of like length, a loss weighed by token, scoring that never holds all logits.

Everything else (optimizer, schedule, clipping, checkpoints, trackers, several processes) is transformers' own.
Knows nothing of recipes, files of data or how adapters are placed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from hatrack.data.batch import LengthBatches, RowsDataset, collate
from hatrack.data.render import TokenRows
from hatrack.evaluate.loss import Batch, count_losses, losses
from hatrack.evaluate.score import Score, score
from hatrack.training import checkpoint
from hatrack.training.layer_streaming import LayerStreaming
from hatrack.training.prefix_cache import Prefix
from hatrack.training.smoothed_loss import SmoothedLoss

Watcher = Callable[[int, float, float, Callable[[], list[int]]], None]
BEST = "goodness"
"""The metric that decides which epoch is kept; higher is better."""
FEW = 32
"""Held-out rows that tell about what loss training began with."""


class HatTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Trains the adapter of `model` on `rows` and scores it on `held_out`.

    `task` is classify, chat or complete; `pad_id` fills short rows up. `watch(step, loss, norm, rows)` is told of each
    step before it is taken, and may raise. `tell_before` is told at the first evaluation how the model scored that
    training began with: its few tensors are kept, so that nobody waits for that score before the first step. `sweep`
    takes the steps and scores of a base that is larger than memory; `prefix` stands for the layers below all adapters.
    Further keywords go to `Trainer`.
    """

    def __init__(
        self,
        *,
        rows: TokenRows,
        held_out: TokenRows,
        task: str,
        pad_id: int,
        watch: Watcher,
        tell_before: Callable[[Score], None] = lambda score: None,
        sweep: LayerStreaming | None = None,
        prefix: Prefix | None = None,
        **options: Any,
    ) -> None:
        self.sweep = sweep
        super().__init__(train_dataset=RowsDataset(rows), eval_dataset=RowsDataset(held_out), **options)
        self.accelerator.device_placement = sweep is None
        self.rows, self.held_out, self.task, self.pad_id, self.watch = rows, held_out, task, pad_id, watch
        self.prefix, self.tell_before = prefix, tell_before
        self.scores: dict[int, Score] = {}  # of this process, by their steps
        self._before: Score | None = None
        self._untrained = [parameter.detach().clone() for parameter in self._trained()]
        self.step_loss: torch.Tensor | float = 0.0
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the items of the whole step, not of a micro-batch
        self._waiting: list[Batch] = []  # this step's micro-batches so far
        self._length = 0.0  # tokens of a row in this step, padding included
        self.smoothed = SmoothedLoss(rows)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """A base that is streamed stays where its window takes it from."""
        if self.sweep is None:
            super()._move_model_to_device(model, device)

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(self.train_dataset, batch_sampler=self._batches(), collate_fn=self._collate)
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def _batches(self) -> LengthBatches:
        size, by_tokens = self.args.per_device_train_batch_size, self.task != "classify"
        return LengthBatches(self.rows.lengths, size, self.args.seed, by_tokens=by_tokens)

    def rows_of_step(self, number: int) -> list[int]:
        """The row numbers that optimizer step `number`, counted from 1, learns from, on all processes together."""
        batches = self._batches()
        several = self.args.gradient_accumulation_steps * self.args.world_size
        epoch, index = divmod(number - 1, -(-len(batches) // several))
        batches.set_epoch(epoch)
        chosen = list(batches)[index * several : (index + 1) * several]
        return [int(self.rows.rows[row]) for batch in chosen for row in batch]

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None) -> Any:
        """Gradients of one micro-batch, whose random numbers depend on the seed, the step and its place in it alone.

        A sweep waits for the step's last micro-batch, and then does them all.
        """
        self._waiting.append(inputs if self.sweep is None else self._prepare_inputs(inputs))
        seeds = [_seed(self.args.seed, self.state.global_step, place) for place in range(len(self._waiting))]
        if self.sweep is None:
            torch.manual_seed(seeds[-1])
            loss = super().training_step(model, inputs, num_items_in_batch)
        elif not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        else:
            model.train()
            loss = self.sweep.step(
                self._waiting,
                seeds,
                lambda batch: self.compute_loss(model, batch, num_items_in_batch=num_items_in_batch),
            )
        if self.accelerator.sync_gradients:
            self._length = float(np.mean([batch["input_ids"].shape[1] for batch in self._waiting]))
            self._waiting = []
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The sum of this micro-batch's losses over the number of items in the whole step."""
        with self.prefix.given(inputs) if self.prefix and not self.sweep else nullcontext():
            values, _, logits = losses(model, inputs, self.task)
        loss = values.sum() / (len(values) if num_items_in_batch is None else num_items_in_batch)
        self.step_loss += loss.detach()
        loss = loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss
        return (loss, logits) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores the held-out rows; `metric_key_prefix` stands before each metric's name, as transformers does."""
        self.score_before()
        found = self.scores[self.state.global_step] = self.score_held_out()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.metrics.items()}
        self.log(dict(metrics))
        metrics[f"{metric_key_prefix}_{BEST}"] = _goodness(found, self.task)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score_before(self) -> Score:
        """The held-out rows' score with the adapter and head that training began with, measured once."""
        if self._before is None:
            self._before = self._untrained_score()
            self._untrained = []
            self.tell_before(self._before)
        return self._before

    @contextmanager
    def starting_over_after(self, error: type[Exception]) -> Iterator[None]:
        """Takes the adapter and head that training began with where the block raises `error`, before any score."""
        try:
            yield
        except error:
            with torch.no_grad():
                torch._foreach_copy_(self._trained(), self._untrained)
            raise

    def loss_before(self) -> float:
        """The same rows' loss, or that of the first few while it is not measured."""
        return (self._before or self._untrained_score(FEW)).metrics["loss"]

    @torch.no_grad()
    def _untrained_score(self, rows: int | None = None) -> Score:
        now = [parameter.detach().clone() for parameter in self._trained()]
        try:
            torch._foreach_copy_(self._trained(), self._untrained)
            return self.score_held_out(rows)
        finally:
            torch._foreach_copy_(self._trained(), now)

    def _trained(self) -> list[torch.Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def score_best(self) -> Score:
        """Takes the best epoch's adapter, and its score: measured already, unless that was before a resume."""
        self.load_best()
        best = self.state.best_global_step
        return self.scores[best] if best in self.scores else self.score_held_out()

    def score_held_out(self, rows: int | None = None) -> Score:
        """The score of the held-out rows, or of the first few, with the model as it is now; logged nowhere."""
        part = self.sweep or self.prefix
        return score(
            self.model,
            self.held_out if rows is None else self.held_out.first(rows),
            task=self.task,
            batch_size=self.args.per_device_eval_batch_size,
            pad_id=self.pad_id,
            device=self.args.device,
            run=part.losses if part else None,
        )

    def load_best(self) -> None:
        """Takes the best epoch's adapter, found by its step: the run's folder may have moved since it was written."""
        self.state.best_model_checkpoint = str(checkpoint.folder_of(self._run, self.state.best_global_step))
        self._load_best_model()

    @property
    def _run(self) -> Path:
        return Path(self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Everything that going on needs: adapter, optimizer, schedule, random state, step and best epoch.

        The order of the data is a function of the seed and the step, and needs no file.
        """
        self.store_flos()
        if self.prefix:
            self.prefix.flush()  # a resumed run reads what this one would: the same bits
        with checkpoint.writing(self._run, self.state.global_step) as folder:
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / checkpoint.STATE))
        checkpoint.prune(self._run, self.state.best_global_step)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Asked for between a step's gradients and the step itself, when a bad one can still be stopped."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss, self.step_loss = float(self.step_loss), 0.0
        number = self.state.global_step + 1
        self.watch(number, loss, float(norm), lambda: self.rows_of_step(number))
        self.smoothed.add(loss, self._length)
        return norm

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Any:
        counted = torch.tensor(sum(count_losses(batch, self.task) for batch in batch_samples), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counted = self.accelerator.gather(counted).sum()
        return counted.clamp(min=1)

    def _collate(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        return collate(rows, self.pad_id, self.task)


def _seed(*path: int) -> int:
    """A seed for torch from whole numbers, each combination with its own."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0])


def _goodness(score: Score, task: str) -> float:
    """Accuracy, where equal the lower loss; to generate, the lower loss alone."""
    loss = score.metrics["loss"]
    return score.metrics["accuracy"] + 1e-6 / (1 + loss) if task == "classify" else -loss
