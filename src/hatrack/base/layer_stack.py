"""The stack of layers inside any Hugging Face encoder or decoder: the part before it, one layer, the part after it.

Nothing is known of any architecture: the model's own forward pass is watched. The stack is the list of modules whose
members are called one after the other, each with what the one before gave. While parts run, layers that are not asked
for hand their input on, so the model's own code still makes masks, position embeddings and heads as ever.

Knows nothing of adapters, losses or where weights lie.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hatrack.base.quiet import quiet
from hatrack.errors import ModelError


@dataclass(frozen=True)
class Call:
    """What a layer is called with, beside the hidden states: masks, position embeddings and the like.

    `place` is where the hidden states go: the number of a positional argument, or the name of a keyword.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str

    def given(self, hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with `hidden` in its place."""
        if isinstance(self.place, int):
            return (*self.args[: self.place], hidden, *self.args[self.place + 1 :]), self.kwargs
        return self.args, self.kwargs | {self.place: hidden}


@dataclass(frozen=True)
class LayerStack:
    """A model's stack of layers. `name` is its full name in `model`; layers that an adapter is put into stay the same.

    `extras` is how many values a layer gives beside its hidden states, or None where it gives them bare.
    """

    name: str
    layers: Sequence[nn.Module]
    config: Any
    extras: int | None

    def before(self, run: Callable[[], Any]) -> tuple[torch.Tensor, list[Call]]:
        """Has `run` run the model, without its layers and what comes after them.

        Returns the hidden states (B, T, d) that the first layer is given, and how each layer is called.
        """
        calls: list[Call] = []
        given: list[torch.Tensor] = []

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            place, hidden = _hidden(args, kwargs, given[-1] if given else None)
            given.append(hidden)
            kept = {name: value for name, value in kwargs.items() if name != place}
            calls.append(Call(tuple(None if n == place else arg for n, arg in enumerate(args)), kept, place))
            if len(calls) == len(self.layers):
                raise _Reached
            return self._as_output(hidden)

        with self._played_by(lambda index: stand_in):
            try:
                run()
            except _Reached:
                return given[0], calls
        raise ModelError(f"{self.name}: a pass through the model left layers out", got=f"{len(calls)} calls")

    def layer(self, index: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """What layer `index` makes of hidden states (B, T, d)."""
        args, kwargs = call.given(hidden)
        return _states(self.layers[index](*args, **kwargs))  # type: ignore[no-any-return]

    @contextmanager
    def after(self, give: Callable[[], torch.Tensor] | None, layers: int | None = None) -> Iterator[None]:
        """While the block runs, the first `layers` of the model (by default all) compute nothing; the last of these
        gives what `give` does (B, T, d), or without it hands on what it is given, as the others do."""
        own = [layer.forward for layer in self.layers]
        past = len(own) if layers is None else layers

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                return self._as_output(give() if give and index == past - 1 else _hidden(args, kwargs, None)[1])

            return forward if index < past else own[index]

        with self._played_by(stand_in):
            yield

    def shortened(self, layers: int = 1) -> AbstractContextManager[None]:
        """While the block runs, only the last `layers` compute: enough to learn about a model without reading it."""
        return self.after(None, len(self.layers) - layers)

    def _as_output(self, hidden: torch.Tensor) -> Any:
        return hidden if self.extras is None else (hidden, *[None] * self.extras)

    @contextmanager
    def _played_by(self, stand_in: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Gives each layer another forward while the block runs; no cache of keys and values is kept meanwhile."""
        with _playing({layer: stand_in(index) for index, layer in enumerate(self.layers)}), uncached(self.config):
            yield


def find_layer_stack(model: Any) -> LayerStack:
    """The stack of layers of a Hugging Face `model`, found by a pass over four tokens.

    Of each candidate only the first layer computes in that pass, so that a large base is not read for it. Raises
    ModelError where there is no stack, or more than one: layers that are shared, or that hand each other more than
    hidden states.
    """
    lists = _outermost_lists(model)
    watches = {name: _Watch(list(members)) for name, members in lists.items()}
    players = {layer: watch.player(index) for watch in watches.values() for index, layer in enumerate(watch.layers)}
    ids = torch.arange(1, 5, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    failure: Exception | None = None
    try:
        with torch.no_grad(), quiet(), uncached(model.config), _playing(players):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (
        Exception
    ) as error:  # an encoder-decoder, or a model of something else than text; watched so far all the same
        failure = error
    finally:
        model.train(was_training)
    stacks = [name for name, watch in watches.items() if watch.is_stack()]
    if failure is not None or len(stacks) != 1:
        raise ModelError(
            f"{model.config.model_type} is not one stack of layers, each fed by the one before",
            got=str(failure or f"{len(stacks)} stacks").partition("\n")[0],
            fix="use a base such as a Llama, a BERT or a GPT-2",
        )
    watch = watches[stacks[0]]
    return LayerStack(stacks[0], watch.layers, model.config, watch.extras)


@contextmanager
def uncached(config: Any) -> Iterator[None]:
    """Has the model keep no keys and values while the block runs: layers that run twice would add theirs twice."""
    configs = list({id(part): part for part in (config, config.get_text_config())}.values())
    before = [getattr(part, "use_cache", None) for part in configs]
    for part in configs:
        part.use_cache = False
    try:
        yield
    finally:
        for part, value in zip(configs, before, strict=True):
            part.use_cache = value


class _Reached(Exception):
    """The last layer was called: what comes after it is not wanted."""


@dataclass
class _Watch:
    """One candidate: which layer was called when, and whether each was fed by the one before and nothing else."""

    layers: list[nn.Module]
    called: list[int] = field(default_factory=list)
    fed: bool = True
    extras: int | None = None
    gave: list[Any] = field(default_factory=list)

    def player(self, index: int) -> Callable[..., Any]:
        """A forward for layer `index`: the first one called is the real one; later ones hand on what they are given."""
        real = self.layers[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.called.append(index)
            if len(self.called) == 1:
                output = real(*args, **kwargs)
                self.extras = len(output) - 1 if isinstance(output, tuple) else None
                self.gave.append(output)
                return output
            came_from_layers = [value for value in _tensors((args, kwargs)) if self._gave(value)]
            wanted = _states(self.gave[-1])
            self.fed &= len(came_from_layers) == 1 and came_from_layers[0] is wanted
            if not isinstance(wanted, torch.Tensor):
                return self.gave[-1]
            hidden = wanted.clone()
            self.gave.append(hidden if self.extras is None else (hidden, *self.gave[0][1:]))
            return self.gave[-1]

        return forward

    def is_stack(self) -> bool:
        """Whether every member was called once, in order, each fed by the one before."""
        return (
            self.called == list(range(len(self.layers)))
            and self.fed
            and isinstance(_states(self.gave[0]), torch.Tensor)
        )

    def _gave(self, value: torch.Tensor) -> bool:
        return any(value is part for output in self.gave for part in _tensors(output))


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Full name -> every list of modules that is not inside another one."""
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    return {n: module for n, module in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}


@contextmanager
def _playing(players: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Gives modules another forward while the block runs, and their own (accelerate's, where it put one) afterwards."""
    before = {module: module.__dict__.get("forward") for module in players}
    for module, player in players.items():
        module.forward = player
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward


def _hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], wanted: torch.Tensor | None
) -> tuple[int | str, torch.Tensor]:
    """Where a layer's hidden states stand among its arguments: the tensor `wanted`, or the first of several dimensions
    that could be it."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in named:
        if isinstance(value, torch.Tensor) and (value is wanted if wanted is not None else value.is_floating_point()):
            return place, value
    raise ModelError("a layer was called without hidden states", got=f"{len(args)} arguments, {', '.join(kwargs)}")


def _states(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
