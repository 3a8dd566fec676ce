"""Running a model's parts one after the other is running the model: values and gradients, whatever the architecture."""

from typing import Any

import pytest
import torch

from hatrack.base.layer_stack import find_layer_stack
from hatrack.errors import ModelError
from tests.base.tiny import DECODERS, config, model

STACKS = {"Bert", "Roberta", "DistilBert", "Electra", "DebertaV2", "MPNet", "ModernBert", *DECODERS}
LAYERS = {"DistilBert": "n_layers", "GPT2": "n_layer"}


def _tiny(kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of three layers and a batch of two rows, one of them padded."""
    made = model(kind, "causal" if kind in DECODERS else "classify", **{LAYERS.get(kind, "num_hidden_layers"): 3})
    ids = torch.arange(3, 19).view(2, 8)
    real = torch.ones_like(ids)
    real[1, 5:] = 0
    return made.requires_grad_(True), {"input_ids": ids, "attention_mask": real}


@pytest.mark.parametrize("kind", sorted(STACKS))
@pytest.mark.parametrize("training", [False, True])
def test_the_parts_give_what_the_whole_gives(kind: str, training: bool) -> None:
    made, batch = _tiny(kind)
    trunk = find_layer_stack(made)
    assert len(trunk.layers) == 3 and made.get_submodule(trunk.name)[0] is trunk.layers[0]
    assert not any("forward" in module.__dict__ for module in made.modules())

    made.train(training)
    _without_dropout(made)
    whole = made(**batch).logits
    whole.square().sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in made.named_parameters() if parameter.grad is not None}
    made.zero_grad()

    hidden, calls = trunk.capture_inputs(lambda: made(**batch))
    assert len(calls) == 3
    for index, call in enumerate(calls):
        hidden = trunk.run_layer(index, hidden, call)
    with trunk.replace_layers(lambda: hidden):
        parts = made(**batch).logits
    assert torch.equal(parts, whole)
    parts.square().sum().backward()
    for name, gradient in wanted.items():
        torch.testing.assert_close(made.get_parameter(name).grad, gradient, msg=name)


def test_one_layer_is_a_stack_too() -> None:
    made = model("Llama", "causal", num_hidden_layers=1)
    assert len(find_layer_stack(made).layers) == 1


def test_only_the_first_layer_computes_while_the_stack_is_looked_for() -> None:
    made = model("Llama", "causal", num_hidden_layers=3)
    ran: list[int] = []
    for index, layer in enumerate(made.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    find_layer_stack(made)
    assert ran == [0]


def test_no_cache_of_keys_is_kept_and_the_setting_comes_back() -> None:
    made, batch = _tiny("Llama")
    assert made.config.use_cache
    trunk = find_layer_stack(made)
    hidden, calls = trunk.capture_inputs(lambda: made(**batch))
    assert all(call.kwargs.get("past_key_values") is None for call in calls)
    first = trunk.run_layer(0, hidden, calls[0])
    assert torch.equal(first, trunk.run_layer(0, hidden, calls[0]))
    assert made.config.use_cache


@pytest.mark.parametrize("kind", ["Albert", "T5", "Bart"])
def test_what_is_no_single_stack_is_refused(kind: str) -> None:
    """Shared layers; two stacks; layers that hand on more than their hidden states."""
    with pytest.raises(ModelError, match="is not one stack of layers"):
        find_layer_stack(model(kind))


def test_gemma_has_layers_that_are_called_differently() -> None:
    """The tests above would not tell if every layer were called as the first one is: this model makes sure they do."""
    assert len(set(config("Gemma2").layer_types)) == 2


def _without_dropout(made: Any) -> None:
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
