"""The fingerprint follows the weights, not the way they are written."""

import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hatrack.base.fingerprint import DIGITS, fingerprint

from . import tiny


def test_it_is_the_same_however_the_weights_are_written(tmp_path: Path) -> None:
    model = tiny.model("Llama", "causal", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    model.model.save_pretrained(tmp_path / "no prefix")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    model.config.save_pretrained(tmp_path / "other order")
    save_file(dict(reversed(tensors.items())), tmp_path / "other order" / "model.safetensors", metadata={"note": "x"})
    prints = {fingerprint(folder) for folder in tmp_path.iterdir()}
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
    assert len({fingerprint(folder) for folder in folders}) == len(folders) == 6


def test_a_large_base_takes_less_than_a_second(tmp_path: Path) -> None:
    tensors = {
        f"model.layers.{n}.mlp.up_proj.weight": torch.full((1024, 1024), n, dtype=torch.bfloat16) for n in range(64)
    }
    tiny.config("Llama").save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    start = time.perf_counter()
    fingerprint(tmp_path)
    assert time.perf_counter() - start < 1
