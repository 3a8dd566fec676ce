"""The rooms and who may import whom, held against the code and against docs/architecture.md."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rooms import FILES, GROUND, GROUND_ROOMS, MAY_IMPORT, PAGE, SOURCE, page

WITHOUT_TORCH = [*sorted(GROUND), "base/header", "adapter/count", "adapter/targets"]
WITHOUT_TORCH += [
    "base/hub",
    "base/locate",
    "base/description",
    "base/free_memory",
    "data/token_lengths",
    "data/limit",
    "data/order",
    "training/hidden_states",
    "training/forecast",
]
WITHOUT_TORCH += ["data/trained_rows", "evaluate/comparable"]
WITHOUT_TORCH += [f"planning/{name}" for name in ("schedule", "fit", "machine", "memory", "model_shape", "time")]
HEAVY = ("torch", "transformers", "peft", "bitsandbytes")
MAX_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 500, 60, 5
MORE_ARGUMENTS = {
    "cli/chat.chat": "a command's options",
    "cli/compare.compare": "a command's options",
    "cli/predict.predict": "a command's options",
    "inference/hat.Hat.__init__": "keyword-only options of a public class",
    "inference/load.load": "keyword-only options of a public function",
    "kernels/attention.attention": "keyword-only options, as transformers' attention functions have",
    "kernels/attention._KernelAttention.forward": "torch.autograd.Function passes each input",
    "kernels/attention._MatmulAttention.forward": "torch.autograd.Function passes each input",
    "kernels/loss._NextToken.forward": "torch.autograd.Function passes each input",
    "layers/fast_base.attend": "transformers' AttentionInterface",
    "layers/fast_base.mask": "transformers' AttentionMaskInterface",
}
"""Functions of more than five arguments, and why they may be."""


def _room(path: Path) -> str:
    """`training` for training/train.py, `` for the package itself and what runs it."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return "" if parts in (("__init__",), ("__main__",)) else parts[0]


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module imported from hatrack, wherever it stands, and whether it is inside a function."""
    tree = ast.parse(path.read_text())
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, id(node) in inner
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for name in node.names:
                yield f"{node.module}.{name.name}", id(node) in inner


def _allowed(room: str, module: str) -> bool:
    parts = module.split(".")[1:]
    target = parts[0] if parts else ""
    if room in ("", "cli") or target == room or target in GROUND | GROUND_ROOMS:
        return True
    return room in MAY_IMPORT and any(parts[: len(rule.split("."))] == rule.split(".") for rule in MAY_IMPORT[room])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_rooms_import_only_what_they_may(path: Path) -> None:
    wrong = [m for m, _ in _imports(path) if m.split(".")[0] == "hatrack" and not _allowed(_room(path), m)]
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_the_command_line_imports_inside_functions(path: Path) -> None:
    inside = [module for module, in_function in _imports(path) if in_function]
    assert _room(path) == "cli" or not inside


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    long = [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long


def _arguments(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    """Each function by its full name, and how many arguments it takes besides self."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = child.args.posonlyargs + child.args.args + child.args.kwonlyargs
            yield prefix + child.name, len([each for each in arguments if each.arg not in ("self", "cls")])
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from _arguments(child, f"{prefix}{child.name}." if named else prefix)  # type: ignore[attr-defined]


def test_functions_take_few_arguments() -> None:
    many = {
        name
        for path in FILES
        for name, count in _arguments(
            ast.parse(path.read_text()), f"{path.relative_to(SOURCE).with_suffix('').as_posix()}."
        )
        if count > MAX_ARGUMENTS
    }
    assert many == set(MORE_ARGUMENTS)


def test_what_counts_arguments_counts_them() -> None:
    code = "class A:\n    def f(self, a, b, /, c, *, d, e, g): ...\ndef h(): ..."
    assert dict(_arguments(ast.parse(code), "m.")) == {"m.A.f": 6, "m.h": 0}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "a module with code needs a docstring"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_light_modules_import_no_torch(module: str) -> None:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for name, _ in _imports(SOURCE / f"{current}.py"):
            assert name.split(".")[0] not in ("torch", "transformers", "peft", "bitsandbytes"), (
                f"{current} imports {name}"
            )
            if name.startswith("hatrack."):
                parts = name.split(".")[1:]
                found = [part for part in ("/".join(parts), "/".join(parts[:-1])) if (SOURCE / f"{part}.py").is_file()]
                waiting += found[:1]


def test_ground_floor_stands_on_nothing() -> None:
    for name in GROUND:
        rooms = {m.split(".")[1] for m, _ in _imports(SOURCE / f"{name}.py") if m.startswith("hatrack.")}
        assert rooms <= GROUND


def test_the_page_shows_the_rooms_as_they_are() -> None:
    assert PAGE.read_text() == page(), "write it anew: .venv/bin/python -m tests.rooms"


def test_the_page_follows_the_tree() -> None:
    lines = PAGE.read_text().splitlines()
    for path in FILES:
        if path.name != "__init__.py":
            name = path.name if path.parent == SOURCE else f"  {path.name}"
            assert any(line.startswith(f"  {name} ") for line in lines), path
    listed = [line for line in lines if line.startswith("  ") and line.split()[0].endswith(".py")]
    assert len(listed) == len([path for path in FILES if path.name != "__init__.py"])
