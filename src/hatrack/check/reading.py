"""Reads the rows of a recipe, and complains of all bad ones at once."""

from functools import partial
from typing import cast

from hatrack.base.description import is_on_hub
from hatrack.base.load import load_config, load_tokenizer
from hatrack.base.sources import find_base
from hatrack.data.complaints import BadRows
from hatrack.data.examples import Examples, add_complaints, read_examples
from hatrack.data.tokens import tokenize
from hatrack.recipe import Recipe, Task


def read_recipe_examples(recipe: Recipe) -> Examples:
    """Reads the examples of a recipe's files.

    Raises BadRows with every row that cannot be learned from. These include rows that only the base's tokenizer or chat
    template refuses, unless the base would have to be downloaded for that.
    """
    try:
        return read_examples(recipe)
    except BadRows as error:
        if recipe.base is None or is_on_hub(recipe.base):
            raise
        raise add_complaints(error, partial(_tokenize, recipe)) from None


def _tokenize(recipe: Recipe, examples: Examples) -> None:
    files = find_base(str(recipe.base), recipe.revision, trust=recipe.trust_remote_code)
    task = cast(Task, examples.task)
    config = load_config(files, task=task, labels=examples.labels, multi_label=examples.multi_label)
    tokenize(recipe, examples, load_tokenizer(files), config)
