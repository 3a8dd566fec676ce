"""What a file is, whatever its name says: of data, adapters and bases alike."""

import gzip
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save

from hatrack.adapter.files import read_adapter
from hatrack.base.description import describe_local
from hatrack.base.sources import find_base
from hatrack.data.read import read_lines, read_rows
from hatrack.errors import AdapterError, DataError, HatrackError, ModelError
from hatrack.file_kind import identify

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab12\nsize 4821\n"
PAGE = b"\xef\xbb\xbf\n<!-- moved -->\n<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"


def zipped(*names: str) -> bytes:
    """A zip archive of files of these names."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, "text,label\na,b\n")
    return content.getvalue()


def checkpoint() -> bytes:
    """What torch.save writes."""
    content = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, content)
    return content.getvalue()


def parquet_table() -> bytes:
    """A Parquet file of one row."""
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), content)
    return content.getvalue()


KINDS = {
    "a Git LFS pointer": POINTER,
    "a web page (HTML or XML)": PAGE,
    "compressed with gzip": gzip.compress(b"text,label\na,b\n", mtime=0),
    "a zip archive": zipped("reviews.csv"),
    "a spreadsheet": zipped("docProps/app.xml", "xl/workbook.xml"),
    "a Word document": zipped("[Content_Types].xml", "word/document.xml"),
    "a Parquet file": parquet_table(),
    "a pickle": checkpoint(),
    "a safetensors file": save({"weight": torch.zeros(2)}),
    "a GGUF file": b"GGUF\x03\0\0\0" + bytes(40),
    "an SQLite database": b"SQLite format 3\0" + bytes(40),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_is(kind: str) -> None:
    found = identify(io.BytesIO(KINDS[kind]))
    assert found is not None and found.kind == kind and found.fix


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_each_protocol(protocol: int) -> None:
    found = identify(io.BytesIO(pickle.dumps([{"text": "a"}], protocol)))
    assert found is not None and found.kind == "a pickle"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + POINTER, b"\n" + POINTER, POINTER.replace(b"\n", b"\r\n"), POINTER.decode().encode("utf-16"),
        PAGE.decode("utf-8-sig").encode("utf-16"), b"<Error><Code>AccessDenied</Code></Error>", b"<title>404</title>",
    ],
)  # fmt: skip
def test_pointers_and_pages_however_they_are_written(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"is a (Git LFS pointer|web page)"):
        read_rows(str(tmp_path / "rows.csv"))


@pytest.mark.parametrize(
    "text",
    ["", "<header>,label\n", "text,label\na,b\n", '{"a": 1}', "<b>bold</b>,good\n", "BZ,1\n", "version,2\n", "€\x80"],
)
def test_plain_text_is_nothing_else(text: str) -> None:
    assert identify(io.BytesIO(text.encode())) is None


FIX = {POINTER: "git lfs pull", PAGE: "download the file again", KINDS["a spreadsheet"]: "save it as CSV"}


@pytest.mark.parametrize("content", FIX.values(), ids=["pointer", "page", "spreadsheet"])
@pytest.mark.parametrize(
    "name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json", "rows.parquet", "rows.xlsx", "rows.csv.gz", "rows"]
)
def test_data_of_another_kind(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_bytes(next(found for found, fix in FIX.items() if fix == content))
    with pytest.raises(DataError, match=rf"{name} is a .*; got it .*; fix: .*{content}.*\[another-kind-of-file\]$"):
        read_rows(str(path))
    with pytest.raises(DataError, match=content):
        read_lines(str(path))


@pytest.mark.parametrize(
    ("name", "content", "fix"),
    [
        ("rows.csv", KINDS["compressed with gzip"], "name it rows.csv.gz"),
        ("rows.jsonl", KINDS["a Parquet file"], "name it rows.parquet"),
        ("rows.csv.gz", b"text,label\na,b\n", "name it rows.csv "),
        ("rows.csv.bz2", KINDS["compressed with gzip"], "name it rows.csv.gz"),
        ("rows.csv.zip", zipped("rows.csv"), "unpack it, and give the file inside"),
        ("rows.csv.gz", gzip.compress(POINTER, mtime=0), "git lfs pull"),
        (
            "rows.csv.gz",
            gzip.compress(gzip.compress(b"text", mtime=0), mtime=0),
            "decompress it once and name it rows.csv.gz",
        ),
        ("rows.csv", b'{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}\n', "name it .jsonl"),
        ("rows.csv", b'[\n {"text": "a", "label": "b"}\n]\n', "name it .json"),
        ("rows.jsonl", b"text,label\na,b\n", "name it .csv"),
        ("rows.json", b"text,label\na,b\n", "name it .csv"),
    ],
)
def test_the_name_that_would_be_right(tmp_path: Path, name: str, content: bytes, fix: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / name))
    assert fix in f"{caught.value} " and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [POINTER, PAGE], ids=["pointer", "page"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_bases_of_another_kind(tmp_path: Path, tiny_decoder: Path, name: str, content: bytes) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_decoder, base)
    (base / name).write_bytes(content)
    with pytest.raises(
        ModelError, match=rf"{name} is a (Git LFS pointer|web page).*{FIX[content]}.*\[another-kind-of-file\]$"
    ):
        find_base(str(base))
    if name in ("model.safetensors", "config.json"):
        with pytest.raises(ModelError, match=FIX[content]):
            describe_local(str(base))


def test_gguf_files_and_pickles_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(POINTER)
    with pytest.raises(ModelError, match=r"model\.gguf is a Git LFS pointer, not a GGUF file; .* git lfs pull"):
        find_base(str(tmp_path / "model.gguf"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(POINTER)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a Git LFS pointer, not a pickle; .* git lfs pull"):
        find_base(str(tmp_path))


@pytest.mark.parametrize("content", [POINTER, PAGE], ids=["pointer", "page"])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "hatrack.json", "adapter_model.bin"]
)
def test_adapters_of_another_kind(tmp_path: Path, name: str, content: bytes) -> None:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if name != "adapter_model.bin":
        (tmp_path / "adapter_model.safetensors").write_bytes(save({"a.lora_A.weight": torch.zeros(2, 2)}))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path)
    assert name in caught.value.what and FIX[content] in str(caught.value) and "copy" not in str(caught.value)
    assert isinstance(caught.value, HatrackError) and caught.value.gotcha == "another-kind-of-file"
