"""Custom code of a base (`auto_map` in its JSON files): runs only if the user named that base.

Knows nothing of adapters: no field of one, and none of a base, can ask for code to be run.
"""

from collections.abc import Mapping
from typing import Any

import transformers

from hatrack.base.description import BaseDescription
from hatrack.errors import ModelError
from hatrack.recipe import flag

AUTO_CLASSES = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer")


def check_code(base: BaseDescription) -> None:
    """Raises ModelError, naming the base and the code, if the base needs code that is not allowed, is in another
    repository, or is missing.

    If transformers has the base's classes, it uses these, and the base's own code is ignored.
    """
    needed = needed_code(base.config, base.tokenizer_config)
    modules = sorted({f"{reference.rpartition('.')[0]}.py" for reference in needed})
    if not needed:
        return
    elsewhere = [module.partition("--")[0] for module in modules if "--" in module]
    if elsewhere:
        raise ModelError(
            f"{base.source} asks for code of another repository",
            got=f"{', '.join(modules)} of {elsewhere[0]}",
            fix="use another base; hatrack runs no code but that beside the weights",
        )
    if not base.trusted:
        raise ModelError(
            f"{base.source} needs code of its own, which is not run unasked",
            got=f"{', '.join(modules)} in {base.source if base.revision else base.folder}",
            fix=f"read it; {flag('trust_remote_code')} {base.source} lets it run, with all your rights",
        )
    missing = [module for module in modules if not (base.folder / module).is_file()]
    if missing:
        raise ModelError(
            f"{base.source} lacks its code", got=f"no {', '.join(missing)}", fix="copy or download the base again"
        )


def needed_code(*configs: Mapping[str, Any]) -> list[str]:
    """References such as `modeling_x.XForCausalLM`, or `owner/name--modeling_x.X`, in the `auto_map` of config.json and
    tokenizer_config.json to classes that transformers lacks."""
    references: list[str] = []
    for config in configs:
        found = config.get("auto_map")
        if isinstance(found, dict):
            references += [reference for kind in AUTO_CLASSES for reference in _texts(found.get(kind))]
        elif found is not None:  # older tokenizers: a pair
            references += _texts(found)
    if not references:
        return []
    known = set(dir(transformers))  # takes a while
    names = {reference: reference.rpartition(".")[2] for reference in references}
    return [reference for reference, name in names.items() if not {name, name.removesuffix("Fast")} & known]


def _texts(value: Any) -> list[str]:
    """The references in a value of `auto_map`: one, or for a tokenizer a slow and a fast one."""
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
