"""Finds tensors that a base's files contain several times, with different values. Needs no torch."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping

from hatrack.base.header import WRAPPERS, TensorInfo
from hatrack.errors import ModelError
from hatrack.storage import machine_errors


def check_duplicates(source: str, headers: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Raises ModelError if a base's files (name -> header) hold one tensor several times with different values: in
    several shards, or with and without what a wrapper puts into names. Which copy is used would be chance."""
    found: dict[str, list[TensorInfo]] = defaultdict(list)
    for header in headers.values():
        for name, info in header.items():
            found[WRAPPERS.sub("", name)].append(info)
    for name, copies in found.items():
        if len(copies) > 1 and len({_digest(copy) for copy in copies}) > 1:
            raise ModelError(
                f"{source} holds a tensor twice, with different values",
                got=f"{name} in {' and '.join(dict.fromkeys(copy.file.name for copy in copies))}",
                fix="copy or download the base again, into an empty folder",
                gotcha="base-tensor-twice",
            )


def _digest(tensor: TensorInfo) -> bytes:
    with machine_errors(tensor.file), tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        described = f"{tensor.dtype} {tensor.shape} ".encode()
        return hashlib.sha256(described + file.read(tensor.bytes)).digest()
