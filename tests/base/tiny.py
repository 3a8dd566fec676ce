"""Tiny random bases of many architectures, as folders that are otherwise like real ones."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hatrack.base.header import read_config, read_tensors, task_shapes

WORDS = ["[PAD]", "[UNK]", "</s>", "the", "cat", "sat", "on", "a", "mat", "good", "bad", "film"]
SMALL = {"vocab_size": 32, "max_position_embeddings": 40}
BERT = SMALL | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = BERT | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}

OPTIONS: dict[str, dict[str, Any]] = {
    "Bert": BERT,
    "Roberta": BERT,
    "DistilBert": SMALL | {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "Electra": BERT | {"embedding_size": 8},
    "Albert": BERT | {"embedding_size": 8},
    "DebertaV2": BERT
    | {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "pooler_hidden_size": 16,
    },
    "MPNet": BERT,
    "ModernBert": BERT
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "GPT2": {
        "vocab_size": 32,
        "n_positions": 40,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
    "Llama": LLAMA,
    "Mistral": LLAMA,
    "Qwen2": LLAMA,
    "Qwen3": LLAMA,
    "Gemma2": LLAMA,
    "Gemma3Text": LLAMA,
    "GPTNeoX": BERT | {"bos_token_id": 2, "eos_token_id": 2},
    "Phi": LLAMA | {"num_key_value_heads": 2},
    "OPT": SMALL
    | {"hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24},
    "T5": {
        "vocab_size": 32,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
        "eos_token_id": 2,
    },
    "Bart": SMALL
    | {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    | {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
DECODERS = ("GPT2", "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "GPTNeoX", "Phi", "OPT")
MASKED = ("Bert", "Roberta", "DistilBert", "Electra", "Albert", "DebertaV2", "MPNet", "ModernBert")


def config(kind: str, **more: Any) -> Any:
    """The configuration of a tiny base; `kind` is transformers' name without `Config`."""
    return getattr(transformers, f"{kind}Config")(**(OPTIONS[kind] | more))


def model(kind: str, head: str = "body", seed: int = 0, **more: Any) -> Any:
    """A tiny random model: `body` alone, or with a `masked`, `causal` or `classify` head."""
    classes = {"body": AutoModel, "masked": AutoModelForMaskedLM, "causal": AutoModelForCausalLM}
    torch.manual_seed(seed)
    return classes.get(head, AutoModelForSequenceClassification).from_config(config(kind, **more))


def tokenizer(pad: bool = True) -> Any:
    """Whole words of a small vocabulary, unknown ones as [UNK]."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "eos_token": "</s>"} | ({"pad_token": "[PAD]"} if pad else {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def save(folder: Path, kind: str, head: str = "body", **more: Any) -> Path:
    """A whole base on disk: config, safetensors, tokenizer (without a padding token where `pad` is False)."""
    pad = more.pop("pad", True)
    model(kind, head, **more).save_pretrained(folder)
    tokenizer(pad).save_pretrained(folder)
    return folder


def shapes_of(folder: Path, task: str, labels: int = 0) -> dict[str, tuple[int, ...]]:
    """The parameters of a task's model on the base in a folder."""
    return task_shapes(read_config(folder), read_tensors(folder), task, labels)
