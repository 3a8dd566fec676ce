"""Code that a base brings along (`auto_map` in its JSON files): run only where a person named that very base.

Knows nothing of adapters: no field of one, and none of a base, can ask for code to be run.
"""

from pathlib import Path
from typing import Any

import transformers

from hatrack.base.header import CONFIG, read_json
from hatrack.base.sources import BaseFiles
from hatrack.errors import ModelError
from hatrack.recipe import flag

TOKENIZER_CONFIG = "tokenizer_config.json"
ASKED_FOR = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer")


def check_code(files: BaseFiles) -> BaseFiles:
    """The same files, where they need no code of their own, or where it may run.

    A base whose classes transformers has itself is loaded by those, whatever code lies beside it. Raises ModelError,
    naming the base and the code, where it is needed and was not allowed, lies in another repository, or is missing.
    """
    needed = needed_code(files.folder)
    modules = sorted({f"{reference.rpartition('.')[0]}.py" for reference in needed})
    if not needed:
        return files
    elsewhere = [module.partition("--")[0] for module in modules if "--" in module]
    if elsewhere:
        raise ModelError(
            f"{files.source} asks for code of another repository",
            got=f"{', '.join(modules)} of {elsewhere[0]}",
            fix="use another base; hatrack runs no code but that beside the weights",
        )
    if not files.trusted:
        raise ModelError(
            f"{files.source} needs code of its own, which is not run unasked",
            got=f"{', '.join(modules)} in {files.source if files.revision else files.folder}",
            fix=f"read it; {flag('trust_remote_code')} {files.source} lets it run, with all your rights",
        )
    missing = [module for module in modules if not (files.folder / module).is_file()]
    if missing:
        raise ModelError(
            f"{files.source} lacks its code", got=f"no {', '.join(missing)}", fix="copy or download the base again"
        )
    return files


def needed_code(folder: Path) -> list[str]:
    """References such as `modeling_x.XForCausalLM`, or `owner/name--modeling_x.X`, to classes transformers has not."""
    references: list[str] = []
    for name in (CONFIG, TOKENIZER_CONFIG):
        path = folder / name
        found = read_json(path).get("auto_map") if path.is_file() else None
        if isinstance(found, dict):
            references += [reference for kind in ASKED_FOR for reference in _texts(found.get(kind))]
        elif found is not None:  # older tokenizers: a pair
            references += _texts(found)
    if not references:
        return []
    known = set(dir(transformers))  # which takes a while
    names = {reference: reference.rpartition(".")[2] for reference in references}
    return [reference for reference, name in names.items() if not {name, name.removesuffix("Fast")} & known]


def _texts(value: Any) -> list[str]:
    """The references in a value of `auto_map`: one, or for a tokenizer a slow and a fast one."""
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
