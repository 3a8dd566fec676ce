"""Proof of effect: records an adapter's outputs for a fixed probe, and compares them at each load.

The record, in hatrack.json, holds the probe's tokens, the probabilities of the likeliest outputs with and without the
adapter, and a digest of each tensor. The check finds an adapter that does nothing, one that was changed or damaged, and
a base with other outputs. It is no signature: whoever writes the adapter can write the record.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hatrack.adapter.card import HATRACK_JSON
from hatrack.adapter.files import AdapterFiles
from hatrack.base.header import read_file_header
from hatrack.base.load import Base, dtype_name
from hatrack.console import say_once
from hatrack.errors import AdapterError, join_first

PROBE = (
    "The hat on the left is not the hat that I was looking for yesterday.",
    "What is good, and what is bad, about a film with so many actors in it?",
    "One, two, three: red, green and blue. Is it very fine or very poor?",
    "This was the first scene, and nothing in it was what it seemed to be.",
)
MAX_TOKENS, MAX_ROWS, TOP_ANSWERS = 32, 16, 16
TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-3, 0.05
"""How far a probability may be from the recorded one: in float32, and in or between dtypes of fewer bits."""
INERT_CHANGE = 1e-5
"""Relative change of the logits that rounding alone can cause. An adapter that changes no more has no effect."""


@dataclass(frozen=True)
class Proof:
    """`probe` (rows, tokens): token ids; `answers` (rows, n): ids of the likeliest outputs; `base` and `adapter`
    (rows, n): their probabilities without and with the adapter; `moved`: the largest change of a probability in a row,
    mean over rows; `dtype` and `quantize`: of the base; `tensors`: name -> digest."""

    probe: list[list[int]]
    answers: list[list[int]]
    base: list[list[float]]
    adapter: list[list[float]]
    moved: float
    tolerance: float
    dtype: str
    quantize: str
    tensors: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """As hatrack.json holds it."""
        return asdict(self)


@torch.no_grad()
def probe_logits(model: Any, probe: list[list[int]], base: Base) -> torch.Tensor:
    """Runs the probe; float32 logits on the CPU: (rows, labels), or (rows, vocabulary) at the last position."""
    ids = torch.tensor(probe, device=base.device)
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu()
    return out if out.dim() == 2 else out[:, -1]  # type: ignore[no-any-return]


def probe_tokens(base: Base) -> list[list[int]]:
    """The probe texts as tokens of a base, cut to one length, so that no padding is needed."""
    ends = [base.tokenizer.eos_token_id] if getattr(base.model.config, "is_encoder_decoder", False) else []
    rows = [base.tokenizer(text)["input_ids"] for text in PROBE]
    rows = [row if row[-1:] == ends or not ends else row + ends for row in rows]
    length = min(MAX_TOKENS, *(len(row) for row in rows))
    return [[*row[: length - 1], row[-1]] for row in rows]


def mean_max_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference between two probabilities in each row; the mean over rows."""
    return float((one - other).abs().amax(-1).mean())


def probabilities(logits: torch.Tensor, multi_label: bool) -> torch.Tensor:
    """Softmax over the outputs, or with `multi_label` the sigmoid of each."""
    return logits.sigmoid() if multi_label else logits.softmax(-1)


def record_proof(model: Any, files: AdapterFiles, base: Base, quantize: str) -> Proof:
    """Makes the proof of the adapter in use, which was loaded from `files`. Raises AdapterError if it is inert."""
    probe, multi_label = probe_tokens(base), _is_multi_label(files)
    bare, adapted = _run_both(model, probe, base)
    _check_effect(files, bare, adapted)
    without, with_it = probabilities(bare, multi_label), probabilities(adapted, multi_label)
    chosen = with_it.topk(min(TOP_ANSWERS, with_it.shape[-1])).indices
    dtype = dtype_name(base.dtype)
    return Proof(
        probe=probe,
        answers=chosen.tolist(),
        base=[[round(p, 6) for p in row] for row in without.gather(1, chosen).tolist()],
        adapter=[[round(p, 6) for p in row] for row in with_it.gather(1, chosen).tolist()],
        moved=mean_max_difference(without, with_it),
        tolerance=TOLERANCE if dtype == "float32" and quantize == "none" else LOW_PRECISION_TOLERANCE,
        dtype=dtype,
        quantize=quantize,
        tensors=digests(files),
    )


def check_proof(model: Any, files: AdapterFiles, base: Base, quantize: str, *, same_base: bool = True) -> None:
    """Runs the probe through the adapter in use and compares tensors and outputs with its record; without a record it
    only checks that the adapter changes something. `same_base`: whether the base is meant to be the recorded one.

    Raises AdapterError if the adapter is inert, or if its tensors or outputs are not the recorded ones.
    """
    proof = read_proof(files)
    if proof is None:
        bare, adapted = _run_both(model, probe_tokens(base), base)
        _check_effect(files, bare, adapted)
        return
    _check_tensors(files, proof)
    width = model.get_input_embeddings().weight.shape[0]
    if max(token for row in proof.probe for token in row) >= width:
        raise _malformed(files, f"a token id of {width} or more")
    bare, adapted = _run_both(model, proof.probe, base)
    _check_effect(files, bare, adapted)
    if not same_base:
        return
    if quantize != proof.quantize:
        say_once(
            f"{files.folder}: trained with --quantize {proof.quantize}, loaded with {quantize}: "
            "its answers are not compared"
        )
        return
    _check_answers(files, proof, base, bare, adapted)


def digests(files: AdapterFiles) -> dict[str, str]:
    """Tensor name -> 16 hex digits of the sha256 of its dtype, shape and bytes in the file."""
    found = {}
    with files.weights.open("rb") as file:
        for name, info in read_file_header(files.weights).items():
            file.seek(info.offset)
            digest = hashlib.sha256(f"{info.dtype}\0{info.shape}\0".encode() + file.read(info.bytes))
            found[name] = digest.hexdigest()[:16]
    return found


def read_proof(files: AdapterFiles) -> Proof | None:
    """Reads and checks the proof in hatrack.json; None without one. Raises AdapterError if it is malformed."""
    content = files.card.proof if files.card else None
    if content is None:
        return None
    try:
        proof = Proof(**{name: content[name] for name in Proof.__dataclass_fields__})
        rows, width = len(proof.probe), len(proof.answers[0])
        is_valid = (
            0 < rows <= MAX_ROWS
            and 0 < len(proof.probe[0]) <= MAX_TOKENS
            and _is_table(proof.probe, rows, len(proof.probe[0]), int)
            and _is_table(proof.answers, rows, width, int)
            and all(_is_table(table, rows, width, float) for table in (proof.base, proof.adapter))
            and all(type(value) is float and math.isfinite(value) for value in (proof.moved, proof.tolerance))
            and 0 < proof.tolerance <= LOW_PRECISION_TOLERANCE
            and all(isinstance(value, str) for value in (proof.dtype, proof.quantize))
            and all(isinstance(value, str) for value in proof.tensors.values())
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise _malformed(files, type(error).__name__) from error
    if not is_valid:
        raise _malformed(files, "invalid values")
    return proof


def _run_both(model: Any, probe: list[list[int]], base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the probe without and with the adapter in use; it stays in use."""
    name = model.active_adapter
    model.eval()
    try:
        adapted = probe_logits(model, probe, base)
        model.base_model.disable_adapter_layers()
        bare = probe_logits(model, probe, base)
    except (ValueError, IndexError, RuntimeError) as error:
        raise AdapterError(
            "the adapter cannot be run on this base", got=" ".join(str(error).split())[:200], fix="use another base"
        ) from error
    finally:
        model.base_model.enable_adapter_layers()
        model.set_adapter(name, inference_mode=True)
    return bare, adapted


def _check_effect(files: AdapterFiles, bare: torch.Tensor, adapted: torch.Tensor) -> None:
    """Raises AdapterError if the adapter changes nothing, or its logits are not finite."""
    if not adapted.isfinite().all():
        raise AdapterError(
            f"with {files.folder} the model's output is not a number", got="inf or nan", fix="train with a lower --lr"
        )
    zero, count = zero_tensors(files)
    if bare.shape == adapted.shape and (bare - adapted).abs().max() <= INERT_CHANGE * (1 + bare.abs().max()):
        raise AdapterError(
            f"{files.folder} changes nothing: with it the base answers as without it",
            got=f"{len(zero)} of {count} lora_B all zero" + (f" ({', '.join(zero[:3])})" if zero else ""),
            fix="train longer, or with a higher --lr",
        )
    if zero:
        say_once(
            f"{files.folder}: {len(zero)} of {count} layers do nothing, their lora_B is zero: {', '.join(zero[:3])}"
        )


def zero_tensors(files: AdapterFiles) -> tuple[list[str], int]:
    """Names of the LoRA B matrices that are all zero, and how many B matrices there are."""
    zero, count = [], 0
    with files.weights.open("rb") as file:
        for name, info in read_file_header(files.weights).items():
            if ".lora_B" in name or ".lora_embedding_B" in name:
                count += 1
                file.seek(info.offset)
                if not any(file.read(info.bytes)):
                    zero.append(name)
    return zero, count


def _check_tensors(files: AdapterFiles, proof: Proof) -> None:
    """Raises AdapterError if the tensors in the file are not the recorded ones."""
    now = digests(files)
    wrong = [f"{name} is different" for name in now if name in proof.tensors and now[name] != proof.tensors[name]]
    wrong += [f"{name} is missing" for name in proof.tensors if name not in now]
    wrong += [f"{name} is new" for name in now if name not in proof.tensors]
    if wrong:
        raise AdapterError(
            f"{files.weights} is not what {HATRACK_JSON} says was trained",
            got=join_first(wrong, 5),
            fix=f"copy the adapter again; if you changed it yourself, remove 'proof' from {HATRACK_JSON}",
        )


def _check_answers(files: AdapterFiles, proof: Proof, base: Base, bare: torch.Tensor, adapted: torch.Tensor) -> None:
    """Compares the probabilities with the recorded ones, those of the base first: the adapter depends on them."""
    multi_label = _is_multi_label(files)
    chosen = torch.tensor(proof.answers)
    same = str(base.dtype) == f"torch.{proof.dtype}"
    tolerance = proof.tolerance if same else LOW_PRECISION_TOLERANCE
    if chosen.max() >= adapted.shape[-1] or chosen.min() < 0:
        raise _malformed(files, "an output id that the model does not have")
    compared = [(str(files.folder), adapted, proof.adapter)]
    if files.config.get("task_type") != "SEQ_CLS":  # the head of a bare classifier is not the trained one
        compared.insert(0, ("the base", bare, proof.base))
    for what, logits, recorded in compared:
        difference = mean_max_difference(probabilities(logits, multi_label).gather(1, chosen), torch.tensor(recorded))
        if not difference <= tolerance:
            raise AdapterError(
                f"{what} does not give the answers recorded when {files.folder} was made",
                got=f"probabilities {difference:.2%} apart, more than {tolerance:.2%}",
                fix="give the base it was trained on; --no-proof leaves this check out",
            )


def _is_table(value: Any, rows: int, width: int, kind: type) -> bool:
    """Whether `value` is `rows` lists of `width` ids (int, at least 0) or probabilities (float)."""
    return (
        isinstance(value, list)
        and len(value) == rows
        and all(
            isinstance(row, list)
            and len(row) == width
            and all(type(number) in ({int} if kind is int else {int, float}) and 0 <= number < 2**31 for number in row)
            for row in value
        )
    )


def _is_multi_label(files: AdapterFiles) -> bool:
    return files.card is not None and files.card.multi_label


def _malformed(files: AdapterFiles, got: str) -> AdapterError:
    path = files.folder / HATRACK_JSON
    return AdapterError(f"{path} has a malformed proof", got=got, fix="copy the adapter again, or remove 'proof'")
