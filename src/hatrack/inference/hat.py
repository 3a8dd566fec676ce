"""`Hat`: a base in memory with its adapters, ready to predict, stream, switch, add and drop."""

import functools
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from hatrack.adapter.attach import attach, detach, peft_adapter_name
from hatrack.adapter.card import AdapterCard
from hatrack.adapter.files import read_adapter
from hatrack.adapter.origin import card_of
from hatrack.adapter.proof import check_proof
from hatrack.adapter.registry import check_name, find_adapter, registered_name
from hatrack.adapter.tokenizer import load_adapter_tokenizer
from hatrack.base.fingerprint import check_base, fingerprint
from hatrack.base.load import Base
from hatrack.base.mapped_layers import MappedLayers
from hatrack.base.offload import placeholders_if_streamed
from hatrack.errors import AdapterError, short_repr
from hatrack.inference.active import ActiveModel
from hatrack.inference.classify import classify
from hatrack.inference.generate import (
    DEFAULT_NEW_TOKENS,
    GenerationOptions,
    Prompt,
    generation_options,
    stream_answer,
)
from hatrack.layers.fast_lora import LAYER_CLASSES


@dataclass(frozen=True)
class AttachedAdapter:
    """An attached adapter: its hatrack.json, its folder, and its own tokenizer if it has one."""

    card: AdapterCard
    folder: Path
    tokenizer: Any | None


class Hat:
    """One frozen base and the adapters attached to it, of which one is in use (or none: the bare base).

    `adapters` maps names to what is attached; `active` names the adapter in use, None for the bare base; `base` and
    `model` are the base by itself and with its adapters; `quantize` is none, 8bit or 4bit. `result` holds what
    `hatrack train --json` prints, if `hatrack.train` made this hat, and is empty otherwise. `mapped_layers` reads
    the layers of a base larger than memory, None for others. Made by `hatrack.load` and `hatrack.train`.
    """

    def __init__(
        self,
        base: Base,
        model: Any,
        adapters: dict[str, AttachedAdapter],
        *,
        quantize: str = "none",
        mapped_layers: MappedLayers | None = None,
        result: dict[str, Any] | None = None,
    ) -> None:
        self.base, self.model, self.adapters = base, model, dict(adapters)
        self.quantize, self.mapped_layers, self.result = quantize, mapped_layers, result or {}
        self.active: str | None = next(iter(adapters))
        self._first_card = self.adapters[self.active].card  # the bare base uses it, even after its adapter was dropped
        self.model.eval()

    def __repr__(self) -> str:
        names = ", ".join(f"{name} (in use)" if name == self.active else name for name in self.adapters)
        labels = f", labels {short_repr(self.labels)}" if self.labels else ""
        return f"Hat({names or 'no adapter'}; {self.task}{labels}; base {self.base.description.source})"

    def with_result(self, folder: Path, result: dict[str, Any]) -> "Hat":
        """The same base and adapter with what training reported, now that the adapter's folder is `folder`."""
        adapters = {name: replace(adapter, folder=folder) for name, adapter in self.adapters.items()}
        return Hat(
            self.base,
            self.model,
            adapters,
            quantize=self.quantize,
            mapped_layers=self.mapped_layers,
            result=result,
        )

    @property
    def cards(self) -> dict[str, AdapterCard]:
        """Name -> `AdapterCard` (what its hatrack.json says) of each attached adapter."""
        return {name: adapter.card for name, adapter in self.adapters.items()}

    hats = cards

    @property
    def task(self) -> str:
        """classify, chat or complete: that of the adapter in use. Classifiers and generators never share a base."""
        return self._card.task

    @property
    def labels(self) -> list[str]:
        """Label names of the adapter in use; empty for generators."""
        return list(self._card.labels)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the adapter in use: the base's, or the adapter's own."""
        return self.tokenizer_of(self.active)

    def tokenizer_of(self, name: str | None) -> Any:
        """The tokenizer of an attached adapter; the base's with None, or if the adapter has none."""
        adapter = self.adapters.get(name) if name else None
        return (adapter and adapter.tokenizer) or self.base.tokenizer

    @property
    def pad_id(self) -> int:
        """The id of the token that pads short rows."""
        return self.active_model.pad_id

    @property
    def _card(self) -> AdapterCard:
        return self.adapters[self.active].card if self.active else self._first_card

    @property
    def active_model(self) -> ActiveModel:
        """The model with the adapter in use, its card and its tokenizer."""
        return ActiveModel(self.base, self.model, self._card, self.tokenizer)

    @functools.cached_property
    def _fingerprint(self) -> str:
        """The fingerprint of the base in memory, computed once for all adapters."""
        return fingerprint(self.base.description)

    def use(self, name: str | None) -> None:
        """Switches to an attached adapter, or with None to the bare base. Takes milliseconds.

        Raises AdapterError if no adapter of that name is attached.
        """
        if name is None:
            if self.active is not None:
                self.model.base_model.disable_adapter_layers()
        else:
            self._check_attached(name)
            if self.active is None:
                self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(peft_adapter_name(name), inference_mode=True)
        self.active = name

    def add(
        self, adapter: str | Path, name: str | None = None, *, allow_other_base: bool = False, prove: bool = True
    ) -> str:
        """Attaches one more adapter and returns its name. The adapter in use stays in use.

        `adapter`: a folder, or a name on the rack. `name`: what to call it here; its own name by default.
        `allow_other_base`: attach it although it was trained on other weights. `prove`: run its proof first, two short
        forward passes.

        Raises AdapterError if the adapter is missing, damaged or does not fit, the name is taken or invalid, the
        task differs, or the proof fails; WrongBase if it was trained on another base.
        """
        folder = find_adapter(adapter)
        files = read_adapter(folder)
        name = name or registered_name(adapter, folder)
        check_name(name)
        if name in self.adapters:
            raise AdapterError("an adapter of that name is attached already", got=name, fix="give it another name")
        card = card_of(files, self.base.description.source)
        if (card.task == "classify") != (self.task == "classify"):
            raise AdapterError(
                f"{name} cannot share this base in memory, which was loaded for the task {self.task}",
                got=f"task {card.task}",
                fix="load it by itself",
            )
        check_base(
            folder, card.base, self.base.description, allow_other=allow_other_base, base_fingerprint=self._fingerprint
        )
        previous, tokenizer = self.active, load_adapter_tokenizer(folder, self.base)
        with placeholders_if_streamed(self.base):
            self.model = attach(self.model, folder, peft_adapter_name(name), layer_classes=LAYER_CLASSES)
        self.adapters[name] = AttachedAdapter(card, folder, tokenizer)
        try:
            if prove:
                self._restore(name)
                check_proof(self.model, files, self.base, self.quantize, same_base=not allow_other_base)
        except AdapterError:
            self.drop(name)
            raise
        finally:
            self._restore(previous)
        return name

    def drop(self, name: str) -> None:
        """Detaches an adapter and frees its memory. If it was in use, the bare base is in use afterwards.

        Raises AdapterError if no adapter of that name is attached.
        """
        self._check_attached(name)
        previous = None if self.active == name else self.active
        self.use(None if len(self.adapters) == 1 else next(other for other in self.adapters if other != name))
        self.model = detach(self.model, peft_adapter_name(name))
        del self.adapters[name]
        self._restore(previous)

    def predict(self, texts: str | Iterable[Prompt], **generation: Any) -> list[dict[str, Any]]:
        """Runs the adapter in use on each text, in order. `texts`: one text, or several.

        classify: `text`, `label` (a list of labels if a row may have several), `scores` (label -> probability) and,
        if the text is longer than the adapter takes, `cut`: True; its end was left out, as in training. There are no
        options.
        chat, complete: `prompt` and `text`; a prompt may be the messages of a conversation. Options:
        `max_new_tokens` (128; at least 1) and `temperature` (0: the likeliest token each time; above 0 samples).

        Raises RecipeError for an unknown option or value, before anything runs; DataError for a text that has no
        tokens or leaves no room for an answer.
        """
        options = generation_options(self.task, generation)
        prompts: list[Prompt] = [texts] if isinstance(texts, str) else list(texts)
        if self.task == "classify":
            return classify(self.active_model, cast("list[str]", prompts))
        return [
            {"prompt": prompt, "text": "".join(stream_answer(self.active_model, prompt, options))} for prompt in prompts
        ]

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = DEFAULT_NEW_TOKENS, temperature: float = 0.0
    ) -> Generator[str, None, bool]:
        """Yields a generator's answer piece by piece. `prompt`: a text, or the messages of a conversation.

        `max_new_tokens`: at least 1. `temperature`: 0 takes the likeliest token each time, above 0 samples. The
        generator returns (`StopIteration.value`) whether the answer is complete: False if it was cut at
        `max_new_tokens`. Closing it stops the generation.

        Raises AdapterError for a classifier, RecipeError for an invalid value, DataError if the prompt leaves no
        room for an answer.
        """
        if self.task == "classify":
            raise AdapterError("a classifier does not generate text", fix="use predict")
        return stream_answer(self.active_model, prompt, GenerationOptions(max_new_tokens, temperature))

    def _check_attached(self, name: str) -> None:
        if name not in self.adapters:
            raise AdapterError(
                f"no adapter named {name} is attached", got=", ".join(self.adapters), fix="attach it with add"
            )

    def _restore(self, name: str | None) -> None:
        """Puts `name` in use again after peft switched to another adapter."""
        if not self.adapters:
            self.active = None
            return
        self.active = next(iter(self.adapters))
        self.model.base_model.enable_adapter_layers()
        self.use(name)
        self.model.eval()
