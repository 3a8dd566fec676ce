"""What was saved is what was trained: the probe through the adapter as read back from disk, and the record of it."""

import dataclasses
from pathlib import Path

import torch

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
    """Loads the adapter just saved, holds it to the logits of the `trained` one, and records its proof beside it.

    Raises AdapterError where it changes nothing, MachineError where it does not reproduce what was trained: then the
    file is not to be trusted.
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
    proof = record_proof(hat.model, files, hat.base, recipe.quantize)  # by the arithmetic that later loads have
    # and by that of training: what differs then is the adapter
    speed_up(hat.base.model, hat.mapped_layers.trunk if hat.mapped_layers else None)
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
    say(f"proof: read back from disk it gives the same answers; it moves {proof.moved:.1%} of the base's probability")
    return hat
