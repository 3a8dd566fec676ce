"""Finds the rows to compare adapters on, without rows that one of them was trained on.

A row counts as trained on if its content matches. What an adapter was trained on is known from the row keys in its
folder (`data/trained_rows.py`); without them, the data file named in its hatrack.json is read again, if it has not
changed.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from hatrack.adapter.card import AdapterCard
from hatrack.console import format_rows, say
from hatrack.data import trained_rows
from hatrack.data.complaints import BadRows, refuse_or_skip
from hatrack.data.examples import Example, Examples, examples_to_score, make_examples
from hatrack.data.in_memory import source_name
from hatrack.data.limit import choose_max_length, length_limit
from hatrack.data.read import read_rows
from hatrack.data.render import RenderSettings, TokenRows, render_cached
from hatrack.data.template import chat_template
from hatrack.data.tokens import check_known_tokens, render_both, render_settings, single_end_token
from hatrack.errors import AdapterError, DataError, HatrackError
from hatrack.evaluate.comparable import check_comparable
from hatrack.inference.hat import Hat
from hatrack.recipe import Recipe, flag

FEWEST_ROWS = 20
"""With fewer rows the bootstrap understates the uncertainty, so there is no verdict."""
COLUMNS = ("text", "label", "prompt", "completion", "messages")


def held_out_rows(hat: Hat, data: str | None = None, **options: str) -> dict[str, TokenRows]:
    """Name of each attached adapter -> the rows to score, tokenized with its tokenizer. All adapters get the same rows:
    those of `data`, or by default those that all adapters held out, without rows that one of them was trained on.

    `options` say how to read `data`: `text`, `label`, `prompt`, `completion`, `messages` name its columns, `bad_rows`
    is refuse or skip. Raises AdapterError if the adapters cannot be compared or do not record their data; DataError if
    the recorded data has changed or too few rows are left.
    """
    check_comparable(hat.cards)
    if data is None:
        examples_by_adapter = {name: _read_training_rows(hat, name, card) for name, card in hat.cards.items()}
        task, examples = hat.task, _held_out_by_all(examples_by_adapter)
        source = " and ".join(dict.fromkeys(str(card.recipe["data"]) for card in hat.cards.values()))
    else:
        examples_by_adapter, source = {}, source_name(data)
        task, examples = _read_data(next(iter(hat.cards.values())), data, options)
    fresh = _leave_out_trained(hat, examples, examples_by_adapter, source)
    bad_rows = options.get("bad_rows", next(iter(hat.cards.values())).recipe.get("bad_rows", "refuse"))
    return _render_for_each(hat, task, fresh, source, bad_rows)


def _read_training_rows(hat: Hat, name: str, card: AdapterCard) -> Examples:
    """Reads an adapter's training and held-out rows again. Raises DataError if they have changed."""
    if not card.recipe.get("data"):
        raise AdapterError(f"{name} does not record what it was trained on", fix=f"give rows with {flag('data')}")
    recipe = Recipe.make(**{**card.recipe, "task": card.task})
    fix = f"give rows with {flag('data')}; that may be the same file: rows that were trained on are left out"
    try:
        rows, eval_rows = read_rows(str(recipe.data)), read_rows(recipe.eval_data) if recipe.eval_data else None
    except DataError as error:
        what = f"the rows that {name} was trained on cannot be read: {error.what}"
        raise DataError(what, got=error.got, fix=fix) from error
    examples = make_examples(recipe, rows, eval_rows)
    if recipe.bad_rows == "skip" and card.max_length:  # also leave out bad rows that only tokenizing finds
        tokenizer = hat.base.tokenizer
        end_token = single_end_token(tokenizer, hat.base.model.config, card.task)
        settings = render_settings(examples, card.max_length, card.template, end_token)
        examples, _, _ = render_both(recipe, examples, tokenizer, settings)
    if examples.digest != card.data.get("digest"):
        raise DataError(f"{recipe.data} is no longer what {name} was trained on", fix=fix)
    return examples


def _held_out_by_all(examples_by_adapter: Mapping[str, Examples]) -> list[Example]:
    first, *others = examples_by_adapter.values()
    shared = first.held_out
    for other in others:
        shared = _select(shared, trained_rows.are_among(shared, trained_rows.row_keys(other.held_out)))
    if len(shared) < min(FEWEST_ROWS, *(len(each.held_out) for each in examples_by_adapter.values())):
        raise DataError(
            f"{' and '.join(examples_by_adapter)} hold out different rows",
            got=f"{len(shared)} in common",
            fix=f"give rows that none was trained on with {flag('data')}",
            gotcha="scored-on-training-rows",
        )
    return shared


def _read_data(card: AdapterCard, data: str, options: Mapping[str, str]) -> tuple[str, list[Example]]:
    """Reads a file's rows and maps their labels to the adapter's. Also returns the task of the rows."""
    rows = read_rows(data)
    kept = {role: card.recipe[role] for role in COLUMNS if card.recipe.get(role) in rows.columns}
    kept |= {"bad_rows": card.recipe["bad_rows"]} if "bad_rows" in card.recipe else {}
    either_task = card.task != "classify" and not card.recipe  # made elsewhere: its task is a guess
    default_names = {str(index): f"LABEL_{index}" for index in range(len(card.labels))}
    # An adapter with transformers' default names also accepts rows with the numbers of its labels.
    aliases = default_names if card.labels == list(default_names.values()) else {}
    problems: list[DataError] = []
    for task in ["chat", "complete"] if either_task else [card.task]:
        recipe = Recipe.make(task=task, **{**kept, **options})
        try:
            return examples_to_score(recipe, rows, card.labels, card.multi_label, aliases)
        except DataError as error:
            problems.append(error)
    raise problems[0]


def _leave_out_trained(
    hat: Hat, examples: list[Example], examples_by_adapter: Mapping[str, Examples], source: str
) -> list[Example]:
    """The rows that no adapter was trained on. Raises DataError if too few are left."""
    keys = [np.empty(0, dtype=np.uint64)]
    for name, card in hat.cards.items():
        known = _trained_keys(hat, name, card, examples_by_adapter.get(name))
        if known is None:
            say(f"{name} does not record the rows it was trained on: some of these may be among them")
        else:
            keys.append(known)
    known_keys = np.concatenate(keys)
    trained = trained_rows.are_among(examples, known_keys)
    count, fresh = int(trained.sum()), _select(examples, ~trained)
    if count and len(fresh) < (
        1 if examples_by_adapter else FEWEST_ROWS
    ):  # without `data`: the runs' own held-out rows may be few
        raise DataError(
            f"these {count:,} rows were trained on, so they cannot be scored",
            got=f"{source}, which has {len(fresh) or 'no'} other row{'s' * (len(fresh) != 1)}",
            fix=f"give at least {FEWEST_ROWS} other rows with {flag('data')}",
            gotcha="scored-on-training-rows",
        )
    if count:
        say(f"{count:,} of {len(examples):,} rows were trained on and are left out")
    return _score_new_turns(fresh, known_keys)


def _score_new_turns(examples: list[Example], known: np.ndarray) -> list[Example]:
    """Marks turns that were trained on as context, so that only the new turns of a conversation are scored."""
    found = [
        replace(each, context_only=tuple(sorted({*each.context_only, *turns})))
        if (turns := trained_rows.seen_turns(each, known))
        else each
        for each in examples
    ]
    continued = sum(new is not old for new, old in zip(found, examples, strict=True))
    if continued:
        say(f"{format_rows(continued)} continue conversations that were trained on: only their new answers are scored")
    return found


def _trained_keys(hat: Hat, name: str, card: AdapterCard, adapter_examples: Examples | None) -> np.ndarray | None:
    """The keys of the rows that an adapter was trained on; None if they are not known."""
    path = hat.adapters[name].folder / trained_rows.FILE
    if path.exists():
        try:
            return trained_rows.from_bytes(path.read_bytes())
        except (OSError, ValueError) as error:
            raise AdapterError(f"{path} is damaged", got=error, fix="copy the adapter again") from error
    if adapter_examples is None and card.recipe.get("data"):
        with contextlib.suppress(HatrackError):  # the file is gone or has changed
            adapter_examples = _read_training_rows(hat, name, card)
    return None if adapter_examples is None else trained_rows.row_and_turn_keys(adapter_examples.train)


def _render_for_each(hat: Hat, task: str, examples: list[Example], source: str, bad_rows: str) -> dict[str, TokenRows]:
    """The rows to score, tokenized with each adapter's tokenizer, with its label ids. Template and maximum length are
    the same for all.

    Raises BadRows if some cannot be learned from, unless `bad_rows` is skip.
    """
    config, first = hat.base.model.config, next(iter(hat.cards.values()))
    template = _shared_template(hat) if task == "chat" else None
    limits = {name: length_limit(hat.tokenizer_of(name).model_max_length, config.to_dict()) for name in hat.cards}
    lengths = {card.max_length or choose_max_length(None, limits[name], task)[0] for name, card in hat.cards.items()}
    if len(lengths) > 1:
        say(f"rows are cut at {min(lengths)} tokens, the shortest length that an adapter was trained with")
    rows = {}
    try:
        for name, card in hat.cards.items():
            label_ids, tokenizer = [card.labels.index(label) for label in first.labels], hat.tokenizer_of(name)
            end_token = single_end_token(tokenizer, config, task)
            settings = RenderSettings(task, min(lengths), len(card.labels), card.multi_label, template, end_token)
            renumbered = [_with_label_ids(each, label_ids) for each in examples]
            rows[name] = render_cached(renumbered, tokenizer, settings, source)
            check_known_tokens(rows[name], tokenizer, config)
    except BadRows as error:
        refuse_or_skip(error, bad_rows)
        bad_numbers = {bad.row for _, each in error.bad for bad in each}
        remaining = [example for example in examples if example.row not in bad_numbers]
        if not remaining:
            raise
        return _render_for_each(hat, task, remaining, source, bad_rows)
    return rows


def _shared_template(hat: Hat) -> str:
    """The chat template of all adapters, or their tokenizer's. Raises AdapterError if they differ."""
    found = {card.template or chat_template(hat.tokenizer_of(name))[0] for name, card in hat.cards.items()}
    if len(found) > 1:
        raise AdapterError(
            f"{' and '.join(hat.cards)} were trained with different chat templates: their losses cannot be compared",
            fix="compare each with the base",
            gotcha="adapters-not-alike",
        )
    return found.pop()


def _with_label_ids(example: Example, numbers: Sequence[int]) -> Example:
    """The example with the label `numbers[i]` in place of label i."""
    label = example.label
    if label is None:
        return example
    return replace(
        example, label=tuple(sorted(numbers[i] for i in label)) if isinstance(label, tuple) else numbers[label]
    )


def _select(examples: Sequence[Example], chosen: np.ndarray) -> list[Example]:
    return [example for example, is_chosen in zip(examples, chosen, strict=True) if is_chosen]
