"""A base in memory with its adapters on it, ready to use: predict, stream, switch, add and drop.

Knows nothing of training or of how answers are shown.
"""

import functools
import math
import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from queue import Queue
from typing import Any, cast

import numpy as np
import torch
from transformers import TextIteratorStreamer

from hatrack.adapter.attach import attach, detach, name_in_model
from hatrack.adapter.card import AdapterCard
from hatrack.adapter.files import read_adapter
from hatrack.adapter.origin import card_of, find_base_of
from hatrack.adapter.proof import check_proof
from hatrack.adapter.registry import check_name, find_adapter, registered_name
from hatrack.adapter.tokenizer import load_adapter_tokenizer
from hatrack.base.fingerprint import check_base, fingerprint
from hatrack.base.free_memory import holds
from hatrack.base.header import read_header
from hatrack.base.layer_stack import find_layer_stack
from hatrack.base.load import Base, choose_device, choose_dtype, free_memory, load_base, name_of
from hatrack.base.mapped_layers import MappedLayers
from hatrack.base.offload import as_if_loaded, open_layers, settle
from hatrack.console import say
from hatrack.data.limit import position_limit
from hatrack.data.stop_tokens import Stops, stops_of_template
from hatrack.data.template import chat_prompt, chat_template
from hatrack.data.tokens import check_prompt_tokens
from hatrack.errors import AdapterError, DataError, short_repr
from hatrack.layers.fast_lora import LAYER_CLASSES
from hatrack.recipe import Task

DEFAULT_NEW_TOKENS = 128


class Hat:
    """One frozen base and the adapters attached to it, of which one is in use (or none: the bare base).

    `hats` maps each attached adapter's name to its `AdapterCard`; `active` names the one in use; `result` is what
    training reported, where this hat comes from `hatrack.train`.
    """

    def __init__(
        self, base: Base, model: Any, hats: dict[str, AdapterCard], active: str, folders: dict[str, Path]
    ) -> None:
        self.base, self.model, self.hats, self.folders = base, model, hats, folders
        self.active: str | None = active
        self.result: dict[str, Any] = {}
        self.window: MappedLayers | None = None  # through which a base larger than memory is read
        self.quantize = "none"
        self._tokenizers = {name: load_adapter_tokenizer(folder, base) for name, folder in folders.items()}
        self._first = hats[active]  # what the bare base answers as, whichever adapters come and go
        self.model.eval()

    def __repr__(self) -> str:
        names = ", ".join(f"{name} (in use)" if name == self.active else name for name in self.hats)
        labels = f", labels {short_repr(self.labels)}" if self.labels else ""
        return f"Hat({names or 'no adapter'}; {self.task}{labels}; base {self.base.files.source})"

    @property
    def task(self) -> str:
        """classify, chat or complete: the same for all adapters on one base in memory."""
        return self._first.task

    @property
    def labels(self) -> list[str]:
        """Label names of the adapter in use; empty for generators."""
        return list(self._current.labels)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the adapter in use: the base's, or the one that it brought."""
        return self.tokenizer_of(self.active)

    def tokenizer_of(self, name: str | None) -> Any:
        """The tokenizer of an attached adapter, or of the bare base."""
        return self._tokenizers.get(name or "") or self.base.tokenizer

    @property
    def _current(self) -> AdapterCard:
        return self.hats[self.active] if self.active else self._first

    @functools.cached_property
    def _fingerprint(self) -> str:
        """Of the base in memory, taken once however many adapters come."""
        return fingerprint(self.base.files.folder)

    def use(self, name: str | None) -> None:
        """Switches to an attached adapter, or with None to the bare base.

        Raises AdapterError where no adapter of that name is attached.
        """
        if name is None:
            if self.active is not None:
                self.model.base_model.disable_adapter_layers()
        else:
            self._known(name)
            if self.active is None:
                self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(name_in_model(name), inference_mode=True)
        self.active = name

    def add(
        self, adapter: str | Path, name: str | None = None, *, allow_other_base: bool = False, prove: bool = True
    ) -> str:
        """Attaches one more adapter (a folder, or a name on the rack) and returns its name. The one in use stays.

        Raises AdapterError where the name is taken, the task differs, or (unless not to `prove` it) the adapter does
        nothing or not what it did; WrongBase where it belongs to another base, unless `allow_other_base`.
        """
        folder = find_adapter(adapter)
        files = read_adapter(folder)
        name = name or registered_name(adapter, folder)
        check_name(name)
        if name in self.hats:
            raise AdapterError("an adapter of that name is attached already", got=name, fix="give it another name")
        hat = card_of(files, self.base.files.source)
        if (hat.task == "classify") != (self.task == "classify"):
            raise AdapterError(
                f"{name} cannot share this base in memory, whose output is made for {self.task}",
                got=f"task {hat.task}",
                fix="open it by itself",
            )
        check_base(folder, hat.base, self.base.files, allow_other=allow_other_base, known=self._fingerprint)
        before, tokenizer = self.active, load_adapter_tokenizer(folder, self.base)
        with as_if_loaded(self.base):
            self.model = attach(self.model, folder, name_in_model(name), layer_classes=LAYER_CLASSES)
        self.hats[name], self.folders[name], self._tokenizers[name] = hat, folder, tokenizer
        try:
            if prove:
                self._restore(name)
                check_proof(self.model, files, self.base, self.quantize, same_base=not allow_other_base)
        except AdapterError:
            self.drop(name)
            raise
        finally:
            self._restore(before)
        return name

    def drop(self, name: str) -> None:
        """Detaches an adapter and frees its memory. If it was in use, the bare base is in use afterwards."""
        self._known(name)
        before = None if self.active == name else self.active
        self.use(None if len(self.hats) == 1 else next(other for other in self.hats if other != name))
        self.model = detach(self.model, name_in_model(name))
        del self.hats[name], self.folders[name], self._tokenizers[name]
        self._restore(before)

    def predict(self, texts: str | Iterable[str], **generation: Any) -> list[dict[str, Any]]:
        """One answer for each text.

        classify: `text`, `label` (a list of labels where a row may have several), `scores` (label -> probability) and,
        where the text is longer than the adapter takes, `cut`: its end was left out, as in training.
        chat and complete: `prompt` and `text`; `generation` may set `max_new_tokens` and `temperature` (0 by default:
        the likeliest words, the same every time).
        """
        several = [texts] if isinstance(texts, str) else list(texts)
        if self.task == "classify":
            return [
                answer for start in range(0, len(several), 32) for answer in self._classify(several[start : start + 32])
            ]
        return [{"prompt": text, "text": "".join(self.stream(text, **generation))} for text in several]

    def stream(
        self,
        prompt: str | Sequence[dict[str, str]],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float = 0.0,
    ) -> Generator[str, None, bool]:
        """The answer of a generator, piece by piece. `prompt` is a text, or the messages of a conversation.

        What the generator returns is whether the answer is whole: False where it was cut at `max_new_tokens`.
        """
        if self.task == "classify":
            raise AdapterError("a classifier does not generate text", fix="use predict")
        inputs, ends = self._encode(prompt), self._ends()
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        room = self._longest - inputs["input_ids"].shape[1]
        options = {**inputs, **sampling, "max_new_tokens": min(max_new_tokens, room), "streamer": streamer}
        failures: Queue[BaseException] = Queue()
        stopped = threading.Event()
        last: list[int] = []

        def generate() -> None:
            try:
                with torch.no_grad():
                    found = self.model.generate(
                        **options,
                        eos_token_id=self._end_tokens(ends),
                        pad_token_id=self.pad_id,
                        stopping_criteria=[
                            lambda ids, scores: torch.full((len(ids),), stopped.is_set(), device=ids.device)
                        ],
                    )
                    last.append(int(found[0, -1]))
            except BaseException as error:  # handed to the reading thread: an iterator must not end as if all were well
                failures.put(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            whole = yield from _until(self._stop_strings(ends), self._begun(streamer))
        finally:
            stopped.set()
            thread.join()
        if not failures.empty():
            raise failures.get()
        return whole or last[0] in self._end_tokens(ends)

    def _begun(self, pieces: Iterable[str]) -> Iterator[str]:
        """Without the spaces at the beginning, which the template leaves to the answer."""
        begun = self.task == "complete"
        for piece in pieces:
            piece = piece if begun else piece.lstrip()
            begun = begun or bool(piece)
            if piece:
                yield piece

    @torch.no_grad()
    def _classify(self, texts: list[str]) -> list[dict[str, Any]]:
        tokenizer = self.tokenizer
        most = min(self._current.max_length or tokenizer.model_max_length, self._longest)
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt")
        lengths = inputs["attention_mask"].sum(1).tolist()
        if not all(lengths):
            raise DataError("the tokenizer makes no token of this text", fix="give it text that the base knows")
        check_prompt_tokens(inputs["input_ids"].numpy(), tokenizer, self.base.model.config, self.task)
        logits = self.model(
            input_ids=inputs["input_ids"].to(self.base.device),
            attention_mask=inputs["attention_mask"].to(self.base.device),
        ).logits.float()
        several = self._current.multi_label
        probabilities = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
        answers = [_answer(text, row, self.labels, several) for text, row in zip(texts, probabilities, strict=True)]
        for answer, length in zip(answers, lengths, strict=True):
            if length == most and len(tokenizer(answer["text"], verbose=False)["input_ids"]) > most:
                answer["cut"] = True
        return answers

    @property
    def _longest(self) -> int:
        """The most tokens that the base takes; where it does not tell, more than anybody asks of it."""
        return position_limit(self.base.model.config.to_dict()) or sys.maxsize

    def _encode(self, prompt: str | Sequence[dict[str, str]]) -> dict[str, torch.Tensor]:
        tokenizer = self.tokenizer
        if self.task == "complete" and isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
            if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text; this one is to go on
                ids = ids[:-1]
            ids = ids or [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            text = chat_prompt(tokenizer, messages, self._current.template)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= self._longest:
            raise DataError(
                "the prompt leaves no room for an answer",
                got=f"{len(ids):,} tokens",
                fix=f"fewer than {self._longest:,}",
            )
        check_prompt_tokens(np.array([ids]), tokenizer, self.base.model.config, self.task)
        tensor = torch.tensor([ids], device=self.base.device)
        return {"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}

    def _ends(self) -> Stops:
        """How answers end: as the adapter in use was taught, or else as the chat template ends them."""
        hat = self._current
        if hat.end_tokens or hat.stop_strings:
            return Stops(tuple(hat.end_tokens), tuple(hat.stop_strings))
        if self.task != "chat":
            return Stops()
        return stops_of_template(self.tokenizer, hat.template or chat_template(self.tokenizer)[0])

    def _end_tokens(self, ends: Stops) -> list[int]:
        """The tokens of `ends`, and whatever the tokenizer or the base's generation settings end an answer with."""
        return all_end_tokens(self.base, [*ends.tokens, self.tokenizer.eos_token_id])

    def _stop_strings(self, ends: Stops) -> list[str]:
        """The texts of `ends`, and those of its tokens that the tokenizer does not leave out by itself."""
        tokenizer = self.tokenizer
        shown = [token for token in ends.tokens if token not in tokenizer.all_special_ids]
        return [*ends.strings, *(tokenizer.decode([token]) for token in shown)]

    @property
    def pad_id(self) -> int:
        """The token that fills short rows up; it is never attended to."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def _known(self, name: str) -> None:
        if name not in self.hats:
            raise AdapterError(
                f"no adapter named {name} is attached", got=", ".join(self.hats), fix="attach it with add"
            )

    def _restore(self, name: str | None) -> None:
        """Puts the adapter in use back after peft moved it."""
        if not self.hats:
            self.active = None
            return
        self.active = next(iter(self.hats))
        self.model.base_model.enable_adapter_layers()
        self.use(name)
        self.model.eval()


def load(
    adapters: str | Path | Sequence[str | Path],
    *,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    memory: int | None = None,
    allow_other_base: bool = False,
    trust_remote_code: str | None = None,
    prove: bool = True,
) -> Hat:
    """Loads a base once and attaches one or more adapters (folders, or names on the rack) to it; the first is in use.

    The base is found from the first adapter unless `base` names where it lies now, and held in as many bits as the
    adapter was trained with unless `quantize` says otherwise. A base that does not fit in `memory` bytes (or in what is
    free) stays on disk, and every pass reads it once. Raises AdapterError where an adapter is missing or damaged,
    WrongBase where it was trained on other weights than these (unless `allow_other_base`), ModelError where the base
    cannot be found, or needs code of its own and is not named by `trust_remote_code`. Each adapter's proof is run
    again, which costs two short forward passes, unless not to `prove` it.
    """
    several = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    if not several:
        raise AdapterError("no adapter was named", fix="give a folder, or a name that hatrack list shows")
    folder = find_adapter(several[0])
    files = read_adapter(folder)
    hat = card_of(files, base)
    found = find_base_of(files, base, trust=trust_remote_code)
    check_base(folder, hat.base, found, allow_other=allow_other_base)
    quantize = quantize or hat.recipe.get("quantize", "none")
    there = choose_device(device)[0]
    number_format = name_of(choose_dtype(dtype, there)[0])
    loaded = load_base(
        found,
        task=cast(Task, hat.task),
        labels=hat.labels,
        multi_label=hat.multi_label,
        device=device,
        dtype=dtype,
        quantize=quantize,
        mapped=quantize == "none" and not holds(read_header(found.folder), number_format, free_memory(there), memory),
        seed=hat.recipe.get("seed", 0),  # a head that no adapter replaces is the one training began with
    )
    name = registered_name(several[0], folder)
    window = _window(loaded) if loaded.mapped else None
    with as_if_loaded(loaded):
        model = attach(loaded.model, folder, name_in_model(name), layer_classes=LAYER_CLASSES)
    ready = Hat(loaded, model, {name: hat}, name, {name: folder})
    ready.window = window
    ready.quantize = quantize
    if prove:
        check_proof(model, files, loaded, quantize, same_base=not allow_other_base)
    for other in several[1:]:
        ready.add(other, allow_other_base=allow_other_base, prove=prove)
    return ready


def all_end_tokens(base: Base, learned: Iterable[int | None]) -> list[int]:
    """All tokens that end an answer: those `learned`, and those of the base's tokenizer and generation settings."""
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*learned, *ends, base.tokenizer.eos_token_id] if token is not None})


def _until(stops: Sequence[str], pieces: Iterable[str]) -> Generator[str, None, bool]:
    """The pieces of a text up to the first of `stops`, and whether there was one. What may be the beginning of one is
    held back until it is known."""
    held = ""
    for piece in pieces:
        held += piece
        found = min((place for stop in stops if (place := held.find(stop)) >= 0), default=None)
        if found is not None:
            if found:
                yield held[:found]
            return True
        longest = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        ready, held = held[: len(held) - longest], held[len(held) - longest :]
        if ready:
            yield ready
    if held:
        yield held
    return False


def _window(base: Base) -> MappedLayers:
    """Has every pass through a base larger than memory read it, layer by layer."""
    say("the base is larger than memory: it stays on disk, and every pass reads it once")
    trunk = find_layer_stack(base.model)
    settle(base.model, trunk, base.dtype, base.device)
    window = open_layers(base.model, trunk, base.dtype, base.files.folder, base.device)
    window.stream()
    return window


def _answer(text: str, probabilities: list[float], labels: list[str], several: bool) -> dict[str, Any]:
    scores = dict(zip(labels, probabilities, strict=True))
    if any(math.isnan(value) for value in probabilities):
        raise AdapterError("the model's output is not a number", fix="train again with a lower --lr")
    label: Any = (
        [name for name, value in scores.items() if value > 0.5] if several else max(scores, key=lambda n: scores[n])
    )
    return {"text": text, "label": label, "scores": scores}
