"""Loads a base: a frozen model and its tokenizer, on a device, in a dtype, in 4 or 8 bits or streamed.

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
"""torch's dtypes by their names in safetensors files."""

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tekken.json", "bpe.codes", "*.model", "*.tiktoken")
"""Files of which a tokenizer needs at least one, unless it splits text into bytes or characters."""
BYTE_TOKENIZERS = ("ByT5", "Canine", "Perceiver")


@dataclass(frozen=True)
class BaseOptions:
    """How to load a base.

    `task`: classify gives a head of `len(labels)` outputs, the checkpoint's own if it has that many, else a new one
    initialized from `seed`; chat and complete give a causal language model. `device`: auto, cpu, cuda, mps or
    xpu. `dtype`: auto, float32, bfloat16 or float16. `quantize`: none, 8bit or 4bit. `streamed`: keep the weights
    memory-mapped in the files' dtype, to be loaded layer by layer.
    """

    task: Task
    labels: Sequence[str] = ()
    multi_label: bool = False
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    streamed: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Base:
    """A frozen model, ready to run: no parameter requires a gradient, dropout is off.

    `device` and `dtype`: where and in what dtype its matmuls are computed. Its floating-point weights are there too,
    and in this dtype, unless they are quantized or `streamed`.
    """

    description: BaseDescription
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    streamed: bool = False

    @property
    def chat_template(self) -> str | None:
        """The base's own chat template (Jinja), or None if it has none."""
        template = getattr(self.tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        return str(template) if template else None


def choose_device(asked: str) -> tuple[torch.device, str]:
    """The device to compute on, and why. `auto` takes the first available of CUDA, MPS, XPU and CPU.

    Raises RecipeError if this machine does not have the device.
    """
    available = _available_devices()
    if asked == "auto":
        return torch.device(available[0]), "the fastest there is" if available[0] != "cpu" else "no accelerator found"
    kind, colon, number = asked.partition(":")
    counts = {"cuda": torch.cuda.device_count, "xpu": torch.xpu.device_count}  # only these may have a number
    has_number = kind in counts and number.isdecimal() and int(number) < counts[kind]()
    if kind not in available or (colon and not has_number):
        raise missing_device_error(asked, available)
    return torch.device(asked), "as asked"


def choose_dtype(asked: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the frozen base, and why. `auto` takes bfloat16 if the device is fast at it."""
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
    """Free bytes of memory on a device."""
    if device.type in ("cuda", "xpu"):
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    return available_memory()[0]


def load_base(description: BaseDescription, options: BaseOptions) -> Base:
    """Loads a base for a task, frozen and in evaluation mode.

    Weights are memory-mapped, not copied, if device and dtype allow it. Quantized weights are cached on disk and mapped
    from there (`quantized_cache.py`). Code of the base runs only if it is trusted.

    Raises ModelError if the base cannot do the task or its files do not fit together, RecipeError for a device or
    quantization this machine does not have, MachineError if memory runs out.
    """
    device, _ = choose_device(options.device)
    dtype, _ = choose_dtype(options.dtype, device)
    task, streamed, quantize = options.task, options.streamed, options.quantize
    config = load_config(description, task=task, labels=options.labels, multi_label=options.multi_label)
    tokenizer = load_tokenizer(description)
    if streamed and (device.type == "mps" or quantize != "none"):
        raise RecipeError(
            "a base larger than memory is streamed, which works neither quantized nor on mps",
            got=f"--device {device}, --quantize {quantize}",
            fix="use --device cpu and --quantize none, or give it more --memory",
        )
    stored = TORCH_DTYPES.get(description.stored_dtype, torch.float32)
    arguments: dict[str, Any] = {"config": config, "dtype": stored if streamed else dtype}
    if quantize != "none" or (device.type != "cpu" and not streamed and task != "classify"):
        arguments["device_map"] = {"": device}
    loading = _Loading(description, task, torch.device("cpu") if streamed else device, options.seed, arguments)
    model, info = _load_model(loading) if quantize == "none" else _load_quantized(loading, quantize)
    _check_complete(loading, model, info)
    _report_fresh_weights(loading, info)
    for part in (model.config, model.config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id
    if task == "classify":  # as in training: many models count positions from the left
        tokenizer.padding_side = "right"
    prevent_repacking(model)
    model.requires_grad_(False)
    model.eval()
    return Base(description, model, tokenizer, device, dtype, streamed)


@dataclass(frozen=True)
class _Loading:
    """One call of transformers' `from_pretrained` for a base; `arguments`: its further keyword arguments."""

    base: BaseDescription
    task: Task
    device: torch.device
    seed: int
    arguments: Mapping[str, Any]

    def with_arguments(self, **arguments: Any) -> "_Loading":
        """The same call with further arguments."""
        return replace(self, arguments={**self.arguments, **arguments})


def _available_devices() -> list[str]:
    """The kinds of device in this machine, the fastest first."""
    kinds = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
    }
    return [*(kind for kind, present in kinds.items() if present), "cpu"]


def load_config(base: BaseDescription, *, task: Task, labels: Sequence[str] = (), multi_label: bool = False) -> Any:
    """transformers' configuration of the model, with the task's labels.

    Raises ModelError if the base cannot do the task or needs code that may not run, RecipeError without labels.
    """
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
    """transformers' configuration of a base, with `extra` in it."""
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
    """Removes and reports a quantization entry left in config.json although the weights are not quantized."""
    quantization = quantization_in_config(config.to_dict())
    if quantization:
        dtype = base.stored_dtype
        say_once(
            f"{_display_name(base)}: config.json says {quantization}, but the weights are {dtype}: used as {dtype}"
        )
        for part in (config, config.get_text_config()):
            for key in QUANTIZATION_KEYS:
                vars(part).pop(key, None)
    return config


def has_tokenizer(folder: Path, tokenizer_config: Mapping[str, Any]) -> bool:
    """Whether a folder has a tokenizer, by the names of its files and its tokenizer_config.json."""
    named = str(tokenizer_config.get("tokenizer_class", ""))
    return any(any(folder.glob(pattern)) for pattern in VOCABULARIES) or named.startswith(BYTE_TOKENIZERS)


def load_tokenizer(base: BaseDescription, embedding_count: int | None = None) -> Any:
    """Loads a base's tokenizer, and sets a padding token if it has none, as with many causal bases.

    `embedding_count`: the model's number of token embeddings, by default the config's `vocab_size`.

    Raises ModelError if the tokenizer is missing, damaged, or needs code that may not run, or if there is no token to
    pad with.
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
    embedding_count = embedding_count or base.config.get("vocab_size")
    id_limit = embedding_count if isinstance(embedding_count, int) else math.inf
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= id_limit:
        say_once(
            f"{base.source}: its padding token {tokenizer.pad_token} is outside its {embedding_count:,} embeddings; "
            "another token is used for padding, which changes no answer"
        )
        tokenizer.pad_token = None
    if tokenizer.pad_token_id is None:
        candidates = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        padding = next((t for t in candidates if t and tokenizer.convert_tokens_to_ids(t) < id_limit), None)
        if padding is None:
            raise ModelError(
                f"{base.source} has no token to pad with", fix="set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = padding
    return tokenizer


def _load_quantized(loading: _Loading, quantize: str) -> tuple[Any, dict[str, Any]]:
    """Like `_load_model`, but quantized: loads the weights from the cache on disk, where they are written if missing.
    If they cannot be cached, quantizes them while loading."""
    base, arguments = loading.base, loading.arguments
    settings = _bitsandbytes_settings(quantize, arguments["dtype"], base.config, loading.task)
    quantize_while_loading = loading.with_arguments(quantization_config=settings)
    folder = _quantized_folder(quantize_while_loading, quantize)
    if folder is None:
        return _load_model(quantize_while_loading)
    arguments["config"].quantization_config = settings.to_dict()  # tells transformers that the weights are quantized
    with folder_to_load(folder, base.folder) as combined_folder:
        model, info = _load_model(replace(loading, base=replace(base, folder=combined_folder, wrappers=())))
    model.name_or_path = model.config.name_or_path = str(base.folder)
    return model, info


def _quantized_folder(loading: _Loading, quantize: str) -> Path | None:
    """The folder with the base's quantized weights, written if it is missing; None if they cannot be cached."""
    base, dtype = loading.base, dtype_name(loading.arguments["dtype"])
    key = quantized_cache.cache_key(base, task=loading.task, quantize=quantize, dtype=dtype, device=loading.device.type)
    folder = quantized_cache.find_cached(key)
    if folder is not None:
        say_once(f"base in {quantize}, as quantized before: {folder} ({format_size(folder_size(folder))})")
        return folder
    if not quantized_cache.has_disk_space(base, quantize):
        return None
    say(f"quantizing {base.source} to {quantize}, once ({format_size(weight_bytes(base.tensors))} to read)")
    write = partial(save_file, _quantized_weights(loading))
    folder = quantized_cache.write_cached(key, base.source, write)
    if folder is not None:
        shown = f"{folder} ({format_size(folder_size(folder))})"
        say(f"cached in {shown}: later runs load it from there; hatrack cache shows it")
    del write
    release_memory()  # before the base is loaded from there
    return folder


def _quantized_weights(loading: _Loading) -> dict[str, torch.Tensor]:
    """Name -> weight of the quantized base, its own head included if it has one. Newly initialized weights are left
    out, so that the result does not depend on the task's labels. Raises ModelError as `load_base` does."""
    loading = replace(loading.with_arguments(config=_read_model_config(loading.base)), seed=0)
    model, info = _load_model(loading)
    _check_complete(loading, model, info)
    fresh = _fresh_tensors(info)
    weights = remove_tied_weights(model.state_dict(), model)
    return {name: tensor.contiguous() for name, tensor in weights.items() if name not in fresh}


def _bitsandbytes_settings(quantize: str, dtype: torch.dtype, config: Mapping[str, Any], task: Task) -> Any:
    """bitsandbytes' settings; a classifier's trained heads and its pooler are excluded from quantization."""
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


def _load_model(loading: _Loading) -> tuple[Any, dict[str, Any]]:
    """The model, and transformers' loading info; new weights are initialized from the seed."""
    base, device = loading.base, loading.device
    kind = AutoModelForSequenceClassification if loading.task == "classify" else AutoModelForCausalLM
    accelerators = [device] if device.type in ("cuda", "xpu") else []
    # tensors of another shape: _check_complete refuses them in plain words, except a classifier's head and pooler
    options: dict[str, Any] = {"local_files_only": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    options |= {"trust_remote_code": base.trusted, "key_mapping": _key_mapping(base)}
    try:
        with quiet(), torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
            torch.manual_seed(loading.seed)
            model, info = kind.from_pretrained(base.folder, **options, **loading.arguments)
            # a new head is initialized on the CPU, so that it is the same on every device
            return model if "device_map" in loading.arguments else model.to(device), info
    except HatrackError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MachineError(
            f"{base.source} does not fit into the memory of {device}", fix="use --quantize 4bit, or a smaller base"
        ) from error
    except (ValueError, KeyError, OSError, RuntimeError, ImportError, AttributeError) as error:
        raise ModelError(
            f"{base.source} cannot be loaded for {loading.task}",
            got=_first_line(error),
            fix="use another base, or another --task",
        ) from error


def _key_mapping(base: BaseDescription) -> dict[str, str] | None:
    """transformers' `key_mapping` that removes from tensor names what a wrapper put into them."""
    if not base.wrappers:
        return None
    say_once(
        f"{_display_name(base)} was saved through a wrapper: its tensors are read without {', '.join(base.wrappers)}"
    )
    return {WRAPPERS.pattern: ""}


def _report_fresh_weights(loading: _Loading, info: Mapping[str, Any]) -> None:
    """Reports a head or pooler of another shape in the base's files, and a missing pooler."""
    mismatched = [str(name) for name, *_ in info["mismatched_keys"]]
    if any(".pooler." not in name for name in mismatched):
        say(f"the base's own head has another number of labels; a fresh one takes its place (seed {loading.seed})")
    if any(".pooler." in name for name in _fresh_tensors(info)):
        found = "a pooler of another size" if any(".pooler." in name for name in mismatched) else "no pooler"
        say(f"{loading.base.source} has {found}; a fresh one is used and not trained (seed {loading.seed})")


def _check_complete(loading: _Loading, model: Any, info: Mapping[str, Any]) -> None:
    """Raises ModelError if more than a classifier's head or pooler is missing from a base's files."""
    mismatched = {
        str(name): f"{name}: file {tuple(in_file)}, config {tuple(in_config)}"
        for name, in_file, in_config in info["mismatched_keys"]
    }
    inner = f"{model.base_model_prefix}."
    missing = [
        name
        for name in _fresh_tensors(info)
        if loading.task != "classify" or (name.startswith(inner) and ".pooler." not in name)
    ]
    if missing:
        _check_no_prefix(loading.base, missing, map(str, info["unexpected_keys"]))
        only_head = all(not name.startswith(inner) for name in missing)
        raise ModelError(
            f"{loading.base.source} lacks {len(missing):,} of the tensors that its config.json asks for",
            got=mismatched.get(missing[0], missing[0]),
            fix="use a base that has its language model head" if only_head else "copy or download the base again",
        )


def _check_no_prefix(base: BaseDescription, missing: Sequence[str], unexpected: Iterable[str]) -> None:
    """Raises ModelError if a wrapper's prefix is why tensors are missing: the first of the `missing` names is among the
    `unexpected` ones with a prefix."""
    wanted = missing[0]
    prefixed = next((name for name in unexpected if name.endswith(f".{wanted}")), None)
    if prefixed is not None:
        prefix = prefixed.removesuffix(f".{wanted}")
        raise ModelError(
            f"the tensors of {base.source} have other names than its config.json asks for",
            got=f"{prefixed} for {wanted}",
            fix=f"remove '{prefix}.' from the names in its files, or save the model itself, without its wrapper",
            gotcha="base-refused",
        )


def _display_name(base: BaseDescription) -> str:
    """A base's name for `say_once`: the same however a path to it is written."""
    path = Path(base.source).expanduser()
    return str(path.resolve()) if path.exists() else base.source


def _fresh_tensors(info: Mapping[str, Any]) -> list[str]:
    """The tensors that are missing from the base's files, or have another shape there."""
    return sorted({*map(str, info["missing_keys"]), *(str(name) for name, *_ in info["mismatched_keys"])})


def _first_line(error: BaseException) -> str:
    """The first line of another library's error message."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:197] + "..."
