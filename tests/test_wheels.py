"""Wheels: fetched through pip, checked by hash, and opened as if by an enemy."""

import hashlib
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hatrack import wheels
from hatrack.errors import HatrackError, MachineError, RecipeError
from hatrack.wheels import extract, fetch_member, fetch_wheel, list_members, parse_pypi

ENGLISH = "pypi:chatterbot-corpus==1.3.3/chatterbot_corpus/data/english"
MakeWheel = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path | None:
    """Each test has a cache of its own, apart from those of the real wheels."""
    if "real" in request.node.name:
        return None
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeWheel:
    """Writes `tiny_thing-1.0` with the given members into a folder that stands for the package index."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))

    def make(files: dict[str, bytes], *, version: str = "1.0", infos: tuple[zipfile.ZipInfo, ...] = ()) -> Path:
        path = index / f"tiny_thing-{version}-py3-none-any.whl"
        papers = f"tiny_thing-{version}.dist-info"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{papers}/METADATA", f"Metadata-Version: 2.1\nName: tiny-thing\nVersion: {version}\n")
            archive.writestr(f"{papers}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{papers}/RECORD", "")
            for name, content in files.items():
                archive.writestr(name, content)
            for info in infos:
                archive.writestr(info, b"elsewhere")
        return path

    return make


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ("pypi:Some_Model==1.0", ("some-model==1.0", "", None)),
        ("pypi:a.b==2!1.0rc1+cpu/x/y.gguf", ("a-b==2!1.0rc1+cpu", "x/y.gguf", None)),
        ("pypi:a==1/folder/", ("a==1", "folder", None)),
        (f"pypi:a==1/x#sha256={'AB' * 32}", ("a==1", "x", "ab" * 32)),
    ],
)
def test_a_source_is_taken_apart(source: str, parsed: tuple[str, str, str | None]) -> None:
    assert parse_pypi(source) == parsed


@pytest.mark.parametrize(
    "source",
    [
        "pypi:",
        "pypi:a",
        "pypi:a>=1",
        "pypi:a==1.*",
        "pypi:a==1,<2",
        "pypi:a==1;os_name=='nt'",
        "pypi:--index-url==x",
        "pypi:a==--pre",
        "pypi:a @ http://b==1",
        "pypi:a==1 b==2",
        "pypi:a==1\nb==2",
        "pypi:git+x==1",
    ],
)
def test_only_one_exact_version_reaches_pip(source: str) -> None:
    with pytest.raises(RecipeError, match=r"one exact version.*got .*fix: for example pypi:"):
        parse_pypi(source)


@pytest.mark.parametrize("inside", ["../x", "a/../../x", "/etc/passwd", "a//b", "C:/x", "a\\b", "a/./b", "a\x00b"])
def test_a_path_that_leads_outside_is_refused_before_fetching(inside: str) -> None:
    with pytest.raises(RecipeError, match=r"relative and has no '\.\.'; got .*fix: name a file or folder"):
        parse_pypi(f"pypi:a==1/{inside}")


def test_a_hash_that_is_none_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"64 hexadecimal digits; got 'abc'; fix: "):
        parse_pypi("pypi:a==1#sha256=abc")


def test_a_file_comes_out_of_a_wheel_and_the_second_time_from_the_cache(
    make_wheel: MakeWheel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel({"thing/data/a.txt": b"hello", "thing/data/deep/b.txt": b"there", "thing/database.txt": b"no"})
    assert fetch_member("pypi:Tiny.Thing==1.0/thing/data/a.txt").read_bytes() == b"hello"
    said = capsys.readouterr().err
    assert "fetching tiny-thing==1.0" in said
    assert "tiny_thing-1.0-py3-none-any.whl, " in said
    assert f"sha256 {sha256(wheel)}" in said

    monkeypatch.setattr(wheels, "_run_pip", None)  # from here on, pip would be an error
    folder = fetch_member("pypi:tiny-thing==1.0/thing/data")
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {"a.txt", "deep/b.txt"}
    assert fetch_member("pypi:tiny-thing==1.0/thing/data") == folder
    assert (fetch_member("pypi:tiny-thing==1.0") / "thing" / "database.txt").read_bytes() == b"no"
    assert capsys.readouterr().err == ""


def test_nothing_of_a_wheel_is_run(make_wheel: MakeWheel, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    make_wheel({"thing/__init__.py": f"open({str(mark)!r}, 'w')".encode(), "setup.py": b"1/0", "thing/a.txt": b"x"})
    fetch_member("pypi:tiny-thing==1.0")
    assert not mark.exists()


def test_a_wheel_whose_hash_differs_is_refused_and_deleted(make_wheel: MakeWheel, cache: Path) -> None:
    wheel = make_wheel({"thing/a.txt": b"hello"})
    wanted = "0" * 64
    with pytest.raises(HatrackError) as caught:
        fetch_member(f"pypi:tiny-thing==1.0/thing/a.txt#sha256={wanted}")
    assert caught.value.exit_code == 2
    assert wanted in caught.value.what
    assert sha256(wheel) in str(caught.value.got)
    assert "do not trust" in str(caught.value.fix)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    right = fetch_member(f"pypi:tiny-thing==1.0/thing/a.txt#sha256={sha256(wheel)}")
    assert right.read_bytes() == b"hello"


def test_a_pin_of_this_package_counts(make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel({"thing/a.txt": b"hello"})
    monkeypatch.setitem(wheels.PINNED, "tiny-thing==1.0", "1" * 64)
    with pytest.raises(HatrackError, match=r"sha256 should be 1111"):
        fetch_member("pypi:tiny-thing==1.0/thing/a.txt")


def test_a_wheel_that_changes_after_it_was_first_seen_is_refused(make_wheel: MakeWheel) -> None:
    make_wheel({"thing/a.txt": b"hello"})
    kept = fetch_wheel("tiny-thing==1.0")
    before = sha256(kept)
    kept.write_bytes(kept.read_bytes() + b"more")
    with pytest.raises(HatrackError, match=f"sha256 should be {before}"):
        fetch_wheel("tiny-thing==1.0")


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/tmp/evil.txt", "thing/../../evil.txt", "C:\\evil.txt", "thing\\..\\evil"]
)
def test_a_member_that_would_land_outside_is_refused(make_wheel: MakeWheel, tmp_path: Path, name: str) -> None:
    wheel = make_wheel({"thing/a.txt": b"x", name: b"evil"})
    for inside in ("", "thing", "thing/a.txt"):
        with pytest.raises(HatrackError, match=r"refused: it holds a path that leads outside; got .*evil.*; fix: "):
            extract(wheel, inside)
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(make_wheel: MakeWheel, kind: int) -> None:
    info = zipfile.ZipInfo("thing/link")
    info.external_attr = (kind | 0o777) << 16
    with pytest.raises(HatrackError, match=r"a link or special file; got 'thing/link'"):
        extract(make_wheel({}, infos=(info,)), "thing")


def test_one_name_twice_is_refused(make_wheel: MakeWheel) -> None:
    info = zipfile.ZipInfo("thing/a.txt")
    with pytest.warns(UserWarning, match=r"Duplicate name"):
        wheel = make_wheel({"thing/a.txt": b"x"}, infos=(info,))
    with pytest.raises(HatrackError, match=r"the same name twice"):
        list_members(wheel)


def test_a_zip_bomb_is_refused_by_what_it_declares(make_wheel: MakeWheel, cache: Path) -> None:
    wheel = make_wheel({"thing/zeros": bytes(30 * 2**20), "thing/random": os.urandom(2**20)})
    with pytest.raises(HatrackError, match=r"grows far too much when unpacked; got thing/zeros: 30.0 MiB out of .*KiB"):
        extract(wheel, "thing")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_total_beyond_the_limit_is_refused(make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel({f"thing/{number}": os.urandom(100) for number in range(11)})
    monkeypatch.setattr(wheels, "LARGEST_TOTAL", 1000)
    with pytest.raises(HatrackError, match=r"1.1 KiB once unpacked, more than 1,000 bytes"):
        extract(wheel, "thing")


def test_a_member_that_lies_about_its_size_is_refused(make_wheel: MakeWheel, cache: Path) -> None:
    """The declared size of 30 MiB of zeros is changed to 10 bytes in both of the archive's records."""
    wheel = make_wheel({"thing/zeros": bytes(30 * 2**20)})
    content = wheel.read_bytes()
    lying = content.replace((30 * 2**20).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    assert lying != content
    wheel.write_bytes(lying)
    with pytest.raises(HatrackError, match=r"damaged or not a wheel|grows far too much"):
        extract(wheel, "thing")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_damaged_wheel_is_one_plain_line(make_wheel: MakeWheel, cache: Path) -> None:
    wheel = make_wheel({"thing/a.txt": os.urandom(5000)})
    content = bytearray(wheel.read_bytes())
    content[content.index(b"thing/a.txt") + 2000] ^= 255
    wheel.write_bytes(content)
    with pytest.raises(HatrackError, match=r"damaged or not a wheel; got Bad CRC-32"):
        extract(wheel, "thing/a.txt")
    wheel.write_bytes(content[:3000])
    with pytest.raises(HatrackError, match=r"damaged or not a wheel; got .*; fix: delete it"):
        list_members(wheel)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_path_that_the_wheel_does_not_have_lists_what_it_has(make_wheel: MakeWheel) -> None:
    wheel = make_wheel({"thing/code.py": b"", "thing/weights.gguf": b"", "thing/data.csv": b""})
    with pytest.raises(HatrackError) as caught:
        extract(wheel, "thing/wieghts.gguf")
    assert "has no thing/wieghts.gguf" in caught.value.what
    assert caught.value.fix == "it has thing/weights.gguf, thing/data.csv"


def test_a_version_that_is_not_there_names_those_that_are(make_wheel: MakeWheel) -> None:
    make_wheel({}, version="1.0")
    make_wheel({}, version="1.1")
    with pytest.raises(HatrackError, match=r"tiny-thing has no version 9\.9 .*; fix: it has 1\.1, 1\.0") as caught:
        fetch_wheel("tiny-thing==9.9")
    assert not isinstance(caught.value, MachineError)


def test_a_package_that_is_not_there_is_an_error_of_the_name(make_wheel: MakeWheel, cache: Path) -> None:
    with pytest.raises(HatrackError, match=r"no wheel named no-such-thing.*; got no-such-thing==1\.0; fix: ") as caught:
        fetch_wheel("no-such-thing==1.0")
    assert caught.value.exit_code == 2
    assert list((cache / "wheels").iterdir()) == []


def test_no_network_is_an_error_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(MachineError, match=r"did not answer while fetching tiny-thing==1.0; fix: check the network"):
        fetch_wheel("tiny-thing==1.0")


@pytest.mark.parametrize(
    ("output", "kind", "words"),
    [
        ("/usr/bin/python: No module named pip", MachineError, "pip is missing"),
        ("ERROR: Could not install: [Errno 28] No space left on device", MachineError, "the disk is full"),
        ("WARNING: Retrying (Retry(total=1\nERROR: (from versions: none)", MachineError, "did not answer"),
        ("ERROR: THESE PACKAGES DO NOT MATCH\nERROR: something new\n", MachineError, "got something new"),
        ("", MachineError, "got no message"),
    ],
)
def test_what_pip_says_becomes_one_line(output: str, kind: type[HatrackError], words: str) -> None:
    error = wheels._pip_error("a==1", output)
    assert type(error) is kind
    assert words in str(error)
    assert "\n" not in str(error)


def test_the_real_corpus_is_pinned_and_readable() -> None:
    assert all(len(pin) == 64 for pin in wheels.PINNED.values())
    folder = fetch_member(ENGLISH)
    assert "conversations" in (folder / "ai.yml").read_text(encoding="utf-8")
    assert fetch_wheel("chatterbot_corpus==1.3.3").name == "chatterbot_corpus-1.3.3-py2.py3-none-any.whl"
