"""Streams a frozen base larger than memory: one part at a time is read ahead, computed with, unmapped.

The weights stay where transformers left them: mapped from the safetensors files, so that the system reads a page when
it is first touched. This module decides when. While one part is loaded, a thread reads the next one ahead, and the one
before is unmapped; its pages stay in the system's cache where all of the base has room there. Where a weight has
another dtype than the matmuls (a bfloat16 base on a CPU that is slow at it), linear layers cast it themselves, a few
rows at a time (`kernels/frozen_linear.py`); the rest of a part is cast into one buffer that all parts share.

Files are read ahead by calls that can fail, not by advice: where a disk gives an error, or a file was cut short, the
run ends with a message; touching such a page would end the process without one. Reading ahead and unmapping need Linux;
elsewhere the system decides by itself. Knows nothing of what the parts compute.
"""

import contextlib
import ctypes
import errno
import functools
import mmap
import os
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
"""The part that is all but the layers; the others are layers, by their number."""
MADV_WILLNEED, MADV_DONTNEED = 3, 4
"""Linux's advice on mapped memory (madvise(2))."""
CHUNK = 2**24
"""Bytes read ahead at a time."""
SMALL_EMBEDDING = 2**22
"""Elements of an embedding; some models use such small ones in matmuls (DeBERTa's of relative positions)."""
RESTORE_HINT = "put the base back as it was; --resume goes on from the last checkpoint"
SMAPS = Path("/proc/self/smaps")


@dataclass(frozen=True)
class MappedFile:
    """A file in memory: addresses from `start` up to `end`, beginning `offset` bytes into the file."""

    path: Path
    start: int
    end: int
    offset: int
    stamp: tuple[int, int, int]
    """Inode, size and time of change when it was mapped."""

    def check(self) -> None:
        """Raises MachineError where the file was replaced, changed or removed since."""
        try:
            now = _stamp(self.path)
        except OSError as error:
            raise MachineError(
                f"{self.path} was removed while the run reads it", got=error.strerror, fix=RESTORE_HINT
            ) from error
        if now != self.stamp:
            raise MachineError(f"{self.path} was changed while the run reads it", fix=RESTORE_HINT)


class Span(NamedTuple):
    """Addresses of mapped memory, from `start` up to `end`, in `file`."""

    start: int
    end: int
    file: MappedFile


class MappedLayers:
    """Loads one part of a frozen `model` from `folder` at a time: a layer by its number, or OUTSIDE for all the rest.

    While a part is loaded, its floating-point weights are in `dtype`; otherwise they are as in their files, from which
    touching them reads them. Weights that are not mapped from a file are only cast. Matrices of linear layers and large
    embeddings stay as they are: their outputs are cast. Trained weights are not touched.
    """

    device = torch.device("cpu")
    """Where a loaded part is computed with."""

    def __init__(self, model: Any, layer_stack: LayerStack, dtype: torch.dtype, folder: Path) -> None:
        self.model, self.layer_stack, self.dtype = model, layer_stack, dtype
        self.parts = dict(enumerate(_frozen(layer) for layer in layer_stack.layers))
        self.parts[OUTSIDE] = _outside_layers(model, layer_stack)
        self.files = unmap(folder)
        self.spans = {part: _spans(weights, self.files) for part, weights in self.parts.items()}
        self.loaded: int | None = None
        count = sum(span.end - span.start for spans in self.spans.values() for span in spans)
        self._exceeds_page_cache = count > available_memory()[0]
        self._stored: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._allocate()
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: dict[int, Future[None]] = {}
        for module in model.modules():
            if type(module) is nn.Embedding and module.weight.dtype != dtype:
                module.register_forward_hook(lambda _module, _ids, output: output.to(dtype))

    def load(self, part: int, next_part: int | None = None) -> None:
        """Loads a part in place of the one before, and begins to read `next_part` ahead.

        Raises MachineError where a file of the base cannot be read, or is not the one that was mapped.
        """
        if part != self.loaded:
            self.unload()
            for file in {span.file for span in self.spans[part]} if part != OUTSIDE else self.files:
                file.check()
            self._use(part, self._ahead.pop(part, None))
            self.loaded = part
        if next_part is not None and next_part != part and next_part not in self._ahead:
            self._ahead = {next_part: self._read(next_part)}

    def unload(self) -> None:
        """Puts the weights of the loaded part back as they are in their files, and unmaps their pages."""
        if self.loaded is None:
            return
        for weight, stored in self._stored:
            weight.data = stored
        self._stored.clear()
        for span in self.spans[self.loaded]:
            _advise(span.start, span.end - span.start, MADV_DONTNEED)
            if self._exceeds_page_cache:
                drop_page_cache(span)
        self.loaded = None

    def stream(self) -> None:
        """From now on any pass through the model, generation included, loads each part when it comes to it."""
        last = len(self.layer_stack.layers) - 1
        self.model.get_input_embeddings().register_forward_pre_hook(lambda *_: self._load_outside())
        for number, layer in enumerate(self.layer_stack.layers):
            layer.forward = self._load_first(layer.forward, number, number + 1 if number < last else OUTSIDE)

    def _load_outside(self) -> None:
        if self.loaded != OUTSIDE:
            self.load(OUTSIDE, next_part=0)

    def _load_first(self, forward: Callable[..., Any], number: int, next_part: int) -> Callable[..., Any]:
        """`forward` of layer `number`, with the layer loaded before it where it is not yet."""

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.loaded == number:
                return forward(*args, **kwargs)
            self.load(number, next_part=next_part)
            output = forward(*args, **kwargs)
            if next_part == OUTSIDE:
                self.load(OUTSIDE, next_part=0)
            return output

        return run

    def _allocate(self) -> None:
        """Makes the buffer for weights of another dtype."""
        cast_by_layer = {id(weight) for weight in self._weights_cast_by_layer()}
        self._cast = {
            part: [weight for weight in weights if self._needs_cast(weight) and id(weight) not in cast_by_layer]
            for part, weights in self.parts.items()
        }
        count = max(sum(map(_padded_elements, weights)) for weights in self._cast.values())
        self._buffer = torch.empty(count, dtype=self.dtype)

    def _weights_cast_by_layer(self) -> Iterator[nn.Parameter]:
        """Turns linear layers of another dtype into `FrozenLinear`s, which need no copy of their matrix; yields these
        matrices."""
        kinds, modules = (nn.Linear, FrozenLinear), list(self.model.modules())
        others = [module for module in modules if type(module) not in (*kinds, nn.Embedding)]
        used = {id(weight) for module in others for weight in module.parameters(recurse=False)}
        for module in modules:
            if type(module) not in kinds or module.weight.requires_grad or id(module.weight) in used:
                continue
            if self._needs_cast(module.weight):
                module.__class__ = FrozenLinear
                yield module.weight

    def _read(self, part: int) -> Future[Any]:
        """Begins to read a part ahead."""
        return self._reader.submit(read_ahead, self.spans[part])

    def _use(self, part: int, reading: Future[Any] | None) -> None:
        """Waits until a part is read, and casts its weights of another dtype into the buffer, one after the other."""
        if reading is not None:
            reading.result()
        start = 0
        for weight in self._cast[part]:
            self._stored.append((weight, weight.data))
            weight.data = self._buffer[start : start + weight.numel()].view(weight.shape).copy_(weight.data)
            start += _padded_elements(weight)

    def _needs_cast(self, weight: nn.Parameter) -> bool:
        return weight.is_floating_point() and weight.dtype != self.dtype


def unmap(folder: Path) -> list[MappedFile]:
    """Unmaps the pages of the weights in `folder` that were touched so far, and returns where the files are mapped."""
    files = _mapped_files({file.resolve() for file in folder.glob("*.safetensors")})
    for file in files:
        _advise(file.start, file.end - file.start, MADV_DONTNEED)
    return files


@contextlib.contextmanager
def fake_dtype(model: nn.Module, dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[None]:
    """While the block runs, the frozen weights in `model` look like zeros in `dtype` on `device`, and take no memory:
    adapters are initialised as for a base that is loaded so. Not for modules that are copied whole, such as heads."""
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


def _outside_layers(model: nn.Module, layer_stack: LayerStack) -> list[nn.Parameter]:
    """The frozen weights that are in no layer, without large embeddings, of which only single rows are read."""
    inside = {id(module) for layer in layer_stack.layers for module in layer.modules()}
    found = {
        id(weight): weight
        for module in model.modules()
        if id(module) not in inside and not (type(module) is nn.Embedding and module.weight.numel() > SMALL_EMBEDDING)
        for weight in module.parameters(recurse=False)
        if not weight.requires_grad
    }
    return list(found.values())


def _padded_elements(weight: nn.Parameter) -> int:
    """The count of its elements, rounded up so that the next weight begins at a multiple of 64 bytes."""
    return -(-weight.numel() // 32) * 32


def _mapped_files(files: Collection[Path]) -> list[MappedFile]:
    """Where this process has `files` mapped unmodified: a modified page would be lost by unmapping. Linux only."""
    if not (SMAPS.exists() and hasattr(os, "sendfile")):
        return []
    found, file = [], None
    with SMAPS.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            first, _, rest = line.partition(" ")
            if not first.endswith(":"):
                file = _parse_mapping(line, files)
            elif file is not None and first == "Anonymous:" and rest.split()[0] == "0":
                found.append(file)
    return found


def _parse_mapping(line: str, files: Collection[Path]) -> MappedFile | None:
    """A mapping in /proc/PID/smaps (proc(5)), where it is of one of `files`, and that file was not replaced since."""
    addresses, _, offset, _, inode, *path = line.rstrip("\n").split(maxsplit=5)
    file = Path(path[0]) if path else None
    if file not in files or file is None or file.stat().st_ino != int(inode):
        return None
    start, _, end = addresses.partition("-")
    return MappedFile(file, int(start, 16), int(end, 16), int(offset, 16), _stamp(file))


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _spans(weights: Iterable[torch.Tensor], mapped: Sequence[MappedFile]) -> list[Span]:
    """The whole pages of mapped weights, neighbours joined."""
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
    """Reads `spans` into the system's page cache; returns when they are there."""
    with open(os.devnull, "wb") as nowhere:
        for start, end, file in spans:
            with _read_errors(file), open(file.path, "rb") as source:
                for address in range(start, end, CHUNK):
                    _advise(address, min(2 * CHUNK, end - address), MADV_WILLNEED)
                    offset = file.offset + address - file.start
                    prefetch(source.fileno(), nowhere.fileno(), offset, min(CHUNK, end - address))


def prefetch(source: int, nowhere: int, offset: int, count: int) -> None:
    """Reads `count` bytes of a file without copying them anywhere (sendfile(2)); the last page may be incomplete."""
    while count > 0:
        done = os.sendfile(nowhere, source, offset, count)
        if done == 0 and count >= mmap.PAGESIZE:
            raise OSError(errno.EIO, "it is shorter than it was")
        offset, count = offset + done, count - (done or count)


@contextlib.contextmanager
def _read_errors(file: MappedFile) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(f"{file.path} cannot be read", got=error.strerror, fix=RESTORE_HINT) from error


def drop_page_cache(span: Span) -> None:
    """Drops a span from the system's page cache, which would otherwise keep used pages and drop those read ahead."""
    start, end, file = span
    with contextlib.suppress(OSError), open(file.path, "rb") as source:
        os.posix_fadvise(source.fileno(), file.offset + start - file.start, end - start, os.POSIX_FADV_DONTNEED)


def _advise(start: int, count: int, advice: int) -> None:
    """Advises the system on mapped memory (madvise(2)); this changes no value."""
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(count), advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
