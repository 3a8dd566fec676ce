"""A release of a library that drops or renames what hatrack uses of it ends in one line, and nothing else uses it."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers

from hatrack.errors import MachineError
from hatrack.upstream import bitsandbytes, names
from hatrack.upstream import peft as upstream_peft
from hatrack.upstream import torch as upstream_torch
from hatrack.upstream import trainer as upstream_trainer
from hatrack.upstream import transformers as upstream_transformers
from tests.rooms import FILES, SOURCE

MODULES = {
    "torch": upstream_torch,
    "transformers": upstream_transformers,
    "peft": upstream_peft,
    "bitsandbytes": bitsandbytes,
}
EVERY = [(library, name) for library, module in MODULES.items() for name in module.NAMES]
EVERY += [("transformers", name) for name in upstream_trainer.NAMES]


class Renamed:
    """Stands in for a module or class, and lacks one of its names."""

    def __init__(self, owner: Any, lacks: str) -> None:
        self._owner, self._lacks = owner, lacks

    def __getattr__(self, name: str) -> Any:
        if name == self._lacks:
            raise AttributeError(name)
        if name in ("__annotations__", "__code__"):
            return {}
        return getattr(self._owner, name)


@pytest.mark.parametrize(("library", "name"), EVERY, ids=[name for _, name in EVERY])
def test_a_name_that_is_gone_is_one_line(library: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(library)
    names.require(library, name)
    owner, _, last = name.partition("(")[0].rpartition(".")
    found, renamed = names.find, Renamed(names.find(owner), last)
    monkeypatch.setattr(names, "find", lambda path: renamed if path == owner else found(path))
    version = importlib.metadata.version(library)
    with pytest.raises(MachineError) as caught:
        names.require(library, name)
    line = str(caught.value)
    assert "\n" not in line and f"does not work with this version of {library}, which has no {name}" in line
    assert f"got {library} {version}" in line and f"fix: pip install '{library}" in line


@pytest.mark.parametrize("function", ["lambda self, model: 0", "lambda self, model, grad_norm, more: 0"])
def test_a_method_with_other_parameters_is_one_line(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.Trainer, "_get_grad_norm", eval(function))
    with pytest.raises(MachineError, match=r"which has no .*_get_grad_norm\(model, grad_norm\); got transformers 5"):
        names.require("transformers", *upstream_trainer.NAMES)


def test_a_method_may_have_further_optional_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.Trainer, "_get_grad_norm", lambda self, model, grad_norm=None, more=1, **rest: 0)
    names.require("transformers", *upstream_trainer.NAMES)


def test_the_command_line_says_which_versions_it_works_with() -> None:
    script = (
        "import sys\n"
        "from transformers import Trainer\n"
        "Trainer.gradient_norm = Trainer._get_grad_norm\n"
        "del Trainer._get_grad_norm\n"
        f"sys.argv = ['hatrack', 'train', '--base', '.', '--data', {__file__!r}]\n"
        "from hatrack.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    *_, line = done.stderr.splitlines()  # transformers, imported first, may say something of its own
    assert done.returncode == 1
    assert line.startswith("hatrack: hatrack does not work with this version of transformers, which has no ")
    assert "fix: pip install 'transformers" in line and ">=5" in line


def test_a_trainer_that_no_longer_asks_for_the_gradients_norm_is_one_line() -> None:
    check = upstream_trainer._HookCheck()
    check.called = True
    check.on_step_end(None, None, None)
    with pytest.raises(MachineError, match=r"does not call _get_grad_norm; got transformers 5.*fix: pip install"):
        check.on_step_end(None, None, None)


def _private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def _own_names() -> set[str]:
    """Every private name that hatrack's own modules define."""
    found: set[str] = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


OWN = _own_names()
CLASSES: dict[str, type] = {
    "Trainer": transformers.Trainer,
    "HookedTrainer": transformers.Trainer,
    "TrainingArguments": transformers.TrainingArguments,
    "PeftLinear": peft.tuners.lora.Linear,
}
THEIRS = {name.partition("(")[0].rpartition(".")[2] for _, name in EVERY}
NAMED_TUPLES = {"_replace"}  # a named tuple's public methods begin so


def _is_own(node: ast.Attribute) -> bool:
    of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr in NAMED_TUPLES or (node.attr in OWN and (of_self or node.attr not in THEIRS))


def _foreign(tree: ast.AST) -> list[str]:
    """Private names that a file takes from elsewhere."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _private(node.attr) and not _is_own(node):
            found.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] not in (
            "hatrack",
            "__future__",
        ):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [part for part in parts if _private(part)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and _private(str(name.value)) and name.value not in OWN:
                found.append(str(name.value))
    return found


def _overridden(tree: ast.AST) -> list[str]:
    """Private methods of a library's class that a class of ours overrides."""
    return [
        method.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if isinstance(base, ast.Name) and base.id in CLASSES
        for method in node.body
        if isinstance(method, ast.FunctionDef) and _private(method.name) and hasattr(CLASSES[base.id], method.name)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_private_name_of_a_library_is_used_elsewhere(path: Path) -> None:
    if path.parent != SOURCE / "upstream":
        tree = ast.parse(path.read_text())
        assert _foreign(tree) + _overridden(tree) == []


def test_that_test_can_fail() -> None:
    uses = (
        "x = torch._C\ny = getattr(torch, '_foreach_copy_')\nfrom torch._ops import a\nz = model._buffers, x._version\n"
    )
    assert sorted(_foreign(ast.parse(uses))) == ["_C", "_buffers", "_foreach_copy_", "_ops", "_version"]
    methods = "class A(Trainer):\n    def _save_checkpoint(self): ...\n    def _ours(self): ...\n"
    assert _overridden(ast.parse(methods)) == ["_save_checkpoint"]
