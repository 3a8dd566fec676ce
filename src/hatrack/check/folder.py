"""Gotchas in an adapter's folder, found without loading its base."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hatrack.adapter.files import AdapterFiles, read_adapter
from hatrack.adapter.origin import find_base_of
from hatrack.adapter.registry import find_adapter
from hatrack.check.finding import Finding, FindingCollector
from hatrack.console import format_size

Tensors = dict[str, torch.Tensor]
PEFT_HEADS = ("classifier", "score")
"""Heads that peft lists in modules_to_save of every classifier, even if the base lacks them."""
EMBEDDINGS = ("embed_tokens", "word_embeddings", ".wte.", "lm_head")


def check_adapter(adapter: str | Path, base: str | None = None, *, trust: str | None = None) -> list[Finding]:
    """Returns all findings in an adapter's files. `base`: its base's new folder if that moved. `trust`: the base whose
    own code may run."""
    collector = FindingCollector()
    folder = collector.attempt("adapter-refused", find_adapter, adapter)
    files = collector.attempt("adapter-refused", read_adapter, folder)
    if files is None:
        return collector.found
    collector.attempt("base-lost", partial(find_base_of, base=base, trust=trust), files)
    tensors = load_file(files.weights)
    return collector.found + [found for gotcha in GOTCHAS if (found := gotcha(files, tensors)) is not None]


def inert_adapter(files: AdapterFiles, tensors: Tensors) -> Finding | None:
    """The tuned model answers like its base: B is zero, so B A adds nothing."""
    ups = [name for name in tensors if ".lora_B." in name]
    zero = [name for name in ups if not tensors[name].any()]
    if not zero:
        return None
    everything = len(zero) == len(ups) and len(ups) == sum(".lora_A." in name for name in tensors)
    return Finding(
        "inert-adapter",
        "the adapter adds nothing to its base" if everything else "part of the adapter adds nothing",
        f"{len(zero)} of {len(ups)} lora_B tensors are zero, the first {zero[0]}",
        "train again, with a higher --lr; or --targets whose output reaches the loss",
    )


def modules_to_save_unknown(files: AdapterFiles, tensors: Tensors) -> Finding | None:
    """peft says nothing if a name in modules_to_save matches no module; that module is neither trained nor saved."""
    wanted = set(files.config.get("modules_to_save") or []) - set(PEFT_HEADS)
    missing = [name for name in sorted(wanted) if not any(f".{name}." in f".{tensor}" for tensor in tensors)]
    if not missing:
        return None
    return Finding(
        "modules-to-save-unknown",
        f"{files.folder} names modules to save that are not in it",
        f"{', '.join(missing)} in modules_to_save, no such tensors",
        "correct the name and train again: the intended module was never saved",
        refused=True,
    )


def embeddings_saved(files: AdapterFiles, tensors: Tensors) -> Finding | None:
    """The adapter is hundreds of megabytes: peft saved the embeddings with it, without being asked to."""
    asked = files.config.get("modules_to_save") or []
    bulky = {
        name: tensor.numel() * tensor.element_size()
        for name, tensor in tensors.items()
        if ".lora_" not in name
        and "trainable_tokens_delta" not in name  # rows that were trained on purpose
        and not files.config.get("ensure_weight_tying")  # one of the two is in modules_to_save, the other follows it
        and any(part in f".{name}." for part in EMBEDDINGS)
        and not any(f".{module}." in f".{name}" for module in asked)
    }
    if not bulky:
        return None
    others = f" and {len(bulky) - 1} more" if len(bulky) > 1 else ""
    return Finding(
        "embeddings-saved",
        "embeddings or an output head were saved in the adapter by accident",
        f"{next(iter(bulky))}{others}, {format_size(sum(bulky.values()))}",
        "save it with save_embedding_layers=False; hatrack does",
    )


def quantized_base(files: AdapterFiles, tensors: Tensors) -> Finding | None:
    """Merged into the full base, the adapter answers differently: it was trained on a quantized one."""
    quantize = (files.card.recipe if files.card else {}).get("quantize", "none")
    if quantize == "none":
        return None
    return Finding(
        "quantised-base",
        "the adapter was trained on a quantized base, whose errors it learned to correct",
        f"--quantize {quantize}",
        f"use it on the {quantize} base, or compare before merging it into the full one",
    )


def scale_far_from_2(files: AdapterFiles, tensors: Tensors) -> Finding | None:
    """The adapter does too little or too much: alpha / r is far from 2, or 0."""
    r, alpha = files.config["r"], files.config["lora_alpha"]
    scale = alpha / (r**0.5 if files.config.get("use_rslora") else r)
    if 0.25 <= scale <= 16:
        return None
    return Finding(
        "alpha-far-from-2r",
        "alpha is 0: the adapter does nothing" if alpha == 0 else "alpha is far from 2r",
        f"lora_alpha {alpha:g}, r {r}",
        "train again, with --alpha left out",
        refused=alpha == 0,
    )


def no_better_than_base(files: AdapterFiles, tensors: Tensors) -> Finding | None:
    """The adapter loads and works, but its held-out score is no better than the base's."""
    metrics = files.card.metrics if files.card else {}
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    name = "accuracy" if "accuracy" in after else "loss"
    if name not in before or name not in after:
        return None
    gain = (after[name] - before[name]) * (1 if name == "accuracy" else -1)
    if gain > 0:
        return None
    return Finding(
        "no-better-than-base",
        "the adapter is no better than its base on held-out rows",
        f"{name} {before[name]:.4f} before, {after[name]:.4f} after",
        "hatrack compare shows how sure that is; then --lr, --epochs, more rows, in this order",
    )


GOTCHAS: tuple[Callable[[AdapterFiles, Any], Finding | None], ...] = (
    modules_to_save_unknown,
    scale_far_from_2,
    inert_adapter,
    embeddings_saved,
    quantized_base,
    no_better_than_base,
)
