"""Which base is this: a short digest of its weights, whatever folder, shards or names' prefix they come in.

Knows nothing of models or devices, and needs no torch.
"""

import hashlib
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

from hatrack.base.header import TensorInfo, read_config, read_header, without_prefix
from hatrack.errors import BaseError

SAMPLE = 4096
"""Bytes read at each of three places of a tensor: its start, its middle, its end."""
DIGITS = 16


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits of a sha256 over every tensor's name, type, shape and sampled bytes.

    The same for the same weights in one file or many, in any order, with or without the model's prefix in the names.
    Two bases that differ only between the sampled bytes of their tensors have the same fingerprint. Raises BaseError
    where a file is missing or damaged.
    """
    config = read_config(folder)
    tensors = {without_prefix(name, config): info for name, info in read_header(folder).items()}
    samples = dict(_sampled(tensors.items()))
    total = hashlib.sha256()
    for name in sorted(tensors):
        info = tensors[name]
        total.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode() + samples[name])
    return total.hexdigest()[:DIGITS]


def _sampled(tensors: Iterable[tuple[str, TensorInfo]]) -> Iterable[tuple[str, bytes]]:
    """Name and digest of the sampled bytes, each file opened once and read from front to back."""
    by_file: dict[Path, list[tuple[int, int, str]]] = {}
    for name, info in tensors:
        by_file.setdefault(info.file, []).append((info.offset, info.bytes, name))
    for path, places in by_file.items():
        try:
            with path.open("rb") as file:
                for offset, length, name in sorted(places, key=itemgetter(0)):
                    digest = hashlib.sha256()
                    for start in sorted({0, max(0, length // 2 - SAMPLE // 2), max(0, length - SAMPLE)}):
                        file.seek(offset + start)
                        digest.update(file.read(min(SAMPLE, length - start)))
                    yield name, digest.digest()
        except OSError as error:
            raise BaseError(f"{path} cannot be read", got=error.strerror) from error
