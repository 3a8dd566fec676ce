"""A frozen base larger than memory, one part of it at a time: read ahead, in the products' format, and let go again.

The weights are where transformers left them: mapped from the safetensors files, so that the system reads a page when it
is first touched. What is added here is when. While a part is shown the next one is read ahead by a thread, and the one
before is unmapped; its pages stay in the system's cache where there is room for all of them. Where their format is not
the products' (a bfloat16 base on a processor that is slow at it), linear layers bring it into theirs themselves, a few
rows at a time (`kernels/frozen_linear.py`); the rest of a part is copied into one buffer, which all parts share.

Files are read ahead by calls that can fail, rather than by advice: where a disk gives an error, or a file was cut
short, the run ends with a message; touching such a page would end the process without one. Reading ahead and unmapping
need Linux; elsewhere the system does as it likes. Knows nothing of what the parts compute.
"""

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hatrack.base.free_memory import available_memory
from hatrack.base.layer_stack import LayerStack
from hatrack.errors import MachineError
from hatrack.kernels.frozen_linear import FrozenLinear

OUTSIDE = -1
"""The part that is all but the layers; the others go by the number of their layer."""
WILL_NEED, DO_NOT_NEED = 3, 4
"""Linux's advice on mapped memory (madvise(2))."""
CHUNK = 2**24
"""Bytes read ahead at a time."""
SMALL_TABLE = 2**22
"""Numbers of an embedding; so small ones are multiplied with in some models (DeBERTa's of relative positions)."""
PUT_BACK = "put the base back as it was; --resume goes on from the last checkpoint"


@dataclass(frozen=True)
class MappedFile:
    """Where a file is mapped: addresses from `start` up to `end`, beginning `offset` bytes into it."""

    path: Path
    start: int
    end: int
    offset: int
    stamp: tuple[int, int, int]
    """Inode, size and time of change, when it was found."""

    def check(self) -> None:
        """Raises MachineError where it is another file by now, or none."""
        try:
            now = _stamp(self.path)
        except OSError as error:
            raise MachineError(f"{self.path} is gone from under the run", got=error.strerror, fix=PUT_BACK) from error
        if now != self.stamp:
            raise MachineError(f"{self.path} was changed while the run reads it", fix=PUT_BACK)


class Span(NamedTuple):
    """Addresses of mapped memory, from `start` up to `end`, in `file`."""

    start: int
    end: int
    file: MappedFile


class MappedLayers:
    """Shows one part of a frozen `model` from `folder` at a time: layer by its number, or OUTSIDE for everything else.

    While a part is shown its floating-point weights are in `dtype`; at other times they are as they lie in their files,
    and touching them reads them from there. What is trained, and what is not mapped from a file, is left alone, but for
    its format. Matrices of linear layers and large tables of embeddings stay as they are: what is made of them is cast.
    """

    device = torch.device("cpu")
    """Where what is shown is computed with."""

    def __init__(self, model: Any, trunk: LayerStack, dtype: torch.dtype, folder: Path) -> None:
        self.model, self.trunk, self.dtype = model, trunk, dtype
        self.parts = dict(enumerate(_frozen(layer) for layer in trunk.layers)) | {OUTSIDE: _outside(model, trunk)}
        self.files = unmap(folder)
        self.spans = {part: _spans(weights, self.files) for part, weights in self.parts.items()}
        self.shown: int | None = None
        every = sum(span.end - span.start for spans in self.spans.values() for span in spans)
        self._crowded = every > available_memory()[0]
        self._stored: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._make_room()
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: dict[int, Future[None]] = {}
        for module in model.modules():
            if type(module) is nn.Embedding and module.weight.dtype != dtype:
                module.register_forward_hook(lambda _module, _ids, found: found.to(dtype))

    def show(self, part: int, then: int | None = None) -> None:
        """Shows a part in place of the one before, and begins to read the one that comes `then`.

        Raises MachineError where a file of the base cannot be read, or is not the one that was mapped.
        """
        if part != self.shown:
            self.close()
            for file in {span.file for span in self.spans[part]} if part != OUTSIDE else self.files:
                file.check()
            self._take(part, self._ahead.pop(part, None))
            self.shown = part
        if then is not None and then != part and then not in self._ahead:
            self._ahead = {then: self._read(then)}

    def close(self) -> None:
        """Puts the weights of the part that is shown back as they lie in their files, and unmaps their pages."""
        if self.shown is None:
            return
        for weight, stored in self._stored:
            weight.data = stored
        self._stored.clear()
        for span in self.spans[self.shown]:
            _advise(span.start, span.end - span.start, DO_NOT_NEED)
            if self._crowded:
                drop_page_cache(span)
        self.shown = None

    def _cast_by_their_layers(self) -> Iterator[nn.Parameter]:
        """Matrices of another format that need no copy, as their layers can do without one from now on."""
        kinds, modules = (nn.Linear, FrozenLinear), list(self.model.modules())
        others = [module for module in modules if type(module) not in (*kinds, nn.Embedding)]
        used = {id(weight) for module in others for weight in module.parameters(recurse=False)}
        for module in modules:
            if type(module) not in kinds or module.weight.requires_grad or id(module.weight) in used:
                continue
            if self._is_foreign(module.weight):
                module.__class__ = FrozenLinear
                yield module.weight

    def _make_room(self) -> None:
        cast = {id(weight) for weight in self._cast_by_their_layers()}
        self._copied = {
            part: [w for w in weights if self._is_foreign(w) and id(w) not in cast]
            for part, weights in self.parts.items()
        }
        wanted = max(sum(map(_padded, weights)) for weights in self._copied.values())
        self._buffer = torch.empty(wanted, dtype=self.dtype)

    def _read(self, part: int) -> Future[Any]:
        """Begins to read a part ahead."""
        return self._reader.submit(read_ahead, self.spans[part])

    def _take(self, part: int, reading: Future[Any] | None) -> None:
        """Makes a part ready to compute with, which `reading` reads ahead: weights of another format are cast into the
        buffer one behind the other."""
        if reading is not None:
            reading.result()
        start = 0
        for weight in self._copied[part]:
            self._stored.append((weight, weight.data))
            weight.data = self._buffer[start : start + weight.numel()].view(weight.shape).copy_(weight.data)
            start += _padded(weight)

    def _is_foreign(self, weight: nn.Parameter) -> bool:
        return weight.is_floating_point() and weight.dtype != self.dtype

    def stream(self) -> None:
        """From now on any pass through the model, generation included, shows each part as it comes to it, unless it is
        shown already."""
        last = len(self.trunk.layers) - 1
        self.model.get_input_embeddings().register_forward_pre_hook(lambda *_: self._begin())
        for number, layer in enumerate(self.trunk.layers):
            layer.forward = self._shown_first(layer.forward, number, number + 1 if number < last else OUTSIDE)

    def _begin(self) -> None:
        if self.shown != OUTSIDE:
            self.show(OUTSIDE, then=0)

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


def unmap(folder: Path) -> list[MappedFile]:
    """Unmaps what was touched so far of the weights in `folder`, and returns where their files are mapped."""
    files = _mapped_files({file.resolve() for file in folder.glob("*.safetensors")})
    for file in files:
        _advise(file.start, file.end - file.start, DO_NOT_NEED)
    return files


@contextlib.contextmanager
def fake_dtype(model: nn.Module, dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[None]:
    """While the block runs, the frozen weights in `model` look like zeros in `dtype` on `device`, and cost no memory:
    what is made like them (an adapter's start) is made as for a base loaded so. What is copied whole is not to be in
    it."""
    before = [(weight, weight.data) for weight in _frozen(model) if weight.is_floating_point()]
    for weight, data in before:
        weight.data = torch.zeros((), dtype=dtype, device=device).expand(data.shape)
    try:
        yield
    finally:
        for weight, data in before:
            weight.data = data


def _frozen(module: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in module.parameters() if not weight.requires_grad]


def _outside(model: nn.Module, trunk: LayerStack) -> list[nn.Parameter]:
    """The frozen weights that are in no layer, without large tables, which are only looked up in."""
    inside = {id(module) for layer in trunk.layers for module in layer.modules()}
    found = {
        id(weight): weight
        for module in model.modules()
        if id(module) not in inside and not (type(module) is nn.Embedding and module.weight.numel() > SMALL_TABLE)
        for weight in module.parameters(recurse=False)
        if not weight.requires_grad
    }
    return list(found.values())


def _padded(weight: nn.Parameter) -> int:
    """Its numbers, filled up so that the next one begins at a multiple of 64 bytes."""
    return -(-weight.numel() // 32) * 32


def _mapped_files(files: Collection[Path]) -> list[MappedFile]:
    """Where this process has `files` mapped of which nothing was written to: a page that was would be lost unmapped."""
    if not sys.platform.startswith("linux"):
        return []
    found, file = [], None
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            first, _, rest = line.partition(" ")
            if not first.endswith(":"):
                file = _mapped_file(files, *line.rstrip("\n").split(maxsplit=5))
            elif file is not None and first == "Anonymous:" and rest.split()[0] == "0":
                found.append(file)
    return found


def _mapped_file(
    files: Collection[Path], span: str, _: str, offset: str, __: str, inode: str, path: str = ""
) -> MappedFile | None:
    """A line of /proc/PID/smaps (proc(5)), where it tells of one of `files` that still lies where it was mapped."""
    file = Path(path)
    if file not in files or file.stat().st_ino != int(inode):
        return None
    start, _, end = span.partition("-")
    return MappedFile(file, int(start, 16), int(end, 16), int(offset, 16), _stamp(file))


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _spans(weights: Iterable[torch.Tensor], mapped: Sequence[MappedFile]) -> list[Span]:
    """The whole pages that mapped weights lie in, neighbours joined."""
    found: list[Span] = []
    page = mmap.PAGESIZE
    for start, end in sorted((w.data_ptr(), w.data_ptr() + w.nbytes) for w in weights):
        file = next((file for file in mapped if file.start <= start and end <= file.end), None)
        if file is None:
            continue
        first, past = start // page * page, -(-end // page) * page
        if found and found[-1].file is file and first <= found[-1].end + CHUNK // 16:
            found[-1] = Span(found[-1].start, max(past, found[-1].end), file)
        else:
            found.append(Span(first, past, file))
    return found


def read_ahead(spans: Sequence[Span]) -> None:
    """Has the system read what lies in `spans` into its cache; returns when it is there."""
    with open(os.devnull, "wb") as nowhere:
        for start, end, file in spans:
            with _readable(file), open(file.path, "rb") as source:
                for place in range(start, end, CHUNK):
                    _advise(place, min(2 * CHUNK, end - place), WILL_NEED)
                    offset = file.offset + place - file.start
                    prefetch(source.fileno(), nowhere.fileno(), offset, min(CHUNK, end - place))


def prefetch(source: int, nowhere: int, place: int, count: int) -> None:
    """Reads `count` bytes of a file without copying them anywhere (sendfile(2)); the last page may be a part of one."""
    while count > 0:
        done = os.sendfile(nowhere, source, place, count)
        if done == 0 and count >= mmap.PAGESIZE:
            raise OSError(errno.EIO, "it is shorter than it was")
        place, count = place + done, count - (done or count)


@contextlib.contextmanager
def _readable(file: MappedFile) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(f"{file.path} cannot be read", got=error.strerror, fix=PUT_BACK) from error


def drop_page_cache(span: Span) -> None:
    """Has the system's cache drop a span: left to itself it keeps what was used and drops what was read ahead."""
    start, end, file = span
    with contextlib.suppress(OSError), open(file.path, "rb") as source:
        os.posix_fadvise(source.fileno(), file.offset + start - file.start, end - start, os.POSIX_FADV_DONTNEED)


def _advise(start: int, count: int, advice: int) -> None:
    """Tells the system what is to come; what it makes of it changes no value."""
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(count), advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
