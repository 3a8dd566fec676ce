"""The rows an adapter was not trained on, found again from what its hatrack.json remembers."""

from hatrack.data.examples import prepare
from hatrack.data.read import read_rows
from hatrack.data.render import TokenRows, render_cached
from hatrack.errors import AdapterError, DataError
from hatrack.hat import Hat
from hatrack.recipe import Recipe


def held_out(hat: Hat, data: str | None = None) -> TokenRows:
    """The held-out rows of the adapter in use as tokens; or all rows of `data`, with the adapter's labels.

    Raises AdapterError where the adapter does not remember its data, DataError where the file has changed since:
    then rows it was trained on could be among those held out.
    """
    made = hat.hats[str(hat.active)]
    if not made.recipe.get("data"):
        raise AdapterError(f"{made.name} does not remember what it was trained on", fix="name rows with --data")
    recipe = Recipe.make(**made.recipe)
    train_rows = read_rows(str(recipe.data))
    eval_source = data or recipe.eval_data
    examples = prepare(recipe, train_rows, read_rows(eval_source) if eval_source else None)
    if data is None and examples.digest != made.data.get("digest"):
        raise DataError(
            f"{recipe.data} is not what {made.name} was trained on any more",
            fix="name other rows with --data",
        )
    return render_cached(
        examples.held_out,
        hat.base.tokenizer,
        task=hat.task,
        max_length=made.max_length,
        labels=len(made.labels),
        multi_label=made.multi_label,
        template=made.template,
        source=str(eval_source or recipe.data),
    )
