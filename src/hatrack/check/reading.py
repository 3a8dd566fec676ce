"""Reads the rows of a recipe as examples and as tokens; reports all bad rows at once."""

from typing import Any, cast

from hatrack.base.description import BaseDescription, is_on_hub
from hatrack.base.load import load_config, load_tokenizer
from hatrack.base.sources import find_base
from hatrack.data.complaints import BadRows
from hatrack.data.examples import Examples, add_complaints, read_examples
from hatrack.data.tokens import Tokens, tokenize
from hatrack.recipe import Recipe, Task


def read_recipe_examples(recipe: Recipe) -> Examples:
    """Reads the examples of a recipe's files.

    Raises BadRows with every row that cannot be used for training. These include rows that only the base's tokenizer or
    chat template refuses, unless checking them would require downloading the base.
    """
    try:
        return read_examples(recipe)
    except BadRows as error:
        if recipe.base is None or is_on_hub(recipe.base):
            raise
        raise add_complaints(error, lambda examples: _check_tokens(recipe, examples)) from None


def tokenize_for_base(
    recipe: Recipe, base: BaseDescription, examples: Examples, template: str | None = None
) -> tuple[Any, Examples, Tokens]:
    """Returns the base's tokenizer, the examples that can be used for training, and their tokens.

    `template` is the chat template to use, by default the base's own. Raises ModelError if the base does not support
    the task, and whatever `tokenize` raises.
    """
    task = cast(Task, examples.task)
    config = load_config(base, task=task, labels=examples.labels, multi_label=examples.multi_label)
    tokenizer = load_tokenizer(base)
    return tokenizer, *tokenize(recipe, examples, tokenizer, config, template=template)


def _check_tokens(recipe: Recipe, examples: Examples) -> None:
    base = find_base(str(recipe.base), recipe.revision, trust=recipe.trust_remote_code)
    tokenize_for_base(recipe, base, examples)
