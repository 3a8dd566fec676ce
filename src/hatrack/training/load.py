"""Loads the base of a run as its recipe and plan say."""

from typing import cast

import torch

from hatrack.base.load import Base, BaseOptions, choose_device, choose_dtype, dtype_name, load_base
from hatrack.check.prepared import Prepared
from hatrack.console import say
from hatrack.recipe import Task


def load_run_base(prepared: Prepared) -> Base:
    """Loads the base for the task and labels of the examples. Says on which device, in which dtype, and why.

    Raises ModelError if the files cannot be loaded, MachineError if memory runs out.
    """
    recipe, examples, streamed = prepared.recipe, prepared.examples, prepared.plan.method.streamed
    device, why_device = choose_device(recipe.device)
    dtype, why_dtype = choose_dtype(recipe.dtype, device)
    say(f"device: {device} ({why_device}); base in {dtype_name(dtype)} ({why_dtype})")
    if recipe.compute != "auto":
        say(f"matmuls with its weights rounded to {recipe.compute} while it trains; what is scored is exact")
        if choose_dtype("auto", device)[0] == torch.bfloat16:
            say("this CPU is fast at bfloat16, which --compute does without: it may gain nothing")
    if streamed:
        say("the base is larger than memory: it stays on disk, and each step reads every layer twice")
    return load_base(
        prepared.base,
        BaseOptions(
            task=cast(Task, examples.task),
            labels=examples.labels,
            multi_label=examples.multi_label,
            device=recipe.device,
            dtype=recipe.dtype,
            quantize=recipe.quantize,
            streamed=streamed,
            seed=recipe.seed,
        ),
    )
