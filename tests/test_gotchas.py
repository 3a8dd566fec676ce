"""docs/gotchas.md is complete against the code: a heading for each gotcha, and no heading without one."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADINGS = re.findall(r"^### ([a-z0-9-]+): (.+)$", (ROOT / "docs/gotchas.md").read_text(), flags=re.M)
CANNOT_HAPPEN = {"pad-is-eos", "merge-rounding", "trained-in-eval-form"}
"""Kept from happening by how hatrack is made; tests/test_evidence.py has a test of each."""


def _named_in_code() -> Iterator[str]:
    """The first argument of every Finding, refusal and attempt in the code, and `gotcha=` of every error."""
    files = [*(ROOT / "src/hatrack/check").glob("*.py"), ROOT / "src/hatrack/cli/check.py"]
    for path in (ROOT / "src/hatrack").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "gotcha" and isinstance(node.value, ast.Constant):
                if node.value.value:
                    yield str(node.value.value)
            elif path not in files:
                continue
            elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
                "Finding",
                "refusal",
                "attempt",
            ):
                for part in ast.walk(node.args[0]):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.value


def test_every_gotcha_has_a_heading_and_every_heading_a_gotcha() -> None:
    named = set(_named_in_code())
    assert len(named) > 30
    assert {name for name, _ in HEADINGS} == named | CANNOT_HAPPEN


def test_headings_are_told_apart() -> None:
    names = [name for name, _ in HEADINGS]
    assert len(names) == len(set(names))
    assert all(words[0].islower() or words[0] == "r" or words.startswith("NaN") for _, words in HEADINGS)


QUOTED = {
    "transformers/utils/hub.py": ["is not a local folder and is not a valid model identifier"],
    "transformers/dynamic_module_utils.py": [
        "contains custom code which must be executed to correctly load the model",
        "Do you wish to run the custom code? [y/N]",
    ],
    "transformers/utils/loading_report.py": ["those params were newly initialized because missing from the checkpoint"],
    "transformers/tokenization_utils_base.py": [
        "Can't load tokenizer for",
        "Unable to create tensor, you should probably activate",
        "Token indices sequence length is longer than the specified maximum sequence length for this model",
        "Cannot use chat template functions because tokenizer.chat_template is not set",
    ],
    "peft/utils/other.py": ["not found in the base model. Please check the target modules and try again."],
    "peft/tuners/tuners_utils.py": [
        "Already found a peft_config attribute in the model",
        "No modules were targeted for adaptation",
    ],
    "peft/utils/save_and_load.py": [
        "Can't find weights for",
        "Setting save_embedding_layers to True as embedding layers found in target_modules",
        "the embedding layer has been resized during finetuning",
    ],
    "peft/peft_model.py": ["Found missing adapter keys while loading the checkpoint"],
    "peft/tuners/lora/bnb.py": [
        "Merge lora module to 4-bit linear may get different generations due to rounding errors."
    ],
    "torch/utils/checkpoint.py": ["None of the inputs have requires_grad=True. Gradients will be None"],
    "torch/nn/modules/module.py": ["copying a param with shape"],
    "torch/amp/grad_scaler.py": ["Attempting to unscale FP16 gradients."],
    "torch/cuda/__init__.py": ["Torch not compiled with CUDA enabled"],
}
"""What people search for, and the files of the libraries here that say it."""


def test_what_is_quoted_is_what_the_libraries_say() -> None:
    page = _words((ROOT / "docs/gotchas.md").read_text())
    for file, quotes in QUOTED.items():
        package, _, path = file.partition("/")
        found = importlib.util.find_spec(package)
        assert found is not None and found.origin is not None
        source = _words((Path(found.origin).parent / path).read_text())
        for quote in quotes:
            assert _words(quote) in page, quote
            assert _words(quote) in source, f"{file} no longer says: {quote}"


def _words(text: str) -> str:
    """Without the marks that Python and Markdown put into a sentence, or between its lines."""
    return " ".join(re.sub(r"""[`"'\\]|\bf(?=["'])""", " ", text).split())
