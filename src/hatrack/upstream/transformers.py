"""Private names of transformers that any use of a model needs: tied weights, and how it computes attention.

Those of its Trainer are in `trainer.py`: importing the Trainer imports datasets and pandas too, 55 MiB.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, modeling_utils

from hatrack.upstream.names import require

NAMES = (
    "transformers.PretrainedConfig._attn_implementation",
    "transformers.modeling_utils.remove_tied_weights_from_state_dict(state_dict, model)",
)
require("transformers", *NAMES)

remove_tied_weights: Callable[[dict[str, torch.Tensor], PreTrainedModel], dict[str, torch.Tensor]]
remove_tied_weights = modeling_utils.remove_tied_weights_from_state_dict
"""The weights of a model without those that are tied to another one's."""


def attention_of(model: PreTrainedModel) -> str:
    """The name of the attention a model computes with, such as sdpa."""
    return str(model.config._attn_implementation)
