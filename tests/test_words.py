"""In Python, messages name options as Python's keyword arguments; at the command line as flags."""

import pytest

import hatrack
from hatrack.console import say
from hatrack.errors import HatrackError, OptionStyle, RecipeError, spell_options
from hatrack.recipe import flag


@pytest.fixture(autouse=True)
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OptionStyle, "flags", False)


@pytest.mark.parametrize(
    ("typed", "python"),
    [
        ("use --r 8", "use r=8"),
        ("try --lr 1e-3", "try lr=1e-3"),
        ("--lr auto measures it", 'lr="auto" measures it'),
        ("--layers top-4 or --layers all", 'layers="top-4" or layers="all"'),
        ("--quantize 4bit", 'quantize="4bit"'),
        ("name it with --text COLUMN --label COLUMN", "name it with text=COLUMN label=COLUMN"),
        ("--eval-data is missing", "eval_data is missing"),
        ("leave out --resume", "leave out resume=True"),
        ("use --steps or --epochs", "use steps or epochs"),
        ("--memory 3GiB", 'memory="3GiB"'),
        (
            "go on with: hatrack train --resume --output x; or --r 4",
            "go on with: hatrack train --resume --output x; or r=4",
        ),
        ("a -- b --- c", "a -- b --- c"),
        ("pip install --upgrade transformers, or --dtype auto", 'pip install --upgrade transformers, or dtype="auto"'),
        ("give hub/models--acme--tiny, or --variant lora", 'give hub/models--acme--tiny, or variant="lora"'),
    ],
)
def test_options_become_arguments(typed: str, python: str) -> None:
    assert spell_options(typed) == python


def test_a_value_is_told_with_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spell_options(f"give {flag('base', 'hub/models--acme--tiny')}") == 'give base="hub/models--acme--tiny"'
    monkeypatch.setattr(OptionStyle, "flags", True)
    assert flag("eval_data", "my rows.csv") == "--eval-data 'my rows.csv'"


def test_errors_and_advice_are_in_the_readers_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = HatrackError("--max-length is too short", got="--x", fix="--max-length 512 keeps it")
    assert str(error) == "max_length is too short; got --x; fix: max_length=512 keeps it"
    assert error.fix == "max_length=512 keeps it"
    say("leave out --lr")
    assert capsys.readouterr().err == "leave out lr\n"
    monkeypatch.setattr(OptionStyle, "flags", True)
    assert "--max-length 512" in str(HatrackError("too short", fix="--max-length 512"))


def test_a_wrong_option_in_python_is_told_in_python() -> None:
    with pytest.raises(RecipeError) as caught:
        hatrack.train(base="b", data="d.csv", r=0)
    assert "--" not in str(caught.value) and "r must be" in str(caught.value)


def test_a_recipe_shows_what_was_set() -> None:
    assert repr(hatrack.Recipe.make(base="b", r=16)) == "Recipe(base='b', r=16)"
