"""Losses and metrics against their definitions, and against transformers' own loss."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hatrack.data.render import TokenRows
from hatrack.evaluate.loss import count_losses, losses
from hatrack.evaluate.score import ScoreSettings, f1, score

CPU = torch.device("cpu")


def _rows(lengths: list[int], labels: np.ndarray | None = None) -> TokenRows:
    random = np.random.default_rng(0)
    total = sum(lengths)
    return TokenRows(
        ids=random.integers(4, 40, total).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        supervised=random.random(total) < 0.6,
        labels=np.empty(0) if labels is None else labels,
        row_numbers=np.arange(len(lengths)),
        cut_count=0,
    )


@pytest.fixture
def decoder(tiny_decoder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.float32).eval()  # type: ignore[no-any-return]


def test_token_loss_is_transformers_own(decoder: torch.nn.Module) -> None:
    ids = torch.randint(4, 40, (3, 12))
    labels = ids.clone()
    labels[:, :5] = -100
    labels[2, 8:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    values, rows, _ = losses(decoder, batch, "chat")
    assert values.mean().item() == pytest.approx(decoder(**batch).loss.item(), rel=1e-6)
    assert len(values) == count_losses(batch, "chat") == int((labels[:, 1:] != -100).sum())
    assert rows.bincount(minlength=3).tolist() == (labels[:, 1:] != -100).sum(1).tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_score_does_not_depend_on_the_batches(decoder: torch.nn.Module, batch_size: int) -> None:
    rows = _rows([5, 17, 9, 12, 3, 8, 20])
    found = score(decoder, rows, ScoreSettings("chat", batch_size, 0, CPU))
    each = [score(decoder, _one(rows, i), ScoreSettings("chat", 1, 0, CPU)) for i in range(len(rows))]
    assert found.outcomes == pytest.approx([float(s.outcomes[0]) for s in each], rel=1e-5)
    assert found.weights.tolist() == [float(s.weights[0]) for s in each]
    assert found.metrics["loss"] == pytest.approx(found.outcomes.sum() / found.weights.sum())
    assert found.metrics["perplexity"] == pytest.approx(math.exp(found.metrics["loss"]))


def _one(rows: TokenRows, index: int) -> TokenRows:
    ids, learn, _ = rows.row(index)
    return TokenRows(ids, np.array([0, len(ids)]), learn, np.empty(0), np.array([0]), 0)


@pytest.mark.parametrize("several", [False, True])
def test_classes_are_counted_right(tiny_encoder: Path, several: bool) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=3, dtype=torch.float32).eval()
    random = np.random.default_rng(1)
    labels = random.integers(0, 2, (9, 3)).astype(np.float32) if several else random.integers(0, 3, 9)
    rows = _rows([5, 7, 5, 9, 4, 6, 8, 3, 7], labels)
    found = score(model, rows, ScoreSettings("classify", 4, 0, CPU))
    guesses = []
    for index in range(9):
        logits = model(torch.tensor(rows.row(index)[0][None].astype(np.int64))).logits[0]
        guesses.append((logits > 0).long().tolist() if several else int(logits.argmax()))
    right = [np.array_equal(guess, label.astype(int)) for guess, label in zip(guesses, labels, strict=True)]
    assert found.outcomes.tolist() == [float(value) for value in right]
    assert found.metrics["accuracy"] == pytest.approx(np.mean(right))
    average = "micro" if several else "macro"
    assert found.metrics["f1"] == pytest.approx(
        f1_score(labels.astype(int), guesses, average=average, zero_division=0.0)
    )


@pytest.mark.parametrize("several", [False, True])
def test_f1_is_scikit_learns(several: bool) -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        shape = (random.integers(1, 9), 3) if several else (random.integers(1, 9),)
        wanted, guesses = random.integers(0, 2 if several else 4, (2, *shape))
        average = "micro" if several else "macro"
        assert f1(wanted, guesses) == pytest.approx(f1_score(wanted, guesses, average=average, zero_division=0.0))


def test_scoring_leaves_the_mode_and_holds_no_graph(decoder: torch.nn.Module) -> None:
    decoder.train()
    score(decoder, _rows([5, 6]), ScoreSettings("chat", 2, 0, CPU))
    assert decoder.training
