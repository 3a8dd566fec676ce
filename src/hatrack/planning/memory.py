"""How many bytes a training run takes at its fullest, by named term. Knows no torch and reads no weights.

What is counted is what the system counts: the most memory the process holds resident, anonymous and mapped pages
together (VmHWM in /proc/self/status; on an accelerator, what torch allocates there).

What a frozen base keeps between the forward and the backward pass (after Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models", 2022, section 4) are, of each token and layer: what enters a norm, an
activation function or a gate; queries, keys and values; and each distinct input of an adapted product. Checkpointing
keeps what enters a layer, and all that of one layer at a time. Full fine-tuning is counted with 16 bytes a parameter
(Rajbhandari et al., "ZeRO", 2020, section 3.1).
"""

from dataclasses import dataclass

from hatrack.planning.model_shape import ModelShape

MIB = 2**20
FRAMEWORK = 391 * MIB
"""torch, transformers and peft once imported for a run, on a processor; `hatrack plan --probe` measures it."""
RUNTIME = 40 * MIB
"""What comes once training runs: compiled products, tokens, the trainer, code that is touched for the first time."""
MATMULS, MATMUL = 64, round(0.4 * MIB)
"""Where oneDNN multiplies bfloat16 it stores so many compiled matmuls, one for each shape, of so many bytes: 23 to 28
MiB of a run on a tiny base, whose figure is exact without the store (docs/log.md)."""
TOKEN = 800
"""A tokenizer's table of words and merges takes so much for each of its tokens."""
BITSANDBYTES_IMPORTED = 80 * MIB
"""What importing bitsandbytes adds, in a process that has yet to start."""
ACCELERATOR = 64 * MIB
"""torch counts its own allocations there: what the driver takes besides is not in it, but room for products is, up to
32 MiB for each of the threads that go forward and backward (cuBLAS on an H100; 8 on older ones)."""
HEAP = 0.35
"""Freed memory between what is kept, as a share of what is kept and of inputs of products that are not: glibc before
2.38 cannot use a freed aligned block again for one of the same size (docs/log.md)."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGITS, LOGITS_ON_ACCELERATOR = 2**23, 2**26
"""Logits held at one time (`kernels/loss.py`)."""
SCORES = 2**22
"""Attention probabilities held at one time in 16-bit formats (`kernels/attention.py`); in float32 none are."""
PART = 2**21
"""Numbers of a matrix brought into the products' format at one time (`kernels/frozen_linear.py`)."""
STATES_IN_MEMORY = 2**27
"""Bytes of hidden states that a sweep holds in memory (`training/layer_streaming.py`); those beyond go to a file."""
PACKED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""Bytes a weight of a quantised layer: 4-bit numbers come with a float32 scale for each 64 of them."""


@dataclass(frozen=True)
class Method:
    """One way to train: `full` or with an adapter, the base in how many bits, kept in memory or streamed layer by
    layer, activations kept or computed again."""

    full: bool = False
    quantize: str = "none"
    streamed: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch, padding included: `rows` of `longest` tokens; `learned` of them are supervised."""

    rows: int
    longest: int
    learned: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return self.rows * self.longest


def training_bytes(
    model: ModelShape,
    method: Method,
    batch: MicroBatch,
    *,
    dtype: str,
    step_tokens: int,
    dropout: float = 0.0,
    plain: bool = True,
    accelerator: bool = False,
    compiled: bool = False,
    framework: int | None = None,
    unread: int = 0,
    packed: bool = False,
    scored: MicroBatch | None = None,
) -> dict[str, int]:
    """Bytes of a run at its fullest, by term, for the largest micro-batch it meets, and the largest that it scores.

    `step_tokens` are those of a whole step, which a sweep keeps at the boundaries of layers; `plain` says that the
    adapted layers are hatrack's own, not peft's (DoRA, quantised bases); `compiled` that the CPU's matmuls are compiled
    for each shape and stored; `framework` what the process holds before;
    `unread` how many layers are left in their file until the finished adapter is proven; `packed` that a quantised base
    is on disk as such already, and only has to be mapped.
    """
    item = ITEM_BYTES[dtype]
    trained = model.counts.total - model.counts.lora - model.counts.head if method.full else 0
    trainable = trained or model.counts.trainable
    weights = 0 if method.full else weight_bytes(model, method, dtype, accelerator)
    layer = _kept_in_layer(model, method, item, dropout, plain, accelerator)
    depth, between = (
        (model.dims.layers if method.full else model.backward_layers),
        0,
    )  # layers at a time, and at their doors
    if method.streamed:
        passed = step_tokens * model.dims.hidden * item  # from one layer to the next, and their gradients
        depth, between = 1, min(STATES_IN_MEMORY, state_bytes(model, step_tokens, item)) + 2 * passed
    elif method.checkpointing:
        depth, between = 1, batch.tokens * model.dims.hidden * item * model.backward_layers
    activations = between + round(batch.tokens * layer * depth)
    dropped = 0.0 if method.full else model.other_inputs / max(model.backward_layers, 1) * item
    heap = 0 if accelerator else round(HEAP * (activations + batch.tokens * dropped * depth))
    at_once = LOGITS_ON_ACCELERATOR if accelerator else LOGITS
    held = min(batch.learned * model.dims.vocabulary, max(at_once, 16 * model.dims.vocabulary))
    left = round(model.matmul_weights * PACKED.get(method.quantize, item) * unread / max(model.dims.layers, 1))
    terms = {
        "weights": 4 * trained if method.full else weights - left,
        "adapter": 0 if method.full else 4 * trainable,
        "gradients": 4 * trainable,
        "optimizer": 8 * trainable,
        "activations": activations,
        "logits": held * (2 * item + (8 if accelerator else 0)) if model.decoder else 0,
        "workspace": _workspace(model, batch, item) + item * _in_another_format(model, method, dtype, accelerator),
        "heap": heap,
        "matmuls": MATMULS * MATMUL if compiled and not accelerator else 0,
        "framework": ACCELERATOR if accelerator else _before_anything(model, framework or FRAMEWORK),
    }
    beside = sum(terms[name] for name in ("weights", "adapter", "gradients", "optimizer", "matmuls", "framework"))
    scoring = beside + (_while_scoring(model, scored, item, at_once) if scored else 0)
    terms["scoring"] = max(0, scoring - sum(terms.values()))
    loading = terms["framework"] + _while_loading(model, method, dtype, weights, accelerator, packed)
    return terms | {"loading": max(0, loading - sum(terms.values()))}


def state_bytes(model: ModelShape, step_tokens: int, item: int) -> int:
    """Bytes of the hidden states that a sweep keeps of a step: of each token, what goes into each layer with a
    gradient."""
    return step_tokens * model.dims.hidden * item * model.backward_layers


def _before_anything(model: ModelShape, framework: int) -> int:
    """What is imported, and what comes with it while running."""
    return framework + RUNTIME + TOKEN * model.dims.vocabulary


def weight_bytes(model: ModelShape, method: Method, dtype: str, accelerator: bool = False) -> int:
    """Bytes of the frozen base that are in memory at a time: all of it, or while sweeping the largest part as it lies
    in its file. On an accelerator, while sweeping: two layers so, a copy of one in `dtype` where that is another
    format, and all that is in no layer."""
    item = ITEM_BYTES[dtype]
    if method.streamed and accelerator:
        layer, stored = model.matmul_weights // max(model.dims.layers, 1), ITEM_BYTES.get(model.stored_dtype, 4)
        return layer * (2 * stored + (item if model.stored_dtype != dtype else 0)) + model.other_weights * item
    if method.streamed:
        part = max(model.matmul_weights // max(model.dims.layers, 1), model.head_weights)
        return part * ITEM_BYTES.get(model.stored_dtype, 4)
    return round(model.matmul_weights * PACKED.get(method.quantize, item) + model.other_weights * item)


def _while_loading(model: ModelShape, method: Method, dtype: str, weights: int, accelerator: bool, packed: bool) -> int:
    """While numbers are converted, the file's pages are in memory beside what is made of them."""
    if accelerator or method.streamed:
        return 0
    made = 4 * model.frozen if method.full else weights
    converted = model.stored_dtype != dtype if method.quantize == "none" else not packed
    return made + (model.disk_bytes if converted else 0)


def _while_scoring(model: ModelShape, batch: MicroBatch, item: int, at_once: int) -> int:
    """What one layer holds without keeping anything, as much again freed between (measured), and a block of logits: of
    held-out rows, which may be longer."""
    shape = model.dims
    numbers = batch.tokens * (4 * shape.hidden + shape.query + 2 * shape.key + 3 * shape.intermediate)
    held = min(batch.learned * shape.vocabulary, max(at_once, 16 * shape.vocabulary)) if model.decoder else 0
    return round(2 * numbers + 2 * _scores(model, batch, item) + 2 * held) * item


def _kept_in_layer(
    model: ModelShape, method: Method, item: int, dropout: float, plain: bool, accelerator: bool
) -> float:
    """Bytes a token that one layer keeps for its backward pass, in the mean over those a gradient passes through."""
    shape, layers = model.dims, max(model.backward_layers, 1)
    mlp = shape.intermediate * (3 if shape.gated else 1)
    numbers = 2 * shape.hidden + shape.query + 2 * shape.key + mlp
    if method.full:
        inputs = float(2 * shape.hidden + shape.query + shape.intermediate)
        return (numbers + inputs) * item
    kept = (numbers + model.adapter_inputs / layers) * item
    kept += model.adapted_layers / layers * 8 * 4  # the narrow side of each adapter, in float32
    if not plain:  # peft's own layers: a float32 copy of the input, and of it after dropout with its mask
        copies = (4 if item < 4 else 0) + (5 if dropout else 0)
        kept += model.peft_copies / layers * copies + model.dora_outputs / layers * item
    return kept + (shape.query * item if accelerator else 0)  # attention's output


def _converted(model: ModelShape, method: Method, dtype: str, accelerator: bool) -> int:
    """Numbers of the base that are brought into the products' format at a time, where they are kept in another."""
    if method.quantize == "8bit" or (method.quantize == "4bit" and accelerator):
        return model.largest_matrix
    return PART if method.quantize == "4bit" or (method.streamed and model.stored_dtype != dtype) else 0


def _workspace(model: ModelShape, batch: MicroBatch, item: int) -> int:
    """What is held for a moment: attention probabilities with their gradients, and gradients of one MLP."""
    return 3 * _scores(model, batch, item) * item + 3 * batch.tokens * model.dims.intermediate * item


def _scores(model: ModelShape, batch: MicroBatch, item: int) -> int:
    """Attention probabilities held at a time: in float32 none are."""
    return min(SCORES, batch.rows * model.dims.heads * batch.longest**2) if item < 4 else 0
