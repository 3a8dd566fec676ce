"""Computes adapted layers that get the same input tensor together.

Attention's query, key and value projections read one tensor. Computed together, they need one pass over it. Which
layers share an input is detected from the tensors they get, not from their names:

1. The first layer that gets a tensor is its leader. Another layer that gets the same tensor, unchanged, becomes one of
   the leader's `followers`.
2. From the next input on, the leader computes the outputs of its followers with its own and stores them here.
3. A follower that gets the leader's tensor pops its stored output, if its weights and settings have not changed.
4. A follower that did not pop its output before the leader's next input stops being a follower.

An output is popped once. Input and leader are held by weak references, so that they are not kept alive. Each thread
has its own `SharedInput`.

Layers are computed one by one in inference mode, whose tensors do not tell whether they were changed, and while
saved-tensor hooks are set, as in gradient checkpointing, whose passes all have to save the same tensors. A layer is
also computed alone if it leaves its forward pass to peft (`FastLinear`), or if its adapter has another shape or dropout
than the leader's.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from hatrack.upstream.torch import has_saved_tensor_hooks, version


class SharingLayer(Protocol):
    """A layer that can be the leader of others."""

    followers: tuple[Any, ...]


class SharedInput(threading.local):
    """The last input of this thread, its leader, and the stored outputs of the followers."""

    def __init__(self) -> None:
        self._input: Callable[[], torch.Tensor | None] = lambda: None
        self._version = 0
        self._leader: Callable[[], SharingLayer | None] = lambda: None
        self._results: dict[SharingLayer, tuple[tuple[object, ...], torch.Tensor]] = {}

    def becomes_leader(self, x: torch.Tensor, layer: SharingLayer) -> bool:
        """Records that `layer` is called with x. Returns whether it is the first, and so the leader."""
        if x.is_inference() or has_saved_tensor_hooks():
            return False
        leader = self._leader()
        if self._is_input(x):
            if leader is not None and leader is not layer and layer not in leader.followers:
                leader.followers = (*leader.followers, layer)
            return False
        if leader is not None and self._results:
            leader.followers = tuple(follower for follower in leader.followers if follower not in self._results)
        self._input, self._version, self._leader, self._results = weakref.ref(x), version(x), weakref.ref(layer), {}
        return True

    def store_result(self, layer: SharingLayer, state: tuple[object, ...], y: torch.Tensor) -> None:
        """Stores the output of a follower. `state`: what the output depends on besides the input."""
        self._results[layer] = state, y

    def pop_result(
        self, x: torch.Tensor, layer: SharingLayer, get_state: Callable[[], tuple[object, ...]]
    ) -> torch.Tensor | None:
        """The stored output of `layer` for x; None if there is none, or if its state has changed since."""
        if not self._is_input(x):
            return None
        stored, y = self._results.pop(layer, (None, None))
        return y if y is not None and stored == get_state() else None

    def _is_input(self, x: torch.Tensor) -> bool:
        return self._input() is x and not x.is_inference() and self._version == version(x)
