"""`hatrack.load`: finds an adapter's base, loads it, and attaches one or more adapters."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from hatrack.adapter.attach import attach, peft_adapter_name
from hatrack.adapter.card import AdapterCard
from hatrack.adapter.files import read_adapter
from hatrack.adapter.origin import card_of, find_base_of
from hatrack.adapter.proof import check_proof
from hatrack.adapter.registry import find_adapter, registered_name
from hatrack.adapter.tokenizer import load_adapter_tokenizer
from hatrack.base.description import BaseDescription
from hatrack.base.fingerprint import check_base
from hatrack.base.free_memory import fits_in_memory
from hatrack.base.layer_stack import find_layer_stack
from hatrack.base.load import Base, BaseOptions, choose_device, choose_dtype, dtype_name, free_memory, load_base
from hatrack.base.mapped_layers import MappedLayers
from hatrack.base.offload import move_all_but_layers, open_layers, placeholders_if_streamed
from hatrack.console import say
from hatrack.errors import AdapterError
from hatrack.inference.hat import AttachedAdapter, Hat
from hatrack.layers.fast_lora import LAYER_CLASSES
from hatrack.recipe import Task, parse_memory


@dataclass(frozen=True)
class _LoadOptions:
    """The options of `load`; `memory` in bytes."""

    base: str | None
    device: str
    dtype: str
    quantize: str | None
    memory: int | None
    allow_other_base: bool
    trust_remote_code: str | None
    prove: bool


def load(
    adapters: str | Path | Sequence[str | Path],
    *,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    memory: int | str | None = None,
    allow_other_base: bool = False,
    trust_remote_code: str | None = None,
    prove: bool = True,
) -> Hat:
    """Loads a base once and attaches one or more adapters to it; the first one is in use.

    `adapters`: folders, or names on the rack. `base`: where the base is now; by default the one the first adapter was
    trained on. `device`: auto, cpu, cuda, mps or xpu. `dtype`: auto, float32, bfloat16 or float16. `quantize`: none,
    8bit or 4bit; by default as the adapter was trained. `memory`: the most to take, in bytes or as "3GiB"; a base that
    does not fit in it, or in what is free, stays on disk, and every forward pass reads it once. `allow_other_base`:
    go on although the adapter was trained on other weights. `trust_remote_code`: the base's name, if its own code
    may run. `prove`: check each adapter's proof, with two short forward passes.

    Raises AdapterError if an adapter is missing, damaged, does not fit or fails its proof; WrongBase if it was
    trained on other weights; ModelError if the base cannot be found or loaded, or needs code of its own;
    RecipeError for an invalid option; MachineError if memory runs out.
    """
    options = _LoadOptions(
        base, device, dtype, quantize, parse_memory(memory), allow_other_base, trust_remote_code, prove
    )
    first, *others = _check_adapters(adapters)
    hat = _load_with_base(first, options)
    for other in others:
        hat.add(other, allow_other_base=allow_other_base, prove=prove)
    return hat


def _check_adapters(adapters: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Returns the adapters as a list. Raises AdapterError if there are none, or one is missing."""
    found = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    if not found:
        raise AdapterError("no adapter was named", fix="give a folder, or a name that hatrack list shows")
    for adapter in found:
        find_adapter(adapter)
    return found


def _load_with_base(adapter: str | Path, options: _LoadOptions) -> Hat:
    """Loads an adapter's base and attaches the adapter to it."""
    folder = find_adapter(adapter)
    files = read_adapter(folder)
    card = card_of(files, options.base)
    base_files = find_base_of(files, options.base, trust=options.trust_remote_code)
    check_base(folder, card.base, base_files, allow_other=options.allow_other_base)
    quantize = options.quantize or card.recipe.get("quantize", "none")
    base = _load_base(base_files, card, quantize, options)
    mapped_layers = _stream_layers(base) if base.streamed else None
    name = registered_name(adapter, folder)
    with placeholders_if_streamed(base):
        model = attach(base.model, folder, peft_adapter_name(name), layer_classes=LAYER_CLASSES)
    attached = AttachedAdapter(card, folder, load_adapter_tokenizer(folder, base))
    hat = Hat(base, model, {name: attached}, quantize=quantize, mapped_layers=mapped_layers)
    if options.prove:
        check_proof(model, files, base, quantize, same_base=not options.allow_other_base)
    return hat


def _load_base(files: BaseDescription, card: AdapterCard, quantize: str, options: _LoadOptions) -> Base:
    """Loads the base as an adapter needs it; into memory if it fits."""
    device = choose_device(options.device)[0]
    dtype = dtype_name(choose_dtype(options.dtype, device)[0])
    return load_base(
        files,
        BaseOptions(
            task=cast(Task, card.task),
            labels=card.labels,
            multi_label=card.multi_label,
            device=options.device,
            dtype=options.dtype,
            quantize=quantize,
            streamed=quantize == "none"
            and not fits_in_memory(files.tensors, dtype, free_memory(device), options.memory),
            seed=card.recipe.get("seed", 0),  # a head that no adapter replaces must be the one that training began with
        ),
    )


def _stream_layers(base: Base) -> MappedLayers:
    """Makes every forward pass read the base from disk, layer by layer."""
    say("the base is larger than memory: it stays on disk, and every pass reads it once")
    layer_stack = find_layer_stack(base.model)
    move_all_but_layers(base.model, layer_stack, base.dtype, base.device)
    mapped_layers = open_layers(base.model, layer_stack, base.dtype, base.description.folder, base.device)
    mapped_layers.stream()
    return mapped_layers
