"""Bytes -> text: every encoding that can be told is read, every other one refused, none taken for another."""

import gzip
from pathlib import Path

import pytest

from hatrack.data.read import decode_lines, read_lines, read_rows
from hatrack.data.text import decode
from hatrack.errors import DataError

TEXT = "text,label\r\nThe café’s kettle works well,gut\r\nÀ côté: 5 € for “naïve” œuvres…,schlecht\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf_8_is_read_without_a_word(encoding: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert decode("x", TEXT.encode(encoding)) == TEXT and capfd.readouterr().err == ""


@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", [TEXT, "text,label\n这个产品很好,好\n", '[{"text": "a"}]'])
def test_utf_16_and_32_are_read_and_said(
    text: str, encoding: str, mark: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    assert decode("x.csv", ("\ufeff" * mark + text).encode(encoding)) == text
    assert capfd.readouterr().err == f"x.csv: read as {encoding[:6].upper()}\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_rows_in_other_encodings_packed_too(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(TEXT.encode(encoding)))
    rows = read_rows(str(tmp_path / "rows.csv.gz"))
    assert rows.rows[0] == {"text": "The café’s kettle works well", "label": "gut"} and len(rows.rows) == 2


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "text\nGröße schön, »Spaß« für müde Füße auf der Straße\n",
        "text\ndéjà vu; créée à l’été, ŒUVRES, ½ price – “good”, L·L, O’Brien\n",
        "text\nà la carte\n",
        "text\nNo español, ¿qué? ¡Sí! Años\n",
        "text\nÞað er gott, ísland og ævintýri\n",
    ],
)
def test_windows_1252_is_read_and_a_word_of_it_shown(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert decode("x.csv", text.encode("cp1252")) == text
    said = capfd.readouterr().err
    assert said.startswith("x.csv: not UTF-8, read as Windows-1252: ") and "in line 2; if that is wrong" in said


OTHERS = {
    "cp1251": "отличный товар",
    "koi8_r": "отличный товар",
    "gbk": "这个产品很好",
    "big5": "這個產品很好",
    "shift_jis": "これはとても良い製品です",
    "euc_kr": "이 제품은 좋아요",
    "cp1253": "πολύ καλό",
    "cp1255": "מוצר טוב",
    "cp1256": "منتج جيد",
    "cp874": "ดีมาก",
    "cp1254": "çok güzel ürün, şık",
    "cp1250": "příliš žluťoučký kůň",
    "mac_roman": "café, naïve, voilà",
    "cp437": "café, schön",
}


@pytest.mark.parametrize("encoding", OTHERS)
def test_no_other_encoding_is_taken_for_windows_1252(encoding: str) -> None:
    content = f"text,label\na fine one,good\n{OTHERS[encoding]},good\n".encode(encoding)
    with pytest.raises(DataError, match=r"^x is not UTF-8 text; got a stray byte in line 3; fix: save it as UTF-8 \["):
        decode("x", content)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("text\ncafé naïve\n".encode() + b"stray \xe9\n", "a stray byte in line 3"),
        ("text\ncafé".encode()[:-1], "a stray byte in line 2"),
        (b"text,label\n\xff\xfe,yes\n", "a stray byte in line 2"),
        (b"text\nhalf \xed\xa0\x80\n", "a stray byte in line 2"),
        (b"text\ncaf\xe9 \x07\n", "a stray byte in line 2"),
        (b"text,label\na,b\nc\0d,e\n", "NUL bytes, the first in line 3"),
        (b"t\0ext,label\nabc,d\n", "NUL bytes"),
        ("text\na\0b\n".encode("utf-16"), "NUL bytes, the first in line 2"),
        ("text\n".encode("utf-16")[:-1], "a mark of UTF-16, and bytes that are not"),
        (bytes(range(256)), "NUL bytes"),
    ],
)
def test_damaged_text_is_refused_in_one_plain_line(content: bytes, got: str) -> None:
    with pytest.raises(DataError) as caught:
        decode("x", content)
    assert str(caught.value) == f"x is not UTF-8 text; got {got}; fix: save it as UTF-8 [text-encoding]"


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("a\nb\n", ["a", "b"]),
        ("a\n\n b \nc", ["a", "", " b ", "c"]),
        ("a\r\nb\r\n\r\n", ["a", "b", ""]),
        ("a\rb\r", ["a", "b"]),
        ("a\rstays\nb\n", ["a\rstays", "b"]),
        ("a\u2028b\x85c\x0cd\n\x1ce", ["a\u2028b\x85c\x0cd", "\x1ce"]),
        ("", []),
        ("\n", [""]),
        ('"a, b",c\n', ['"a, b",c']),
    ],
)
def test_lines_end_where_files_end_them_and_nowhere_else(tmp_path: Path, content: str, lines: list[str]) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(content.encode())
    assert read_lines(str(path)) == lines == decode_lines("standard input", content.encode("utf-8-sig"))
    path.write_bytes(("\ufeff" + content).encode("utf-16"))
    assert read_lines(str(path)) == lines


def test_lines_of_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such data file"):
        read_lines(str(tmp_path / "x.txt"))
    with pytest.raises(DataError, match="the data is a folder, not a file"):
        read_lines(str(tmp_path))
