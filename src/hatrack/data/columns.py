"""Finds the task, and the column of each role. Guesses only if one reading is possible, and reports it.

Knows nothing of what becomes of the rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hatrack.console import say
from hatrack.data.messages import looks_like_conversation
from hatrack.data.table import is_index_column
from hatrack.errors import DataError, short_repr
from hatrack.recipe import Recipe, flag, nearest

COMMON_NAMES = {
    "text": ("text", "sentence", "review", "content", "body", "document", "message", "comment", "tweet", "description"),
    "label": ("label", "labels", "category", "categories", "class", "target", "sentiment", "tag", "tags", "intent"),
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "instruction", "question", "input", "query"),
    "completion": ("completion", "response", "answer", "output", "reply"),
}
EXTRA_NAMES = {
    "input": ("input", "context", "passage", "document"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "tools": ("tools",),
}
"""Columns that are read in addition to a conversation, or to a prompt and its completion."""
EXTRA_MESSAGES = {
    "input": "the prompt is {prompt!r}, then a blank line and {column!r} if the row has one",
    "system": "{column!r} becomes the first turn",
    "history": "{column!r} becomes earlier turns, whose answers are learned too",
    "tools": "{column!r} holds the tools that the chat template is given",
}
WEIGHT_NAMES: tuple[str, ...] = ("weight", "weights", "sample_weight", "loss_weight", "loss_scale", "mask", "loss_mask")
WEIGHT_NAMES += ("loss", "train", "training", "trainable")
TRUE_VALUES, FALSE_VALUES = ("1", "1.0", "true"), ("0", "0.0", "false")
UNSUPPORTED_NAMES: tuple[str, ...] = ("functions", "function_call", "tool_calls", "reasoning_content", "reasoning")
UNSUPPORTED_NAMES += ("thinking", "cot", "chain_of_thought", "rationale", "thought", "thoughts", "masked")
UNSUPPORTED_NAMES += ("chat_template_kwargs", "images", "image", "videos", "video", "audios", "audio")
SECOND_TEXT_NAMES = ("text_pair", "text2", "text_b", "sentence2", "sentence_b", "premise", "hypothesis")
"""The second text in data sets that classify pairs."""
NEVER_TEXTS = ("id", "idx", "index", "uid", "date", "time")
NEVER_LABELS = ("id", "idx", "index", "uid", "title", "name", "url", "date", "time", "author")
TASK_ROLES = {
    "classify": (("text", "label"),),
    "chat": (("messages",), ("prompt", "completion")),
    "complete": (("prompt", "completion"), ("text",)),
}


def find_columns(
    recipe: Recipe, columns: Sequence[str], source: str, first_row: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, str]]:
    """The task, and the column of each role it needs. `first_row` helps to explain unclear columns.

    Raises DataError if a named column is missing, or if the columns leave the task or a role open.
    """
    named = {role: getattr(recipe, role) for role in COMMON_NAMES if getattr(recipe, role) is not None}
    for role, column in named.items():
        if column not in columns:
            guess = nearest(column, columns)
            raise DataError(
                f"{source} has no column {column!r} for {flag(role)}",
                got=f"columns {', '.join(columns)}",
                fix=f"did you mean {guess}?" if guess else f"name one of them with {flag(role)}",
            )
    task_given = recipe.task is not None
    columns = [column for column in columns if not is_index_column(column)]
    for task in [recipe.task] if recipe.task else ["chat", "classify", "complete"]:
        for roles in TASK_ROLES[task]:
            found = _fill_roles(roles, named, columns, task_given)
            if task == "complete" and recipe.task is None and len(columns) > len(roles):
                continue  # a text among other columns: they may matter
            if found and set(named) <= set(roles):
                _say_guesses(task, found, named, recipe)
                return task, found
    raise _unclear_columns(recipe.task, columns, source, first_row or {})


def _unclear_columns(task: str | None, columns: Sequence[str], source: str, first_row: Mapping[str, Any]) -> DataError:
    """The error for columns that can be read in no way or in several. `first_row` shows what is inside objects."""
    inside = {name: value for name, value in first_row.items() if isinstance(value, dict) and value}
    names = [
        f"{name} (an object of {', '.join(map(str, inside[name]))})" if name in inside else name for name in columns
    ]
    known = {column.strip().lower(): column for column in columns}
    if {"chosen", "rejected"} <= set(known):
        chosen, suggested = known["chosen"], {"messages": known["chosen"]}
        if "prompt" in known:
            suggested = {"prompt": known["prompt"], "completion": chosen}
        elif isinstance(first_row.get(chosen), str) and not looks_like_conversation(first_row[chosen]):
            suggested = {"task": "complete", "text": chosen}
        return DataError(
            f"{source} has pairs of a better and a worse answer; hatrack learns from one answer",
            got=f"columns {', '.join(names)}",
            fix=f"learn the better one: {' '.join(flag(role, column) for role, column in suggested.items())}",
        )
    accepted = {each: TASK_ROLES[each] for each in ([task] if task else ["classify", "chat", "complete"])}
    sets = dict.fromkeys(roles for each in accepted.values() for roles in each)
    wanted = " or ".join(" and ".join(roles) for roles in sets)
    flags = ", or ".join(
        ("--task complete " if roles == ("text",) and not task else "")
        + " ".join(f"{flag(role)} COLUMN" for role in roles)
        for roles in sets
    )
    unnest = f"make columns of what is inside {next(iter(inside))}, then " if inside else ""
    return DataError(
        f"{source} has no clear columns {f'for {task}' if task else 'to learn from'} ({wanted})",
        got=f"columns {', '.join(names)}",
        fix=f"{unnest}name them: {flags}",
    )


def find_extra_columns(
    task: str, found: Mapping[str, str], recipe: Recipe, filled: Mapping[str, Sequence[Any]]
) -> dict[str, str]:
    """The columns that are read in addition to those of `found`, by role: input, system, history, tools.

    `filled` has the columns that are not empty, with their values. Says what is read as what, and what is not read.
    Raises DataError for columns whose meaning hatrack does not support.
    """
    others = [column for column in filled if column not in found.values() and not is_index_column(column)]
    unread_names = {column: column.strip().lower() for column in others}
    for column, name in unread_names.items():
        unsupported = _unsupported_values(task, name, filled[column], recipe)
        if unsupported:
            raise DataError(
                f"the column {column!r} means something that hatrack does not support",
                got=f"values such as {short_repr(unsupported[0])}",
                fix="remove or rename it",
                gotcha="columns-ignored",
            )
    extra: dict[str, str] = {}
    paired = "completion" in found
    prompts = [
        column
        for column, name in unread_names.items()
        if name in COMMON_NAMES["prompt"] and name not in EXTRA_NAMES["input"]
    ]
    if paired and prompts and recipe.prompt is None:
        raise DataError(
            "two columns could be the prompt",
            got=f"{found['prompt']}, {prompts[0]}",
            fix=f"{flag('prompt', found['prompt'])} {flag('completion', found['completion'])} leaves {prompts[0]!r} "
            "out; or join both into one column",
            gotcha="columns-ignored",
        )
    for role, names in EXTRA_NAMES.items() if task == "chat" or paired else ():
        candidates = [column for column, name in unread_names.items() if name in names]
        if role == "input" and (not paired or recipe.prompt is not None):
            continue  # a named prompt is the whole prompt
        if role == "history" and not paired:
            continue
        if len(candidates) > 1:
            raise DataError(
                f"two columns could be the {role}", got=", ".join(candidates), fix="remove or rename one of them"
            )
        if candidates and task == "complete" and role != "input":
            raise DataError(
                f"the column {candidates[0]!r} is not used by --task complete",
                got=f"columns {', '.join(filled)}",
                fix="use --task chat, or remove or rename it",
            )
        if candidates:
            extra[role] = candidates[0]
            say(EXTRA_MESSAGES[role].format(prompt=found.get("prompt"), column=candidates[0]))
    unread = [column for column in unread_names if column not in extra.values()]
    if unread:
        say(f"not read: {', '.join(unread)}")
    return extra


def find_prompt_columns(task: str, columns: Sequence[str], source: str, named: Mapping[str, str]) -> dict[str, str]:
    """The columns that hold prompts, by role. The rows need no labels or completions.

    `named` are the columns named by the user, now or for training. Says what is guessed; raises DataError if unclear.
    """
    roles = {"classify": ("text",), "chat": ("messages", "prompt"), "complete": ("prompt", "text")}[task]
    found: dict[str, str] | None = next(({role: named[role]} for role in roles if named.get(role) in columns), None)
    if found is None:
        filled = (_fill_roles((role,), {}, columns, task_given=role != "messages") for role in roles)
        found = next((each for each in filled if each), None)
        if found is None:
            raise DataError(
                f"it is not clear which column of {source} to answer",
                got=f"columns {', '.join(columns)}",
                fix=f"name it with {flag('text')}",
            )
        extra = {"chat": ("system", "tools", "history", "input"), "complete": ("input",), "classify": ()}[task]
        for other in extra if "prompt" in found else extra[:2]:
            names = [
                each for each in columns if each.strip().lower() in EXTRA_NAMES[other] and each not in found.values()
            ]
            if names:
                found[other] = names[0]
    if "tools" in found:
        raise DataError(
            f"{source} has tools, which are not used when an adapter answers",
            got=f"column {found['tools']}",
            fix="remove or rename it",
            gotcha="columns-ignored",
        )
    if any(role != column for role, column in found.items()):
        say(f"columns: {', '.join(f'{role} = {column!r}' for role, column in found.items())}")
    return found


def _unsupported_values(task: str, name: str, values: Sequence[Any], recipe: Recipe) -> Sequence[Any]:
    """The values of an unread column that say what or how much to learn from, which hatrack does not support."""
    not_true = [value for value in values if str(value).strip().lower() not in TRUE_VALUES]
    chosen = task == "classify" and recipe.text is not None and recipe.label is not None
    if name in WEIGHT_NAMES:
        return [] if chosen else not_true
    if task == "classify" and name in SECOND_TEXT_NAMES:
        return [] if chosen else values
    if task != "chat":
        return []
    is_rating = name == "label" and all(str(value).strip().lower() in FALSE_VALUES for value in not_true)
    return not_true if is_rating else values if name in UNSUPPORTED_NAMES else []


def _fill_roles(
    roles: Sequence[str], named: dict[str, str], columns: Sequence[str], task_given: bool
) -> dict[str, str] | None:
    """A column for every role: as named, or the one with a common name, or the only one left; None if one has none.

    `task_given` says whether the user chose the task of these roles.
    """
    found = {role: named[role] for role in roles if role in named}
    for role in roles:
        if role not in found:
            free = [column for column in columns if column not in found.values()]
            candidates = [column for column in free if column.strip().lower() in COMMON_NAMES[role]]
            inputs = [column for column in candidates if column.strip().lower() in EXTRA_NAMES["input"]]
            if role == "prompt" and len(inputs) < len(candidates):  # the input of an instruction, not the instruction
                candidates = [column for column in candidates if column not in inputs]
            exact = [column for column in candidates if column.strip().lower() == role]
            if len(exact) == 1 or len(candidates) == 1:
                found[role] = (exact or candidates)[0]
    open_roles = [role for role in roles if role not in found]
    free = [column for column in columns if column not in found.values()]
    # two columns, one of them found; or one column, which can only be the text
    last_one = len(open_roles) == 1 == len(free) and (found or task_given or roles == ("text",))
    if last_one and _can_be(open_roles[0], free[0], task_given):
        found[open_roles[0]] = free[0]
    return {role: found[role] for role in roles} if len(found) == len(roles) else None


def _can_be(role: str, column: str, task_given: bool) -> bool:
    """Whether the last column left can have this role: not if its name says that it is something else."""
    name = column.strip().lower()
    if name in {"label": NEVER_LABELS, "text": NEVER_TEXTS}.get(role, ()):
        return False
    roles = [other for other, names in COMMON_NAMES.items() if name in names]
    return task_given or not roles or roles == [role] or (role == "text" and roles == ["prompt"])


def _say_guesses(task: str, found: dict[str, str], named: dict[str, str], recipe: Recipe) -> None:
    guessed = [role for role, column in found.items() if role not in named and column != role]
    if recipe.task is None:
        say(f"task: {task}, from the columns (--task NAME changes it)")
    if guessed:
        listed = ", ".join(f"{role} = {column!r}" for role, column in found.items())
        flags = " and ".join(flag(role) for role in guessed)
        say(f"columns: {listed} (guessed; {flags} to change)")
