"""Loads a saved adapter and checks that its outputs match the trained adapter's."""

import dataclasses
from pathlib import Path

import torch
from peft.functional import cast_adapter_dtype
from peft.utils import load_peft_weights, set_peft_model_state_dict

from hatrack.adapter.card import HATRACK_JSON
from hatrack.adapter.files import read_adapter
from hatrack.adapter.proof import mean_max_difference, probabilities, probe_logits, probe_tokens, record_proof
from hatrack.console import say
from hatrack.errors import MachineError
from hatrack.inference.hat import Hat
from hatrack.inference.load import load
from hatrack.layers.fast_base import speed_up
from hatrack.recipe import Recipe
from hatrack.storage import write_file


def read_back(output: Path, trained: torch.Tensor, recipe: Recipe) -> Hat:
    """Loads the saved adapter, compares its logits with those of the `trained` adapter, and records its proof.

    Raises AdapterError if the adapter changes nothing, MachineError if it does not reproduce the trained outputs.
    """
    hat = load(
        output,
        device=recipe.device,
        dtype=recipe.dtype,
        memory=recipe.memory,
        trust_remote_code=recipe.trust_remote_code,
        prove=False,
    )
    files = read_adapter(output)
    proof = record_proof(hat.model, files, hat.base, recipe.quantize)  # as later loads compute
    _compute_as_in_training(hat, output)
    again = probe_logits(hat.model, probe_tokens(hat.base), hat.base)
    several = hat.cards[str(hat.active)].multi_label
    apart = mean_max_difference(probabilities(again, several), probabilities(trained, several))
    tolerance = 1e-4 if hat.base.dtype == torch.float32 else 0.02  # bf16 keeps 8 bits; kernels may sum in another order
    if not apart <= tolerance:
        raise MachineError(
            "the saved adapter does not reproduce the trained one",
            got=f"probabilities {apart:.2%} apart, more than {tolerance:.2%}",
            fix="train again; if it happens twice, please report it",
        )
    assert files.card is not None
    write_file(output / HATRACK_JSON, dataclasses.replace(files.card, proof=proof.to_json()).to_json())
    say(
        "proof: the adapter read back from disk gives the same answers; it changes the base's probabilities by up to "
        f"{100 * proof.moved:.1f} percentage points per text (mean of {len(proof.probe)} probe texts)"
    )
    return hat


def _compute_as_in_training(hat: Hat, output: Path) -> None:
    """Speeds up the base and reloads the adapter's float32 weights from the file.

    `load` rounds them to the base's dtype. peft's own layers (on quantized bases, for DoRA) compute in the dtype of the
    adapter: in bfloat16 the probabilities of a 4-bit base came out up to 3% apart.
    """
    speed_up(hat.base.model, hat.mapped_layers.layer_stack if hat.mapped_layers else None)
    name = hat.model.active_adapter
    cast_adapter_dtype(hat.model, name)
    weights = load_peft_weights(str(output), device=str(hat.base.device))
    set_peft_model_state_dict(hat.model, weights, adapter_name=name)
