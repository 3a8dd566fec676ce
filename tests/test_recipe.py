"""Options: what is accepted, what is refused and in which words, and that all three generated forms agree."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hatrack
from hatrack.cli.options import options_page
from hatrack.errors import RecipeError
from hatrack.option_aliases import NOT_NEEDED, OTHER_NAMES
from hatrack.recipe import Recipe, choices, flag

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "--r must be greater than or equal to 1; got 0; fix: try 8"),
        ({"lr": -1}, "--lr must be greater than 0; got -1; fix: try 1e-3"),
        ({"lr": float("nan")}, "--lr must be a finite number; got nan"),
        ({"task": "clasify"}, "--task must be one of classify, chat, complete; did you mean classify?"),
        ({"batchsize": 3}, "there is no option 'batchsize'; did you mean batch_size?"),
        ({"memory": "a lot"}, "--memory must be a size such as 3GiB or 800MB; got 'a lot'; fix: try 4GiB"),
        ({"layers": "top-0"}, "--layers must be all, auto, or top-N such as top-4"),
        (
            {"text": "a", "label": "a"},
            "--text and --label name the same column; got a; fix: give --label its own column",
        ),
        ({"name": "../x"}, "--name must be letters, digits"),
        ({"steps": 3, "epochs": 1}, "--steps and --epochs exclude each other"),
        ({"prompt": "q"}, "--prompt and --completion belong together; got only one; fix: add --completion COLUMN"),
        ({"dropout": 1.0}, "--dropout must be less than 1; got 1.0; fix: try 0.05"),
        ({"variant": "lokr"}, "--variant must be one of lora, dora, rslora, pissa"),
        ({"device": "gpu"}, "--device must match pattern"),
        ({"alpha": 0}, "--alpha must be greater than 0; got 0; fix: leave it out for 2 x r"),
    ],
)
def test_wrong_options_say_what_got_and_fix(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.make(**options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_every_wrong_option_is_reported_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.make(r=0, lr=-1, quantize="2bit")
    assert all(name in str(caught.value) for name in ("--r ", "--lr ", "--quantize "))


def test_text_from_a_shell_means_the_same_as_values() -> None:
    typed = Recipe.make(r="16", lr="1e-4", memory="3 GiB", targets="q_proj,v_proj", epochs="2.5", seed="7")
    assert typed == Recipe.make(r=16, lr=1e-4, memory=3 * 2**30, targets=["q_proj", "v_proj"], epochs=2.5, seed=7)


def test_alpha_follows_r() -> None:
    assert Recipe.make(r=16).effective_alpha == 32
    assert Recipe.make(r=16, alpha=8).effective_alpha == 8


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("r: 4\nlr: 1e-4\neval-data: held.csv\n")
    recipe = Recipe.read(path, r="32")
    assert (recipe.r, recipe.lr, recipe.eval_data) == (32, 1e-4, "held.csv")
    assert recipe.explicit_options() == {"r": 32, "lr": 1e-4, "eval_data": "held.csv"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("r: [", "the recipe is not valid YAML; got"),
        ("- r\n- 8\n", "a recipe must be lines of 'name: value'; got"),
        ("rank: 8\n", "there is no option 'rank'"),
        ("", "a recipe must be lines of 'name: value'; got"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        Recipe.read(path)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no such recipe file; got .*nowhere\.yaml; fix: check the path"):
        Recipe.read(tmp_path / "nowhere.yaml")


def test_the_options_page_is_not_stale() -> None:
    assert (ROOT / "docs" / "options.md").read_text() == options_page(), "run make format"


def test_every_option_is_a_flag_with_the_same_help() -> None:
    command = [sys.executable, "-m", "hatrack", "train", "--help"]
    env = {"COLUMNS": "500", "PATH": "", "NO_COLOR": "1", "PYTHONPATH": str(Path(hatrack.__file__).parents[1])}
    shown = " ".join(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split())
    for name, field in Recipe.model_fields.items():
        assert f"{flag(name)} " in shown
        assert str(field.description) in shown


def test_importing_hatrack_imports_no_torch() -> None:
    heavy = ("torch", "transformers", "peft", "sklearn", "datasets")
    script = f"import sys, hatrack, hatrack.cli.main; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    assert (
        hatrack.__all__
        == sorted(hatrack.__all__)
        == ["Hat", "HatrackError", "Recipe", "compare", "get_peft_model", "load", "plan", "speed_up", "train"]
    )
    assert all(hasattr(hatrack, name) for name in hatrack.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tain'"):
        _ = hatrack.tain


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("learning_rate", "did you mean lr?"),
        ("lora_r", "did you mean r?"),
        ("lora_alpha", "did you mean alpha?"),
        ("num_train_epochs", "did you mean epochs?"),
        ("per_device_train_batch_size", "did you mean batch_size?"),
        ("max_seq_length", "did you mean max_length?"),
        ("model_name_or_path", "did you mean base?"),
        ("dataset", "did you mean data?"),
        ("target_modules", "did you mean targets?"),
        ("outputDir", "did you mean output?"),
        ("load_in_4bit", "did you mean quantize: 4bit?"),
        ("gradient_accumulation_steps", "leave it out: "),
        ("epoch", "did you mean epochs?"),
        ("xyzzy", "the options are base, "),
    ],
)
def test_names_of_other_tools_lead_to_the_option(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"there is no option {name!r}; {hint}")):
        Recipe.make(**{name: 1})
    (tmp_path / "r.yaml").write_text(f"{name}: 1\n")
    with pytest.raises(RecipeError, match=re.escape(hint)):
        Recipe.read(tmp_path / "r.yaml")


def test_every_other_name_leads_to_an_option_that_is_there() -> None:
    assert {meant.partition(" ")[0] for meant in OTHER_NAMES.values()} <= set(Recipe.model_fields)
    assert not {*OTHER_NAMES, *NOT_NEEDED} & set(Recipe.model_fields) and not set(OTHER_NAMES) & set(NOT_NEEDED)
    for meant in OTHER_NAMES.values():
        option, _, value = meant.partition(" ")
        assert not value or value in choices(Recipe.model_fields[option])


def test_a_path_is_a_recipe_or_the_rows(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("base: b\nr: 4\n")
    assert Recipe.of(tmp_path / "r.yaml", r=16) == Recipe.make(base="b", r=16)
    assert Recipe.of("rows.csv", base="b") == Recipe.make(base="b", data="rows.csv")
    with pytest.raises(RecipeError, match=r"named twice; got rows.csv and new.csv"):
        Recipe.of("rows.csv", data="new.csv")
