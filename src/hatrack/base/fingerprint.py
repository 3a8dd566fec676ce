"""A base's fingerprint: a digest of its weights that ignores folders, shards and name prefixes.

Knows nothing of models or devices, and needs no torch.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from hatrack.base.description import BaseDescription
from hatrack.base.header import TensorInfo, own_parameters
from hatrack.console import say_once
from hatrack.errors import ModelError, WrongBase
from hatrack.storage import cache_dir

READ_WHOLE = 512 * 2**20
"""Bases of up to this many bytes are read whole."""
BUDGET = 128 * 2**20
"""Bytes that are read of a larger base, the same fraction of each tensor: about a second without the page cache."""
SAMPLE = 64 * 2**10
"""Bytes per sample: large enough for a disk to read samples about as fast as whole files."""
DIGITS = 16
FINGERPRINT_KIND = 2
"""Version of the fingerprint, stored beside each: fingerprints of different versions are not compared."""
EMBEDDING_COPIES = ("lm_head.weight", "embed_out.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight")
"""Names under which a checkpoint may have a second copy of its embedding."""


def fingerprint(base: BaseDescription) -> str:
    """16 hexadecimal digits of a sha256 over every tensor's name, type, shape and bytes, or samples of its bytes.

    The same for the same weights in one file or many, in any order, with or without the model's prefix in the names,
    a task's own head or a second copy of the embedding. A base of up to 512 MiB is read whole. Of a larger base, each
    tensor's start, end and evenly spread samples are read, 128 MiB in total. This always detects a change all over a
    matrix, as any training makes; a change of a few neighboring rows is detected with a probability equal to the
    fraction read (1% for 13.5 GB). Raises ModelError if a file cannot be read.
    """
    digests = dict(_tensor_digests(own_parameters(base.config, base.tensors)))
    for name in EMBEDDING_COPIES:
        if name in digests and any(
            digests[other] == digests[name] for other in digests if other not in EMBEDDING_COPIES
        ):
            del digests[name]
    return _combine(digests)


def tensors_digest(tensors: Mapping[str, TensorInfo]) -> str:
    """The fingerprint of any tensors, with their names. Raises ModelError if a file cannot be read."""
    return _combine(dict(_tensor_digests(tensors)))


def base_record(base: BaseDescription, quantize: str = "none") -> dict[str, Any]:
    """What hatrack.json records about a base: where it came from, its fingerprint, and its form in training.

    The fingerprint is that of the weights on disk. `form` says if the base was converted from a GGUF or pickled file,
    or quantized for training: its weights are then only approximately those of the full base.
    """
    source, revision = _portable_name(base)
    converted = base.folder.parent == cache_dir("bases")  # into a folder named after the file
    origin = base.folder.name.rpartition("-")[0] if converted else None
    forms = [f"converted from {origin}"] if origin else []
    forms += [f"held in {quantize}"] if quantize != "none" else []
    return {
        "source": source,
        "revision": revision,
        "fingerprint": fingerprint(base),
        "fingerprint_kind": FINGERPRINT_KIND,
        "model_type": base.config.get("model_type"),
        "form": ", ".join(forms) or None,
    }


def check_base(
    adapter: str | Path,
    made_on: Mapping[str, Any],
    base: BaseDescription,
    *,
    allow_other: bool = False,
    base_fingerprint: str | None = None,
) -> None:
    """Raises WrongBase if an adapter was not trained on `base`; reports once if that is unknown.

    `made_on`: the `base_record` of when the adapter was made, or `source` and `revision` alone for an adapter made
    elsewhere; a fingerprint of another version is ignored. `allow_other`: only report another base.
    `base_fingerprint`: the base's fingerprint, computed if None.
    """
    wanted, why = made_on.get("fingerprint"), "was not made by hatrack"
    if wanted and made_on.get("fingerprint_kind") != FINGERPRINT_KIND:
        wanted, why = None, "has a fingerprint of another version of hatrack, which cannot be compared"
    there = f"{made_on['source']}" + (f" ({made_on['form']})" if made_on.get("form") else "")
    if wanted:
        found = base_fingerprint or fingerprint(base)
        if wanted == found:
            return
        what, there, here = "was trained on other weights", f"{there}, {wanted}", f"{base.source}, {found}"
    elif not _same_name(made_on, base):
        revision = f" at {made_on['revision']}" if made_on.get("revision") else ""
        what, there = "names another base", there + revision
        here = base.source + (f" at {base.revision}" if base.revision and revision else "")
    else:
        by = "name and shapes" if made_on.get("named", True) else "shapes alone, as it names no base"
        say_once(f"{adapter} {why}: it fits {base.source} by {by}; its weights were not compared")
        return
    if not allow_other:
        raise WrongBase(
            f"{adapter} {what}: {there}",
            got=here,
            fix="give the base it was trained on with --base MODEL, or use this one with --allow-other-base",
        )
    say_once(f"{adapter} {what} ({there}): on {base.source} its scores and its proof say nothing")


def _combine(digests: Mapping[str, bytes]) -> str:
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(name.encode() + b"\0" + digests[name])
    return total.hexdigest()[:DIGITS]


def _tensor_digests(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, bytes]]:
    """Name and digest of dtype, shape and bytes, or samples of them; each file is opened once and read in order."""
    total_bytes = sum(info.bytes for info in tensors.values())
    fraction = 1.0 if total_bytes <= READ_WHOLE else BUDGET / total_bytes
    by_file: dict[Path, list[tuple[int, str]]] = {}
    for name, info in tensors.items():
        by_file.setdefault(info.file, []).append((info.offset, name))
    for path, places in by_file.items():
        try:
            with path.open("rb") as file:
                for offset, name in sorted(places, key=itemgetter(0)):
                    info = tensors[name]
                    tensors_digest = hashlib.sha256(f"{info.dtype}\0{info.shape}\0".encode())
                    for start, length in sample_ranges(info.bytes, fraction):
                        file.seek(offset + start)
                        tensors_digest.update(file.read(length))
                    yield name, tensors_digest.digest()
        except OSError as error:
            raise ModelError(f"{path} cannot be read", got=error.strerror) from error


def sample_ranges(size: int, fraction: float) -> list[tuple[int, int]]:
    """(start, length) of samples that cover about `fraction` of `size` bytes, the first and last bytes included.

    >>> sample_ranges(10, 1.0)
    [(0, 10)]
    """
    count = max(2, round(size * fraction / SAMPLE))
    if fraction >= 1 or count * SAMPLE >= size:
        return [(0, size)]
    return [((size - SAMPLE) * part // (count - 1), SAMPLE) for part in range(count)]


def _same_name(made_on: Mapping[str, Any], base: BaseDescription) -> bool:
    """Whether an adapter made elsewhere may be for this base: by the last part of the name, and the commit if known."""
    names = [re.split(r"[/\\]", str(source).rstrip("/\\"))[-1].lower() for source in (made_on["source"], base.source)]
    commits = [str(commit) for commit in (made_on.get("revision"), base.revision) if commit]
    hashes = [commit for commit in commits if re.fullmatch(r"[0-9a-f]{40}", commit)]
    return names[0] == names[1] and (len(hashes) < 2 or hashes[0] == hashes[1])


def _portable_name(base: BaseDescription) -> tuple[str, str | None]:
    """The base's name and commit as another machine understands them: its hub id, its name on a package index, else its
    path. A folder in the hub's cache counts as the hub's."""
    path = Path(base.source).expanduser()
    if not path.exists():
        return base.source, base.revision
    whole = str(path.absolute())
    cached = re.search(r"[/\\]models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})$", whole)
    if cached:
        return cached[1].replace("--", "/", 1), cached[2]
    return str(path.resolve()), base.revision
