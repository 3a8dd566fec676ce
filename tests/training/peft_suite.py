"""peft's own tests of LoRA, with hatrack's layer in place of peft's: one command, ten minutes on one core.

    .venv/bin/python tests/training/peft_suite.py [--stock] [pytest's own options, such as -k mixed]

The tests come from peft's source distribution, fetched from the package index, checked against its sha256 and kept in
the cache. A test is run where its parameters or its source name `LoraConfig`: in the files below, all that can run on a
processor without a model hub. The hub's tiny models are stood in for by random ones of the same shape; a test that asks
for anything else of the hub counts as skipped. Left out are the files about other methods, about GPUs and quantizers,
and those that need images or diffusion models; also four tests of what a layer's class is called. What fails is run
once more with peft's own layers, to tell hatrack's faults from those of the machine. `--stock` runs it all with peft's
own layers.
"""

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig

from hatrack.layers.fast_lora import LAYER_CLASSES, FastLinear
from hatrack.storage import cache_dir, new_folder

PEFT = "peft==0.21.2"
SHA256 = "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"
ALSO = ["diffusers==0.42.1", "importlib-metadata==10.2.0", "zipp==4.1.2", "pillow==13.0.0", "parameterized==0.9.0"]
ALSO += ["attrs==26.1.0"]
"""What the tests import and hatrack does not need; kept in the cache, apart from hatrack's own packages."""
# fmt: off
FILES = (
    "custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "seq_classifier",
    "token_classification_qa", "initialization", "lora_variants", "target_parameters", "mixed", "low_level_api",
    "lora_conversion", "tuners_utils", "other", "lorafa", "loraplus", "lora_ga", "velora", "bdlora", "arrow",
    "trainable_tokens", "integrations", "helpers", "mapping", "lora_intruders", "xlora", "lora_megatron",
    "torch_compile",
)
# fmt: on
NAMES = (
    "test_custom_models.py::TestLayerRepr::test_repr_lora_linear",
    "test_custom_models.py::TestLayerRepr::test_repr_lora_conv1d",
    "test_initialization.py::TestLoraInitialization::test_modules_to_save_targets_lora_layer_raises",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_target_parameters_and_target_modules",
)
"""Tests of what a layer's class is called, in a print or a message."""

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SMALL |= {"vocab_size": 1024, "max_position_embeddings": 512}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1024, "n_positions": 512}
OPT = {**SMALL, "word_embed_proj_dim": 32}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 1024}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 1024}
T5 |= {"decoder_start_token_id": 0}
STAND_INS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", SMALL),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", OPT),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "bert-base-uncased": ("BertForSequenceClassification", SMALL),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", SMALL),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", SMALL),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", SMALL),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", SMALL),
}
"""The hub's name -> the class and the shape of the random model that stands in for it."""

taken: Counter[bool] = Counter()
"""Forward passes of fast layers, by whether they took the fast path."""
tests_with_it: set[str] = set()
"""Names of the tests in which one did."""


def main() -> int:
    """Fetches, runs, counts; 1 where a test fails that passes with peft's own layers."""
    stock, options = "--stock" in sys.argv, [option for option in sys.argv[1:] if option != "--stock"]
    folder = _suite()
    files = [f"tests/test_{name}.py" for name in FILES]
    found = _run(folder, [*files, *(f"--deselect=tests/{test}" for test in NAMES), *options], stock)
    told = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(found["outcomes"].items()))
    print(f"\n{PEFT}, {'its own' if stock else 'hatrack'} layers: {told}")
    print(f"the fast path was taken {found['taken']:,} times in {found['tests_with_it']:,} tests; ")
    print(f"{found['handed_over']:,} times a fast layer handed over to peft's forward")
    if stock or not found["failed"]:
        return int(bool(found["failed"]))
    again = _run(folder, found["failed"], stock=True)
    ours = sorted(set(found["failed"]) - set(again["failed"]))
    print(f"\n{len(found['failed']) - len(ours)} of the failures are the same with peft's own layers; hatrack's are:")
    print("\n".join(ours) or "none")
    return int(bool(ours))


def _suite() -> Path:
    """The folder with peft's `tests`, what they import (`also`) and the stand-ins (`hub`), made once."""
    key = hashlib.sha256(repr((SHA256, ALSO, STAND_INS)).encode()).hexdigest()
    final = cache_dir("peft-suite") / key[:16]
    if final.exists():
        return final
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with new_folder(final) as working:
        subprocess.run([*pip, "install", "--no-deps", "--target", str(working / "also"), *ALSO], check=True)
        subprocess.run([*pip, "download", "--no-deps", "--no-binary", "peft", "--dest", str(working), PEFT], check=True)
        archive = next(working.glob("peft-*.tar.gz"))
        if (seen := hashlib.sha256(archive.read_bytes()).hexdigest()) != SHA256:
            raise SystemExit(f"{archive.name} is not the one expected: sha256 {seen}")
        with tarfile.open(archive) as tar:
            tar.extractall(working, [m for m in tar.getmembers() if "/tests/" in m.name], filter="data")
        next(working.glob("peft-*/tests")).rename(working / "tests")
        (working / "tests" / "__init__.py").touch()  # they import each other, and the distribution leaves it out
        for name, (kind, shape) in STAND_INS.items():
            _stand_in(working / "hub" / f"models--{name.replace('/', '--')}", kind, shape)
    return final


def _stand_in(folder: Path, kind: str, shape: dict[str, Any]) -> None:
    """Writes a random model as the hub's cache keeps one."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)
    model(model.config_class(**shape)).save_pretrained(folder / "snapshots" / "random")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("random")


def _run(folder: Path, chosen: list[str], stock: bool) -> dict[str, Any]:
    """Runs pytest in a process of its own, with this file as a plugin, and returns what it counted."""
    counts = folder / f"counts-{os.getpid()}.json"
    paths = [Path(__file__).parent, Path(__file__).parents[2] / "src", folder / "also"]
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(folder / "hub"), PEFT_SUITE_COUNTS=str(counts))
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PEFT_SUITE_STOCK": "1" if stock else ""}
    command = [sys.executable, "-m", "pytest", "-p", "peft_suite", "-p", "no:cacheprovider", "-o", "addopts="]
    subprocess.run([*command, "-q", "--tb=short", "--rootdir", ".", *chosen], cwd=folder, env=environment, check=False)
    try:
        return json.loads(counts.read_text())  # type: ignore[no-any-return]
    finally:
        counts.unlink(missing_ok=True)


# What follows is the plugin.


def pytest_configure(config: pytest.Config) -> None:
    """Registers hatrack's layers with every `LoraConfig` there will be, and counts what they do."""
    if os.environ.get("PEFT_SUITE_STOCK") or "PEFT_SUITE_COUNTS" not in os.environ:
        return
    made, judge = LoraConfig.__post_init__, FastLinear._plain_parts

    def post_init(config: LoraConfig) -> None:
        made(config)
        config._register_custom_module(dict(LAYER_CLASSES))

    def parts(layer: FastLinear, dtype: torch.dtype) -> Any:
        answer = judge(layer, dtype)
        taken[answer is not None] += 1
        if answer is not None:
            tests_with_it.add(os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0])
        return answer

    setattr(LoraConfig, "__post_init__", post_init)  # noqa: B010
    setattr(FastLinear, "_plain_parts", parts)  # noqa: B010


class _All(Counter[str]):
    """The models that were fetched before, as the tests keep account of them: for those they do not go to the hub."""

    def __contains__(self, name: object) -> bool:
        return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """Keeps the tests that are about LoRA, and the hub out of all."""
    sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = _All()  # type: ignore[attr-defined]
    kept = [item for item in items if _is_about_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _is_about_lora(item: Any) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if "config_cls" in parameters:
        return parameters["config_cls"] is LoraConfig
    return bool(re.search(r"\bLoraConfig\b", inspect.getsource(item.function)) or "lora" in item.nodeid.lower())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Skips what asks the hub for more than the stand-ins."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    while error is not None:
        if report.failed and re.search(r"huggingface\.co|on the Hub|offline mode|OfflineMode|LocalEntry", repr(error)):
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, "Skipped: asks the hub")
        error = error.__cause__ or error.__context__
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Writes the counts for `main`."""
    if "PEFT_SUITE_COUNTS" not in os.environ:
        return
    outcomes = {
        name: reports for name, reports in terminalreporter.stats.items() if name in ("passed", "failed", "error")
    }
    failed = [report.nodeid for name in ("failed", "error") for report in outcomes.get(name, [])]
    told = {name: len(reports) for name, reports in outcomes.items()}
    skipped = terminalreporter.stats.get("skipped", [])
    told["skipped for want of the hub"] = sum("asks the hub" in str(report.longrepr) for report in skipped)
    told["skipped by peft (a GPU, another library, not for LoRA)"] = len(skipped) - told["skipped for want of the hub"]
    found = {"outcomes": told, "failed": failed, "taken": taken[True], "handed_over": taken[False]}
    Path(os.environ["PEFT_SUITE_COUNTS"]).write_text(json.dumps({**found, "tests_with_it": len(tests_with_it)}))


if __name__ == "__main__":
    sys.exit(main())
