"""Keeps one layer of a base resident at a time: prefetch, compute, release.

For a frozen base larger than memory. transformers memory-maps the weights from the safetensors files, so that the
kernel reads a page when it is first touched; this module controls when. A part is one layer, or all weights outside the
layers. While one part is loaded, a thread reads the next part ahead, and the pages of the previous part are released;
they stay in the page cache if the whole base fits there. If a weight has another dtype than the matmuls (a bfloat16
base on a CPU that is slow at it), linear layers cast it themselves, a few rows at a time (`kernels/frozen_linear.py`);
the other weights of the part are cast into one buffer that all parts share.

Besides the madvise hint, files are read with sendfile, which reports I/O errors, so that a bad disk or a truncated file
ends the run with a message; touching a bad page would kill the process (SIGBUS). Reading ahead and releasing need
Linux; elsewhere the kernel alone decides. Knows nothing of what the layers compute.
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

NON_LAYER_WEIGHTS = -1
"""Pseudo layer number of all weights outside the layer stack (embeddings, final norm, head)."""
MADV_WILLNEED, MADV_DONTNEED = 3, 4
"""Linux's constants for hints on mapped memory (madvise(2))."""
CHUNK = 2**24
"""Bytes read ahead at a time."""
SMALL_EMBEDDING = 2**22
"""Embeddings of up to this many elements are loaded whole: some models use them in matmuls (DeBERTa's relative
positions). Of larger ones only the rows that are looked up are read."""
RESTORE_HINT = "check the disk, or restore the base's files; then --resume"
SMAPS = Path("/proc/self/smaps")


@dataclass(frozen=True)
class MappedFile:
    """A memory mapping of a file: addresses from `start` up to `end`, from `offset` bytes into the file."""

    path: Path
    start: int
    end: int
    offset: int
    identity: tuple[int, int, int]
    """Inode, size and modification time when the file was mapped."""

    def check(self) -> None:
        """Raises MachineError if the file was replaced, changed or removed since it was mapped."""
        try:
            current = _file_identity(self.path)
        except OSError as error:
            raise MachineError(
                f"{self.path} was removed during the run", got=error.strerror, fix=RESTORE_HINT
            ) from error
        if current != self.identity:
            raise MachineError(f"{self.path} was changed during the run", fix=RESTORE_HINT)


class Span(NamedTuple):
    """Addresses of mapped memory, from `start` up to `end`, in `file`."""

    start: int
    end: int
    file: MappedFile


class MappedLayers:
    """Loads one part of a frozen `model` from `folder` at a time: a layer by its number, or NON_LAYER_WEIGHTS.

    While a part is loaded, its floating-point weights are in `dtype`; otherwise they keep the file's dtype and are
    paged in on access. Two kinds always keep the file's dtype: matrices of linear layers, which are cast during the
    matmul, and large embeddings, whose output is cast. Weights that are not mapped from a file are cast, but neither
    read ahead nor released. Trained weights are not touched.
    """

    device = torch.device("cpu")
    """The device of the weights of a loaded part."""

    def __init__(self, model: Any, layer_stack: LayerStack, dtype: torch.dtype, folder: Path) -> None:
        self.model, self.layer_stack, self.dtype = model, layer_stack, dtype
        self.parts = dict(enumerate(_frozen(layer) for layer in layer_stack.layers))
        self.parts[NON_LAYER_WEIGHTS] = _non_layer_weights(model, layer_stack)
        self.files = find_mappings(folder)
        release_pages(self.files)
        self.spans = {part: _page_spans(weights, self.files) for part, weights in self.parts.items()}
        self.loaded: int | None = None
        mapped_bytes = sum(span.end - span.start for spans in self.spans.values() for span in spans)
        self._exceeds_page_cache = mapped_bytes > available_memory()[0]
        self._stored: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._allocate_buffers()
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._pending_reads: dict[int, Future[None]] = {}
        for module in model.modules():
            if type(module) is nn.Embedding and module.weight.dtype != dtype:
                module.register_forward_hook(lambda _module, _ids, output: output.to(dtype))

    def load(self, part: int, next_part: int | None = None) -> None:
        """Replaces the loaded part with `part`, and starts to read `next_part` ahead.

        Raises MachineError if a file of the base cannot be read, or has changed since it was mapped.
        """
        if part != self.loaded:
            self.unload()
            for file in {span.file for span in self.spans[part]} if part != NON_LAYER_WEIGHTS else self.files:
                file.check()
            self._activate(part, self._pending_reads.pop(part, None))
            self.loaded = part
        if next_part is not None and next_part != part and next_part not in self._pending_reads:
            self._pending_reads = {next_part: self._start_reading(next_part)}

    def unload(self) -> None:
        """Restores the file's dtype of the loaded part's weights, and releases their pages."""
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
        """From now on every forward pass of the model, generation included, loads each part when it needs it."""
        last = len(self.layer_stack.layers) - 1
        self.model.get_input_embeddings().register_forward_pre_hook(lambda *_: self._load_non_layer_weights())
        for number, layer in enumerate(self.layer_stack.layers):
            layer.forward = self._load_before(layer.forward, number, number + 1 if number < last else NON_LAYER_WEIGHTS)

    def _load_non_layer_weights(self) -> None:
        if self.loaded != NON_LAYER_WEIGHTS:
            self.load(NON_LAYER_WEIGHTS, next_part=0)

    def _load_before(self, forward: Callable[..., Any], number: int, next_part: int) -> Callable[..., Any]:
        """Wraps `forward` of layer `number`: loads the layer first if it is not loaded."""

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.loaded == number:
                return forward(*args, **kwargs)
            self.load(number, next_part=next_part)
            output = forward(*args, **kwargs)
            if next_part == NON_LAYER_WEIGHTS:
                self.load(NON_LAYER_WEIGHTS, next_part=0)
            return output

        return run

    def _allocate_buffers(self) -> None:
        """Allocates the buffer for weights that have to be cast."""
        converted = {id(weight) for weight in self._convert_to_frozen_linear()}
        self._cast_weights = {
            part: [weight for weight in weights if self._needs_cast(weight) and id(weight) not in converted]
            for part, weights in self.parts.items()
        }
        elements = max(sum(map(_padded_elements, weights)) for weights in self._cast_weights.values())
        self._buffer = torch.empty(elements, dtype=self.dtype)

    def _convert_to_frozen_linear(self) -> Iterator[nn.Parameter]:
        """Converts linear layers whose matrix has another dtype to `FrozenLinear`, which casts it during the matmul.

        Yields these matrices. A layer stays as it is if a module of another class uses its matrix too.
        """
        linear_classes, modules = (nn.Linear, FrozenLinear), list(self.model.modules())
        other_modules = [module for module in modules if type(module) not in (*linear_classes, nn.Embedding)]
        used_elsewhere = {id(weight) for module in other_modules for weight in module.parameters(recurse=False)}
        for module in modules:
            if type(module) not in linear_classes or module.weight.requires_grad or id(module.weight) in used_elsewhere:
                continue
            if self._needs_cast(module.weight):
                module.__class__ = FrozenLinear
                yield module.weight

    def _start_reading(self, part: int) -> Future[Any]:
        """Starts to read a part ahead, in the reading thread."""
        return self._reader.submit(read_ahead, self.spans[part])

    def _activate(self, part: int, reading: Future[Any] | None) -> None:
        """Waits until a part is read, then casts its weights of another dtype into the buffer."""
        if reading is not None:
            reading.result()
        start = 0
        for weight in self._cast_weights[part]:
            self._stored.append((weight, weight.data))
            weight.data = self._buffer[start : start + weight.numel()].view(weight.shape).copy_(weight.data)
            start += _padded_elements(weight)

    def _needs_cast(self, weight: nn.Parameter) -> bool:
        return weight.is_floating_point() and weight.dtype != self.dtype


def find_mappings(folder: Path) -> list[MappedFile]:
    """The mappings of the safetensors files in `folder` that this process has not modified. Linux only: else empty."""
    return _parse_smaps({file.resolve() for file in folder.glob("*.safetensors")})


def release_pages(files: Sequence[MappedFile]) -> None:
    """Releases the resident pages of unmodified mappings; the next access reads them from the file again."""
    for file in files:
        _advise(file.start, file.end - file.start, MADV_DONTNEED)


@contextlib.contextmanager
def placeholder_weights(model: nn.Module, dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[None]:
    """While the block runs, replaces the frozen weights of `model` by zeros in `dtype` on `device` that take no memory.

    An adapter made in the block gets the dtype and device that it would get if the base were in `dtype` on `device`.
    Not for a module of the base that peft copies (modules_to_save, such as a head): the copy would stay zeros.
    """
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


def _non_layer_weights(model: nn.Module, layer_stack: LayerStack) -> list[nn.Parameter]:
    """The frozen weights outside the layers, except large embeddings, of which only single rows are read."""
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
    """The number of elements, rounded up so that the next weight in the buffer begins at a multiple of 64 bytes."""
    return -(-weight.numel() // 32) * 32


def _parse_smaps(files: Collection[Path]) -> list[MappedFile]:
    """The mappings of `files` in this process without modified pages: releasing a page discards its modifications."""
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
    """The mapping that a line of /proc/PID/smaps (proc(5)) describes; None if it is of no file in `files`, or if that
    file was replaced."""
    addresses, _, offset, _, inode, *path = line.rstrip("\n").split(maxsplit=5)
    file = Path(path[0]) if path else None
    if file not in files or file is None or file.stat().st_ino != int(inode):
        return None
    start, _, end = addresses.partition("-")
    return MappedFile(file, int(start, 16), int(end, 16), int(offset, 16), _file_identity(file))


def _file_identity(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _page_spans(weights: Iterable[torch.Tensor], mapped: Sequence[MappedFile]) -> list[Span]:
    """The pages of the mapped weights as spans; spans that are close together become one."""
    found: list[Span] = []
    page = mmap.PAGESIZE
    for start, end in sorted((w.data_ptr(), w.data_ptr() + w.nbytes) for w in weights):
        file = next((file for file in mapped if file.start <= start and end <= file.end), None)
        if file is None:
            continue
        first_page, end_page = start // page * page, -(-end // page) * page
        if found and found[-1].file is file and first_page <= found[-1].end + CHUNK // 16:
            found[-1] = Span(found[-1].start, max(end_page, found[-1].end), file)
        else:
            found.append(Span(first_page, end_page, file))
    return found


def read_ahead(spans: Sequence[Span]) -> None:
    """Reads `spans` into the page cache; returns when they are there."""
    with open(os.devnull, "wb") as nowhere:
        for start, end, file in spans:
            with _read_errors(file), open(file.path, "rb") as source:
                for address in range(start, end, CHUNK):
                    _advise(address, min(2 * CHUNK, end - address), MADV_WILLNEED)
                    offset = file.offset + address - file.start
                    prefetch(source.fileno(), nowhere.fileno(), offset, min(CHUNK, end - address))


def prefetch(source: int, nowhere: int, offset: int, count: int) -> None:
    """Reads `count` bytes into the page cache by sendfile(2) to /dev/null; the last page may be incomplete."""
    while count > 0:
        done = os.sendfile(nowhere, source, offset, count)
        if done == 0 and count >= mmap.PAGESIZE:
            raise OSError(errno.EIO, "the file was truncated")
        offset, count = offset + done, count - (done or count)


@contextlib.contextmanager
def _read_errors(file: MappedFile) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(f"{file.path} cannot be read", got=error.strerror, fix=RESTORE_HINT) from error


def drop_page_cache(span: Span) -> None:
    """Drops a span from the page cache, which would otherwise keep used pages and evict those read ahead."""
    start, end, file = span
    with contextlib.suppress(OSError), open(file.path, "rb") as source:
        os.posix_fadvise(source.fileno(), file.offset + start - file.start, end - start, os.POSIX_FADV_DONTNEED)


def _advise(start: int, count: int, advice: int) -> None:
    """Gives the kernel a hint on mapped memory (madvise(2)). MADV_DONTNEED is safe only on unmodified pages, see
    `_parse_smaps`."""
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(count), advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
