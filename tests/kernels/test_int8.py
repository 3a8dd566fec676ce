"""Products in integers: the kernel against the formulas in torch, both against the exact product."""

from collections.abc import Iterator

import pytest
import torch

from hatrack.kernels.int8 import BITS, BLOCK, int_matmul, is_available, quantize_block, reference_matmul

SHAPES = [
    (1, 1, 1),
    (6, 128, 16),
    (7, 129, 17),
    (1, 576, 50),
    (13, 31, 100),
    (200, 300, 33),
    (5, 1000, 3),
    (395, 64, 200),
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    if not is_available():
        pytest.skip("no kernels for integers here")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def matrices(n: int, k: int, d: int, transposed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (n, k), W (k, d) and y (n, d), each with a gap behind its rows; what lies in x's and W's is not finite."""
    generator = torch.Generator().manual_seed(n * k + d)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        whole = torch.randn(rows, columns + 3, generator=generator)
        whole[:, columns:] = torch.nan
        return whole[:, :columns]

    return drawn(n, k), drawn(d, k).t() if transposed else drawn(k, d), drawn(n, d)


def computed(x: torch.Tensor, W: torch.Tensor, format: str) -> torch.Tensor:
    y = torch.full((len(x), W.shape[1]), torch.nan)
    int_matmul(x, W, y, format)
    return y


def norm(y: torch.Tensor) -> float:
    return float(y.double().norm())


@pytest.mark.parametrize("transposed", [False, True], ids=["W", "W^T"])
@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize(("n", "k", "d"), SHAPES)
def test_the_kernel_computes_the_formulas(n: int, k: int, d: int, format: str, transposed: bool) -> None:
    x, W, y = matrices(n, k, d, transposed)
    size = x.double().abs() @ W.double().abs()
    plain = reference_matmul(x, W, format)
    added = y.double() + plain
    int_matmul(x, W, y, format, add=True)
    assert bool(((y - added).abs() <= 1e-6 * (size + added.abs())).all())
    int_matmul(x, W, y, format)
    assert bool(((y - plain).abs() <= 1e-6 * size).all())
    behind = torch.as_strided(y, (n, 3), (d + 3, 1), d)
    assert bool(behind.isnan().all())


@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize("values", ["normal", "student", "channel"])
def test_errors_stay_within_their_bound(values: str, format: str) -> None:
    """As |x - s q| <= s / 2, an output is off by the sum of s / 2 |W| + t / 2 |x| + s t / 4 at most."""
    torch.manual_seed(1)
    x, W = torch.randn(50, 300), torch.randn(300, 40)
    if values == "student":
        x, W = (torch.distributions.StudentT(3.0).sample(part.shape) for part in (x, W))
    elif values == "channel":
        x[:, 7] *= 100
    bound, most = torch.zeros(50, 40, dtype=torch.float64), 2 ** (BITS[format] - 1) - 1
    for rows, columns in zip(torch.split(x.double(), BLOCK, 1), torch.split(W.double(), BLOCK), strict=True):
        u, v = (part.abs().amax(1, keepdim=True).expand_as(part) / most / 2 for part in (rows, columns.t()))
        bound += u @ columns.abs() + rows.abs() @ v.t() + u @ v.t()
    exact = x.double() @ W.double()
    error = (computed(x, W, format) - exact).abs()
    assert bool((error <= 1.002 * bound + 1e-6 * (x.abs() @ W.abs())).all())
    assert float(error.max()) > 0.05 * float(bound.min())  # the bound says something


def test_int16_is_finer_than_rounding_to_bfloat16() -> None:
    torch.manual_seed(2)
    x, W = torch.randn(64, 576), torch.randn(576, 64)
    exact = x.double() @ W.double()
    rounded = x.bfloat16().double() @ W.bfloat16().double()
    assert norm(computed(x, W, "int16") - exact) <= norm(rounded - exact) / 4
    assert norm(computed(x, W, "int8") - exact) <= 0.03 * norm(exact)


@pytest.mark.parametrize("transposed", [False, True], ids=["W", "W^T"])
@pytest.mark.parametrize("format", BITS)
def test_any_number_of_threads_computes_the_same(format: str, transposed: bool) -> None:
    for shape in ((70, 300, 500), (301, 130, 20), (3, 200, 8)):
        x, W, _ = matrices(*shape, transposed)
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(computed(x, W, format))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_sums_do_not_overflow(sign: float, format: str) -> None:
    x, W = torch.full((7, 256), 3.0), torch.full((256, 18), sign * 0.5)
    assert torch.allclose(computed(x, W, format), torch.full((7, 18), sign * 384.0), rtol=1e-6)
    x[:, 1::2] *= -1
    assert torch.equal(computed(x, W, format), torch.zeros(7, 18))
    W[1::2] *= -1
    assert torch.allclose(computed(x, W, format), torch.full((7, 18), sign * 384.0), rtol=1e-6)


@pytest.mark.parametrize("transposed", [False, True], ids=["W", "W^T"])
@pytest.mark.parametrize("format", BITS)
def test_blocks_of_zeros_add_nothing(format: str, transposed: bool) -> None:
    x, W, _ = (part.clone() for part in matrices(20, 300, 40, transposed))
    x[3], x[:, :128], W[:, 5], W[256:] = 0, 0, 0, 0
    x[4, 130] = 1e-42  # beside others of its block
    x[5, 128:256] = 1e-42
    y = computed(x, W, format)
    assert not bool(y[3].any()) and not bool(y[:, 5].any()) and not bool(y[5].any())
    assert norm(y - reference_matmul(x, W, format)) <= 1e-6 * norm(y)


@pytest.mark.parametrize("transposed", [False, True], ids=["W", "W^T"])
@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen(value: float, format: str, transposed: bool) -> None:
    x, W, y = matrices(20, 300, 40, transposed)
    x = x.clone()
    x[3, 150] = value
    int_matmul(x, W, y, format, add=True)
    rows = torch.arange(20) == 3
    assert torch.equal(y.isnan(), rows[:, None].expand(20, 40))
    x, W, _ = matrices(20, 300, 40, transposed)
    W = W.clone()  # keeps its strides
    W[299, 17] = value
    assert torch.equal(computed(x, W, format).isnan(), (torch.arange(40) == 17).expand(20, 40))


def test_nothing_to_multiply() -> None:
    assert computed(torch.empty(0, 5), torch.empty(5, 3), "int16").shape == (0, 3)
    assert not bool(computed(torch.empty(4, 0), torch.empty(0, 3), "int16").any())


def test_integers_are_within_their_bits() -> None:
    for bits in BITS.values():
        q, s = quantize_block(torch.tensor([[1e30, -1e30, 3e27], [1.0, -0.5, 0.0]]), 2 ** (bits - 1) - 1)
        assert float(q.abs().max()) == 2 ** (bits - 1) - 1
        assert torch.allclose(
            q * s, torch.tensor([[1e30, -1e30, 3e27], [1.0, -0.5, 0.0]]), rtol=0, atol=float(s[0]) / 2
        )
