"""Merging an adapter into the base so that taking it out again leaves every bit of the base as it was.

peft adds s B A to the weight and subtracts it later; in bf16 each of the two rounds, and after 21 rounds a third of the
weights have changed. Here the weight from before is kept and put back. While merged, the adapted weights are there
twice, on the device they are on: as they were, and merged. Of a base that is mapped from its file, as on a CPU, the
system may drop the first and read it again; the second is memory of its own, as it is however a weight is merged.
"""

from typing import Any

import torch


class LosslessMerge:
    """To stand before a LoRA layer of peft's among the bases of a class."""

    _before: dict[str, torch.Tensor]

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters in use, or those named, to the base's weight, of which the original is kept."""
        base = self.get_base_layer()
        if not self.merged:
            self._before = {name: parameter.data for name, parameter in base.named_parameters(recurse=False)}
            for parameter in base.parameters(recurse=False):
                parameter.data = parameter.data.clone()
        try:
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
        finally:
            if not self.merged:
                self._put_back()

    def unmerge(self: Any) -> None:
        """Puts the original weight back, whatever was merged into it."""
        if not self.merged:
            super().unmerge()  # type: ignore[misc]  # warns
            return
        self.merged_adapters.clear()
        self._put_back()

    def _put_back(self: Any) -> None:
        base = self.get_base_layer()
        for name, tensor in self._before.items():
            parameter = getattr(base, name)
            parameter.data = tensor.to(parameter.device, parameter.dtype)  # the model may have moved meanwhile
        self._before = {}
