"""Whether a run fits, how many rows at a time, and the change that helps when it does not."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hatrack.base.description import BaseDescription
from hatrack.base.header import TensorInfo
from hatrack.data.batch import LengthBatches
from hatrack.errors import RecipeError
from hatrack.planning.fit import (
    METHODS,
    PlanRequest,
    Workload,
    choose_plan,
    largest_micro_batch,
    make_request,
    micro_batches,
    plan_or_raise,
    plan_run,
    scored_batches,
    suggest_change,
    too_large_error,
)
from hatrack.planning.machine import GIB, Machine, machine_named
from hatrack.planning.memory import Method, MicroBatch
from hatrack.planning.time import MachineSpeed, frozen_prefix_counts
from hatrack.recipe import Recipe

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
SPEED = MachineSpeed(
    seconds_per_operation=1e-12,
    seconds_per_element=1e-10,
    seconds_per_call=1e-6,
    disk_bytes_per_second=1e9,
    start_seconds=10.0,
    source="probe",
)


def llama(layers: int = 32) -> BaseDescription:
    """A 7B Llama's headers, in bfloat16."""
    shapes = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096), "model.norm.weight": (4096,)}
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{layer}.self_attn.{name}.weight"] = (4096, 4096)
        shapes[f"model.layers.{layer}.mlp.gate_proj.weight"] = (11008, 4096)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (11008, 4096)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (4096, 11008)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (4096,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (4096,)
    tensors = {name: TensorInfo(shape, "BF16", Path("x"), 0, 2 * int(np.prod(shape))) for name, shape in shapes.items()}
    return BaseDescription("seven", Path("seven"), LLAMA | {"num_hidden_layers": layers}, tensors)


def where(there: int | str, lengths: Any = (256,) * 64, **options: Any) -> PlanRequest:
    recipe = Recipe.make(**({"base": "x", "data": "y", "dtype": "bfloat16", "batch_size": 8} | options))
    rows = np.array([(length, length) for length in lengths])
    machine = (
        machine_named(there) if isinstance(there, str) else Machine("m", there, "as asked", "bfloat16", speed=SPEED)
    )
    return make_request(recipe, llama(), Workload("chat", 0, rows, rows[:8]), machine)


@pytest.mark.parametrize(("layers", "rounded_layers"), [("all", 32), ("top-8", 8)])
def test_rounded_products_are_priced_in_training_alone(layers: str, rounded_layers: int) -> None:
    """The layers below all adapters are computed as they are scored."""
    found = []
    for compute in ("auto", "int8"):
        at = where(60 * GIB, dtype="float32", layers=layers, compute=compute)
        speed = dataclasses.replace(SPEED, rounded={"int8": 0.25e-12})
        at = dataclasses.replace(at, machine=dataclasses.replace(at.machine, speed=speed))
        plan = plan_run(at)
        assert plan.step_seconds is not None and plan.seconds is not None
        found.append((plan.step_seconds, plan.seconds, at.schedule(plan.micro_batch).steps))
    matrices = rounded_layers * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    spared = 0.75e-12 * 2 * 2 * 8 * 256 * matrices  # there and back, two operations each
    assert found[0][0] - found[1][0] == pytest.approx(spared, rel=0.01)
    assert found[0][1] - found[1][1] == pytest.approx(spared * found[0][2], rel=0.01)


def test_the_most_rows_that_fit_and_divide_the_batch() -> None:
    def memory(rows: int) -> dict[str, int]:
        return {"weights": 100, "activations": 30 * rows}

    found = [largest_micro_batch(memory, 12, limit)[0] for limit in (10**9, 460, 459, 260, 130, 129)]
    assert found == [12, 12, 6, 4, 1, 1]


def test_rows_at_a_time_then_checkpointing_then_refusal() -> None:
    """A 7B in bfloat16 is 12.6 GiB; what is left decides how it is trained."""
    roomy, tight, tighter, too_small = (plan_run(where(gib * GIB)) for gib in (60, 20, 15, 13))
    assert (roomy.micro_batch, roomy.method.checkpointing) == (8, False)
    assert tight.micro_batch < 8 and not tight.method.checkpointing
    assert tighter.method.checkpointing and tighter.fits
    assert tighter.memory["activations"] < tight.memory["activations"] / tight.micro_batch
    assert not too_small.fits and too_small.micro_batch == 1


def test_a_run_that_cannot_fit_is_refused_with_the_change_that_helps() -> None:
    small = where(12 * GIB)
    message = str(too_large_error(small, plan_run(small)))
    assert "11.4 GiB of memory (as asked) is too little even for one row at a time" in message
    assert "of which weights 12.6 GiB; fix: --quantize 8bit (" in message and "or --force" in message
    tiny = where(GIB)
    with pytest.raises(RecipeError, match="is too little even for one row at a time"):
        plan_or_raise(tiny.recipe, llama(), tiny.work, tiny.machine)
    forced = plan_or_raise(tiny.recipe.changed(force=True), llama(), tiny.work, tiny.machine)[1]
    assert not forced.fits and forced.micro_batch == 1
    assert "--memory 9.0 GiB is too little" in str(too_large_error(where(64 * GIB, memory="9GiB"), plan_run(small)))


def test_a_base_without_room_is_swept_unless_it_is_needed_as_a_whole() -> None:
    one = where(3 * GIB)
    plan = plan_or_raise(one.recipe, llama(), one.work, one.machine)[1]
    assert plan.method.streamed and plan.fits and plan.micro_batch == 8
    dora = where(3 * GIB, variant="dora")
    with pytest.raises(RecipeError, match="fix: --variant lora, and the base streamed layer by layer"):
        plan_or_raise(dora.recipe, llama(), dora.work, dora.machine)
    mac = dataclasses.replace(one.machine, accelerator=True, can_stream=False)
    assert not choose_plan(dataclasses.replace(one, machine=mac)).method.streamed


def test_an_accelerator_holds_two_layers_and_all_that_is_in_none() -> None:
    one = where(3 * GIB)
    gpu = dataclasses.replace(one, machine=dataclasses.replace(one.machine, accelerator=True))
    plan = choose_plan(gpu)
    layer, tables = (4 * 4096**2 + 3 * 4096 * 11008) * 2, (2 * 32000 * 4096 + 65 * 4096) * 2
    assert plan.method.streamed and plan.memory["weights"] == 2 * layer + tables


def test_layers_below_the_adapters_are_paid_for_once() -> None:
    """64 rows of 256 tokens to learn from, 8 of them scored too; 24 of 32 layers below; 4 epochs of 8 steps."""
    plain, kept, few = (where(60 * GIB, layers="top-8", epochs=4, cache_limit=limit) for limit in (0, None, "100MB"))
    known = dataclasses.replace(kept, work=dataclasses.replace(kept.work, cached_fraction=1.0))
    never, once, partly, read = (plan_run(setting) for setting in (plain, kept, few, known))
    below = frozen_prefix_counts(kept.model, Method(), MicroBatch(8, 256, 2048))
    tokens, layer = 8 * 256, 4 * 4096**2 + 3 * 4096 * 11008
    assert below.operations == 24 * (2 * layer * tokens + 4 * 256 * 4096 * tokens)
    each = below.seconds(SPEED)
    assert never.step_seconds is not None
    for plan, share in ((once, 3 / 4), (read, 1), (partly, 3 / 4 * 100e6 / (72 * 256 * 4096 * 2))):
        assert plan.step_seconds == pytest.approx(never.step_seconds - share * each)
    assert never.whole_seconds is not None and once.whole_seconds is not None
    assert never.whole_seconds - once.whole_seconds == pytest.approx((24 + 4 + 1) * each)  # and 5 scores of 8 rows
    assert "kept" not in never.disk
    assert once.disk["kept"] == read.disk["kept"] == 72 * 256 * 4096 * 2 and partly.disk["kept"] == 100 * 10**6
    assert never.memory["weights"] - read.memory["weights"] == 24 * layer * 2  # left in the file while training
    assert once.memory == never.memory and read.memory["loading"] > 0
    full = plan_run(kept, Method(full=True))
    assert "kept" not in full.disk and full.seconds == plan_run(plain, Method(full=True)).seconds


def test_the_change_is_tried_and_fits() -> None:
    for gib, lengths, fix in (
        (12, 256, "--quantize 8bit"),
        (7, 256, "--quantize 4bit"),
        (18, 32768, "--max-length 4096"),
    ):
        one = where(gib * GIB, (lengths,) * 8)
        plan = plan_run(one)
        assert not plan.fits
        told = suggest_change(one, plan)
        assert told is not None and told.startswith(fix)
    assert suggest_change(where(2 * GIB), plan_run(where(2 * GIB))) is None


def test_a_limit_is_never_more_than_there_is() -> None:
    assert where(10 * GIB, memory="64GiB").limit == int(9.5 * GIB)
    assert where(10 * GIB, memory="4GiB").limit == 4 * GIB


@pytest.mark.parametrize("task", ["classify", "chat"])
def test_the_planned_batches_are_those_that_training_meets(task: str) -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 103)
    one = where(64 * GIB, lengths, seed=3, epochs=2)
    one = dataclasses.replace(one, work=dataclasses.replace(one.work, task=task))
    found = micro_batches(one, 4)
    loader = LengthBatches(lengths, 4, 3, by_tokens=task != "classify")
    met = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        met += [(len(batch), int(lengths[batch].max())) for batch in loader]
    assert [(batch.rows, batch.longest) for batch in found] == met
    few = dataclasses.replace(one, recipe=one.recipe.changed(epochs=None, steps=3))
    assert micro_batches(few, 4) == found[:6]  # 3 steps of 2 micro-batches


def test_time_grows_with_steps_and_the_ways_are_told_apart() -> None:
    one, two = (plan_run(where(64 * GIB, steps=steps)) for steps in (2, 4))
    assert one.seconds is not None and two.seconds is not None and one.whole_seconds is not None
    assert one.step_seconds == pytest.approx(two.step_seconds)
    # 4 operations for each of 6.5 billion weights and 2,048 tokens: at least 52 s a step at 1 TFLOP/s
    assert one.step_seconds is not None and 52 < one.step_seconds < 70
    assert two.seconds - one.seconds == pytest.approx(2 * one.step_seconds)
    assert one.whole_seconds > one.seconds + SPEED.start_seconds
    ways = {name: plan_run(where(400 * GIB), method) for name, method in METHODS.items()}
    assert ways["full"].trainable == 6_738_415_616 and ways["LoRA"].trainable < 25_000_000
    assert ways["full"].step_seconds > 1.4 * one.step_seconds  # type: ignore[operator]
    order = ["LoRA, streamed", "LoRA, 4-bit base", "LoRA, 8-bit base", "LoRA", "full"]
    weights = [ways[name].memory["weights"] for name in order]
    assert weights == sorted(set(weights))
    assert ways["full"].peak_memory_bytes > ways["LoRA"].peak_memory_bytes > ways["LoRA, streamed"].peak_memory_bytes


def test_bytes_read_from_disk() -> None:
    """What fits is read once; what is streamed, twice a step; a mapped base that does not fit, twice a micro-batch."""
    base = 2 * 6_738_415_616
    assert plan_run(where(64 * GIB)).read_per_step == 0
    assert plan_run(where(6 * GIB), Method(streamed=True)).read_per_step == 2 * base
    assert plan_run(where(6 * GIB)).read_per_step == 2 * 8 * base
    top = where(6 * GIB, layers="top-8", epochs=4)  # layers below are read once in the first of four epochs
    below = 24 * 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert plan_run(top, Method(streamed=True)).read_per_step == pytest.approx(2 * base - below - 3 / 4 * below)
    assert plan_run(where(64 * GIB)).disk["base"] == base


def test_held_out_rows_that_are_longer_are_counted() -> None:
    """Two rows of 2,000 tokens are scored at a time: one layer's numbers of each token, and a block of logits."""
    short = where(64 * GIB, (40,) * 64, batch_size=1)
    long = dataclasses.replace(short, work=dataclasses.replace(short.work, held_out_sizes=np.full((8, 2), 2000)))
    assert scored_batches(long, 1) == [MicroBatch(2, 2000, 4000)] * 4
    plans = plan_run(short), plan_run(long)
    more = plans[1].peak_memory_bytes - plans[0].peak_memory_bytes
    assert plans[0].memory["scoring"] == 0 < plans[1].memory["scoring"] == more
    training = sum(plans[0].memory[term] for term in ("activations", "heap", "workspace", "logits"))
    numbers = 4000 * (4 * 4096 + 3 * 4096 + 3 * 11008) * 2 + 2 * 2**22 + 2 * 2**23
    assert training + more == pytest.approx(2 * numbers, rel=0.01)
    assert plans[1].seconds > plans[0].seconds  # type: ignore[operator]
