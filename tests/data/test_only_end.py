"""Encoder-decoders classify at their end token: each row has it exactly once, or is named."""

from pathlib import Path

import pytest
import transformers
from tokenizers import processors

import hatrack
from hatrack.errors import DataError, ModelError
from tests.base import tiny

ROWS = [f"a {word} film {more},{word}" for word in ("good", "bad") for more in ("cat", "mat", "the", "sat", "on", "a")]


@pytest.fixture(params=["T5", "Bart"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """With a tokenizer that ends texts, as theirs do."""
    folder = tiny.save(tmp_path / "base", request.param, "classify")
    _ends(folder, ends=True)
    return folder


def _ends(folder: Path, *, ends: bool, pad: str = "[PAD]") -> None:
    tokenizer = tiny.tokenizer()
    if ends:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 2)]
        )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]", eos_token="</s>", pad_token=pad
    )
    made.save_pretrained(folder)


def _train(base: Path, rows: list[str], **options: str) -> hatrack.Hat:
    data = base.parent / "rows.csv"
    data.write_text("\n".join(["text,label", *rows]) + "\n")
    out = str(base.parent / "out")
    return hatrack.train(
        base=str(base), task="classify", data=str(data), output=out, steps=2, batch_size=4, device="cpu", **options
    )


def test_rows_of_several_lengths_are_learned_and_asked(base: Path) -> None:
    hat = _train(base, ROWS)
    texts = ["a good film", "the cat sat on a mat"]
    assert [answer["label"] in ("good", "bad") for answer in hat.predict(texts)] == [True, True]
    with pytest.raises(DataError, match="2 end tokens, but this base classifies at its end token and needs one"):
        hat.predict(["good", "a </s> film"])


def test_an_end_token_in_a_text_is_named(base: Path) -> None:
    with pytest.raises(DataError, match=r"2 end tokens, but this base classifies.*one-end-token"):
        _train(base, [*ROWS, "a </s> mat,good"])
    assert _train(base, [*ROWS, "a </s> mat,good"], bad_rows="skip").result


def test_a_tokenizer_that_ends_no_text_is_named(base: Path) -> None:
    _ends(base, ends=False)
    with pytest.raises(DataError, match=r"12 rows.*no end token, but this base classifies"):
        _train(base, ROWS)


def test_padding_with_the_end_token_is_refused(base: Path) -> None:
    _ends(base, ends=True, pad="</s>")
    with pytest.raises(ModelError, match="classifies at its end token, and pads with the same token"):
        _train(base, ROWS)
