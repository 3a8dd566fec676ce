"""Gotchas in the settings of a run. Each function returns a finding or None."""

import math

from hatrack import cpu
from hatrack.check.finding import Finding
from hatrack.check.prepared import Prepared
from hatrack.recipe import flag

TIMID, WILD = 1 / 30, 5
"""Multiples of the usual learning rate that are too low and too high. At 3 times it training still works well, at 10
times it does not (docs/log.md)."""
USUAL_RANK = 16
MAX_CAPACITY_RATIO = 100
"""An adapter whose capacity is more than this many times the bits in the data has too high a rank."""


def learning_rate_timid(prepared: Prepared) -> Finding | None:
    """The run ends and nothing has changed: the rate suits full fine-tuning, or is a typing error."""
    lr, usual = prepared.schedule.lr, prepared.usual_lr
    if prepared.recipe.lr == "auto" or lr >= usual * TIMID:
        return None
    return Finding(
        "learning-rate-timid",
        f"the learning rate is so low that {prepared.schedule.steps:,} steps will change almost nothing",
        f"--lr {lr:g}, {usual / lr:,.0f} times below the usual {usual:g}",
        f"--lr {usual:g}, or --lr auto to measure it",
    )


def learning_rate_wild(prepared: Prepared) -> Finding | None:
    """The loss jumps, grows, or becomes NaN."""
    lr, usual = prepared.schedule.lr, prepared.usual_lr
    if prepared.recipe.lr == "auto" or lr <= usual * WILD:
        return None
    return Finding(
        "learning-rate-wild",
        "the learning rate is so high that the loss may grow",
        f"--lr {lr:g}, {lr / usual:,.0f} times the usual {usual:g}",
        f"--lr {usual:g}, or --lr auto to measure it",
    )


def alpha_far_from_2r(prepared: Prepared) -> Finding | None:
    """The adapter does too little or too much: its output is scaled by alpha / r (rsLoRA: alpha / sqrt(r))."""
    recipe = prepared.recipe
    if recipe.alpha is None or 0.5 <= recipe.alpha / recipe.r <= 8:
        return None
    return Finding(
        "alpha-far-from-2r",
        "alpha is far from 2r, which acts like another learning rate",
        f"alpha {recipe.alpha:g}, r {recipe.r}: scale {recipe.alpha / recipe.r:g}",
        f"leave --alpha out for {2 * recipe.r}, and set --lr",
    )


def rank_before_data(prepared: Prepared) -> Finding | None:
    """A higher r does not improve the result: the data is the limit.

    An adapter stores about 2 bits per parameter (Allen-Zhu and Li, "Physics of Language Models 3.3", 2024). Data has at
    most log2(labels) bits per row to classify, otherwise about one bit per supervised token (Schulman et al., "LoRA
    Without Regret", 2025).
    """
    if prepared.recipe.r <= USUAL_RANK:
        return None
    examples, train = prepared.examples, prepared.tokens.train
    bits = len(train) * max(1.0, math.log2(max(len(examples.labels), 2)))
    bits = bits if prepared.task == "classify" else float(train.supervised.sum())
    capacity = 2 * prepared.plan.trainable
    if capacity <= MAX_CAPACITY_RATIO * bits:
        return None
    return Finding(
        "rank-before-data",
        "r is higher than the data can use",
        f"r {prepared.recipe.r} has room for {capacity / bits:,.0f} times what {len(train):,} rows can teach",
        "--r 8; more rows help, and --lr before --r",
    )


def rounding_slower(prepared: Prepared) -> Finding | None:
    """The run takes longer with `--compute` than without: a CPU with bfloat16 instructions computes bfloat16 as fast as
    integers, and moves half the bytes in everything else."""
    compute = prepared.recipe.compute
    if compute == "auto" or not cpu.has_fast_bfloat16():
        return None
    return Finding(
        "rounding-slower",
        "this CPU has bfloat16 instructions, which are exact and likely faster than rounding to integers",
        f"{flag('compute')} {compute}, which computes everything else in float32",
        f"leave {flag('compute')} out; hatrack plan --probe measures both",
    )


def float16_overflow(prepared: Prepared) -> Finding | None:
    """The loss becomes NaN in the middle of a run: the largest float16 is 65,504."""
    if prepared.dtype != "float16" or prepared.stored_dtype == "F16":
        return None
    return Finding(
        "float16-overflow",
        "the largest float16 is 65,504, and the activations of a base trained in another dtype may exceed it",
        f"--dtype float16 for weights stored as {prepared.stored_dtype}",
        "--dtype bfloat16, or auto",
    )
