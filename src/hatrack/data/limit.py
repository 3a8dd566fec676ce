"""Finds the longest row that a base can take, from its config.json and tokenizer. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from hatrack.errors import RecipeError

DEFAULT_LENGTHS = {"classify": 512, "chat": 2048, "complete": 2048}
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "model_max_length")
"""Names of the number of positions in configs: Llama's, GPT-2's, MPT's, RWKV's, Kimi's."""
# fmt: off
AFTER_PADDING = frozenset((
    "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
))
# fmt: on
"""Model types that number positions from the padding token's id on, so fewer positions than embeddings are usable."""


def position_limit(config: Mapping[str, Any]) -> int | None:
    """The most tokens that a base can read at once, from its config.json or transformers' `to_dict()`; None if it does
    not say."""
    for part in (config, config.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        names = POSITIONS[:1] if "relative_attention_num_buckets" in part else POSITIONS  # T5's n_positions is no limit
        found = next((part[name] for name in names if isinstance(part.get(name), int)), 0)
        if part.get("model_type") in AFTER_PADDING:
            padding = part.get("pad_token_id")
            found -= (1 if padding is None else int(padding)) + 1
        if found > 0:
            return found
    return None


def length_limit(model_max_length: float | None, config: Mapping[str, Any]) -> int | None:
    """The longest row in tokens that a base can take, from the tokenizer's `model_max_length` and the config."""
    limits = [model_max_length, position_limit(config)]
    return min((int(limit) for limit in limits if limit and 0 < limit < 10**9), default=None)


def choose_max_length(asked: int | None, limit: int | None, task: str) -> tuple[int, str]:
    """The longest row in tokens, and the reason: as asked, or the model's limit but at most 512 (classify) or 2,048.

    Raises RecipeError if more is asked than the model can take.
    """
    if asked is not None:
        if limit is not None and asked > limit:
            raise RecipeError("--max-length is more than this model can take", got=asked, fix=f"at most {limit}")
        return asked, "as asked"
    cap = DEFAULT_LENGTHS[task]
    return (limit, "the model's limit") if limit is not None and limit <= cap else (cap, f"the default for {task}")
