"""A base's files -> a frozen model and its tokenizer, on a device, in a number format.

Knows nothing of adapters, rows or training.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from hatrack.base import quantized_cache
from hatrack.base.code import check_code
from hatrack.base.description import BaseDescription
from hatrack.base.free_memory import available_memory, check_bitsandbytes, missing_device_error, release_memory
from hatrack.base.header import (
    QUANTIZATION_KEYS,
    WRAPPERS,
    check_task,
    quantization_in_config,
    weight_bytes,
)
from hatrack.base.quantized_cache import folder_to_load
from hatrack.base.quiet import quiet
from hatrack.console import format_size, say, say_once
from hatrack.cpu import has_fast_bfloat16
from hatrack.errors import HatrackError, MachineError, ModelError, RecipeError
from hatrack.kernels.frozen_linear import prevent_repacking
from hatrack.kernels.native import dtype_name as dtype_name
from hatrack.recipe import Task
from hatrack.storage import folder_size
from hatrack.upstream.transformers import remove_tied_weights

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""torch's formats under the names that safetensors gives them."""

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tekken.json", "bpe.codes", "*.model", "*.tiktoken")
"""Files of which a tokenizer needs at least one, unless it splits text into bytes or characters."""
BYTE_TOKENIZERS = ("ByT5", "Canine", "Perceiver")


@dataclass(frozen=True)
class Base:
    """A frozen model, ready to run: no parameter requires a gradient, dropout is off.

    `device` and `dtype` are those of its floating-point weights (of the computation, where they are quantised or
    `streamed`: left mapped in the files' own dtype, to be loaded layer by layer).
    """

    description: BaseDescription
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    streamed: bool = False

    @property
    def chat_template(self) -> str | None:
        """The base's own chat template (Jinja), or None where it has none."""
        template = getattr(self.tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        return str(template) if template else None


def choose_device(asked: str) -> tuple[torch.device, str]:
    """The device to compute on, and why. `auto` takes the first there is of CUDA, MPS, XPU and CPU.

    Raises RecipeError where the one asked for is not in this machine.
    """
    there = _available_devices()
    if asked == "auto":
        return torch.device(there[0]), "the fastest there is" if there[0] != "cpu" else "no accelerator found"
    kind, _, number = asked.partition(":")
    counts = {"cuda": torch.cuda.device_count, "xpu": torch.xpu.device_count}
    if kind not in there or (number and int(number) >= counts[kind]()):
        raise missing_device_error(asked, there)
    return torch.device(asked), "as asked"


def choose_dtype(asked: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The number format of the frozen base, and why. `auto` takes bfloat16 where the device is fast at it."""
    if asked != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[asked], "as asked"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = has_fast_bfloat16()
    else:
        fast = device.type == "xpu"
    if fast:
        return torch.bfloat16, "this device is fast at it"
    return torch.float32, "this device is not fast at bfloat16"


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device."""
    if device.type in ("cuda", "xpu"):
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    return available_memory()[0]


def load_base(
    description: BaseDescription,
    *,
    task: Task,
    labels: Sequence[str] = (),
    multi_label: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "none",
    streamed: bool = False,
    seed: int = 0,
) -> Base:
    """Loads a base for a task, frozen and in evaluation mode.

    classify: with a head of `len(labels)` outputs, the checkpoint's own where it has that many, else a fresh one that
    is the same for the same `seed`. chat, complete: a causal language model. `quantize`: none, 8bit or 4bit.
    Weights are mapped from the files, not copied, where device and dtype allow it; `streamed` keeps the files' dtype so
    that they are. Quantised ones are cached on disk from the first time on, and mapped from there
    (`quantized_cache.py`). No code of the base is run, unless its files are trusted.

    Raises ModelError where the base cannot do the task or its files do not fit together, RecipeError for a device or
    quantisation this machine does not have, MachineError where memory runs out.
    """
    chosen, _ = choose_device(device)
    number_format, _ = choose_dtype(dtype, chosen)
    config = load_config(description, task=task, labels=labels, multi_label=multi_label)
    tokenizer = load_tokenizer(description)
    if streamed and (chosen.type == "mps" or quantize != "none"):
        raise RecipeError(
            "a base larger than memory is streamed in its own format, and not on mps",
            got=f"--device {chosen}, --quantize {quantize}",
            fix="use --device cpu and --quantize none, or give it more --memory",
        )
    loaded_as = TORCH_DTYPES.get(description.stored_dtype, torch.float32) if streamed else number_format
    options: dict[str, Any] = {"config": config, "dtype": loaded_as, "trust_remote_code": description.trusted}
    # sizes that do not match are not ignored: _check_loaded refuses them, more plainly than transformers does
    options |= {"local_files_only": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    if quantize != "none" or (chosen.type != "cpu" and not streamed and task != "classify"):
        options["device_map"] = {"": chosen}
    if quantize != "none":
        model, found = _load_quantized(description, task, chosen, seed, quantize, options)
    else:
        model, found = _load_model(description, task, torch.device("cpu") if streamed else chosen, seed, options)
    _check_loaded(description, model, task, found, seed)
    for part in (model.config, model.config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id
    if task == "classify":  # as in training, whatever side it generates from: many models count positions from the left
        tokenizer.padding_side = "right"
    prevent_repacking(model)
    model.requires_grad_(False)
    model.eval()
    return Base(description, model, tokenizer, chosen, number_format, streamed)


def _available_devices() -> list[str]:
    """The kinds of device in this machine, the preferred one first."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
    }
    return [*(kind for kind, present in there.items() if present), "cpu"]


def load_config(base: BaseDescription, *, task: Task, labels: Sequence[str] = (), multi_label: bool = False) -> Any:
    """The model's configuration with the task's labels in it. Raises ModelError where the base cannot do the task,
    cannot be trained on, or needs code that may not run."""
    check_code(base)
    check_task(base.source, base.config, task)
    if task == "classify" and not labels:
        raise RecipeError("a classifier needs labels", got="none", fix="give the label column with --label COLUMN")
    extra: dict[str, Any] = {}
    if task == "classify":
        extra["id2label"] = dict(enumerate(labels))
        extra["label2id"] = {name: number for number, name in enumerate(labels)}
        extra["problem_type"] = "multi_label_classification" if multi_label else "single_label_classification"
    return _read_model_config(base, extra)


def _read_model_config(base: BaseDescription, extra: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The configuration as the base brings it, with `extra` in it."""
    try:
        with quiet():
            trusted = {"trust_remote_code": base.trusted, "local_files_only": True}
            return _drop_quantization_config(base, AutoConfig.from_pretrained(base.folder, **trusted, **extra))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(
            f"{base.source} ({base.config.get('model_type', 'unknown type')}): "
            "this version of transformers cannot read its config.json",
            got=_first_line(error),
            fix="pip install --upgrade transformers, or use another base",
        ) from error


def _drop_quantization_config(base: BaseDescription, config: Any) -> Any:
    """The configuration of full weights without what it tells of quantised ones, as after a merge; which is said."""
    told = quantization_in_config(config.to_dict())
    if told:
        dtype = base.stored_dtype
        say_once(f"{_display_name(base)}: config.json says {told}, but the weights are {dtype}: used as {dtype}")
        for part in (config, config.get_text_config()):
            for key in QUANTIZATION_KEYS:
                vars(part).pop(key, None)
    return config


def has_tokenizer(folder: Path, tokenizer_config: Mapping[str, Any]) -> bool:
    """Whether a folder has a tokenizer, by the names of its files and its tokenizer_config.json."""
    named = str(tokenizer_config.get("tokenizer_class", ""))
    return any(any(folder.glob(pattern)) for pattern in VOCABULARIES) or named.startswith(BYTE_TOKENIZERS)


def load_tokenizer(base: BaseDescription, rows: int | None = None) -> Any:
    """The base's tokenizer, with a padding token; bases that only generate often bring none.

    `rows`: how many embeddings there are, where config.json beside the tokenizer does not tell. Raises ModelError where
    there is no tokenizer, a damaged one, one that needs code that may not run, or no token to pad with.
    """
    check_code(base)
    if not has_tokenizer(base.folder, base.tokenizer_config):
        raise ModelError(
            f"{base.folder} has no tokenizer", got="no tokenizer.json", fix="copy the tokenizer files into it"
        )
    try:
        with quiet():
            trusted = {"trust_remote_code": base.trusted, "local_files_only": True}
            tokenizer = AutoTokenizer.from_pretrained(base.folder, **trusted)
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise ModelError(
            f"the tokenizer of {base.source} cannot be loaded",
            got=_first_line(error),
            fix="copy or download the base again",
        ) from error
    rows = rows or base.config.get("vocab_size")
    inside = rows if isinstance(rows, int) else math.inf
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= inside:
        say_once(
            f"{base.source}: its padding token {tokenizer.pad_token} has none of its {rows:,} embeddings; "
            "another token pads, which no answer sees"
        )
        tokenizer.pad_token = None
    if tokenizer.pad_token_id is None:
        stand_ins = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        stand_in = next((t for t in stand_ins if t and tokenizer.convert_tokens_to_ids(t) < inside), None)
        if stand_in is None:
            raise ModelError(
                f"{base.source} has no token to pad with", fix="set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = stand_in
    return tokenizer


def _load_quantized(
    base: BaseDescription, task: Task, device: torch.device, seed: int, quantize: str, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """What `_load_model` gives, in fewer bits: from the disk, where it is put first if it is not there yet."""
    settings = _quantization(quantize, options["dtype"], base.config, task)
    folder = _quantized_folder(base, task, device, quantize, options | {"quantization_config": settings})
    if folder is None:
        return _load_model(base, task, device, seed, options | {"quantization_config": settings})
    options["config"].quantization_config = settings.to_dict()  # by which transformers knows that they are quantised
    with folder_to_load(folder, base.folder) as there:
        model, found = _load_model(replace(base, folder=there, wrappers=()), task, device, seed, options)
    model.name_or_path = model.config.name_or_path = str(base.folder)
    return model, found


def _quantized_folder(
    base: BaseDescription, task: Task, device: torch.device, quantize: str, options: dict[str, Any]
) -> Path | None:
    """The folder with the base's quantised weights, which are made first where they are not kept yet. None where they
    cannot be."""
    dtype = dtype_name(options["dtype"])
    about = quantized_cache.cache_key(base, task=task, quantize=quantize, dtype=dtype, device=device.type)
    folder = quantized_cache.find_cached(about)
    if folder is not None:
        say_once(f"base in {quantize}, as quantised before: {folder} ({format_size(folder_size(folder))})")
        return folder
    if not quantized_cache.has_disk_space(base, quantize):
        return None
    say(f"quantising {base.source} to {quantize}, once ({format_size(weight_bytes(base.tensors))} to read)")
    write = partial(save_file, _quantized_weights(base, task, device, options))
    folder = quantized_cache.write_cached(about, base.source, write)
    if folder is not None:
        say(
            f"kept in {folder} ({format_size(folder_size(folder))}): "
            "later runs take it from there; hatrack cache shows it"
        )
    del write
    release_memory()  # before the base is loaded from there
    return folder


def _quantized_weights(
    base: BaseDescription, task: Task, device: torch.device, options: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Name -> weight of the quantised base: with its own head if it has one, whatever labels the task has, and nothing
    fresh. Raises ModelError as `load_base` does."""
    model, found = _load_model(base, task, device, 0, options | {"config": _read_model_config(base)})
    _check_complete(base, model, task, found)
    fresh = _fresh_tensors(found)
    weights = remove_tied_weights(model.state_dict(), model)
    return {name: tensor.contiguous() for name, tensor in weights.items() if name not in fresh}


def _quantization(quantize: str, dtype: torch.dtype, config: Mapping[str, Any], task: Task) -> Any:
    """What bitsandbytes is told: heads that are trained stay as they are."""
    check_bitsandbytes(quantize)
    skipped = quantized_cache.skipped_modules(config, task)
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def _load_model(
    base: BaseDescription, task: Task, device: torch.device, seed: int, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model and what transformers tells of its loading; fresh weights come from `seed`, whatever ran before."""
    kind = AutoModelForSequenceClassification if task == "classify" else AutoModelForCausalLM
    accelerators = [device] if device.type in ("cuda", "xpu") else []
    try:
        with quiet(), torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
            torch.manual_seed(seed)
            model, found = kind.from_pretrained(base.folder, **options, key_mapping=_key_mapping(base))
            # a fresh head is drawn on the processor, so that it is the same wherever it is used
            return model if "device_map" in options else model.to(device), found
    except HatrackError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MachineError(
            f"{base.source} does not fit into the memory of {device}", fix="use --quantize 4bit, or a smaller base"
        ) from error
    except (ValueError, KeyError, OSError, RuntimeError, ImportError, AttributeError) as error:
        raise ModelError(
            f"{base.source} cannot be loaded for {task}",
            got=_first_line(error),
            fix="use another base, or another --task",
        ) from error


def _key_mapping(base: BaseDescription) -> dict[str, str] | None:
    """What transformers is to take out of the names in a base's files, where a wrapper put something into them."""
    if not base.wrappers:
        return None
    say_once(
        f"{_display_name(base)} was saved through a wrapper: its tensors are read without {', '.join(base.wrappers)}"
    )
    return {WRAPPERS.pattern: ""}


def _check_loaded(base: BaseDescription, model: Any, task: Task, found: dict[str, Any], seed: int) -> None:
    """Refuses a base of which more than a head or a pooler is missing, and says what is fresh."""
    _check_complete(base, model, task, found)
    if found["mismatched_keys"]:
        say(f"the base's own head has another number of labels; a fresh one takes its place (seed {seed})")
    if any(".pooler." in name for name in _fresh_tensors(found)):
        say(f"{base.source} has no pooler; a fresh one stays as it is (seed {seed})")


def _check_complete(base: BaseDescription, model: Any, task: Task, found: dict[str, Any]) -> None:
    """Refuses a base of which more than a head or a pooler is missing."""
    mismatched = {
        str(name): f"{name}: file {tuple(ours)}, config {tuple(theirs)}"
        for name, ours, theirs in found["mismatched_keys"]
    }
    inside = f"{model.base_model_prefix}."
    lost = [
        name
        for name in _fresh_tensors(found)
        if task != "classify" or (name.startswith(inside) and ".pooler." not in name)
    ]
    if lost:
        _check_no_prefix(base, lost, map(str, found["unexpected_keys"]))
        only_head = all(not name.startswith(inside) for name in lost)
        raise ModelError(
            f"{base.source} lacks {len(lost):,} of the tensors that its config.json asks for",
            got=mismatched.get(lost[0], lost[0]),
            fix="use a base that has its language model head" if only_head else "copy or download the base again",
        )


def _check_no_prefix(base: BaseDescription, lost: Sequence[str], others: Iterable[str]) -> None:
    """Refuses a base whose tensors are all there, but with something before their names."""
    names = {other.removesuffix(f".{lost[0]}"): other for other in others if other.endswith(f".{lost[0]}")}
    for prefix, other in names.items():
        raise ModelError(
            f"the tensors of {base.source} have other names than its config.json asks for",
            got=f"{other} for {lost[0]}",
            fix=f"take '{prefix}.' out of the names in its files, or save it again without what is around it",
            gotcha="base-refused",
        )


def _display_name(base: BaseDescription) -> str:
    """A base's name, the same however a path to it is written: what is said of it is said once."""
    path = Path(base.source).expanduser()
    return str(path.resolve()) if path.exists() else base.source


def _fresh_tensors(found: dict[str, Any]) -> list[str]:
    """The tensors that are not in the base's files, or there in another shape."""
    return sorted({*map(str, found["missing_keys"]), *(str(name) for name, *_ in found["mismatched_keys"])})


def _first_line(error: BaseException) -> str:
    """The first line of somebody else's long message."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:197] + "..."
