"""The base of a run, as its recipe says."""

from typing import cast

import torch

from hatrack.base.description import BaseDescription
from hatrack.base.load import Base, choose_device, choose_dtype, dtype_name, load_base
from hatrack.console import say
from hatrack.data.examples import Examples
from hatrack.recipe import Recipe, Task


def load_for(recipe: Recipe, files: BaseDescription, examples: Examples, *, streamed: bool) -> Base:
    """The base, for the task and labels of the examples, as the recipe says. Says on which device, in which format."""
    device, why_device = choose_device(recipe.device)
    dtype, why_dtype = choose_dtype(recipe.dtype, device)
    say(f"device: {device} ({why_device}); base in {dtype_name(dtype)} ({why_dtype})")
    if recipe.compute != "auto":
        say(f"products with its matrices rounded to {recipe.compute} while it trains; what is scored is exact")
        if choose_dtype("auto", device)[0] == torch.bfloat16:
            say("this processor is fast at bfloat16, which --compute does without: it may gain nothing")
    if streamed:
        say("the base is larger than memory: it stays on disk, and each step reads every layer twice")
    return load_base(
        files,
        task=cast(Task, examples.task),
        labels=examples.labels,
        multi_label=examples.multi_label,
        device=recipe.device,
        dtype=recipe.dtype,
        quantize=recipe.quantize,
        streamed=streamed,
        seed=recipe.seed,
    )
