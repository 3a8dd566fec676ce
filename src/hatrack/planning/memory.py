"""Computes the peak memory of a training run, by component. Imports no torch and reads no weights.

Peak memory is the peak resident memory of the process, anonymous and mapped pages together (VmHWM in
/proc/self/status); on an accelerator, what torch allocates there.

For each token and layer, a frozen base saves these for the backward pass (after Korthikanti et al., "Reducing
Activation Recomputation in Large Transformer Models", 2022, section 4): the inputs of norms, activation functions and
gates; queries, keys and values; each distinct input of an adapted layer. Checkpointing saves the input of every layer,
and all of the above for one layer at a time. Full fine-tuning takes 16 bytes per parameter (Rajbhandari et al.,
"ZeRO", 2020, section 3.1).
"""

from dataclasses import dataclass

from hatrack.kernels.limits import (
    ATTENTION_BLOCK,
    CACHED_MATMULS,
    LOGITS_BLOCK,
    LOGITS_BLOCK_ON_ACCELERATOR,
    WEIGHT_CHUNK,
)
from hatrack.planning.model_shape import ModelShape

MIB = 2**20
FRAMEWORK = 391 * MIB
"""Resident bytes after torch, transformers and peft are imported for a run on a CPU; `hatrack plan --probe` measures
it."""
RUNTIME = 40 * MIB
"""Bytes added while training runs: compiled matmuls, tokens, the trainer, code that is used for the first time."""
CACHED_MATMUL_BYTES = round(0.4 * MIB)
"""Bytes of one compiled matmul in oneDNN's cache: measured by runs on a tiny base, which the cache makes 23 to 28 MiB
larger (docs/log.md)."""
VOCABULARY_ENTRY = 800
"""Bytes of a tokenizer's tables per token of its vocabulary."""
BITSANDBYTES_IMPORTED = 80 * MIB
"""Bytes that importing bitsandbytes adds."""
ACCELERATOR = 64 * MIB
"""Workspaces of cuBLAS, which torch counts: up to 32 MiB each for the forward and the backward thread (on an H100; 8
MiB on older ones)."""
HEAP = 0.35
"""Heap fragmentation, as a fraction of the activations and of the layer inputs that are freed at once: glibc before
2.38 cannot reuse a freed aligned block for one of the same size (docs/log.md)."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATES_IN_MEMORY = 2**27
"""Bytes of hidden states that layer streaming holds in memory (training/layer_streaming.py); the rest go to a file."""
QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""Bytes per weight of a quantized layer: 4-bit weights have one float32 scale per 64 weights."""


@dataclass(frozen=True)
class Method:
    """A training method: `full` or with an adapter, the base quantized (none, 8bit, 4bit) or `streamed` layer by layer,
    activations saved or recomputed (`checkpointing`)."""

    full: bool = False
    quantize: str = "none"
    streamed: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of `rows` rows, padded to `longest` tokens each; `supervised` tokens in all (0 if classifying)."""

    rows: int
    longest: int
    supervised: int = 0

    @property
    def tokens(self) -> int:
        """All tokens, padding included."""
        return self.rows * self.longest


@dataclass(frozen=True)
class MemoryRequest:
    """What the memory of a run depends on.

    `batch`: the largest micro-batch of training. `scored`: the largest batch of held-out rows, None without any.
    `step_tokens`: tokens of the largest step. `uses_fast_lora`: the adapted layers are those of `layers/fast_lora.py`,
    not peft's, which DoRA and quantized bases use. `caches_primitives`: oneDNN caches its compiled matmul primitives.
    `process_bytes`: resident bytes of the process before the run. `layers_not_read`: how many layers are not read
    until the finished adapter is verified, because their outputs are all cached. `quantized_cached`: the quantized base
    is in the cache and only has to be mapped.
    """

    model: ModelShape
    method: Method
    dtype: str
    batch: MicroBatch
    step_tokens: int
    scored: MicroBatch | None = None
    dropout: float = 0.0
    uses_fast_lora: bool = True
    accelerator: bool = False
    caches_primitives: bool = False
    process_bytes: int = FRAMEWORK
    layers_not_read: int = 0
    quantized_cached: bool = False

    @property
    def item_bytes(self) -> int:
        """Bytes per element in `dtype`."""
        return ITEM_BYTES[self.dtype]

    @property
    def logits_block(self) -> int:
        """The most logits held at a time."""
        return LOGITS_BLOCK_ON_ACCELERATOR if self.accelerator else LOGITS_BLOCK


def training_bytes(run: MemoryRequest) -> dict[str, int]:
    """The peak memory of a run in bytes, by component."""
    model, full = run.model, run.method.full
    trained = model.counts.total - model.counts.lora - model.counts.head if full else 0
    trainable = trained or model.counts.trainable
    activations, inputs = _activations(run)
    weights = 0 if full else base_bytes(model, run.method, run.dtype, run.accelerator)
    components = {
        "weights": 4 * trained if full else weights - _not_read_bytes(run),
        "adapter": 0 if full else 4 * trainable,
        "gradients": 4 * trainable,
        "optimizer": 8 * trainable,
        "activations": activations,
        "logits": _logits(run, run.batch) * (2 * run.item_bytes + (8 if run.accelerator else 0)),
        "workspace": _workspace(run) + run.item_bytes * _converted_weights(run),
        "heap": 0 if run.accelerator else round(HEAP * (activations + inputs)),
        "matmuls": CACHED_MATMULS * CACHED_MATMUL_BYTES if run.caches_primitives and not run.accelerator else 0,
        "framework": ACCELERATOR if run.accelerator else _process_bytes(run),
    }
    persistent = sum(
        components[name] for name in ("weights", "adapter", "gradients", "optimizer", "matmuls", "framework")
    )
    scoring = persistent + (_scoring_bytes(run, run.scored) if run.scored else 0)
    components["scoring"] = max(0, scoring - sum(components.values()))
    loading = components["framework"] + _loading_bytes(run, weights)
    return components | {"loading": max(0, loading - sum(components.values()))}


def streamed_state_bytes(model: ModelShape, step_tokens: int, item: int) -> int:
    """Bytes of the hidden states that layer streaming saves per step: for each token, the input of each layer in the
    backward pass."""
    return step_tokens * model.dims.hidden * item * model.backward_layers


def base_bytes(model: ModelShape, method: Method, dtype: str, accelerator: bool = False) -> int:
    """Bytes of the frozen base in memory at a time: the whole base, or if streamed, its largest part as stored.

    Streamed to an accelerator: two layers as stored, a copy of one layer in `dtype` if that differs, and all weights
    outside the layers.
    """
    item, stored = ITEM_BYTES[dtype], ITEM_BYTES.get(model.stored_dtype, 4)
    layer = model.matmul_weights // max(model.dims.layers, 1)
    if method.streamed and accelerator:
        return layer * (2 * stored + (item if model.stored_dtype != dtype else 0)) + model.other_weights * item
    if method.streamed:
        return max(layer, model.head_weights) * stored
    return round(model.matmul_weights * QUANTIZED_BYTES.get(method.quantize, item) + model.other_weights * item)


def _activations(run: MemoryRequest) -> tuple[int, float]:
    """Bytes saved for the backward pass, and bytes of layer inputs that are freed at once."""
    model, tokens = run.model, run.batch.tokens
    layers, boundaries = model.dims.layers if run.method.full else model.backward_layers, 0
    if run.method.streamed:
        passed = run.step_tokens * model.dims.hidden * run.item_bytes  # from one layer to the next, and their gradients
        states = streamed_state_bytes(model, run.step_tokens, run.item_bytes)
        layers, boundaries = 1, min(STATES_IN_MEMORY, states) + 2 * passed
    elif run.method.checkpointing:
        layers, boundaries = 1, tokens * model.dims.hidden * run.item_bytes * model.backward_layers
    inputs = 0.0 if run.method.full else model.other_inputs / max(model.backward_layers, 1) * run.item_bytes
    return boundaries + round(tokens * _saved_per_token(run) * layers), tokens * inputs * layers


def _saved_per_token(run: MemoryRequest) -> float:
    """Bytes per token that one layer saves for its backward pass: the mean over the layers of the backward pass."""
    model, dims, layers = run.model, run.model.dims, max(run.model.backward_layers, 1)
    elements = 2 * dims.hidden + dims.query + 2 * dims.key + dims.intermediate * (3 if dims.gated else 1)
    if run.method.full:
        inputs = float(2 * dims.hidden + dims.query + dims.intermediate)
        return (elements + inputs) * run.item_bytes
    saved = (elements + model.adapter_inputs / layers) * run.item_bytes
    saved += model.adapted_layers / layers * 8 * 4  # the rank-r output of each lora_A, in float32
    if not run.uses_fast_lora:  # peft saves a float32 copy of the input, and another after dropout with its mask
        copies = (4 if run.item_bytes < 4 else 0) + (5 if run.dropout else 0)
        saved += model.peft_copies / layers * copies + model.dora_outputs / layers * run.item_bytes
    return saved + (dims.query * run.item_bytes if run.accelerator else 0)  # attention's output


def _process_bytes(run: MemoryRequest) -> int:
    """Bytes of the process besides the model: imports, and what is added while training runs."""
    return run.process_bytes + RUNTIME + VOCABULARY_ENTRY * run.model.dims.vocabulary


def _not_read_bytes(run: MemoryRequest) -> int:
    """Bytes of the layers that training does not read."""
    weight = QUANTIZED_BYTES.get(run.method.quantize, run.item_bytes)
    return round(run.model.matmul_weights * weight * run.layers_not_read / max(run.model.dims.layers, 1))


def _loading_bytes(run: MemoryRequest, weights: int) -> int:
    """Bytes of the base while it is loaded: if weights are converted, the pages of their files are resident too."""
    if run.accelerator or run.method.streamed:
        return 0
    loaded = 4 * run.model.frozen if run.method.full else weights
    same = run.model.stored_dtype == run.dtype if run.method.quantize == "none" else run.quantized_cached
    return loaded + (0 if same else run.model.disk_bytes)


def _scoring_bytes(run: MemoryRequest, batch: MicroBatch) -> int:
    """Bytes of one layer without a backward pass, the same again in freed heap blocks (measured), a block of logits."""
    dims = run.model.dims
    elements = batch.tokens * (4 * dims.hidden + dims.query + 2 * dims.key + 3 * dims.intermediate)
    return round(2 * elements + 2 * _attention_scores(run, batch) + 2 * _logits(run, batch)) * run.item_bytes


def _logits(run: MemoryRequest, batch: MicroBatch) -> int:
    """Logits of a batch that are held at a time: 0 to classify."""
    vocabulary = run.model.dims.vocabulary
    return min(batch.supervised * vocabulary, max(run.logits_block, 16 * vocabulary)) if run.model.decoder else 0


def _converted_weights(run: MemoryRequest) -> int:
    """Weights that are converted at a time, if they are stored in another dtype than that of the matmul."""
    if run.method.quantize == "8bit" or (run.method.quantize == "4bit" and run.accelerator):
        return run.model.largest_matrix
    streamed = run.method.streamed and run.model.stored_dtype != run.dtype
    return WEIGHT_CHUNK if run.method.quantize == "4bit" or streamed else 0


def _workspace(run: MemoryRequest) -> int:
    """Bytes of temporary tensors: attention probabilities with their gradients, and gradients of one MLP."""
    mlp = run.batch.tokens * run.model.dims.intermediate
    return 3 * _attention_scores(run, run.batch) * run.item_bytes + 3 * mlp * run.item_bytes


def _attention_scores(run: MemoryRequest, batch: MicroBatch) -> int:
    """Attention probabilities held at a time: 0 in float32."""
    return min(ATTENTION_BLOCK, batch.rows * run.model.dims.heads * batch.longest**2) if run.item_bytes < 4 else 0
