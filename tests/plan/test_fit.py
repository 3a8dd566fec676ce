"""The plan: terms that add up, the micro-batch that fits, and what it says when none does."""

import pytest

from hatrack.errors import RecipeError
from hatrack.kernels.loss import CHUNK
from hatrack.plan.fit import fit
from hatrack.plan.memory import LOGITS, Shape, shape_of, training_bytes

LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
SHAPE = Shape(4096, 11008, 32, 32000)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (LLAMA, SHAPE),
        ({"n_embd": 768, "n_layer": 12, "n_inner": None, "vocab_size": 50257}, Shape(768, 3072, 12, 50257)),
        ({"dim": 768, "n_layers": 6, "hidden_dim": 3072, "vocab_size": 30522}, Shape(768, 3072, 6, 30522)),
        ({"d_model": 512, "d_ff": 2048, "num_layers": 6, "vocab_size": 32128}, Shape(512, 2048, 6, 32128)),
        ({"text_config": LLAMA}, SHAPE),
    ],
)
def test_shapes_under_any_name(config: dict[str, int], shape: Shape) -> None:
    assert shape_of(config) == shape


def _bytes(tokens: int, **options: str) -> dict[str, int]:
    settings = {"task": "chat", "dtype": "bfloat16"} | options
    return training_bytes(SHAPE, parameters=10**9, trainable=10**6, copied_inputs=0, tokens=tokens, **settings)


def test_what_is_frozen_costs_its_format_and_what_is_trained_four_times_four_bytes() -> None:
    terms = _bytes(100)
    assert terms["base"] == 2 * 10**9 and _bytes(100, dtype="float32")["base"] == 4 * 10**9
    assert terms["adapter"] + terms["gradients"] + terms["optimizer"] == 16 * 10**6
    assert _bytes(100, quantize="4bit")["base"] < 0.6 * 10**9


def test_activations_grow_with_tokens_and_logits_until_a_chunk_is_full() -> None:
    assert _bytes(200)["activations"] == 2 * _bytes(100)["activations"] > 0
    assert _bytes(200)["logits"] == 2 * _bytes(100)["logits"] > 0
    assert _bytes(20_000)["logits"] == _bytes(10_000)["logits"] == LOGITS * 10
    assert LOGITS == CHUNK
    assert _bytes(100, task="classify")["logits"] == 0


def test_the_most_rows_that_fit_and_divide_the_batch() -> None:
    def memory(rows: int) -> dict[str, int]:
        return {"base": 100, "activations": 30 * rows}

    def found(limit: int | None) -> int:
        return fit(memory, batch_size=12, limit=limit, trainable=1, total=2).micro_batch

    assert [found(limit) for limit in (None, 460, 459, 260, 130)] == [12, 12, 6, 4, 1]
    with pytest.raises(
        RecipeError, match=r"too little even for one row at a time; got 130 bytes needed, of which base"
    ):
        found(129)
