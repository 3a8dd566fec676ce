"""The fingerprint follows the weights, not the way they are written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hatrack.base.description import BaseDescription, describe_folder
from hatrack.base.fingerprint import DIGITS, SAMPLE, base_record, check_base, fingerprint, sample_ranges
from hatrack.errors import WrongBase

from . import tiny


def test_it_is_the_same_however_the_weights_are_written(tmp_path: Path) -> None:
    model = tiny.model("Llama", "causal", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    model.model.save_pretrained(tmp_path / "no prefix")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    model.config.save_pretrained(tmp_path / "other order")
    save_file(dict(reversed(tensors.items())), tmp_path / "other order" / "model.safetensors", metadata={"note": "x"})
    prints = {fingerprint(describe_folder(folder)) for folder in tmp_path.iterdir()}
    assert len(prints) == 1
    assert len(prints.pop()) == DIGITS


def test_any_of_these_changes_it(tmp_path: Path) -> None:
    model = tiny.model("Llama", "causal")
    first, key, value = (
        model.model.layers[0].self_attn.q_proj,
        *(getattr(model.model.layers[1].self_attn, f"{name}_proj") for name in "kv"),
    )
    model.save_pretrained(tmp_path / "0 as it was")
    with torch.no_grad():
        first.weight[0, 0] += 1
        model.save_pretrained(tmp_path / "1 first number")
        first.weight[0, 0] -= 1
        first.weight[-1, -1] += 1
        model.save_pretrained(tmp_path / "2 last number")
        first.weight[-1, -1] -= 1
        key.weight.data, value.weight.data = value.weight.data, key.weight.data
        model.save_pretrained(tmp_path / "3 two tensors changed places")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "4 other format")
    tiny.model("Llama", "causal", seed=1).save_pretrained(tmp_path / "5 other seed")
    folders = sorted(tmp_path.iterdir())
    assert len({fingerprint(describe_folder(folder)) for folder in folders}) == len(folders) == 6


def test_a_task_head_or_a_second_copy_of_the_embedding_does_not_change_it(tmp_path: Path) -> None:
    masked = tiny.model("Bert", "masked")
    masked.save_pretrained(tmp_path / "masked")
    masked.bert.save_pretrained(tmp_path / "body")
    tensors = load_file(tmp_path / "body" / "model.safetensors")
    (tmp_path / "old names").mkdir()
    masked.config.save_pretrained(tmp_path / "old names")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
    old["embeddings.position_ids"] = torch.arange(40).unsqueeze(0)
    save_file(old, tmp_path / "old names" / "model.safetensors")
    assert len({fingerprint(describe_folder(folder)) for folder in tmp_path.iterdir()}) == 1

    tied = tiny.model("Llama", "causal", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    tied.config.save_pretrained(tmp_path / "twice")
    save_file(twice, tmp_path / "twice" / "model.safetensors")
    assert fingerprint(describe_folder(tmp_path / "tied")) == fingerprint(describe_folder(tmp_path / "twice"))
    twice["lm_head.weight"][3, 3] += 1  # a head of its own is another base
    save_file(twice, tmp_path / "twice" / "model.safetensors")
    assert fingerprint(describe_folder(tmp_path / "tied")) != fingerprint(describe_folder(tmp_path / "twice"))


def test_one_number_anywhere_changes_that_of_a_small_base(tmp_path: Path) -> None:
    tiny.model("Llama", "causal").save_pretrained(tmp_path)
    before, weights = fingerprint(describe_folder(tmp_path)), tmp_path / "model.safetensors"
    content = weights.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in range(start, len(content), (len(content) - start) // 40):
        changed = bytearray(content)
        changed[place] ^= 1
        weights.write_bytes(bytes(changed))
        assert fingerprint(describe_folder(tmp_path)) != before, place
    weights.write_bytes(content)
    assert fingerprint(describe_folder(tmp_path)) == before


@pytest.mark.parametrize("size", [1, 4096, 3 * SAMPLE, 46 * 2**20, 262 * 2**20])
@pytest.mark.parametrize("share", [0.001, 0.04, 0.5, 1.0])
def test_samples_lie_evenly_inside(size: int, share: float) -> None:
    parts = sample_ranges(size, share)
    assert parts[0][0] == 0 and sum(parts[-1]) == size
    ends = [start + length for start, length in parts]
    assert all(end <= start for end, (start, _) in zip(ends, parts[1:], strict=False))
    read = sum(length for _, length in parts)
    assert read <= max(size * share + SAMPLE, 2 * SAMPLE) and read >= min(size, size * share - SAMPLE)
    gaps = [start - end for end, (start, _) in zip(ends, parts[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_of_a_large_base_every_tensor_is_sampled_within_the_budget(tmp_path: Path) -> None:
    """A file with holes: its size is a 7B base's, what it takes on disk is not."""
    layers, side = 32, 4096
    header: dict[str, Any] = {}
    for index in range(layers):
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
            begin = len(header) * side * side * 2
            entry = {"dtype": "BF16", "shape": [side, side], "data_offsets": [begin, begin + side * side * 2]}
            header[f"model.layers.{index}.{name}.weight"] = entry
    text = json.dumps(header).encode()
    tiny.config("Llama").save_pretrained(tmp_path)
    total = layers * 4 * side * side * 2
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + total)
    before = fingerprint(describe_folder(tmp_path))
    for tensor in (0, 57, 127):  # a third of its rows; a training would change them all
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.seek(8 + len(text) + tensor * side * side * 2 + 1000 * side * 2)
            file.write(b"\1" * (1400 * side * 2))
        after = fingerprint(describe_folder(tmp_path))
        assert after != before
        before = after


def test_a_base_says_where_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HATRACK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache/bases/Some-Model.Q4_1-0123456789abcdef"
    tiny.save(folder, "Llama", "causal")
    made_on = base_record(describe_folder(folder, "some.gguf"), "4bit")
    assert made_on["form"] == "converted from Some-Model.Q4_1, held in 4bit" and made_on["model_type"] == "llama"
    tiny.save(tmp_path / "plain", "Llama", "causal")
    plain = describe_folder(tmp_path / "plain")
    assert base_record(plain)["form"] is None and base_record(plain)["fingerprint"] == made_on["fingerprint"]
    check_base("hat", made_on, plain)


def test_another_base_is_refused_with_both_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        tiny.save(tmp_path / f"base-{seed}", "Llama", "causal", seed=seed)
    one, other = (describe_folder(tmp_path / f"base-{seed}") for seed in (1, 2))
    made_on = base_record(one)
    with pytest.raises(WrongBase) as caught:
        check_base("my-hat", made_on, other)
    assert caught.value.what == f"my-hat was trained on other weights: {one.source}, {fingerprint(one)}"
    assert caught.value.got == f"{other.source}, {fingerprint(other)}"
    assert "--base" in str(caught.value.fix) and "--allow-other-base" in str(caught.value.fix)
    check_base("my-hat", made_on, other, allow_other=True)
    assert f"on {other.source} its scores and its proof say nothing" in capsys.readouterr().err


SHA, SHA2 = "a" * 40, "b" * 40


@pytest.mark.parametrize(
    ("source", "revision", "base", "commit", "fits"),
    [
        ("meta/Llama", None, "/models/llama/", None, True),
        ("meta/Llama", SHA, "meta/Llama", SHA, True),
        ("meta/Llama", SHA, "meta/Llama", SHA2, False),
        ("meta/Llama", "main", "meta/Llama", SHA, True),
        ("C:\\models\\Llama", None, "meta/Llama", SHA, True),
        ("meta/Llama", None, "meta/Llama-2", None, False),
    ],
)
def test_an_adapter_made_elsewhere_is_held_to_its_bases_name(
    source: str, revision: str | None, base: str, commit: str | None, fits: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    files = BaseDescription(base, Path("nowhere"), {}, {}, revision=commit)
    name = f"{source} {revision} {base} {commit}"
    if fits:
        check_base(name, {"source": source, "revision": revision}, files)
        check_base(name, {"source": source, "revision": revision}, files)
        assert capsys.readouterr().err.count("was not made by hatrack: it fits") == 1
        return
    with pytest.raises(WrongBase, match=r"names another base: .*Llama.*; got .*Llama.*; fix: .*--allow-other-base"):
        check_base(name, {"source": source, "revision": revision}, files)


def test_a_fingerprint_of_another_version_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That it differs says nothing of the weights: the name decides, and what cannot be known is said."""
    files = describe_folder(tiny.save(tmp_path / "base", "Llama", "causal"))
    older = base_record(files) | {"fingerprint": "0" * DIGITS}
    del older["fingerprint_kind"]
    check_base("old-hat", older, files)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "old-hat has a fingerprint of another version of hatrack, which cannot be compared: it fits" in said
    with pytest.raises(WrongBase, match="old-hat names another base"):
        check_base("old-hat", older | {"source": "some/other"}, files)
    with pytest.raises(WrongBase, match="was trained on other weights"):
        check_base("hat", base_record(files) | {"fingerprint": "0" * DIGITS}, files)
