"""A base's own code is refused by name, and runs only where a person named that very base."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import dynamic_module_utils

import hatrack
from hatrack.base.code import check_code, needed_code
from hatrack.base.description import BaseDescription
from hatrack.base.load import BaseOptions, load_base, load_config, load_tokenizer
from hatrack.base.sources import find_base
from hatrack.check.checks import check_recipe
from hatrack.errors import HatrackError, ModelError, RecipeError
from hatrack.recipe import Recipe
from tests.reliability.child import Child

CODE = """
from pathlib import Path
Path({ran!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class BrandConfig(LlamaConfig):
    model_type = "brand"
class BrandForCausalLM(LlamaForCausalLM):
    config_class = BrandConfig
"""
AUTO = {"AutoConfig": "brand.BrandConfig", "AutoModelForCausalLM": "brand.BrandForCausalLM"}


@pytest.fixture
def brand(tmp_path: Path, tiny_decoder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base that needs its own code, which leaves a trace when it runs."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "brand"
    folder.mkdir()
    for path in tiny_decoder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    _change(folder / "config.json", model_type="brand", architectures=["BrandForCausalLM"], auto_map=AUTO)
    (folder / "brand.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    return folder


def _change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _parts(error: HatrackError) -> tuple[str, str, str]:
    return error.what, str(error.got), str(error.fix)


def test_it_is_refused_by_the_names_of_base_and_code(brand: Path, questions: Path, tmp_path: Path) -> None:
    expected = (
        f"{brand} needs code of its own, which is not run unasked",
        f"brand.py in {brand}",
        f"read it; --trust-remote-code {brand} lets it run, with all your rights",
    )
    files = find_base(str(brand))
    for refuse in (
        lambda: load_base(files, BaseOptions(task="chat")),
        lambda: load_config(files, task="chat"),
        lambda: load_tokenizer(files),
        lambda: hatrack.train(base=str(brand), data=str(questions), task="chat", output=str(tmp_path / "hat")),
    ):
        with pytest.raises(ModelError) as caught:
            refuse()
        assert _parts(caught.value) == expected
    found, _ = check_recipe(Recipe.make(base=str(brand), data=str(questions), task="chat"))
    assert [(finding.gotcha, finding.what) for finding in found] == [("base-code", expected[0])]
    assert not (tmp_path / "ran").exists()


def test_it_runs_where_the_base_is_named_again(brand: Path, questions: Path, tmp_path: Path) -> None:
    options = {"base": str(brand), "data": str(questions), "task": "chat", "device": "cpu", "steps": 2, "batch_size": 4}
    output = str(tmp_path / "hat")
    hat = hatrack.train(**options, output=output, name="hat", lr=0.05, trust_remote_code=str(brand))
    assert (tmp_path / "ran").exists() and type(hat.base.model).__name__ == "BrandForCausalLM"
    assert "trust" not in (tmp_path / "hat/hatrack.json").read_text()
    with pytest.raises(ModelError, match="which is not run unasked"):  # an adapter cannot ask for it, nor remember it
        hatrack.load(output)
    assert hatrack.load(output, trust_remote_code=str(brand)).active == "hat"
    child = Child(["check", output], tmp_path / "said")
    assert child.end() == 2 and "which is not run unasked" in child.said
    child = Child(["check", output, "--trust-remote-code", brand], tmp_path / "said then")
    assert child.end() == 0, child.said


def test_another_name_trusts_nothing(brand: Path, tiny_decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        find_base(str(brand), trust=str(tiny_decoder))
    what, got, fix = _parts(caught.value)
    assert what == "--trust-remote-code names another base than the one in use"
    assert got == f"{tiny_decoder} and {brand}" and "whose code you have read" in fix
    assert find_base(str(brand), trust=f"{brand}/../brand").trusted  # the same folder


def test_fields_of_an_adapter_or_a_recipe_kept_with_it_ask_for_nothing(
    brand: Path, tiny_decoder: Path, questions: Path, tmp_path: Path
) -> None:
    options = {"base": str(tiny_decoder), "data": str(questions), "task": "chat", "steps": 2, "lr": 0.05}
    hatrack.train(**options, device="cpu", output=str(tmp_path / "hat"), name="hat")
    content = json.loads((tmp_path / "hat/hatrack.json").read_text())
    content["base"] |= {"source": str(brand), "trusted": True}
    content["recipe"]["trust_remote_code"] = content["trust_remote_code"] = str(brand)
    (tmp_path / "hat/hatrack.json").write_text(json.dumps(content))
    _change(tmp_path / "hat/adapter_config.json", base_model_name_or_path=str(brand), trust_remote_code=str(brand))
    with pytest.raises(HatrackError):
        hatrack.load(tmp_path / "hat")
    _change(tmp_path / "hat/adapter_config.json", trust_remote_code=None)
    with pytest.raises(ModelError, match="which is not run unasked"):
        hatrack.load(tmp_path / "hat")
    assert not (tmp_path / "ran").exists()


def test_a_kept_run_asks_for_nothing(brand: Path, questions: Path, tmp_path: Path) -> None:
    """`run.json` is a file like any other: the trust in it counts for nothing when the run is resumed."""
    run = tmp_path / "hat.run"
    run.mkdir()
    recipe = {"base": str(brand), "data": str(questions), "task": "chat", "trust_remote_code": str(brand)}
    (run / "run.json").write_text(json.dumps({"recipe": recipe, "facts": {}}))
    with pytest.raises(ModelError, match="which is not run unasked"):
        hatrack.train(resume=True, output=str(tmp_path / "hat"))
    assert not (tmp_path / "ran").exists()


def test_code_that_lies_elsewhere_or_nowhere(brand: Path) -> None:
    (brand / "brand.py").unlink()
    with pytest.raises(ModelError) as caught:
        check_code(find_base(str(brand), trust=str(brand)))
    assert _parts(caught.value) == (f"{brand} lacks its code", "no brand.py", "copy or download the base again")
    _change(brand / "config.json", auto_map={"AutoConfig": "other/place--brand.BrandConfig"})
    with pytest.raises(ModelError) as caught:
        check_code(find_base(str(brand), trust=str(brand)))
    assert (
        caught.value.what == f"{brand} asks for code of another repository"
        and "of other/place" in _parts(caught.value)[1]
    )


@pytest.mark.parametrize("auto", [{"AutoTokenizer": ["words.BrandTokenizer", None]}, ["words.BrandTokenizer", None]])
def test_a_tokenizers_code_is_refused_too(tiny_decoder: Path, tmp_path: Path, auto: Any) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for path in tiny_decoder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    _change(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="BrandTokenizer")
    with pytest.raises(ModelError) as caught:
        load_tokenizer(find_base(str(folder)))
    assert caught.value.got == f"words.py in {folder}"


def test_what_transformers_has_itself_is_taken_from_it(tiny_decoder: Path, tmp_path: Path) -> None:
    """Many a repository still carries the code from before its kind came to transformers."""
    auto = {"AutoConfig": "old.LlamaConfig", "AutoModelForCausalLM": "old.LlamaForCausalLM", "AutoModel": "old.Own"}
    auto["AutoTokenizer"] = ["old.LlamaTokenizer", "old.LlamaTokenizerFast"]  # type: ignore[assignment]
    assert needed_code({"auto_map": auto}) == []
    check_code(BaseDescription("x", tmp_path, {"auto_map": auto}, {}))


def test_the_command_line_has_the_option(brand: Path, questions: Path, tmp_path: Path) -> None:
    arguments = ["train", "--base", brand, "--data", questions, "--task", "chat", "--output", tmp_path / "hat"]
    child = Child(arguments, tmp_path / "said")
    assert child.end() == 2 and f"--trust-remote-code {brand} lets it run" in child.said
    child = Child([*arguments, "--trust-remote-code", "somebody/else"], tmp_path / "said else")
    assert child.end() == 2 and "names another base" in child.said
