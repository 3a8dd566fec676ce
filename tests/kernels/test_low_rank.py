"""The three skinny products: the kernels and torch against plain mathematics, and their dropout against a coin."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from hatrack.kernels import low_rank, native
from hatrack.kernels.dropout import NO_DROPOUT, Mask, dropout_positions
from hatrack.kernels.low_rank import add_up_projection_, down, outer, prepare_factor

BOUND = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


def kept(n: int, d: int, mask: Mask, dtype: torch.dtype) -> torch.Tensor:
    """Which numbers of a matrix (n, d) `mask` keeps, as ones and zeros."""
    if mask == NO_DROPOUT:
        return torch.ones(n, d, dtype=dtype)
    y = torch.zeros(n, d, dtype=dtype)
    add_up_projection_(y, torch.ones(n, 8), torch.full((8, d), 0.125, dtype=dtype), 1.0, mask)
    return y


@pytest.mark.parametrize("mask", [NO_DROPOUT, Mask(0.3, 5)], ids=["all kept", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d", "r"), [(1, 32, 8), (7, 64, 3), (70, 96, 24), (33, 1536, 8), (5, 40, 8), (0, 32, 8)])
def test_products_are_the_plain_ones(n: int, d: int, r: int, dtype: torch.dtype, mask: Mask, ways: str) -> None:
    generator = torch.Generator().manual_seed(n * d)
    x = torch.randn(n, d, generator=generator).to(dtype)
    y = torch.randn(n, d, generator=generator).to(dtype)
    A = prepare_factor(torch.randn(r, d, generator=generator), dtype)
    h = torch.randn(n, len(A), generator=generator)
    D = kept(n, d, mask, dtype).double()
    expected = (
        0.5 * (x.double() * D) @ A.double().t(),
        y + 0.5 * (h.double() @ A.double()) * D,
        h.double().t() @ (x * D),
    )
    add_up_projection_(y, h, A, 0.5, mask)
    found = down(x, A, 0.5, mask), y, outer(x, h, 1.0, mask)
    for ours, plain in zip(found, expected, strict=True):
        assert ours.shape == plain.shape
        assert float((ours - plain).norm()) <= BOUND[dtype] * float(plain.norm())


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_numbers_are_dropped_as_by_a_coin(p: float, ways: str) -> None:
    n, d = 500, 384
    masks = [kept(n, d, Mask(p, seed), torch.float32).numpy() == 0 for seed in range(4)]
    sigma = (p * (1 - p) / (n * d)) ** 0.5
    for mask in masks:
        assert abs(mask.mean() - p) < 4 * sigma
        for far in (mask[1:] & mask[:-1], mask[:, 1:] & mask[:, :-1], mask[:, 32:] & mask[:, :-32]):
            assert abs(far.mean() - p * p) < 5 * (p * p * (1 - p * p) / far.size) ** 0.5
        rows_dropped = mask.sum(1)
        assert abs(rows_dropped.var() / (d * p * (1 - p)) - 1) < 5 * (2 / n) ** 0.5
    both = (masks[0] & masks[1]).mean()
    assert abs(both - p * p) < 4 * (p * p * (1 - p * p) / (n * d)) ** 0.5
    assert np.array_equal(masks[2], kept(n, d, Mask(p, 2), torch.float32).numpy() == 0)


def test_positions_are_within_the_tensor_and_the_same_for_a_seed() -> None:
    drawn = dropout_positions(1001, 0.4, 9)
    assert int(drawn.min()) >= 0 and int(drawn.max()) <= 1000
    assert torch.equal(drawn, dropout_positions(1001, 0.4, 9))


def test_both_formats_and_any_number_of_threads_drop_the_same() -> None:
    if native.library() is None:
        pytest.skip("no compiler for the kernels here")
    threads = torch.get_num_threads()
    wanted = kept(65, 96, Mask(0.4, 3), torch.float32)
    try:
        torch.set_num_threads(1)
        assert torch.equal(kept(65, 96, Mask(0.4, 3), torch.bfloat16).float(), wanted)
    finally:
        torch.set_num_threads(threads)


def test_without_a_compiler_torch_does_the_work(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert native.library.__wrapped__() is None
    assert "no C++ compiler found" in capfd.readouterr().err


def test_a_compiler_that_fails_is_said_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails(command: list[str], **options: object) -> object:
        if "--version" in command:
            return subprocess.CompletedProcess(command, 0, stdout=b"9")
        raise subprocess.CalledProcessError(1, command, stderr=b"x.cpp:1: error: no such thing\n")

    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path))
    monkeypatch.setattr("subprocess.run", fails)
    assert native.library.__wrapped__() is None
    assert "x.cpp:1: error: no such thing" in capfd.readouterr().err
    assert not list((tmp_path / "native").iterdir())


def test_the_largest_rank_goes_to_torch() -> None:
    assert not low_rank._kernel_supports(torch.zeros(4, 32), low_rank.LARGEST_RANK + 8, (NO_DROPOUT,))
