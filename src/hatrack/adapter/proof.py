"""Proof of effect: what an adapter does to a fixed probe, recorded when it is made and checked again when it is used.

The record, in hatrack.json, holds the probe's tokens, the probabilities of the likeliest answers with and without the
adapter, and a digest of every tensor. It finds an adapter that does nothing, one that was changed or damaged, and a
base that answers differently. It is no signature: whoever writes the adapter can write the record.
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
from hatrack.errors import AdapterError

PROBE = (
    "The hat on the left is not the hat that I was looking for yesterday.",
    "What is good, and what is bad, about a film with so many actors in it?",
    "One, two, three: red, green and blue. Is it very fine or very poor?",
    "This was the first scene, and nothing in it was what it seemed to be.",
)
LONGEST, MOST_ROWS, ANSWERS = 32, 16, 16
TOLERANCE, ROUGH = 1e-3, 0.05
"""How far a probability may be from the recorded one: in float32, and in or between formats of fewer bits."""
INERT = 1e-5
"""Logits that move by no more than this share of their size do not move: rounding moves them as much."""


@dataclass(frozen=True)
class Proof:
    """`probe` (rows, tokens): ids; `answers` (rows, n): ids of the outputs looked at; `base` and `adapter` (rows, n):
    their probabilities without and with the adapter; `moved`: the largest difference of the two in any row, averaged
    over rows; `dtype` and `quantize`: how the base was held; `tensors`: name -> digest."""

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
    """What comes out for the probe, float32 on the CPU: (rows, labels), or (rows, vocabulary) at the last position."""
    ids = torch.tensor(probe, device=base.device)
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu()
    return out if out.dim() == 2 else out[:, -1]  # type: ignore[no-any-return]


def probe_tokens(base: Base) -> list[list[int]]:
    """The probe in a base's tokens: rows of one length, so that no padding decides anything."""
    ends = [base.tokenizer.eos_token_id] if getattr(base.model.config, "is_encoder_decoder", False) else []
    rows = [base.tokenizer(text)["input_ids"] for text in PROBE]
    rows = [row if row[-1:] == ends or not ends else row + ends for row in rows]
    length = min(LONGEST, *(len(row) for row in rows))
    return [[*row[: length - 1], row[-1]] for row in rows]


def mean_max_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of any answer's probability, mean over rows."""
    return float((one - other).abs().amax(-1).mean())


def probabilities(out: torch.Tensor, several: bool) -> torch.Tensor:
    """Of labels that exclude each other, or, with `several`, of each label by itself."""
    return out.sigmoid() if several else out.softmax(-1)


def record_proof(model: Any, files: AdapterFiles, base: Base, quantize: str) -> Proof:
    """The proof of the adapter in use, as it was read back from `files`. Raises AdapterError where it is inert."""
    probe, several = probe_tokens(base), bool(files.card and files.card.multi_label)
    bare, ours = _both(model, probe, base)
    _check_effect(files, bare, ours)
    without, with_it = probabilities(bare, several), probabilities(ours, several)
    chosen = with_it.topk(min(ANSWERS, with_it.shape[-1])).indices
    dtype = dtype_name(base.dtype)
    return Proof(
        probe=probe,
        answers=chosen.tolist(),
        base=[[round(p, 6) for p in row] for row in without.gather(1, chosen).tolist()],
        adapter=[[round(p, 6) for p in row] for row in with_it.gather(1, chosen).tolist()],
        moved=mean_max_difference(without, with_it),
        tolerance=TOLERANCE if dtype == "float32" and quantize == "none" else ROUGH,
        dtype=dtype,
        quantize=quantize,
        tensors=digests(files),
    )


def check_proof(model: Any, files: AdapterFiles, base: Base, quantize: str, *, same_base: bool = True) -> None:
    """Runs the probe through the adapter in use and holds it to its record; without one, it must at least do something.

    Raises AdapterError, naming the tensors, where the adapter is inert, or is not or does not answer as recorded.
    """
    proof = read_proof(files)
    if proof is None:
        bare, ours = _both(model, probe_tokens(base), base)
        _check_effect(files, bare, ours)
        return
    _check_tensors(files, proof)
    width = model.get_input_embeddings().weight.shape[0]
    if max(token for row in proof.probe for token in row) >= width:
        raise _malformed(files, f"a token of {width} and more")
    bare, ours = _both(model, proof.probe, base)
    _check_effect(files, bare, ours)
    if not same_base:
        return
    if quantize != proof.quantize:
        say_once(f"{files.folder} was trained on a base held in {proof.quantize}: its answers are not compared")
        return
    _check_answers(files, proof, base, bare, ours)


def digests(files: AdapterFiles) -> dict[str, str]:
    """Tensor name -> 16 digits of the sha256 of its type, shape and bytes in the file."""
    found = {}
    with files.weights.open("rb") as file:
        for name, info in read_file_header(files.weights).items():
            file.seek(info.offset)
            digest = hashlib.sha256(f"{info.dtype}\0{info.shape}\0".encode() + file.read(info.bytes))
            found[name] = digest.hexdigest()[:16]
    return found


def read_proof(files: AdapterFiles) -> Proof | None:
    """The record in hatrack.json, checked; None where there is none. Raises AdapterError where it is malformed."""
    content = files.card.proof if files.card else None
    if content is None:
        return None
    try:
        proof = Proof(**{name: content[name] for name in Proof.__dataclass_fields__})
        rows, width = len(proof.probe), len(proof.answers[0])
        fits = (
            0 < rows <= MOST_ROWS
            and 0 < len(proof.probe[0]) <= LONGEST
            and _table(proof.probe, rows, len(proof.probe[0]), int)
            and _table(proof.answers, rows, width, int)
            and all(_table(table, rows, width, float) for table in (proof.base, proof.adapter))
            and all(type(value) is float and math.isfinite(value) for value in (proof.moved, proof.tolerance))
            and 0 < proof.tolerance <= ROUGH
            and all(isinstance(value, str) for value in (proof.dtype, proof.quantize))
            and all(isinstance(value, str) for value in proof.tensors.values())
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise _malformed(files, type(error).__name__) from error
    if not fits:
        raise _malformed(files, "values that are none")
    return proof


def _both(model: Any, probe: list[list[int]], base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    """The probe's logits without and with the adapter in use, which stays in use and frozen."""
    name = model.active_adapter
    model.eval()
    try:
        ours = probe_logits(model, probe, base)
        model.base_model.disable_adapter_layers()
        bare = probe_logits(model, probe, base)
    except (ValueError, IndexError, RuntimeError) as error:
        raise AdapterError(
            "the adapter cannot be run on this base", got=" ".join(str(error).split())[:200], fix="use another base"
        ) from error
    finally:
        model.base_model.enable_adapter_layers()
        model.set_adapter(name, inference_mode=True)
    return bare, ours


def _check_effect(files: AdapterFiles, bare: torch.Tensor, ours: torch.Tensor) -> None:
    """Refuses an adapter with which nothing changes, or nothing is a number any more."""
    if not ours.isfinite().all():
        raise AdapterError(
            f"with {files.folder} the model's output is not a number", got="inf or nan", fix="train with a lower --lr"
        )
    zero, of = zero_tensors(files)
    if bare.shape == ours.shape and (bare - ours).abs().max() <= INERT * (1 + bare.abs().max()):
        raise AdapterError(
            f"{files.folder} changes nothing: with it the base answers as without it",
            got=f"{len(zero)} of {of} lora_B all zero" + (f" ({', '.join(zero[:3])})" if zero else ""),
            fix="train longer, or with a higher --lr",
        )
    if zero:
        say_once(f"{files.folder}: {len(zero)} of {of} layers do nothing, their lora_B is zero: {', '.join(zero[:3])}")


def zero_tensors(files: AdapterFiles) -> tuple[list[str], int]:
    """Names of the second LoRA matrices that are all zero, and how many there are in all."""
    zero, seconds = [], 0
    with files.weights.open("rb") as file:
        for name, info in read_file_header(files.weights).items():
            if ".lora_B" in name or ".lora_embedding_B" in name:
                seconds += 1
                file.seek(info.offset)
                if not any(file.read(info.bytes)):
                    zero.append(name)
    return zero, seconds


def _check_tensors(files: AdapterFiles, proof: Proof) -> None:
    now = digests(files)
    wrong = [f"{name} is different" for name in now if name in proof.tensors and now[name] != proof.tensors[name]]
    wrong += [f"{name} is missing" for name in proof.tensors if name not in now]
    wrong += [f"{name} is new" for name in now if name not in proof.tensors]
    if wrong:
        raise AdapterError(
            f"{files.weights} is not what {HATRACK_JSON} says was trained",
            got=", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""),
            fix=f"copy the adapter again; if you changed it yourself, remove 'proof' from {HATRACK_JSON}",
        )


def _check_answers(files: AdapterFiles, proof: Proof, base: Base, bare: torch.Tensor, ours: torch.Tensor) -> None:
    """Holds the answers to the recorded ones: the base's first, since an adapter is nothing without its base."""
    several = bool(files.card and files.card.multi_label)
    chosen = torch.tensor(proof.answers)
    same = str(base.dtype) == f"torch.{proof.dtype}"
    tolerance = proof.tolerance if same else ROUGH
    if chosen.max() >= ours.shape[-1] or chosen.min() < 0:
        raise _malformed(files, "an answer the model cannot give")
    compared = [(f"{files.folder}", ours, proof.adapter)]
    if files.config.get("task_type") != "SEQ_CLS":  # a bare classifier's head is whatever it was loaded with
        compared.insert(0, ("the base", bare, proof.base))
    for what, out, table in compared:
        apart = mean_max_difference(probabilities(out, several).gather(1, chosen), torch.tensor(table))
        if not apart <= tolerance:
            raise AdapterError(
                f"{what} does not give the answers recorded when {files.folder} was made",
                got=f"probabilities {apart:.2%} apart, more than {tolerance:.2%}",
                fix="give the base it was trained on; --no-proof leaves this check out",
            )


def _table(value: Any, rows: int, width: int, kind: type) -> bool:
    """Whether `value` is `rows` lists of `width` numbers: ids (int, none negative), or probabilities (float)."""
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


def _malformed(files: AdapterFiles, got: str) -> AdapterError:
    path = files.folder / HATRACK_JSON
    return AdapterError(f"{path} has a malformed proof", got=got, fix="copy the adapter again, or remove 'proof'")
