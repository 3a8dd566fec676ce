"""How long a row may be, by the base's config and its tokenizer."""

from typing import Any

import pytest
import torch
import transformers

from hatrack.data.limit import choose_max_length, length_limit, position_limit
from hatrack.errors import RecipeError

SMALL = {"vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
LIMITS: dict[str, tuple[dict[str, Any], int | None]] = {
    "bert": (SMALL | {"max_position_embeddings": 12}, 12),
    "roberta": (SMALL | {"max_position_embeddings": 12, "pad_token_id": 1}, 10),
    "xlm-roberta": (SMALL | {"max_position_embeddings": 12, "pad_token_id": 3}, 8),
    "mpnet": (SMALL | {"max_position_embeddings": 12, "pad_token_id": 1}, 10),
    "gpt2": ({"vocab_size": 16, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 12}, 12),
    "mpt": ({"vocab_size": 16, "d_model": 8, "n_heads": 2, "n_layers": 1, "max_seq_len": 12}, 12),
    "bloom": ({"vocab_size": 16, "hidden_size": 8, "n_head": 2, "n_layer": 1, "seq_length": 12}, None),
}


@pytest.mark.parametrize("model_type", LIMITS)
def test_a_model_reads_as_many_tokens_as_its_config_allows_and_no_more(model_type: str) -> None:
    settings, limit = LIMITS[model_type]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    assert position_limit(config.to_dict()) == position_limit({"model_type": model_type, **settings}) == limit
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        model(input_ids=torch.full((1, limit or 40), 7))
        if limit:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, limit + 1), 7))


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"model_type": "t5", "n_positions": 512, "relative_attention_num_buckets": 32}, None),
        ({"model_type": "xlnet", "max_position_embeddings": -1}, None),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 4096}}, 4096),
        ({"model_type": "dbrx", "max_seq_len": 2048}, 2048),
        ({"model_type": "mamba"}, None),
    ],
)
def test_where_configs_have_their_limit(config: dict[str, Any], limit: int | None) -> None:
    assert position_limit(config) == limit


def test_the_lesser_of_tokenizer_and_config_holds() -> None:
    assert length_limit(64, {"max_position_embeddings": 40}) == 40
    assert length_limit(32, {"max_position_embeddings": 40}) == 32
    assert length_limit(1e30, {}) is None  # what tokenizers say that do not know


def test_the_longest_row_has_a_default_and_a_limit() -> None:
    assert choose_max_length(None, 40, "classify") == (40, "the model's limit")
    assert choose_max_length(32, 40, "chat") == (32, "as asked")
    assert choose_max_length(None, 8192, "classify") == (512, "the default for classify")
    assert choose_max_length(None, None, "complete") == (2048, "the default for complete")
    assert choose_max_length(9000, None, "classify") == (9000, "as asked")
    with pytest.raises(RecipeError, match="--max-length is more than this model can take; got 9000; fix: at most 8192"):
        choose_max_length(9000, 8192, "chat")
