"""Which column is which, and which task they are made for. Guessed only where one reading is possible, and said.

Knows nothing of what is in the rows.
"""

from collections.abc import Sequence

from hatrack.errors import DataError
from hatrack.recipe import Recipe, flag, nearest
from hatrack.say import say

COMMON = {
    "text": ("text", "sentence", "review", "content", "body", "document", "message", "comment", "tweet", "description"),
    "label": ("label", "labels", "category", "categories", "class", "target", "sentiment", "tag", "tags", "intent"),
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "instruction", "question", "input", "query"),
    "completion": ("completion", "response", "answer", "output", "reply"),
}
NEVER_LABELS = ("id", "idx", "index", "uid", "title", "name", "url", "date", "time", "author")
ROLES = {
    "classify": (("text", "label"),),
    "chat": (("messages",), ("prompt", "completion")),
    "complete": (("prompt", "completion"), ("text",)),
}


def find_columns(recipe: Recipe, columns: Sequence[str], source: str) -> tuple[str, dict[str, str]]:
    """The task, and the column of each role it needs.

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
    for task in [recipe.task] if recipe.task else ["chat", "classify", "complete"]:
        for roles in ROLES[task]:
            found = _fill(roles, named, columns, asked)
            if task == "complete" and recipe.task is None and len(columns) > len(roles):
                continue  # a text among other columns: nobody said that the others do not matter
            if found and set(named) <= set(roles):
                _say_guesses(task, found, named, recipe)
                return task, found
    wanted = " or ".join(" and ".join(roles) for roles in ROLES[recipe.task or "classify"])
    flags = " ".join(f"{flag(role)} COLUMN" for role in ROLES[recipe.task or "classify"][0])
    task = f"for {recipe.task}" if recipe.task else "to learn from"
    raise DataError(
        f"{source} has no clear columns {task} ({wanted})",
        got=f"columns {', '.join(columns)}",
        fix=f"name them: {flags}",
    )


def _fill(roles: Sequence[str], named: dict[str, str], columns: Sequence[str], asked: bool) -> dict[str, str] | None:
    """A column for every role: as named, or the one with a common name, or the only one left; None if not all have.

    `asked`: whether a person chose the task these roles belong to.
    """
    found = {role: named[role] for role in roles if role in named}
    for role in roles:
        if role not in found:
            free = [column for column in columns if column not in found.values()]
            candidates = [column for column in free if column.strip().lower() in COMMON[role]]
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
    if role == "label" and name in NEVER_LABELS:
        return False
    meant = [other for other, names in COMMON.items() if name in names]
    return asked or not meant or meant == [role] or (role == "text" and meant == ["prompt"])


def _say_guesses(task: str, found: dict[str, str], named: dict[str, str], recipe: Recipe) -> None:
    guessed = [role for role, column in found.items() if role not in named and column != role]
    if recipe.task is None:
        say(f"task: {task}, from the columns (--task to change it)")
    if guessed:
        listed = ", ".join(f"{role} = {column!r}" for role, column in found.items())
        flags = " and ".join(flag(role) for role in guessed)
        say(f"columns: {listed} (guessed; {flags} to change)")
