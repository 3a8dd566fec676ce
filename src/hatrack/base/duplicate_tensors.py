"""Tensors that a base's files hold several times. Needs no torch."""

import hashlib
from collections import defaultdict
from pathlib import Path

from hatrack.base.header import WRAPPERS, TensorInfo, read_file_headers
from hatrack.errors import ModelError
from hatrack.storage import machine_errors


def check_copies(source: str, folder: Path) -> None:
    """Raises ModelError where one tensor is in the files of a base several times, with other numbers each: in several
    shards, or with and without what a wrapper puts into names. Which of them is used would be chance."""
    found: dict[str, list[TensorInfo]] = defaultdict(list)
    for header in read_file_headers(folder).values():
        for name, info in header.items():
            found[WRAPPERS.sub("", name)].append(info)
    for name, copies in found.items():
        if len(copies) > 1 and len({_digest(copy) for copy in copies}) > 1:
            raise ModelError(
                f"{source} holds a tensor twice, with other numbers each time",
                got=f"{name} in {' and '.join(dict.fromkeys(copy.file.name for copy in copies))}",
                fix="copy or download the base again, into an empty folder",
                gotcha="base-tensor-twice",
            )


def _digest(tensor: TensorInfo) -> bytes:
    with machine_errors(tensor.file), tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        described = f"{tensor.dtype} {tensor.shape} ".encode()
        return hashlib.sha256(described + file.read(tensor.bytes)).digest()
