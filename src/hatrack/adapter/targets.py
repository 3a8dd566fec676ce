"""Which linear layers get an adapter: a choice by name and shape alone. Knows no torch and touches no model."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hatrack.errors import RecipeError, TargetError
from hatrack.recipe import nearest

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Layers that send a token to experts: adapting one changes which experts run, not what they say."""

OUTPUT_HEADS = (
    "lm_head",
    "embed_out",
    "score",
    "classifier",
    "pre_classifier",
    "classification_head",
    "qa_outputs",
    "cls",
)


@dataclass(frozen=True)
class Choice:
    """The layers that get an adapter by full name, what to call them in peft's `target_modules`, and why these."""

    names: tuple[str, ...]
    target_modules: tuple[str, ...]
    why: str


def choose(
    linears: Mapping[str, tuple[int, int]],
    targets: str,
    top_layers: int | None,
    *,
    heads: Collection[str] = (),
    modules: Collection[str] = (),
) -> Choice:
    """Chooses among `linears` (full name -> (d_in, d_out)).

    `targets`: auto (every projection inside the repeated layers), all-linear (every linear layer but the output's), or
    names with commas. `top_layers`: only the last N of the repeated layers. `heads`: modules of the output head.
    `modules`: every module's name, so that no short name catches something else.

    Raises TargetError for names that match nothing, RecipeError where there are fewer than N layers.
    """
    everything = set(modules) | set(linears)
    body = {name for name in linears if not _in_head(name, heads)}
    if targets == "auto":
        names = {name for name in body if _place(name) and not _is_router(name, body)}
        why = "attention and MLP projections"
    elif targets == "all-linear":
        names, why = set(body), "every linear layer but the output's"
    else:
        names = _named([name.strip() for name in targets.split(",")], body, linears, everything)
        why = f"the layers named {targets}"
    if top_layers is not None:
        names, depth = _top(names, linears, top_layers), f"the last {top_layers} layers"
        why = f"{why}, in {depth}"
    if not names:
        raise TargetError(
            f"no layer to adapt: {why}", got=_some(_leaves(body)), fix="name layers with --targets NAME,NAME"
        )
    ordered = tuple(name for name in linears if name in names)
    return Choice(ordered, tuple(_short_names(ordered, everything)), why)


def check_rank(r: int, choice: Choice, linears: Mapping[str, tuple[int, int]]) -> None:
    """Raises RecipeError where an adapter would be wider than a layer it is put on."""
    narrow = min(choice.names, key=lambda name: min(linears[name]))
    side = min(linears[narrow])
    if r > side:
        raise RecipeError(f"--r is larger than {narrow} is wide", got=f"{r} and {side}", fix=f"at most --r {side}")


def matches(name: str, target: str) -> bool:
    """peft's rule: the whole name, or its last parts."""
    return name == target or name.endswith("." + target)


def depth(names: Iterable[str]) -> dict[str, int]:
    """Number of layers of each repeated stack: `{"model.layers": 32}`."""
    found: dict[str, int] = defaultdict(int)
    for name in names:
        place = _place(name)
        if place:
            found[place[0]] = max(found[place[0]], place[1] + 1)
    return dict(found)


def _place(name: str) -> tuple[str, int, str] | None:
    """Stack, index and the path inside the layer: `model.layers.7.mlp.up_proj` -> (model.layers, 7, mlp.up_proj)."""
    match = re.match(r"(.*?)\.(\d+)\.(.+)$", name)
    return (match[1], int(match[2]), match[3]) if match else None


def _in_head(name: str, heads: Collection[str]) -> bool:
    first = name.split(".")[0]
    return first in OUTPUT_HEADS or any(name == head or name.startswith(head + ".") for head in heads)


def _is_router(name: str, names: Collection[str]) -> bool:
    parent, _, leaf = name.rpartition(".")
    return leaf in ROUTERS and any(other.startswith(f"{parent}.experts.") for other in names)


def _named(targets: Sequence[str], body: set[str], linears: Mapping[str, object], modules: set[str]) -> set[str]:
    """Every layer that one of the names means; each name must mean at least one."""
    missing = [target for target in targets if not any(matches(name, target) for name in body)]
    if missing:
        leaves = _leaves(body)
        problems = []
        for target in missing:
            guess = nearest(target, leaves)
            if any(matches(name, target) for name in linears):
                problems.append(f"{target!r} is the output head, which is trained without being named")
            elif any(matches(name, target) for name in modules):
                problems.append(f"{target!r} is not a linear layer" + (f" (did you mean {guess}?)" if guess else ""))
            else:
                problems.append(f"{target!r} matches no layer" + (f" (did you mean {guess}?)" if guess else ""))
        raise TargetError(
            "; ".join(problems), got=f"a model with {_some(leaves)}", fix="use those names, or --targets auto"
        )
    return {name for name in body if any(matches(name, target) for target in targets)}


def _top(names: set[str], linears: Iterable[str], top: int) -> set[str]:
    """Those in the last `top` layers of their stack. A shorter second stack keeps all of its layers."""
    depths = depth(linears)
    deepest = max(depths.values(), default=0)
    if top > deepest:
        raise RecipeError(
            f"--layers top-{top} is more than this model has", got=f"{deepest} layers", fix="use --layers all"
        )
    places = {name: _place(name) for name in names}
    return {name for name, place in places.items() if place and place[1] >= depths[place[0]] - top}


def _short_names(names: Sequence[str], modules: set[str]) -> list[str]:
    """The shortest endings that mean exactly these modules to peft; the full names where no endings do."""
    wanted = set(names)
    found: list[str] = []
    for path in dict.fromkeys((_place(name) or ("", 0, name))[2] for name in names):
        parts = path.split(".")
        tails = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        tail = next((tail for tail in tails if all(name in wanted for name in modules if matches(name, tail))), None)
        if tail is None:
            return list(names)
        if tail not in found:
            found.append(tail)
    return found


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
