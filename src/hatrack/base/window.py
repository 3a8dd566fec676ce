"""A frozen base larger than memory, one part of it at a time: read ahead, in the products' format, and let go again.

The weights are where transformers left them: mapped from the safetensors files, so that the system reads a page when it
is first touched. What is added here is when. While a part is shown the next one is read ahead by a thread, and the one
before is unmapped; its pages stay in the system's cache for as long as there is room. A part whose format is not the
products' (a bfloat16 base on a processor that is slow at it) is copied into one buffer, which all parts share.

Reading ahead and unmapping need Linux; elsewhere the system does as it likes. Knows nothing of what the parts compute.
"""

import contextlib
import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import nn

from hatrack.base.trunk import Trunk

OUTSIDE = -1
"""The part that is all but the layers; the others go by the number of their layer."""
WILL_NEED, DO_NOT_NEED = 3, 4
"""Linux's advice on mapped memory (madvise(2))."""
CHUNK = 2**24
"""Bytes read ahead at a time."""


class Span(NamedTuple):
    """Addresses of mapped memory, from `start` up to `end`."""

    start: int
    end: int


class Window:
    """Shows one part of a frozen `model` at a time: layer by its number, or OUTSIDE for everything else.

    While a part is shown its floating-point weights are in `dtype`; at other times they are as they lie in their files,
    and touching them reads them from there. What is trained, and what is not mapped from a file, is left alone, but for
    its format. Tables of embeddings stay as they are, and what is looked up in them is cast.
    """

    def __init__(self, model: Any, trunk: Trunk, dtype: torch.dtype) -> None:
        self.model, self.trunk, self.dtype = model, trunk, dtype
        self.parts = dict(enumerate(_frozen(layer) for layer in trunk.layers)) | {OUTSIDE: _outside(model, trunk)}
        mapped = _mapped_files()
        self.spans = {part: _spans(weights, mapped) for part, weights in self.parts.items()}
        self.shown: int | None = None
        self._stored: list[tuple[nn.Parameter, torch.Tensor]] = []
        wanted = max(sum(_padded(w) for w in weights if self._foreign(w)) for weights in self.parts.values())
        self._buffer = torch.empty(wanted, dtype=dtype)
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: dict[int, Future[None]] = {}
        for module in model.modules():
            if type(module) is nn.Embedding and module.weight.dtype != dtype:
                module.register_forward_hook(lambda _module, _ids, found: found.to(dtype))

    def show(self, part: int, then: int | None = None) -> None:
        """Shows a part in place of the one before, and begins to read the one that comes `then`."""
        if part != self.shown:
            self.close()
            if (reading := self._ahead.pop(part, None)) is not None:
                reading.result()
            self._copy(part)
            self.shown = part
        if then is not None and then != part and then not in self._ahead:
            self._ahead = {then: self._reader.submit(_read_ahead, self.spans[then])}

    def close(self) -> None:
        """Puts the weights of the part that is shown back as they lie in their files, and unmaps their pages."""
        if self.shown is None:
            return
        for weight, stored in self._stored:
            weight.data = stored
        self._stored.clear()
        for span in self.spans[self.shown]:
            _advise(span, DO_NOT_NEED)
        self.shown = None

    def _copy(self, part: int) -> None:
        """Weights of another format, cast into the buffer one behind the other."""
        start = 0
        for weight in self.parts[part]:
            if self._foreign(weight):
                self._stored.append((weight, weight.data))
                weight.data = self._buffer[start : start + weight.numel()].view(weight.shape).copy_(weight.data)
                start += _padded(weight)

    def _foreign(self, weight: nn.Parameter) -> bool:
        return weight.is_floating_point() and weight.dtype != self.dtype

    def stream(self) -> None:
        """From now on any pass through the model, generation included, shows each part as it comes to it, unless it is
        shown already."""
        last = len(self.trunk.layers) - 1
        self.model.get_input_embeddings().register_forward_pre_hook(lambda *_: self.show(OUTSIDE, then=0))
        for number, layer in enumerate(self.trunk.layers):
            layer.forward = self._shown_first(layer.forward, number, number + 1 if number < last else OUTSIDE)

    def _shown_first(self, forward: Callable[..., Any], number: int, after: int) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.shown == number:
                return forward(*args, **kwargs)
            self.show(number, then=after)
            output = forward(*args, **kwargs)
            if after == OUTSIDE:
                self.show(OUTSIDE, then=0)
            return output

        return run


@contextlib.contextmanager
def as_if(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While the block runs, the frozen weights in `model` look like zeros in `dtype`, and cost no memory: what is made
    in their format (an adapter's start) is made as for a base loaded in it. What is copied whole is not to be in it."""
    before = [(weight, weight.data) for weight in _frozen(model) if weight.is_floating_point()]
    for weight, data in before:
        weight.data = torch.zeros((), dtype=dtype).expand(data.shape)
    try:
        yield
    finally:
        for weight, data in before:
            weight.data = data


def _frozen(module: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in module.parameters() if not weight.requires_grad]


def _outside(model: nn.Module, trunk: Trunk) -> list[nn.Parameter]:
    """The frozen weights that are in no layer, without tables that are only looked up in."""
    inside = {id(module) for layer in trunk.layers for module in layer.modules()}
    found = {
        id(weight): weight
        for module in model.modules()
        if id(module) not in inside and type(module) is not nn.Embedding
        for weight in module.parameters(recurse=False)
        if not weight.requires_grad
    }
    return list(found.values())


def _padded(weight: nn.Parameter) -> int:
    """Its numbers, filled up so that the next one begins at a multiple of 64 bytes."""
    return -(-weight.numel() // 32) * 32


def _mapped_files() -> list[Span]:
    """Where this process has files mapped of which nothing was written to: a page that was would be lost unmapped."""
    if not sys.platform.startswith("linux"):
        return []
    found, span = [], None
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            first, _, rest = line.partition(" ")
            if not first.endswith(":"):
                start, _, end = first.partition("-")
                span = Span(int(start, 16), int(end, 16)) if rest.strip().endswith(".safetensors") else None
            elif span is not None and first == "Anonymous:" and rest.split()[0] == "0":
                found.append(span)
    return found


def _spans(weights: Iterable[torch.Tensor], mapped: Sequence[Span]) -> list[Span]:
    """The whole pages that mapped weights lie in, neighbours joined."""
    found: list[Span] = []
    page = mmap.PAGESIZE
    for start, end in sorted((w.data_ptr(), w.data_ptr() + w.nbytes) for w in weights):
        if not any(span.start <= start and end <= span.end for span in mapped):
            continue
        first, past = start // page * page, -(-end // page) * page
        if found and first <= found[-1].end + CHUNK // 16:
            found[-1] = Span(found[-1].start, max(past, found[-1].end))
        else:
            found.append(Span(first, past))
    return found


def _read_ahead(spans: Sequence[Span]) -> None:
    for span in spans:
        for start in range(span.start, span.end, CHUNK):
            _advise(Span(start, min(start + CHUNK, span.end)), WILL_NEED)


def _advise(span: Span, advice: int) -> None:
    """Tells the system what is to come; what it makes of it changes no value."""
    _libc().madvise(ctypes.c_void_p(span.start), ctypes.c_size_t(span.end - span.start), advice)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
