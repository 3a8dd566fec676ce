"""Gotchas in the settings of a run: each function takes a prepared run and returns a finding, or None."""

import math

from hatrack import cpu
from hatrack.check.finding import Finding
from hatrack.check.prepared import Prepared
from hatrack.recipe import flag

TIMID, WILD = 1 / 30, 5
"""Times the usual learning rate. Three times it still learns well, ten times no longer (docs/log.md)."""
USUAL_RANK, ROOMY = 16, 100


def learning_rate_timid(prepared: Prepared) -> Finding | None:
    """The run ends, nothing has changed: the rate is one for full fine-tuning, or a typing error."""
    lr, usual = prepared.schedule.lr, prepared.usual_lr
    if prepared.recipe.lr == "auto" or lr >= usual * TIMID:
        return None
    return Finding(
        "learning-rate-timid",
        f"the learning rate is so low that {prepared.schedule.steps:,} steps will change next to nothing",
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
    """The adapter whispers or shouts: its output is scaled by alpha / r (rsLoRA: alpha / sqrt(r))."""
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
    """r was raised, and nothing got better: the data is the limit.

    An adapter holds about 2 bits a parameter (Allen-Zhu and Li, "Physics of Language Models 3.3", 2024); data has at
    most log2(labels) bits a row to classify, and about one a supervised token otherwise (Schulman et al., "LoRA Without
    Regret", 2025).
    """
    if prepared.recipe.r <= USUAL_RANK:
        return None
    examples, learn = prepared.examples, prepared.tokens.train
    bits = len(learn) * max(1.0, math.log2(max(len(examples.labels), 2)))
    bits = bits if prepared.task == "classify" else float(learn.supervised.sum())
    room = 2 * prepared.plan.trainable
    if room <= ROOMY * bits:
        return None
    return Finding(
        "rank-before-data",
        "r is raised where the data is the limit",
        f"r {prepared.recipe.r} has room for {room / bits:,.0f} times what {len(learn):,} rows can teach",
        "--r 8; more rows help, and --lr before --r",
    )


def rounding_slower(prepared: Prepared) -> Finding | None:
    """The run takes longer with `--compute` than without: a CPU that multiplies bfloat16 itself does that as fast as
    integers, and all else in half the bytes."""
    compute = prepared.recipe.compute
    if compute == "auto" or not cpu.has_fast_bfloat16():
        return None
    return Finding(
        "rounding-slower",
        "this CPU multiplies bfloat16 itself, which is exact and likely faster than rounding to integers",
        f"{flag('compute')} {compute}, which computes all else in float32",
        f"leave {flag('compute')} out; hatrack plan --probe measures both",
    )


def float16_overflow(prepared: Prepared) -> Finding | None:
    """The loss becomes NaN in the middle of a run: float16 ends at 65,504, bfloat16 does not."""
    if prepared.dtype != "float16" or prepared.stored_dtype == "F16":
        return None
    return Finding(
        "float16-overflow",
        "float16 ends at 65,504, and the activations of a base made in another format may pass it",
        f"--dtype float16 for weights stored as {prepared.stored_dtype}",
        "--dtype bfloat16, or auto",
    )
