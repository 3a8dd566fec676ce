"""Describes a base by its config.json alone: the tensors that transformers would make, without weights."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from hatrack.base.description import BaseDescription
from hatrack.base.header import (
    CONFIG,
    TOKENIZER_CONFIG,
    TensorInfo,
    family,
    read_config,
    read_optional_json,
    weight_bytes,
)
from hatrack.errors import ModelError

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def describe_shapes(folder: Path, source: str) -> BaseDescription:
    """Describes a base that has only config.json.

    Raises ModelError if transformers cannot make a model of it.
    """
    found = read_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        make = AutoModelForMaskedLM if family(found) == "encoder" else AutoModelForCausalLM
        with torch.device("meta"):
            model = make.from_config(config, dtype=getattr(config, "dtype", None) or torch.float32)
    except (ValueError, KeyError, OSError, ImportError, TypeError) as error:
        raise ModelError(
            f"no model can be made of {source}/{CONFIG}",
            got=str(error).splitlines()[0],
            fix="give a folder with config.json and weights, or a hub name",
        ) from None
    file = folder / CONFIG
    tensors = {
        name: TensorInfo(
            tuple(each.shape), SAFETENSORS_DTYPES.get(each.dtype, "F32"), file, 0, each.numel() * each.element_size()
        )
        for name, each in model.named_parameters()
    }
    settings = read_optional_json(folder / TOKENIZER_CONFIG)
    return BaseDescription(source, folder, found, tensors, settings, to_download=weight_bytes(tensors))
