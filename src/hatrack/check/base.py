"""Gotchas in the base and its tokenizer."""

import re

from hatrack.check.finding import Finding
from hatrack.check.prepared import Prepared

MARK = re.compile(r"<\|[\w ]+\|>|<(?:start|end)_of_turn>")


def no_chat_template(prepared: Prepared) -> Finding | None:
    """transformers: "Cannot use chat template functions because tokenizer.chat_template is not set"."""
    if prepared.task != "chat" or prepared.tokenizer.chat_template:
        return None
    return Finding(
        "no-chat-template",
        "the base has no chat template: conversations are written as 'User: ...' and 'Assistant: ...'",
        f"none in {prepared.base.source}",
        "an instruct version of the base, or go on: the adapter remembers how its conversations were written",
    )


def wrong_chat_template(prepared: Prepared) -> Finding | None:
    """Answers contain <|im_end|> as text: the chat template belongs to another base's tokenizer."""
    marks = sorted(set(MARK.findall(prepared.tokens.template or "")))
    pieces = {mark: prepared.tokenizer(mark, add_special_tokens=False)["input_ids"] for mark in marks}
    split = [mark for mark, ids in pieces.items() if len(ids) != 1 or ids[0] == prepared.tokenizer.unk_token_id]
    if not split:
        return None
    return Finding(
        "wrong-chat-template",
        "the chat template writes control tokens that this base's tokenizer does not have",
        f"{split[0]} becomes {len(pieces[split[0]])} tokens",
        "use the tokenizer and the template of the same base",
    )


def label_count(prepared: Prepared) -> Finding | None:
    """torch: "size mismatch for classifier.weight", or a new head where a trained one was expected."""
    own = _own_labels(prepared)
    if own is None or own == len(prepared.examples.labels):
        return None
    return Finding(
        "label-count",
        "the base is a classifier with a different number of labels: a new head replaces its own",
        f"{own} in the base, {len(prepared.examples.labels)} in the data",
        "go on, or give the data the base's labels",
    )


def base_already_tuned(prepared: Prepared) -> Finding | None:
    """Training makes the model worse: the base was an instruct model or a classifier already."""
    own = _own_labels(prepared)
    if prepared.task == "classify" and own == len(prepared.examples.labels):
        names = [str(name) for name in (prepared.config.get("id2label") or {}).values()]
        return Finding(
            "base-already-tuned",
            "the base is a classifier already: training continues from its head",
            f"its labels {', '.join(names[:5]) or own}; yours {', '.join(prepared.examples.labels[:5])}",
            "go on if they mean the same in the same order, else use the base it was made from",
        )
    if prepared.task == "complete" and prepared.tokenizer.chat_template:
        return Finding(
            "base-already-tuned",
            "the base was tuned to hold conversations, and plain text makes it forget how",
            f"a chat template in {prepared.base.source}",
            "--task chat, or the base it was tuned from",
        )
    return None


def _own_labels(prepared: Prepared) -> int | None:
    """Returns the number of labels of the base's classification head, or None if it has no such head."""
    architectures = prepared.config.get("architectures") or [""]
    if prepared.task != "classify" or not str(architectures[0]).endswith("ForSequenceClassification"):
        return None
    return len(prepared.config.get("id2label") or {0: "", 1: ""})
