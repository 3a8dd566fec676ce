"""What a training leaves out of its imports, and when it must not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hatrack.adapter.card import AdapterCard
from hatrack.cli.spare import OF_NUMBERS, leave_out, leave_out_of_torch, leave_out_to_open, list_models_once
from hatrack.errors import AdapterError
from hatrack.recipe import Recipe

ALL = {"bitsandbytes", "scipy", "datasets"}


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({}, ALL),
        ({"data": "pypi:x==1/rows.csv"}, ALL),
        ({"data": "somebody/rows"}, {"bitsandbytes", "scipy"}),
        ({"eval_data": "somebody/rows"}, {"bitsandbytes", "scipy"}),
        ({"quantize": "4bit"}, {"datasets"}),
        ({"report_to": "tensorboard"}, set()),
        ({"resume": True}, set()),
    ],
)
def test_only_what_the_run_has_no_use_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], left_out: set[str]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.touch()
    modules: dict[str, Any] = {}
    monkeypatch.setattr(sys, "modules", modules)
    leave_out(Recipe.make(**({"data": str(rows)} | options)))
    monkeypatch.undo()
    assert modules == dict.fromkeys(left_out)


@pytest.mark.parametrize(
    ("recipe", "left_out"), [({}, {"bitsandbytes", "scipy"}), ({"quantize": "4bit"}, set()), (None, set())]
)
def test_quantisers_are_left_out_for_a_base_that_was_not_quantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any] | None, left_out: set[str]
) -> None:
    if recipe is not None:
        hat = AdapterCard(name="hat", base={"source": "somewhere"}, task="classify", recipe=recipe)
        (tmp_path / "hatrack.json").write_text(hat.to_json())
    (tmp_path / "adapter_config.json").touch()
    modules: dict[str, Any] = {}
    monkeypatch.setattr(sys, "modules", modules)
    leave_out_to_open(str(tmp_path))
    with pytest.raises(AdapterError, match="no such adapter"):
        leave_out_to_open("no-such-adapter")
    monkeypatch.undo()
    assert modules == dict.fromkeys(left_out)


def test_training_goes_without_them(tmp_path: Path) -> None:
    """In a process of its own: the main path is imported whole, and none of them with it."""
    script = (
        "import sys; from pathlib import Path\n"
        "from hatrack.cli.spare import leave_out; from hatrack.recipe import Recipe\n"
        "Path('rows.csv').touch(); leave_out(Recipe.make(data='rows.csv')); import hatrack.training.train\n"
        "print([name for name in ('bitsandbytes', 'scipy', 'datasets', 'pandas', 'sklearn') if sys.modules.get(name)])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_model_files_are_listed_once() -> None:
    """In processes of their own: as many names as without it, and no folder listed a second time."""
    script = (
        "import sys; from hatrack.cli.spare import list_models_once\n"
        "if sys.argv[1:]: list_models_once()\n"
        "import transformers; transformers.AutoModel; import transformers.utils.import_utils as module\n"
        "listed = module.create_import_structure_from_path.cache_info()\n"
        "print(len(dir(transformers)), len(dir(transformers.models)), listed.misses, listed.currsize)"
    )
    plain, once = (
        [int(word) for word in subprocess.check_output([sys.executable, "-c", script, *words], text=True).split()]
        for words in ([], ["once"])
    )
    assert once[:2] == plain[:2]
    assert once[2] == once[3] < plain[2]


def test_listing_is_left_alone_where_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", sys)
    before = list(sys.meta_path)
    list_models_once()
    assert sys.meta_path == before


COMPILER = "torch._dynamo.eval_frame", "torch.distributed.tensor._api", "torch.distributed.fsdp", "sympy.core"


def last_line(tmp_path: Path, *lines: str) -> str:
    """What a process prints last that was told to leave out what is spare of torch."""
    script = "\n".join(
        ("import sys", "from hatrack.cli.spare import leave_out_of_torch", "leave_out_of_torch()", *lines)
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_training_goes_without_the_compiler(tmp_path: Path, tiny_decoder: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "row {i} of these"}}\n' for i in range(20)))
    said = f"atexit.register(lambda: print([name for name in {COMPILER} if name in sys.modules]))"
    command = "from hatrack.cli.main import main", "main()"
    train = ["train", "--base", str(tiny_decoder), "--task", "complete", "--data", "rows.jsonl", "--steps", "2"]
    for words in ([*train, "--name", "hat"], ["predict", "hat", "row"], ["compare", "hat"], ["check", *train[1:]]):
        assert last_line(tmp_path, "import atexit", f"sys.argv[1:] = {words}", said, *command) == "[]", words


def test_the_compiler_comes_when_it_is_asked_for(tmp_path: Path) -> None:
    lines = "import torch, transformers.masking_utils as masks", "before = 'torch._dynamo.eval_frame' in sys.modules"
    compiled = "double = torch.compile(lambda x: 2 * x, backend='eager')", "found = double(torch.ones(2)).tolist()"
    index = "with masks.TransformGetItemToIndex(): second = torch.arange(3)[torch.tensor(1)].item()"
    assert last_line(tmp_path, *lines, *compiled, index, "print(before, found, second)") == "False [2.0, 2.0] 1"


def test_symbols_are_left_to_torch(tmp_path: Path) -> None:
    lines = (
        "import torch",
        "from torch.fx.experimental.symbolic_shapes import guard_or_false, sym_and",
        "plain = guard_or_false(3 == 3), 'sympy.core' in sys.modules",
        "from torch.fx.experimental.symbolic_shapes import ShapeEnv",
        "u = ShapeEnv().create_unbacked_symint()",
        "print(plain, guard_or_false(u == 3), type(sym_and(u == 3, True)).__name__)",
    )
    assert last_line(tmp_path, *lines) == "(True, False) False SymBool"


@pytest.mark.filterwarnings("ignore:guard_size_oblivious:FutureWarning")
def test_numbers_are_answered_as_torch_answers() -> None:
    from torch.fx.experimental import symbolic_shapes as real

    sizes: list[Any] = [0, 1, 7, (), (1, 2), [1, 2], (1, 3), [1]]
    cases: dict[str, list[tuple[Any, ...]]] = {name: [(False,), (True,)] for name in OF_NUMBERS}
    for name in ("guarding_hint_or_throw", "has_guarding_hint", "is_nested_int"):
        cases[name] = [(0,), (1,), (7,)]
    for name in ("sym_and", "sym_or"):
        cases[name] += [(True, False), (False, False), (True, True, True)]
    cases["sym_eq"] = [(a, b) for a in sizes for b in sizes if isinstance(a, int) == isinstance(b, int)]
    for name, answer in OF_NUMBERS.items():
        for case in cases[name]:
            assert answer(*case) == getattr(real, name)(*case), (name, case)


def test_one_process_among_many_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = list(sys.meta_path)
    leave_out_of_torch()
    assert sys.meta_path == before
