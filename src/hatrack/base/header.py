"""Reads config.json and safetensors headers: a base's tensor names, shapes, bytes, and its family.

Reads no weights and knows no torch. The safetensors layout (8 bytes of length, a JSON header, then the data) is the
one of https://github.com/huggingface/safetensors#format.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hatrack.errors import ModelError
from hatrack.file_kind import SAFETENSORS, wrong_kind_error

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 * 2**20
"""Bytes; the limit of the safetensors library itself."""

ITEM_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
ITEM_BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64}
ITEM_BITS |= {"F64": 64, "C64": 64}

WRAPPERS = re.compile(
    r"^(?:module\.|_orig_mod\.)+|(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What DistributedDataParallel, torch.compile and FSDP add to the tensor names of a model that they wrap."""

PACKED_TYPES = ("U8", "I8", "U16", "I16", "U32", "I32", "F4", "F6", "F8")
"""Prefixes of the dtypes of packed quantized weights."""
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""The keys of config.json that describe quantized weights."""

Family = Literal["encoder", "decoder", "encoder-decoder"]
# fmt: off
ENCODERS = frozenset((
    "albert", "bert", "bert-japanese", "big_bird", "camembert", "canine", "convbert", "data2vec-text", "deberta",
    "deberta-v2", "distilbert", "electra", "ernie", "esm", "eurobert", "flaubert", "fnet", "funnel", "ibert",
    "jina_embeddings_v3", "layoutlm", "longformer", "luke", "megatron-bert", "mobilebert", "modernbert", "mpnet", "mra",
    "nomic_bert", "nystromformer", "perceiver", "qdqbert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert",
    "roformer", "splinter", "squeezebert", "tapas", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso",
))
# fmt: on
"""Model types that read a text as a whole and cannot continue it, unless their config says `is_decoder`."""


PREFIXES = {"bert": "bert", "megatron-bert": "bert", "big_bird": "bert", "roberta": "roberta", "camembert": "roberta"}
PREFIXES |= {"xlm-roberta": "roberta", "xlm-roberta-xl": "roberta", "deberta-v2": "deberta", "modernbert": "model"}
PREFIXES |= {"gpt_neox": "gpt_neox", "squeezebert": "transformer"}
PREFIXES |= dict.fromkeys(
    ("gpt2", "gpt_neo", "gptj", "gpt_bigcode", "codegen", "falcon", "bloom", "mpt"), "transformer"
)
PREFIXES |= dict.fromkeys(("t5", "mt5", "umt5"), "transformer")
"""Model type -> attribute of the base model in its classes; others: the type itself for encoders, else `model`."""

HEAD_KINDS = {"distilbert": "pre", "deberta": "pooler", "deberta-v2": "pooler", "modernbert": "normed"}
HEAD_KINDS |= dict.fromkeys(
    ("roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "electra", "mpnet", "longformer"), "dense"
)
HEAD_KINDS |= dict.fromkeys(("big_bird", "convbert", "nystromformer", "ibert", "data2vec-text", "esm"), "dense")

POOLERS = dict.fromkeys(("bert", "megatron-bert", "ernie", "mobilebert", "rembert", "squeezebert"), "pooler.dense")
POOLERS |= {"albert": "pooler", "big_bird": "pooler"}
"""Model type -> name of the pooler in the base model that its classifier reads."""

LANGUAGE_HEADS = ("lm_head.", "embed_out.", "head.")
"""A language model's output head; the last one is RWKV's."""
ROUTER_BUFFERS = ("e_score_correction_bias", "expert_bias", "balancing_biases")
"""Buffers of an expert router that are in the files but are no parameters."""

IGNORE_MASK = ("fnet",)
"""Model types that have no attention mask, so that padding changes their outputs."""

OTHER_HEADS: tuple[str, ...] = (
    "cls.",
    "lm_head.",
    "embed_out.",
    "classifier.",
    "pre_classifier.",
    "score.",
    "qa_outputs.",
    "vocab_",
)
OTHER_HEADS += ("classification_head.", "discriminator_predictions.", "generator_", "predictions.", "lm_loss.", "head.")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: `dtype` as safetensors writes it ("BF16"), `offset` and `bytes` within `file`."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    bytes: int


def read_config(folder: Path) -> dict[str, Any]:
    """The base's config.json. Raises ModelError if it is missing, unreadable or not a JSON object."""
    return read_json(folder / CONFIG)


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors headers of a base: `files` by file name, and in `stored` the tensors that transformers reads.

    `tensors`: the same as `stored`, without what wrappers such as torch.compile put into names, which `wrappers` lists.
    """

    files: Mapping[str, Mapping[str, TensorInfo]]
    stored: Mapping[str, TensorInfo]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {WRAPPERS.sub("", name): info for name, info in self.stored.items()}

    @property
    def wrappers(self) -> tuple[str, ...]:
        return tuple(sorted({match[0] for name in self.stored if (match := WRAPPERS.search(name))}))


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Name -> tensor, for every tensor of `model.safetensors` or of the shards that its index names, without wrappers.

    Raises ModelError as `read_checkpoint` does.
    """
    return read_checkpoint(folder).tensors


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads the headers of the files that transformers reads: `model.safetensors`, else the shards of the index.

    Raises ModelError, naming the file, if one is missing, truncated or malformed, or lacks a tensor of the index.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.is_file():
        if not (folder / WEIGHTS).exists():
            raise ModelError(f"{folder} has no {WEIGHTS}", fix="give the folder of a whole model")
        header = read_file_header(folder / WEIGHTS)
        return Checkpoint({WEIGHTS: header}, header)
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ModelError(f"{index} has no weight_map", fix="copy or download the base again")
    outside = sorted({file for file in names.values() if Path(file).name != file})
    if outside:
        raise ModelError(f"{index} names files outside its folder", got=outside[0], fix="do not use this base")
    shards = {file: folder / file for file in sorted(set(names.values()))}
    missing = [file for file, path in shards.items() if not path.exists()]
    if missing:
        raise ModelError(
            f"{len(missing)} of the {len(shards)} weight files of {folder} are missing",
            got=", ".join(missing[:3]),
            fix="copy or download the base again",
        )
    headers = {file: read_file_header(path) for file, path in shards.items()}
    absent = [name for name, file in names.items() if name not in headers[file]]
    if absent:
        raise ModelError(f"{folder / names[absent[0]]} lacks {len(absent)} tensors of the index", got=absent[0])
    return Checkpoint(headers, {name: headers[file][name] for name, file in names.items()})


def own_parameters(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The base's own parameters under names that are the same in every checkpoint: no prefix, buffers or task heads.

    The output head of a language model belongs to it and stays.
    """
    named = {
        without_prefix(_modern_name(name), config): info
        for name, info in tensors.items()
        if not _is_buffer(name, info.shape)
    }
    own = ("lm_head.", "embed_out.")
    return {name: info for name, info in named.items() if name.startswith(own) or not name.startswith(OTHER_HEADS)}


def check_trainable(source: str, config: Mapping[str, Any], header: Mapping[str, TensorInfo]) -> None:
    """Raises ModelError if a base's tensors cannot be trained on, whatever the task: if some are an adapter's (a
    model that was saved with unmerged adapters), empty, or packed in fewer bits."""
    from_adapter = [name for name in header if ".lora_" in name or ".base_layer." in name]
    if from_adapter:
        raise ModelError(
            f"{source} carries an adapter already",
            got=f"{len(from_adapter):,} tensors such as {from_adapter[0]}",
            fix="merge it first, or start from the bare base",
            gotcha="base-with-adapters",
        )
    empty = [name for name, info in header.items() if 0 in info.shape]
    if empty:
        raise ModelError(
            f"{len(empty):,} of the {len(header):,} tensors of {source} are empty",
            got=f"{empty[0]} of shape {list(header[empty[0]].shape)}",
            fix="save it again with all of its parts: DeepSpeed ZeRO-3 and FSDP keep a part in each process "
            "(zero_to_fp32.py joins DeepSpeed's)",
            gotcha="base-saved-in-parts",
        )
    quantization = quantization_in_config(config)
    packed = [name for name, info in header.items() if _is_packed(name, info, in_config=quantization is not None)]
    if packed:
        raise ModelError(
            f"the weights of {source} are packed in {quantization or 'fewer bits'}, which cannot be trained on",
            got=f"{packed[0]} as {header[packed[0]].dtype}",
            fix="use the full model that it was made from, with --quantize 4bit to hold it in 4 bits",
            gotcha="base-packed",
        )


def quantization_in_config(config: Mapping[str, Any]) -> str | None:
    """The quantization that config.json describes, such as `4 bits (bitsandbytes)`; None if it describes none."""
    parts = (config, config.get("text_config") or {})
    described = next((part[key] for part in parts for key in QUANTIZATION_KEYS if part.get(key)), None)
    if described is None:
        return None
    described = described if isinstance(described, dict) else {}
    named = {"_load_in_4bit": 4, "load_in_4bit": 4, "_load_in_8bit": 8, "load_in_8bit": 8}
    bits = next(
        (described[key] for key in ("bits", "nbits", "w_bit", "num_bits") if type(described.get(key)) is int), None
    )
    bits = bits or next((number for key, number in named.items() if described.get(key) is True), None)
    method = str(described.get("quant_method") or "quantization_config")[:40]
    return f"{bits} bits ({method})" if bits else method


def check_task(source: str, config: Mapping[str, Any], task: str) -> None:
    """Raises ModelError if a base of this kind cannot do the task."""
    kind = family(config)
    described = f"{source} ({config.get('model_type', 'unknown type')})"
    if task == "classify" and config.get("model_type") in IGNORE_MASK:
        raise ModelError(
            f"{source} has no attention mask: a text's label would depend on the padding, and so on its batch",
            got=str(config["model_type"]),
            fix="use another base, such as a BERT",
        )
    if task != "classify" and kind == "encoder":
        raise ModelError(
            f"{described} is an encoder: it cannot generate text",
            got=f"--task {task}",
            fix="use --task classify, or a causal base such as a Llama",
        )
    if task != "classify" and kind == "encoder-decoder":
        raise ModelError(
            f"{described} is an encoder-decoder, which {task} cannot use yet", fix="use a causal base such as a Llama"
        )


def read_file_header(path: Path, largest: int = MAX_HEADER_BYTES) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, checked against the file's real size. Raises ModelError naming it.

    A header of more than `largest` bytes is refused unread.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise _damaged_error(path, f"{size:,} bytes, shorter than its own header")
            if length > largest:
                raise _damaged_error(path, f"a header of {length:,} bytes")
            content = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"{path} cannot be read", got=error.strerror) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise _damaged_error(path, "a header that is not JSON") from error
    if not isinstance(content, dict):
        raise _damaged_error(path, "a header that is not a JSON object")
    tensors = {
        name: _parse_entry(path, name, entry, 8 + length) for name, entry in content.items() if name != "__metadata__"
    }
    end = max((tensor.offset + tensor.bytes for tensor in tensors.values()), default=8 + length)
    if end > size:
        raise _damaged_error(path, f"{size:,} bytes where its header says {end:,}")
    return tensors


def parameter_count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The total number of elements in tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())


def weight_bytes(header: Mapping[str, TensorInfo]) -> int:
    """Bytes of all tensors on disk."""
    return sum(tensor.bytes for tensor in header.values())


def stored_dtype(header: Mapping[str, TensorInfo]) -> str:
    """The dtype of most of a base's bytes, as safetensors names it: `BF16`. `F32` for no tensors."""
    formats: dict[str, int] = defaultdict(int)
    for tensor in header.values():
        formats[tensor.dtype] += tensor.bytes
    return max(formats, key=lambda name: formats[name], default="F32")


def family(config: Mapping[str, Any]) -> Family:
    """Whether a base only reads text (encoder), continues it (decoder), or turns one text into another."""
    if config.get("is_encoder_decoder"):
        return "encoder-decoder"
    architectures = config.get("architectures") or [""]
    if config.get("model_type") in ENCODERS and not config.get("is_decoder"):
        return "encoder"
    if str(architectures[0]).endswith(("ForMaskedLM", "ForPreTraining")) and not config.get("is_decoder"):
        return "encoder"
    return "decoder"


def head_shapes(config: Mapping[str, Any], labels: int) -> dict[str, tuple[int, ...]]:
    """The classification head that transformers puts on a base: parameter name -> shape, for `labels` outputs.

    Unknown model types get the usual head of their family: one linear layer on an encoder, a dense layer and a
    projection on an encoder-decoder, `score` on a decoder. Raises ModelError if the config has no hidden size.
    """
    width = hidden_size(config)
    square = {"weight": (width, width), "bias": (width,)}
    out = {"weight": (labels, width), "bias": (labels,)}
    match HEAD_KINDS.get(str(config.get("model_type")), family(config)):
        case "decoder":
            return {"score.weight": (labels, width)}
        case "pre":
            return _prefixed("pre_classifier", square) | _prefixed("classifier", out)
        case "pooler":
            return _prefixed("pooler.dense", square) | _prefixed("classifier", out)
        case "dense":
            return _prefixed("classifier.dense", square) | _prefixed("classifier.out_proj", out)
        case "encoder-decoder":
            return _prefixed("classification_head.dense", square) | _prefixed("classification_head.out_proj", out)
        case "normed":
            bias = _prefixed("head.dense", {"bias": (width,)}) if config.get("classifier_bias") else {}
            bias |= {"head.norm.bias": (width,)} if config.get("norm_bias") else {}
            return (
                {"head.dense.weight": (width, width), "head.norm.weight": (width,)}
                | bias
                | _prefixed("classifier", out)
            )
        case _:
            return _prefixed("classifier", out)


def head_modules(config: Mapping[str, Any]) -> list[str]:
    """The top-level modules of the classification head, such as `["pre_classifier", "classifier"]`."""
    return list(dict.fromkeys(name.split(".")[0] for name in head_shapes(config, 1)))


def task_shapes(
    config: Mapping[str, Any], header: Mapping[str, TensorInfo], task: str, labels: int = 0
) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape as the task's transformers model has them, from the checkpoint's headers alone.

    `task` is classify (with a head of `labels` outputs), chat or complete. The checkpoint may carry the model's prefix
    or not, and another task's head: the names come out the same. Tied weights are listed once, buffers not at all.
    Experts that transformers joins into one tensor while loading are listed as the checkpoint has them.
    """
    kind, prefix = str(config.get("model_type")), _prefix(config)
    shapes = {_modern_name(name): info.shape for name, info in header.items() if not _is_buffer(name, info.shape)}
    shapes = {
        name: shape for name, shape in shapes.items() if name.rpartition(".")[2] not in ROUTER_BUFFERS or len(shape) > 1
    }
    if any(name.startswith(prefix) for name in shapes):
        body = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
    else:
        body = {prefix + name: shape for name, shape in shapes.items() if not name.startswith(OTHER_HEADS)}
    body = {name: shape for name, shape in body.items() if not _is_tied(name, body)}
    if task != "classify":
        heads = {name: shape for name, shape in shapes.items() if name.startswith(LANGUAGE_HEADS)}
        heads = {name.replace("embed_out.", "lm_head."): shape for name, shape in heads.items()}
        if config.get("tie_word_embeddings", not heads):
            heads.pop("lm_head.weight", None)
        return body | heads
    if POOLERS.get(kind) is None:
        body = {name: shape for name, shape in body.items() if not name.startswith(prefix + "pooler.")}
    else:
        width = hidden_size(config)
        body |= {prefix + POOLERS[kind] + ".weight": (width, width), prefix + POOLERS[kind] + ".bias": (width,)}
    return body | head_shapes(config, labels)


def without_prefix(name: str, config: Mapping[str, Any]) -> str:
    """A tensor's name without the base's prefix in a task's model: `bert.encoder.layer...` -> `encoder.layer...`."""
    return name.removeprefix(_prefix(config))


def hidden_size(config: Mapping[str, Any]) -> int:
    """The hidden size, under the name that the architecture uses. Raises ModelError if there is none."""
    for part in (config, config.get("text_config") or {}):
        for name in ("hidden_size", "n_embd", "dim", "d_model"):
            if type(part.get(name)) is int:
                return int(part[name])
    raise ModelError("config.json has no hidden_size", got=config.get("model_type"), fix="use another base")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file with one JSON object. Raises ModelError naming it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} has no {path.name}", fix="give the folder of a whole model") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read", got=error.strerror) from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        fix = "copy or download the base again"
        raise wrong_kind_error(path, "a JSON file", ModelError) or ModelError(
            f"{path} is not valid JSON", got=reason, fix=fix
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object", got=type(content).__name__)
    return content


def read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`; an empty dict if there is no such file."""
    return read_json(path) if path.is_file() else {}


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Checks and returns one header entry. `data_start`: the offset of the data in the file."""
    try:
        shape, dtype, (begin, end) = tuple(entry["shape"]), entry["dtype"], entry["data_offsets"]
        fits = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        bits = ITEM_BITS[dtype] * math.prod(shape) if fits else 0
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged_error(path, f"a malformed entry for {name}") from error
    if not fits or end - begin != math.ceil(bits / 8):
        raise _damaged_error(path, f"{name} with shape {list(shape)} in bytes {begin} to {end}")
    return TensorInfo(shape, dtype, path, data_start + begin, end - begin)


def _prefix(config: Mapping[str, Any]) -> str:
    """The prefix of the base's parameters in a task's model, with its dot."""
    kind = str(config.get("model_type"))
    return PREFIXES.get(kind, kind if family(config) == "encoder" else "model") + "."


def _prefixed(module: str, parts: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{module}.{part}": shape for part, shape in parts.items()}


def _modern_name(name: str) -> str:
    """The current name in transformers; the oldest checkpoints call LayerNorm's parameters gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a buffer of an old checkpoint: positions, rotary frequencies, a causal mask."""
    last = name.rsplit(".", 1)[-1]
    return last in ("position_ids", "token_type_ids", "inv_freq", "masked_bias") or (last == "bias" and len(shape) == 4)


def _is_packed(name: str, info: TensorInfo, *, in_config: bool) -> bool:
    """Whether a tensor holds quantized weights; `in_config`: config.json says that the base is quantized."""
    matrix = len(info.shape) > 1 and info.dtype.startswith(PACKED_TYPES) and not _is_buffer(name, info.shape)
    return matrix and (in_config or "weight" in name.rpartition(".")[2])


def _is_tied(name: str, body: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether an encoder-decoder's own embedding is the shared one under another name."""
    start, _, part = name.rpartition(".embed_tokens.")
    stack = start.rsplit(".", 1)
    return part == "weight" and stack[-1] in ("encoder", "decoder") and f"{stack[0]}.shared.weight" in body


def _damaged_error(path: Path, got: str) -> ModelError:
    return wrong_kind_error(path, SAFETENSORS, ModelError) or ModelError(
        f"{path} is damaged or not a safetensors file", got=got, fix="copy or download the base again"
    )
