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
    others = (
        wrong_kind_error(path, "a tokenizer's file", AdapterError)
        for name in TOKENIZER_FILES
        for path in folder.glob(name)
    )
    for other in filter(None, others):
        raise other
    try:
        config, settings = (read_optional_json(folder / name) for name in (CONFIG, TOKENIZER_CONFIG))
        if not has_tokenizer(folder, settings):
            return None
        if needed_code(config, settings):
            say_once(f"{folder}: its tokenizer needs code of its own, which is not run: the base's tokenizer is used")
            return None
        rows = base.model.get_input_embeddings().weight.shape[0]
        own = load_tokenizer(BaseDescription(str(folder), folder, config, {}, settings), rows)
    except ModelError as error:
        fix = "copy the adapter again, or remove the tokenizer's files from it to use the base's"
        raise AdapterError(error.what, got=error.got, fix=fix, gotcha="tokenizer-beside") from error
    differences = _differences(own, base.tokenizer)
    if not differences:
        return None
    say_once(f"{folder}: its own tokenizer is used: {', '.join(differences)}")
    own.padding_side = base.tokenizer.padding_side
    own.chat_template = own.chat_template or base.tokenizer.chat_template
    own.pad_token = own.convert_ids_to_tokens(base.tokenizer.pad_token_id)  # the model knows padding by this id
    return own


def _differences(own: Any, bases: Any) -> list[str]:
    """How a tokenizer differs from the base's, for people."""
    here, there = own.get_vocab(), bases.get_vocab()
    added = sorted((token for token in here if token not in there), key=here.__getitem__)
    moved = [token for token, token_id in here.items() if there.get(token, token_id) != token_id]
    special = set(own.all_special_tokens) - {*bases.all_special_tokens, *added, own.pad_token}
    differences = [f"{len(added):,} more tokens, such as {short_repr(added[0])}"] if added else []
    differences += [f"{len(moved):,} tokens with other ids, such as {short_repr(moved[0])}"] if moved else []
    differences += [f"{short_repr(sorted(special)[0])} is a special token"] if special else []
    if own.chat_template and own.chat_template != bases.chat_template:
        differences.append("another chat template")
    if not differences and own(SAMPLE_TEXT)["input_ids"] != bases(SAMPLE_TEXT)["input_ids"]:
        differences.append("other tokens for the same text")
    return differences
