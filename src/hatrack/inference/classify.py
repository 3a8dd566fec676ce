"""Classifies texts: finds their labels and the probability of each label."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from hatrack.data.tokens import check_prompt_tokens
from hatrack.errors import AdapterError, DataError
from hatrack.inference.active import ActiveModel

BATCH_SIZE = 32


def classify(active: ActiveModel, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Classifies texts in batches of 32. Each result has `text`, `label`, `scores`, and `cut` if the text was too long.

    Raises DataError for a text without tokens, AdapterError if the model's output is not a number.
    """
    batches = (texts[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE))
    return [answer for batch in batches for answer in _classify_batch(active, batch)]


@torch.no_grad()
def _classify_batch(active: ActiveModel, texts: Sequence[str]) -> list[dict[str, Any]]:
    tokenizer, base, card = active.tokenizer, active.base, active.card
    max_length = min(card.max_length or tokenizer.model_max_length, active.max_positions)
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    lengths = inputs["attention_mask"].sum(1).tolist()
    if not all(lengths):
        raise DataError("the tokenizer returns no tokens for this text", fix="replace the text")
    check_prompt_tokens(inputs["input_ids"].numpy(), tokenizer, base.model.config, card.task)
    logits = active.model(
        input_ids=inputs["input_ids"].to(base.device), attention_mask=inputs["attention_mask"].to(base.device)
    ).logits.float()
    probabilities = (logits.sigmoid() if card.multi_label else logits.softmax(-1)).tolist()  # (B, labels)
    answers = []
    for text, row, length in zip(texts, probabilities, lengths, strict=True):
        answer = _answer(text, dict(zip(card.labels, row, strict=True)), card.multi_label)
        if length == max_length and len(tokenizer(text, verbose=False)["input_ids"]) > max_length:
            answer["cut"] = True
        answers.append(answer)
    return answers


def _answer(text: str, scores: dict[str, float], multi_label: bool) -> dict[str, Any]:
    if any(math.isnan(score) for score in scores.values()):
        raise AdapterError("the model's output is not a number", fix="train again with a lower --lr")
    label: Any = max(scores, key=lambda name: scores[name])
    if multi_label:
        label = [name for name, score in scores.items() if score > 0.5]
    return {"text": text, "label": label, "scores": scores}
