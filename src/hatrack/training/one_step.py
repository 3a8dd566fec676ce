"""One step on trial, for `hatrack check`: is the loss a number, does a gradient arrive; nothing is kept of it."""

import torch
from transformers import set_seed

from hatrack.adapter.place import place
from hatrack.check.finding import Finding
from hatrack.check.prepared import Prepared
from hatrack.check.running import Step, loss_not_a_number, no_gradient
from hatrack.data.batch import LengthBatches, collate
from hatrack.evaluate.loss import losses
from hatrack.layers.fast_lora import LAYER_CLASSES
from hatrack.training.auto_settings import measured_rate
from hatrack.training.load import load_for

ROWS = 4


def one_step(facts: Prepared) -> list[Finding]:
    """Loads the base, places the adapter, and takes the gradient of a few rows. With `--lr auto` the rate is measured.

    Raises HatrackError where the base cannot be loaded after all.
    """
    base = load_for(facts.recipe, facts.files, facts.examples, mapped=facts.plan.method.sweep)
    set_seed(facts.recipe.seed)
    model = place(base.model, facts.recipe, task=facts.task, layer_classes=LAYER_CLASSES)
    learn = facts.tokens.learn
    chosen = next(iter(LengthBatches(learn.lengths, min(ROWS, len(learn)), facts.recipe.seed)))
    batch = collate([learn.row(index) for index in chosen], base.tokenizer.pad_token_id, facts.task)
    model.train()
    loss = losses(model, {name: tensor.to(base.device) for name, tensor in batch.items()}, facts.task)[0].mean()
    loss.backward()  # type: ignore[no-untyped-call]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    model.zero_grad()
    rows = [int(learn.rows[index]) for index in chosen]
    step = Step(1, float(loss.detach()), norm, rows, str(facts.recipe.data))
    found = [loss_not_a_number(step, facts.schedule.lr, facts.usual_lr, facts.dtype), no_gradient(step)]
    if facts.recipe.lr == "auto" and not any(found):
        measured_rate(base, model, facts)
    return [finding for finding in found if finding is not None]
