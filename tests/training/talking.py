"""Tiny bases that hold conversations: a token for each byte, and the chat template and end token one asks for."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(template: Any = None, *, eos: str = "<|endoftext|>", pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """The special tokens are the first, by their place in `SPECIAL`; then one for each byte."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


def talking_base(
    folder: Path, template: Any = CHATML, *, eos: str = "<|endoftext|>", pad: str = "<pad>", says: str = ""
) -> Path:
    """A Llama of two small layers with random weights. With `says` each of its characters is followed by the next,
    whatever came before, and the last one by itself."""
    tokenizer = byte_tokenizer(template, eos=eos, pad=pad)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=-(-len(tokenizer) // 32) * 32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=512,
        pad_token_id=SPECIAL.index(pad),
        bos_token_id=None,
        eos_token_id=SPECIAL.index(eos),
    )
    model = LlamaForCausalLM(config)
    if says:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_(), layer.mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(*model.model.embed_tokens.weight.shape))
            model.lm_head.weight.zero_()
            for this, following in pairwise(tokenizer(says)["input_ids"]):
                model.lm_head.weight[following, this] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversations(path: Path, rows: Sequence[Sequence[tuple[str, str]]]) -> Path:
    """A file of conversations, each a list of (role, content)."""
    lines = [{"messages": [{"role": role, "content": content} for role, content in row]} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


LANDS = (
    "Norway",
    "Ecuador",
    "Vietnam",
    "Portugal",
    "Ghana",
    "Peru",
    "Kenya",
    "Latvia",
    "Nepal",
    "Malta",
    "Cuba",
    "Qatar",
)
CAPITALS = (
    "Oslo",
    "Quito",
    "Hanoi",
    "Lisbon",
    "Accra",
    "Lima",
    "Nairobi",
    "Riga",
    "Kathmandu",
    "Valletta",
    "Havana",
    "Doha",
)


def capitals(path: Path) -> Path:
    """Twelve questions with short answers."""
    pairs = zip(LANDS, CAPITALS, strict=True)
    return conversations(
        path, [[("user", f"Capital of {land}?"), ("assistant", f"It is {city}.")] for land, city in pairs]
    )
