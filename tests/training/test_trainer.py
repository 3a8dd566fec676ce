"""What learns with hatrack's parts learns as with transformers' Trainer and peft's layers: speed costs no quality."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from hatrack.adapter.place import place
from hatrack.data.batch import collate
from hatrack.data.render import TokenRows
from hatrack.layers.fast_base import ATTENTION_NAME, FastDropout, speed_up
from hatrack.layers.fast_lora import LAYER_CLASSES
from hatrack.recipe import Recipe
from hatrack.training.trainer import HatTrainer, TrainerRows

STEPS = 30


@pytest.fixture
def pair(tiny_encoder: Path) -> tuple[PeftModel, PeftModel]:
    """An encoder with a head: with hatrack's layers and kernels, and the same with peft's and torch's."""
    torch.manual_seed(3)
    chances = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.5}
    base = BertForSequenceClassification.from_pretrained(tiny_encoder, dtype=torch.float32, **chances)
    base.requires_grad_(False)
    for layer in base.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.mul_(10)  # attention chooses, and what it chooses matters
    recipe = Recipe.make(base=str(tiny_encoder), data="-", r=4, dropout=0.1)
    models = []
    for classes in (LAYER_CLASSES, None):
        own = copy.deepcopy(base)
        if classes:
            speed_up(own)
        models.append(place(own, recipe, task="classify", layer_classes=classes))
    for name, parameter in models[1].named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
            models[0].get_parameter(name).data.copy_(parameter.data)
    return models[0], models[1]


def _rows(count: int) -> TokenRows:
    """Rows of 3 to 20 tokens, whose first token decides."""
    random = np.random.default_rng(4)
    lengths = random.integers(3, 21, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(6, 40, offsets[-1]).astype(np.int32)
    labels = (ids[offsets[:-1]] > 22).astype(np.int64)
    return TokenRows(ids, offsets, np.zeros(len(ids), bool), labels, np.arange(count), 0)


def _trained(model: PeftModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def test_a_run_takes_the_steps_of_transformers_and_peft(tmp_path: Path, pair: tuple[PeftModel, PeftModel]) -> None:
    """Without dropout, and given the same batches: loss, clipping, optimizer and schedule are the same."""
    rows, losses = _rows(100), []
    before = _trained(pair[0])
    for model in pair:
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
    settings: dict[str, Any] = {"lr_scheduler_type": "linear", "warmup_steps": 3, "max_grad_norm": 0.3}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=STEPS,  # of 13 batches an epoch, the last of 4 rows
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    ours = HatTrainer(
        model=pair[0], args=arguments, rows=TrainerRows(rows, rows, "classify", pad_id=0), watch=lambda *step: None
    )

    class Stock(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return ours.get_train_dataloader()

    for trainer in (ours, Stock(model=pair[1], args=arguments, train_dataset=ours.train_dataset)):
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], abs=1e-4)
    moved, wanted = _trained(pair[0]) - before, _trained(pair[1]) - before
    assert float((moved - wanted).norm()) < 1e-3 * float(wanted.norm())


def test_dropout_spreads_gradients_as_torchs_does(pair: tuple[PeftModel, PeftModel]) -> None:
    """Over many masks of the base's and the adapters' dropout, gradients have the same mean and the same variance."""
    assert any(isinstance(layer, FastDropout) for layer in pair[0].modules())
    assert pair[0].config._attn_implementation == ATTENTION_NAME
    rows, draws = _rows(8), 200
    batch = collate([rows.row(index) for index in range(len(rows))], 0, "classify")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    means, variances = [], []
    for model in pair:
        model.train()
        found = []
        for seed in range(draws):
            torch.manual_seed(seed)
            model.zero_grad()
            F.cross_entropy(model(**inputs).logits, batch["labels"]).backward()  # type: ignore[no-untyped-call]
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        gradients = torch.stack(found).double()
        means.append(gradients.mean(0))
        variances.append(float(gradients.var(0).sum()))
    chance = sum(variances) / draws  # of the squared distance between the means
    assert float((means[0] - means[1]).square().sum()) < 2 * chance < 0.1 * float(means[1].square().sum())
    assert variances[0] == pytest.approx(variances[1], rel=0.1)
