"""Runs parts of a transformers model: what comes before its layers, one layer, what comes after.

Knows no architecture: it watches the model's own forward pass. The layer stack is the list of modules that are called
one after the other, each with the output of the one before. While a part runs, the other layers return their input, so
that the model's own code still computes masks, position embeddings and heads.

Knows nothing of adapters, losses or where weights are.
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
    """A layer's arguments besides the hidden states: masks, position embeddings and the like.

    `place`: the position or the keyword of the argument that takes the hidden states.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str

    def with_hidden(self, hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, `hidden` among them."""
        if isinstance(self.place, int):
            return (*self.args[: self.place], hidden, *self.args[self.place + 1 :]), self.kwargs
        return self.args, self.kwargs | {self.place: hidden}


@dataclass(frozen=True)
class LayerStack:
    """A model's stack of layers; `name` is its full name in the model. Adapters may be placed in its layers later.

    `extras`: how many values a layer returns besides the hidden states; None if it returns only the hidden states.
    """

    name: str
    layers: Sequence[nn.Module]
    config: Any
    extras: int | None

    def capture_inputs(self, run: Callable[[], Any]) -> tuple[torch.Tensor, list[Call]]:
        """Calls `run`, which runs the model, but computes neither the layers nor what comes after them.

        Returns the hidden states (B, T, d) that the first layer gets, and the arguments of each layer.
        """
        calls: list[Call] = []
        inputs: list[torch.Tensor] = []

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            place, hidden = _find_hidden_states(args, kwargs, inputs[-1] if inputs else None)
            inputs.append(hidden)
            others = {name: value for name, value in kwargs.items() if name != place}
            calls.append(Call(tuple(None if n == place else arg for n, arg in enumerate(args)), others, place))
            if len(calls) == len(self.layers):
                raise _StopForward
            return self._as_output(hidden)

        with self._replaced_by(lambda index: stand_in):
            try:
                run()
            except _StopForward:
                return inputs[0], calls
        raise ModelError(f"{self.name}: a forward pass skipped layers", got=f"{len(calls)} calls")

    def run_layer(self, index: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """The output of layer `index` for hidden states (B, T, d)."""
        args, kwargs = call.with_hidden(hidden)
        return _hidden_states(self.layers[index](*args, **kwargs))  # type: ignore[no-any-return]

    @contextmanager
    def replace_layers(self, give: Callable[[], torch.Tensor] | None, layers: int | None = None) -> Iterator[None]:
        """While the block runs, the first `layers` of the model (by default all) compute nothing: each returns its
        input, or, if `give` is not None, the last of them returns the hidden states (B, T, d) from `give`."""
        own = [layer.forward for layer in self.layers]
        past = len(own) if layers is None else layers

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                return self._as_output(
                    give() if give and index == past - 1 else _find_hidden_states(args, kwargs, None)[1]
                )

            return forward if index < past else own[index]

        with self._replaced_by(stand_in):
            yield

    def only_last_layers(self, layers: int = 1) -> AbstractContextManager[None]:
        """While the block runs, only the last `layers` compute: enough to test a large model's forward pass."""
        return self.replace_layers(None, len(self.layers) - layers)

    def _as_output(self, hidden: torch.Tensor) -> Any:
        return hidden if self.extras is None else (hidden, *[None] * self.extras)

    @contextmanager
    def _replaced_by(self, stand_in: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Replaces the forward of each layer while the block runs, without a KV cache."""
        with (
            _replaced_forwards({layer: stand_in(index) for index, layer in enumerate(self.layers)}),
            without_kv_cache(self.config),
        ):
            yield


def find_layer_stack(model: Any) -> LayerStack:
    """Finds the stack of layers of a Hugging Face `model` by a forward pass over four tokens.

    Only the first layer of each candidate computes in that pass, so that most of a large base is not read. Raises
    ModelError if there is not exactly one stack, as with shared layers, or layers that pass more than hidden states.
    """
    lists = _outermost_lists(model)
    recorders = {name: _CallRecorder(list(members)) for name, members in lists.items()}
    forwards = {layer: each.forward_of(index) for each in recorders.values() for index, layer in enumerate(each.layers)}
    ids = torch.arange(1, 5, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    failure: Exception | None = None
    try:
        with torch.no_grad(), quiet(), without_kv_cache(model.config), _replaced_forwards(forwards):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:  # an encoder-decoder, or a model that does not read text
        failure = error
    finally:
        model.train(was_training)
    stacks = [name for name, recorder in recorders.items() if recorder.is_stack()]
    if failure is not None or len(stacks) != 1:
        raise ModelError(
            f"{model.config.model_type} is not one stack of layers, each fed by the one before",
            got=str(failure or f"{len(stacks)} stacks").partition("\n")[0],
            fix="use a base such as a Llama, a BERT or a GPT-2",
        )
    found = recorders[stacks[0]]
    return LayerStack(stacks[0], found.layers, model.config, found.extras)


@contextmanager
def without_kv_cache(config: Any) -> Iterator[None]:
    """Turns the KV cache off while the block runs: layers that run twice would add their keys twice."""
    configs = list({id(part): part for part in (config, config.get_text_config())}.values())
    before = [getattr(part, "use_cache", None) for part in configs]
    for part in configs:
        part.use_cache = False
    try:
        yield
    finally:
        for part, value in zip(configs, before, strict=True):
            part.use_cache = value


class _StopForward(Exception):
    """Ends a forward pass at the last layer."""


@dataclass
class _CallRecorder:
    """Records the order of a candidate's calls, and whether each layer gets the output of the previous one alone."""

    layers: list[nn.Module]
    called: list[int] = field(default_factory=list)
    is_chain: bool = True
    extras: int | None = None
    outputs: list[Any] = field(default_factory=list)

    def forward_of(self, index: int) -> Callable[..., Any]:
        """A forward for layer `index`: the first layer called computes; the others return their input."""
        real = self.layers[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.called.append(index)
            if len(self.called) == 1:
                output = real(*args, **kwargs)
                self.extras = len(output) - 1 if isinstance(output, tuple) else None
                self.outputs.append(output)
                return output
            came_from_layers = [value for value in _all_tensors((args, kwargs)) if self._is_output(value)]
            wanted = _hidden_states(self.outputs[-1])
            self.is_chain &= len(came_from_layers) == 1 and came_from_layers[0] is wanted
            if not isinstance(wanted, torch.Tensor):
                return self.outputs[-1]
            hidden = wanted.clone()
            self.outputs.append(hidden if self.extras is None else (hidden, *self.outputs[0][1:]))
            return self.outputs[-1]

        return forward

    def is_stack(self) -> bool:
        """Whether every member was called once, in order, each with the output of the one before."""
        return (
            self.called == list(range(len(self.layers)))
            and self.is_chain
            and isinstance(_hidden_states(self.outputs[0]), torch.Tensor)
        )

    def _is_output(self, value: torch.Tensor) -> bool:
        return any(value is part for output in self.outputs for part in _all_tensors(output))


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Every list of modules that is not inside another one, by full name."""
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    return {n: module for n, module in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}


@contextmanager
def _replaced_forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While the block runs, replaces the forward of modules; then restores their own (or accelerate's)."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.__dict__["forward"]
            else:
                module.forward = own


def _find_hidden_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], wanted: torch.Tensor | None
) -> tuple[int | str, torch.Tensor]:
    """The position or keyword of a layer's hidden states, and the tensor: `wanted`, else the first float tensor."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in named:
        if isinstance(value, torch.Tensor) and (value is wanted if wanted is not None else value.is_floating_point()):
            return place, value
    raise ModelError("a layer was called without hidden states", got=f"{len(args)} arguments, {', '.join(kwargs)}")


def _hidden_states(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _all_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _all_tensors(part)
    elif isinstance(value, dict):
        yield from _all_tensors(list(value.values()))
