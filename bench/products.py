"""Times matmuls with a frozen weight: torch's in float32 and bfloat16, hatrack's in integers. In turns, medians.

    .venv/bin/python bench/products.py [--rounds 9] [--threads 1] [--shapes 1024x576x1536,...] [--sides float32,int16]

GFLOP/s a thread of x (n, k) W (k, d), with W contiguous and transposed. Errors are norms relative to the exact matmul:
of normally distributed elements, of Student's t with 3 degrees of freedom, of normal ones with one channel of x times
100.
"""

import argparse
import statistics
import time

import torch

from hatrack.kernels import int8

SHAPES = "1024x576x576,1024x576x192,1024x576x1536,1024x1536x576,2048x768x768,2048x768x3072,512x384x384,2048x384x1536"
SHAPES += ",170x576x49152,1024x4096x4096,1024x4096x11008"
AT_LEAST = 2e9
"""FLOP timed at once: small matmuls are repeated."""


def main() -> None:
    """Prints a table of speeds, and one of errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--sides", default="float32,bfloat16,int16,int8")
    options = parser.parse_args()
    if not int8.is_available():
        raise SystemExit("no kernels for integers here: they need a C++ compiler and a CPU with AVX2")
    torch.set_num_threads(options.threads)
    sides = options.sides.split(",")
    print(f"{options.threads} threads, GFLOP/s a thread (slowest to fastest), and relative to the first")
    for shape in options.shapes.split(","):
        n, k, d = map(int, shape.split("x"))
        for transposed in (True, False):
            x, W = torch.randn(n, k), torch.randn(d, k).t() if transposed else torch.randn(k, d)
            speeds = _speeds(x, W, sides, options.rounds)
            first = statistics.median(speeds[sides[0]])
            line = f"{shape:<16}{'W^T' if transposed else 'W':<5}"
            for side, found in speeds.items():
                middle = statistics.median(found)
                line += f"{side} {middle:.0f} ({min(found):.0f} to {max(found):.0f}) {middle / first:.2f}x  "
            print(line, flush=True)
    print("errors")
    for name, (x, W) in _matrices().items():
        exact = x.double() @ W.double()
        errors = {side: float((_multiply(x, W, side).double() - exact).norm() / exact.norm()) for side in sides}
        print(f"{name:<16}" + "  ".join(f"{side} {error:.1e}" for side, error in errors.items()))


def _speeds(x: torch.Tensor, W: torch.Tensor, sides: list[str], rounds: int) -> dict[str, list[float]]:
    """Side -> GFLOP/s a thread in each round."""
    (n, k), d = x.shape, W.shape[1]
    inputs = {side: (x.bfloat16(), W.bfloat16()) if side == "bfloat16" else (x, W) for side in sides}
    out = {side: torch.empty(n, d, dtype=inputs[side][0].dtype) for side in sides}
    flop, speeds = 2 * n * k * d, {side: [0.0] * 0 for side in sides}
    repeats = max(1, round(AT_LEAST / flop))
    for turn in range(rounds + 1):
        for side in sides:
            began = time.perf_counter()
            for _ in range(repeats):
                _multiply(*inputs[side], side, out[side])
            if turn:  # the first warms up
                speeds[side].append(repeats * flop / (time.perf_counter() - began) / 1e9 / torch.get_num_threads())
    return speeds


def _multiply(x: torch.Tensor, W: torch.Tensor, side: str, out: torch.Tensor | None = None) -> torch.Tensor:
    if side not in int8.BITS:
        dtype = getattr(torch, side)
        return torch.mm(x.to(dtype), W.to(dtype), out=out)
    out = torch.empty(len(x), W.shape[1]) if out is None else out
    int8.int_matmul(x, W, out, side)
    return out


def _matrices() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    x, W = torch.randn(256, 1536), torch.randn(1536, 256)
    heavy = torch.distributions.StudentT(3.0)
    channel = x.clone()
    channel[:, 7] *= 100
    return {"normal": (x, W), "student": (heavy.sample(x.shape), heavy.sample(W.shape)), "channel": (channel, W)}


if __name__ == "__main__":
    main()
