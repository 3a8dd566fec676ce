"""Loads the tokenizer saved with an adapter, if it differs from the base's."""

from pathlib import Path
from typing import Any

from hatrack.adapter.card import HATRACK_JSON
from hatrack.base.code import needed_code
from hatrack.base.description import BaseDescription
from hatrack.base.header import CONFIG, TOKENIZER_CONFIG, read_optional_json
from hatrack.base.load import Base, has_tokenizer, load_tokenizer
from hatrack.console import say_once
from hatrack.errors import AdapterError, ModelError, short_repr
from hatrack.file_kind import wrong_kind_error

TOKENIZER_FILES = ("*token*.json", "vocab.*", "*.model", "merges.txt", "*.jinja")
SAMPLE_TEXT = "One hat, two hats."


def load_adapter_tokenizer(folder: Path, base: Base) -> Any | None:
    """Loads the tokenizer in an adapter's folder and prints how it differs from the base's (added tokens, another chat
    template); None if it does not. Adapters made by hatrack use the base's.

    Raises AdapterError if it cannot be loaded.
    """
    if (folder / HATRACK_JSON).exists():
        return None
    wrong_kinds = (
        wrong_kind_error(path, "a tokenizer's file", AdapterError)
        for name in TOKENIZER_FILES
        for path in folder.glob(name)
    )
    for error in filter(None, wrong_kinds):
        raise error
    try:
        config, settings = (read_optional_json(folder / name) for name in (CONFIG, TOKENIZER_CONFIG))
        if not has_tokenizer(folder, settings):
            return None
        if needed_code(config, settings):
            say_once(f"{folder}: its tokenizer needs code of its own, which is not run: the base's tokenizer is used")
            return None
        vocabulary_size = base.model.get_input_embeddings().weight.shape[0]
        own = load_tokenizer(BaseDescription(str(folder), folder, config, {}, settings), vocabulary_size)
    except ModelError as error:
        fix = "copy the adapter again, or remove the tokenizer's files from it to use the base's"
        raise AdapterError(error.what, got=error.got, fix=fix, gotcha="tokenizer-beside") from error
    differences = _differences(own, base.tokenizer)
    if not differences:
        return None
    say_once(f"{folder}: its own tokenizer is used: {', '.join(differences)}")
    own.padding_side = base.tokenizer.padding_side
    own.chat_template = own.chat_template or base.tokenizer.chat_template
    own.pad_token = own.convert_ids_to_tokens(base.tokenizer.pad_token_id)  # the model uses this id for padding
    return own


def _differences(own: Any, base_tokenizer: Any) -> list[str]:
    """Describes how a tokenizer differs from the base's."""
    vocabulary, base_vocabulary = own.get_vocab(), base_tokenizer.get_vocab()
    added = sorted((token for token in vocabulary if token not in base_vocabulary), key=vocabulary.__getitem__)
    moved = [token for token, token_id in vocabulary.items() if base_vocabulary.get(token, token_id) != token_id]
    special = set(own.all_special_tokens) - {*base_tokenizer.all_special_tokens, *added, own.pad_token}
    differences = [f"{len(added):,} more tokens, such as {short_repr(added[0])}"] if added else []
    differences += [f"{len(moved):,} tokens with other ids, such as {short_repr(moved[0])}"] if moved else []
    differences += [f"{short_repr(sorted(special)[0])} is a special token"] if special else []
    if own.chat_template and own.chat_template != base_tokenizer.chat_template:
        differences.append("another chat template")
    if not differences and own(SAMPLE_TEXT)["input_ids"] != base_tokenizer(SAMPLE_TEXT)["input_ids"]:
        differences.append("other tokens for the same text")
    return differences
