"""Which column is which, and which task they are made for. Guessed only where one reading is possible, and said.

Knows nothing of what becomes of the rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hatrack.console import say
from hatrack.data.messages import looks_like_conversation
from hatrack.errors import DataError, short_repr
from hatrack.recipe import Recipe, flag, nearest

COMMON = {
    "text": ("text", "sentence", "review", "content", "body", "document", "message", "comment", "tweet", "description"),
    "label": ("label", "labels", "category", "categories", "class", "target", "sentiment", "tag", "tags", "intent"),
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "instruction", "question", "input", "query"),
    "completion": ("completion", "response", "answer", "output", "reply"),
}
BESIDE = {
    "input": ("input", "context", "passage", "document"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "tools": ("tools",),
}
"""Columns beside a conversation, or a prompt and its completion, whose meaning is settled."""
SAID = {
    "input": "the prompt is {prompt!r}, and where there is one a blank line and {column!r}",
    "system": "{column!r} becomes the first turn",
    "history": "{column!r} becomes earlier turns, whose answers are learned too",
    "tools": "{column!r} are the tools that the chat template is given",
}
WEIGHTS: tuple[str, ...] = ("weight", "weights", "sample_weight", "loss_weight", "loss_scale", "mask", "loss_mask")
WEIGHTS += ("loss", "train", "training", "trainable")
ONE, ZERO = ("1", "1.0", "true"), ("0", "0.0", "false")
MEANING: tuple[str, ...] = ("functions", "function_call", "tool_calls", "reasoning_content", "reasoning", "thinking")
MEANING += ("cot", "chain_of_thought", "rationale", "thought", "thoughts", "masked")
MEANING += ("chat_template_kwargs", "images", "image", "videos", "video", "audios", "audio")
SECOND_TEXTS = ("text_pair", "text2", "text_b", "sentence2", "sentence_b", "premise", "hypothesis")
"""The other half of what is classified, in data sets of pairs."""
NEVER_TEXTS = ("id", "idx", "index", "uid", "date", "time")
NEVER_LABELS = ("id", "idx", "index", "uid", "title", "name", "url", "date", "time", "author")
ROLES = {
    "classify": (("text", "label"),),
    "chat": (("messages",), ("prompt", "completion")),
    "complete": (("prompt", "completion"), ("text",)),
}


def find_columns(
    recipe: Recipe, columns: Sequence[str], source: str, first: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, str]]:
    """The task, and the column of each role it needs. `first` is a row, to tell what is inside of its cells.

    Raises DataError where a named column is missing, or where the columns leave the task or a role open.
    """
    named = {role: getattr(recipe, role) for role in COMMON if getattr(recipe, role) is not None}
    for role, column in named.items():
        if column not in columns:
            guess = nearest(column, columns)
            raise DataError(
                f"{source} has no column {column!r} for {flag(role)}",
                got=f"columns {', '.join(columns)}",
                fix=f"did you mean {guess}?" if guess else f"name one of them with {flag(role)}",
            )
    asked = recipe.task is not None
    columns = [column for column in columns if not nameless(column)]
    for task in [recipe.task] if recipe.task else ["chat", "classify", "complete"]:
        for roles in ROLES[task]:
            found = _fill(roles, named, columns, asked)
            if task == "complete" and recipe.task is None and len(columns) > len(roles):
                continue  # a text among other columns: nobody said that the others do not matter
            if found and set(named) <= set(roles):
                _say_guesses(task, found, named, recipe)
                return task, found
    raise _unclear(recipe.task, columns, source, first or {})


def nameless(column: str) -> bool:
    """Whether a column is an index that pandas wrote: it has no name, and means nothing."""
    return not column.strip() or column.startswith(("Unnamed: ", "__index_level_"))


def _unclear(task: str | None, columns: Sequence[str], source: str, first: Mapping[str, Any]) -> DataError:
    """What to say where no reading of the columns is the only one. `first` is a row, for what lies inside its cells."""
    inside = {name: value for name, value in first.items() if isinstance(value, dict) and value}
    told = [
        f"{name} (an object of {', '.join(map(str, inside[name]))})" if name in inside else name for name in columns
    ]
    known = {column.strip().lower(): column for column in columns}
    if {"chosen", "rejected"} <= set(known):
        chosen, learned = known["chosen"], {"messages": known["chosen"]}
        if "prompt" in known:
            learned = {"prompt": known["prompt"], "completion": chosen}
        elif isinstance(first.get(chosen), str) and not looks_like_conversation(first[chosen]):
            learned = {"task": "complete", "text": chosen}
        return DataError(
            f"{source} has pairs of a better and a worse answer; hatrack learns from one answer",
            got=f"columns {', '.join(told)}",
            fix=f"learn the better one: {' '.join(flag(role, column) for role, column in learned.items())}",
        )
    accepted = {each: ROLES[each] for each in ([task] if task else ["classify", "chat", "complete"])}
    sets = dict.fromkeys(roles for each in accepted.values() for roles in each)
    wanted = " or ".join(" and ".join(roles) for roles in sets)
    ways = ", or ".join(
        ("--task complete " if roles == ("text",) and not task else "")
        + " ".join(f"{flag(role)} COLUMN" for role in roles)
        for roles in sets
    )
    lift = f"bring what is inside {next(iter(inside))} up into columns, then " if inside else ""
    return DataError(
        f"{source} has no clear columns {f'for {task}' if task else 'to learn from'} ({wanted})",
        got=f"columns {', '.join(told)}",
        fix=f"{lift}name them: {ways}",
    )


def find_extra_columns(
    task: str, found: Mapping[str, str], recipe: Recipe, filled: Mapping[str, Sequence[Any]]
) -> dict[str, str]:
    """The columns beside those of `found` that are read as well, by role: input, system, history, tools.

    `filled` has the columns that hold anything, with their values. What becomes of each is said, and what is not read.
    Raises DataError for columns that mean something which is not honoured.
    """
    left = {
        column: column.strip().lower() for column in filled if column not in found.values() and not nameless(column)
    }
    for column, name in left.items():
        telling = _not_honoured(task, name, filled[column], recipe)
        if telling:
            raise DataError(
                f"the column {column!r} means something that hatrack does not honour",
                got=f"values such as {short_repr(telling[0])}",
                fix="remove or rename it",
                gotcha="columns-ignored",
            )
    beside: dict[str, str] = {}
    paired = "completion" in found
    asked = [column for column, name in left.items() if name in COMMON["prompt"] and name not in BESIDE["input"]]
    if paired and asked and recipe.prompt is None:
        raise DataError(
            "two columns could be the prompt",
            got=f"{found['prompt']}, {asked[0]}",
            fix=f"{flag('prompt', found['prompt'])} {flag('completion', found['completion'])} leaves {asked[0]!r} out; "
            "or bring both into one column",
            gotcha="columns-ignored",
        )
    for role, names in BESIDE.items() if task == "chat" or paired else ():
        candidates = [column for column, name in left.items() if name in names]
        if role == "input" and (not paired or recipe.prompt is not None):
            continue  # whoever names the prompt has named all of it
        if role == "history" and not paired:
            continue
        if len(candidates) > 1:
            raise DataError(
                f"two columns could be the {role}", got=", ".join(candidates), fix="remove or rename one of them"
            )
        if candidates and task == "complete" and role != "input":
            raise DataError(
                f"the column {candidates[0]!r} has no place in --task complete",
                got=f"columns {', '.join(filled)}",
                fix="use --task chat, or remove or rename it",
            )
        if candidates:
            beside[role] = candidates[0]
            say(SAID[role].format(prompt=found.get("prompt"), column=candidates[0]))
    unread = [column for column in left if column not in beside.values()]
    if unread:
        say(f"not read: {', '.join(unread)}")
    return beside


def find_prompt_columns(task: str, columns: Sequence[str], source: str, named: Mapping[str, str]) -> dict[str, str]:
    """The columns that an adapter for `task` is asked by, by role, in rows without labels or completions. `named` are
    those a person named, now or for training. Says what is guessed; raises DataError where nothing is clear."""
    roles = {"classify": ("text",), "chat": ("messages", "prompt"), "complete": ("prompt", "text")}[task]
    found: dict[str, str] | None = next(({role: named[role]} for role in roles if named.get(role) in columns), None)
    if found is None:
        filled = (_fill((role,), {}, columns, asked=role != "messages") for role in roles)
        found = next((each for each in filled if each), None)
        if found is None:
            raise DataError(
                f"{source} does not tell which column to answer",
                got=f"columns {', '.join(columns)}",
                fix=f"name it with {flag('text')}",
            )
        beside = {"chat": ("system", "tools", "history", "input"), "complete": ("input",), "classify": ()}[task]
        for other in beside if "prompt" in found else beside[:2]:
            names = [each for each in columns if each.strip().lower() in BESIDE[other] and each not in found.values()]
            if names:
                found[other] = names[0]
    if "tools" in found:
        raise DataError(
            f"{source} brings tools, which are not used when an adapter is asked",
            got=f"column {found['tools']}",
            fix="remove or rename it",
            gotcha="columns-ignored",
        )
    if any(role != column for role, column in found.items()):
        say(f"columns: {', '.join(f'{role} = {column!r}' for role, column in found.items())}")
    return found


def _not_honoured(task: str, name: str, values: Sequence[Any], recipe: Recipe) -> Sequence[Any]:
    """The values of a column that is not read which say what or how much is to be learned."""
    less = [value for value in values if str(value).strip().lower() not in ONE]
    chosen = task == "classify" and recipe.text is not None and recipe.label is not None
    if name in WEIGHTS:
        return [] if chosen else less
    if task == "classify" and name in SECOND_TEXTS:
        return [] if chosen else values
    if task != "chat":
        return []
    judged = name == "label" and all(str(value).strip().lower() in ZERO for value in less)  # good answers and bad ones
    return less if judged else values if name in MEANING else []


def _fill(roles: Sequence[str], named: dict[str, str], columns: Sequence[str], asked: bool) -> dict[str, str] | None:
    """A column for every role: as named, or the one with a common name, or the only one left; None if not all have.

    `asked`: whether a person chose the task these roles belong to.
    """
    found = {role: named[role] for role in roles if role in named}
    for role in roles:
        if role not in found:
            free = [column for column in columns if column not in found.values()]
            candidates = [column for column in free if column.strip().lower() in COMMON[role]]
            about = [column for column in candidates if column.strip().lower() in BESIDE["input"]]
            if role == "prompt" and len(about) < len(candidates):  # what an instruction is about, not the instruction
                candidates = [column for column in candidates if column not in about]
            exact = [column for column in candidates if column.strip().lower() == role]
            if len(exact) == 1 or len(candidates) == 1:
                found[role] = (exact or candidates)[0]
    open_roles = [role for role in roles if role not in found]
    free = [column for column in columns if column not in found.values()]
    # A table of two columns, one of them known; or of one column, which can only be the text
    last_one = len(open_roles) == 1 == len(free) and (found or asked or roles == ("text",))
    if last_one and _may_be(open_roles[0], free[0], asked):
        found[open_roles[0]] = free[0]
    return {role: found[role] for role in roles} if len(found) == len(roles) else None


def _may_be(role: str, column: str, asked: bool) -> bool:
    """Whether the one column that is left can have this role: not if its name says that it is something else."""
    name = column.strip().lower()
    if name in {"label": NEVER_LABELS, "text": NEVER_TEXTS}.get(role, ()):
        return False
    meant = [other for other, names in COMMON.items() if name in names]
    return asked or not meant or meant == [role] or (role == "text" and meant == ["prompt"])


def _say_guesses(task: str, found: dict[str, str], named: dict[str, str], recipe: Recipe) -> None:
    guessed = [role for role, column in found.items() if role not in named and column != role]
    if recipe.task is None:
        say(f"task: {task}, from the columns (--task NAME changes it)")
    if guessed:
        listed = ", ".join(f"{role} = {column!r}" for role, column in found.items())
        flags = " and ".join(flag(role) for role in guessed)
        say(f"columns: {listed} (guessed; {flags} to change)")
