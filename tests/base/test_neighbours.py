"""A classifier's answer does not depend on its neighbours in the batch, whatever side its tokenizer pads on."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hatrack.base.description import describe_folder
from hatrack.base.load import BaseOptions, load_base, load_tokenizer
from hatrack.errors import ModelError

from . import tiny

SMALL = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
GPT = SMALL | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
WIDE = SMALL | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MORE: dict[str, dict[str, Any]] = {
    "Bloom": SMALL | {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "Falcon": WIDE | {"alibi": True, "new_decoder_architecture": False},
    "Mpt": SMALL | {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 40},
    "GPTBigCode": GPT,
    "OpenAIGPT": GPT,
    "CTRL": GPT | {"dff": 24},
    "BioGpt": WIDE,
    "Flaubert": {"vocab_size": 32, "n_words": 32, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "pad_index": 0},
    "Gemma": WIDE | {"head_dim": 8, "num_key_value_heads": 1},
    "Phi3": WIDE | {"num_key_value_heads": 1},
    "Mixtral": WIDE | {"num_key_value_heads": 1, "num_local_experts": 2},
    "Deberta": WIDE,
    "Camembert": WIDE,
    "XLMRoberta": WIDE,
}
TEXTS = ["good film </s>", "the cat sat on a mat the cat sat on a mat </s>", "bad </s>", "a good cat on a film </s>"]


def save(folder: Path, kind: str, side: str, pad: bool) -> Path:
    config = getattr(transformers, f"{kind}Config")(**(MORE.get(kind) or tiny.OPTIONS[kind]))
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer = tiny.tokenizer(pad)
    tokenizer.padding_side = side
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [*tiny.OPTIONS, *MORE])
def test_an_answer_is_the_same_alone_and_among_others(kind: str, side: str, tmp_path: Path) -> None:
    folder = save(tmp_path, kind, side, pad=kind not in tiny.DECODERS)
    base = load_base(
        describe_folder(folder), BaseOptions(task="classify", labels=("a", "b"), device="cpu", dtype="float32")
    )

    def answers(texts: list[str]) -> torch.Tensor:
        inputs = base.tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = base.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return torch.as_tensor(logits)

    torch.testing.assert_close(answers(TEXTS), torch.cat([answers([text]) for text in TEXTS]), rtol=0, atol=1e-5)


def test_a_base_that_sees_padding_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "Bert")
    transformers.FNetConfig().save_pretrained(folder)
    with pytest.raises(ModelError, match="has no attention mask"):
        load_base(
            describe_folder(folder), BaseOptions(task="classify", labels=("a", "b"), device="cpu", dtype="float32")
        )


def test_a_padding_token_without_an_embedding_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save(tmp_path, "Llama", "causal", vocab_size=12, pad=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 12
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(describe_folder(folder)).pad_token_id == 2
    assert "its padding token <pad> is outside its 12 embeddings" in capsys.readouterr().err
