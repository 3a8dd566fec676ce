"""Batches of like length: an order that can be had again, and rows that do not depend on their neighbours."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from hatrack.base.load import load_config, load_tokenizer
from hatrack.base.sources import find_base
from hatrack.cli import demo
from hatrack.cli.demo import CHAT_MODEL, ENCODER
from hatrack.data.batch import LengthBatches, collate
from hatrack.data.examples import read_examples
from hatrack.data.order import scoring_batches
from hatrack.data.tokens import tokenize
from hatrack.planning.schedule import batch_rows
from hatrack.recipe import Recipe, Task

LENGTHS = np.random.default_rng(0).lognormal(3.2, 0.5, 1003).astype(int) + 3


def _real_share(lengths: np.ndarray, batches: list[list[int]]) -> float:
    """The share of tokens in padded batches that are not padding."""
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    return sum(int(lengths[batch].sum()) for batch in batches) / padded


def _epoch(epoch: int, batch_size: int = 16, seed: int = 0, by_tokens: bool = False) -> list[list[int]]:
    batches = LengthBatches(LENGTHS, batch_size, seed, by_tokens=by_tokens)
    batches.set_epoch(epoch)
    return list(batches)


def test_every_row_once_an_epoch_in_a_constant_number_of_batches() -> None:
    for epoch in range(3):
        batches = _epoch(epoch)
        assert sorted(row for batch in batches for row in batch) == list(range(len(LENGTHS)))
        assert len(batches) == len(LengthBatches(LENGTHS, 16, 0)) == 63
        assert sorted(map(len, batches))[0] == 1003 % 16


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    assert _epoch(1) == _epoch(1)
    assert _epoch(1) != _epoch(2) and _epoch(1, seed=1) != _epoch(1)
    first = [len(batch) and LENGTHS[batch].mean() for batch in _epoch(0)[:20]]
    assert first != sorted(first)  # batches come in random order, not by length


def test_a_resumed_run_meets_the_batches_it_would_have_met() -> None:
    """Neither the epochs before nor anybody's use of the global generators change the order of an epoch."""
    whole = LengthBatches(LENGTHS, 16, 7)
    orders = []
    for epoch in range(4):
        whole.set_epoch(epoch)
        orders.append(list(whole))
    np.random.seed(5)
    torch.manual_seed(5)
    assert [_epoch(epoch, seed=7) for epoch in (3, 2)] == [orders[3], orders[2]]
    batches = iter(LengthBatches(LENGTHS, 16, 7))
    assert [next(batches) for _ in range(10)] == orders[0][:10]


@pytest.mark.parametrize(("count", "size", "batches"), [(1, 8, 1), (8, 8, 1), (9, 8, 2), (401, 8, 51), (799, 8, 100)])
def test_few_rows_and_whole_windows(count: int, size: int, batches: int) -> None:
    made = LengthBatches(np.arange(count) + 1, size, 0)
    assert len(list(made)) == len(made) == batches
    assert sorted(row for batch in made for row in batch) == list(range(count))
    assert max(len(batch) for batch in made) <= size


def test_batches_are_sized_by_tokens_where_asked() -> None:
    batches = _epoch(0, by_tokens=True)
    assert sorted(row for batch in batches for row in batch) == list(range(len(LENGTHS))) and len(batches) == 63
    tokens = np.array([LENGTHS[batch].max() * len(batch) for batch in batches[:-1]])
    rows = [len(batch) for batch in batches[:-1]]
    assert tokens.std() < 0.25 * tokens.mean()
    assert min(rows) < 10 < 20 < max(rows)
    one_long = np.array([1000] + [3] * 99)
    assert sorted(map(len, LengthBatches(one_long, 10, 0, by_tokens=True)))[0] == 1
    assert sorted(map(len, _epoch(0)))[-2:] == [16, 16]


def test_little_is_padding() -> None:
    assert _real_share(LENGTHS, _epoch(0)) > 0.93 and _real_share(LENGTHS, _epoch(0, by_tokens=True)) > 0.95
    assert _real_share(np.array([4, 2]), [[0, 1]]) == pytest.approx(6 / 8)


def test_nine_tenths_of_what_the_demo_computes_are_real_tokens(tmp_path: Path) -> None:
    reviews, kinds, questions = demo._write_data(tmp_path, lambda text: None)
    for data, base, length in ((reviews, ENCODER, None), (kinds, ENCODER, 128), (questions, CHAT_MODEL, 256)):
        recipe = Recipe.make(base=base, data=str(data), max_length=length)
        examples, files = read_examples(recipe), find_base(base)
        config = load_config(files, task=cast(Task, examples.task), labels=examples.labels)
        lengths = tokenize(recipe, examples, load_tokenizer(files), config)[1].train.lengths
        rows = batch_rows(recipe, task=examples.task, rows=len(lengths))
        batches = LengthBatches(lengths, rows, recipe.seed, by_tokens=examples.task != "classify")
        for epoch in range(2):
            batches.set_epoch(epoch)
            assert _real_share(lengths, list(batches)) >= 0.9, data.name


def test_scoring_begins_with_the_longest() -> None:
    order = scoring_batches(LENGTHS, 100)
    assert LENGTHS[order[0]].min() >= LENGTHS[order[1]].max()
    assert sorted(np.concatenate(order).tolist()) == list(range(len(LENGTHS)))


def _row(ids: list[int], learn: list[bool], label: object = None) -> tuple[np.ndarray, np.ndarray, object]:
    return np.array(ids, dtype=np.int32), np.array(learn), label


def test_padding_is_masked_and_never_learned() -> None:
    batch = collate([_row([5, 6, 7], [False, True, True]), _row([8], [True])], pad_id=9, task="chat")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_labels_keep_their_kind() -> None:
    one = collate([_row([5], [False], np.int64(3)), _row([6, 7], [False, False], np.int64(0))], 0, "classify")
    assert one["labels"].tolist() == [3, 0] and one["labels"].dtype == torch.int64
    several = collate([_row([5], [False], np.array([1, 0], dtype=np.float32))], 0, "classify")
    assert several["labels"].tolist() == [[1, 0]] and several["labels"].dtype == torch.float32


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    row = _row([5, 6, 7], [False, True, True])
    for other in (_row([8], [True]), _row([8] * 9, [True] * 9)):
        batch = collate([row, other], 0, "chat")
        assert batch["input_ids"][0, :3].tolist() == [5, 6, 7] and batch["labels"][0, :3].tolist() == [-100, 6, 7]
        assert batch["attention_mask"][0].sum() == 3


@pytest.mark.parametrize("by_tokens", [False, True])
def test_the_largest_batch_comes_first(by_tokens: bool) -> None:
    """What does not fit in memory is found out in the first step."""
    sizes = [len(batch) * LENGTHS[batch].max() for batch in _epoch(0, by_tokens=by_tokens)]
    assert sizes[0] == max(sizes)


def test_long_rows_are_scored_fewer_at_a_time() -> None:
    """The first batch is the largest, and none has more than 4,096 tokens but a single row."""
    lengths = np.array([30, 9000, 2000, 2100, 1900, 40, 2050, 50])
    batches = scoring_batches(lengths, 8)
    assert [list(batch) for batch in batches] == [[1], [3], [6], [2, 4], [7, 5, 0]]
    assert sorted(int(row) for batch in batches for row in batch) == list(range(8))
    sizes = [len(batch) * lengths[batch].max() for batch in batches]
    assert all(size <= 4096 or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    assert [len(batch) for batch in scoring_batches(np.full(20, 100), 8)] == [8, 8, 4]
