"""The model, card and tokenizer of the adapter in use, which answer one request."""

import sys
from dataclasses import dataclass
from typing import Any

from hatrack.adapter.card import AdapterCard
from hatrack.base.load import Base
from hatrack.data.limit import position_limit


@dataclass(frozen=True)
class ActiveModel:
    """`model` is the base with the adapter in use (or none); `card` and `tokenizer` are that adapter's."""

    base: Base
    model: Any
    card: AdapterCard
    tokenizer: Any

    @property
    def max_positions(self) -> int:
        """The most tokens the base can read; `sys.maxsize` if its config does not say."""
        return position_limit(self.base.model.config.to_dict()) or sys.maxsize

    @property
    def pad_id(self) -> int:
        """The token that pads short rows; the attention mask hides it."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)
