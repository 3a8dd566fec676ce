"""Merges an adapter into a base, and unmerges it bit for bit.

peft adds s B A and later subtracts it, and both round: after 21 merges in bfloat16, 35% of the base's weights have
changed, and with them the answers of every adapter on that base. This keeps the original weights instead.

While an adapter is merged, the weights of its layers are in memory twice. If the base is memory-mapped, as on a CPU,
the kernel can drop the pages of the originals.
"""

from typing import Any

import torch


class LosslessMerge:
    """A mixin for peft's LoRA layers; it must come before them in the list of base classes."""

    _before: dict[str, torch.Tensor]
    """The base layer's weights before the merge, by name."""

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the active adapters, or those in `adapter_names`, to a copy of the base layer's weight."""
        base = self.get_base_layer()
        if not self.merged:
            self._before = {name: parameter.data for name, parameter in base.named_parameters(recurse=False)}
            for parameter in base.parameters(recurse=False):
                parameter.data = parameter.data.clone()
        try:
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
        finally:
            if not self.merged:
                self._restore()

    def unmerge(self: Any) -> None:
        """Restores the original weight, whatever was merged into it."""
        if not self.merged:
            super().unmerge()  # type: ignore[misc]  # warns
            return
        self.merged_adapters.clear()
        self._restore()

    def _restore(self: Any) -> None:
        base = self.get_base_layer()
        for name, tensor in self._before.items():
            parameter = getattr(base, name)
            parameter.data = tensor.to(parameter.device, parameter.dtype)  # the model may have moved since
        self._before = {}
