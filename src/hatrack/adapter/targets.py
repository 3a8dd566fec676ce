"""Which linear layers get an adapter: a choice by name and shape alone. Knows no torch and touches no model."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hatrack.adapter.count import Experts
from hatrack.errors import RecipeError, TargetError
from hatrack.recipe import flag, nearest

NEVER = {
    r"(^|\.)(gate|shared_experts?_gate|\w*router\w*)(\.|$)": "sends tokens to experts",
    r"(^|\.)(indexer|scorer)\.": "chooses the tokens that attention looks at, which no gradient tells it",
    r"(^|\.)(mamba|mixer)\.(x_proj|dt_proj|out_proj)$": "is read by the kernels of state-space layers past any adapter",
}
"""Layers that never get an adapter, and why: one on a router changes which experts run, not what they say."""

OTHER_SENSES = re.compile(r"vision|visual|image|img_|audio|speech", re.IGNORECASE)
"""Parts of a model that text does not pass through: an adapter there learns nothing from it."""

NARROW = 8
"""A layer narrower than the adapter's rank is left out if the widest one is so many times as wide."""

NO_EXPERTS = Experts()

KINDS = {
    "attention": r"attn|attention|(^|\.)([qkvo]|qkv)_proj$",
    "shared expert": r"shared_expert|shared_mlp",
    "expert": r"(^|\.)experts\.",
    "state-space": r"(^|\.)(mamba|mixer)\.in_proj$",
    "MLP": "",
}
"""What a projection belongs to, by the first pattern that its place in a layer matches."""

OUTPUT_HEADS = (
    "lm_head",
    "embed_out",
    "score",
    "classifier",
    "pre_classifier",
    "classification_head",
    "qa_outputs",
    "cls",
    "generator_lm_head",
    "lm_loss",
    "head",
)


@dataclass(frozen=True)
class TargetChoice:
    """The layers that get an adapter by full name, what to call them in peft's `target_modules`, and why these.

    `notes` say which others could be expected to get one, and why they do not.
    """

    names: tuple[str, ...]
    target_modules: tuple[str, ...]
    why: str
    notes: tuple[str, ...] = ()


def choose_targets(
    linears: Mapping[str, tuple[int, int]],
    targets: str,
    top_layers: int | None,
    *,
    r: int = 1,
    heads: Collection[str] = (),
    modules: Collection[str] = (),
    experts: Experts = NO_EXPERTS,
) -> TargetChoice:
    """Chooses among `linears` (full name -> (d_in, d_out)).

    `targets`: auto (every projection inside the repeated layers), all-linear (every linear layer but the output's), or
    names with commas. Both leave out what no text passes through, and layers 1 wide or much narrower than `r`.
    `top_layers`: only the last N of the repeated layers. `heads`: modules of the output head. `modules`: every module's
    name, so that no short name catches something else. `experts`: those that are one tensor, no layers.

    Raises TargetError for names that match nothing or layers that never get an adapter, RecipeError where there are
    fewer than N layers.
    """
    everything = set(modules) | set(linears)
    body = {name for name in linears if not _in_head(name, heads) and not never(name)}
    confused = {name for name in body if _short(name) in experts.names}
    body -= confused
    notes = _notes(experts, confused)
    if targets in ("auto", "all-linear"):
        names = {name for name in body if not OTHER_SENSES.search(name) and (targets == "all-linear" or _place(name))}
        narrow = _narrow(names, linears, r)
        names -= narrow
        if narrow:
            notes.append(f"none on {_layers(len(narrow))} narrower than {flag('r')} {r} ({_some(_leaves(narrow))})")
        why = f"{_kinds(names)} projections" if targets == "auto" else "every linear layer but the output's"
    else:
        names = _named([name.strip() for name in targets.split(",")], body, linears, everything, experts)
        why = f"the layers named {targets}"
    if top_layers is not None:
        names, depth = _top(names, linears, top_layers), f"the last {top_layers} layers"
        why = f"{why}, in {depth}"
    if not names:
        raise TargetError(
            f"no layer to adapt: {why}", got=_some(_leaves(body)), fix="name layers with --targets NAME,NAME"
        )
    ordered = tuple(name for name in linears if name in names)
    return TargetChoice(ordered, tuple(_short_names(ordered, everything)), why, tuple(notes))


def check_rank(r: int, choice: TargetChoice, linears: Mapping[str, tuple[int, int]]) -> None:
    """Raises RecipeError where an adapter would be wider than a layer it is put on."""
    narrow = min(choice.names, key=lambda name: min(linears[name]))
    side = min(linears[narrow])
    if r > side:
        raise RecipeError(f"--r is larger than {narrow} is wide", got=f"{r} and {side}", fix=f"at most --r {side}")


def matches(name: str, target: str) -> bool:
    """peft's rule: the whole name, or its last parts."""
    return name == target or name.endswith("." + target)


def layer_counts(names: Iterable[str]) -> dict[str, int]:
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


def never(name: str) -> str | None:
    """Why a layer gets no adapter, whatever the targets are; None where it may get one."""
    return next((why for pattern, why in NEVER.items() if re.search(pattern, name)), None)


def _notes(experts: Experts, confused: Collection[str]) -> list[str]:
    joined = "none on the experts: they are joined into one tensor in each layer, which takes no adapter"
    notes = [joined] if experts.modules else []
    if confused:
        beside = f"{_layers(len(confused))} beside them"
        notes.append(f"none on {beside}, which peft takes for experts by name ({_some(_leaves(confused))})")
    return notes


def _narrow(names: Collection[str], linears: Mapping[str, tuple[int, int]], r: int) -> set[str]:
    """Those 1 wide, or narrower than `r` and than an eighth of the widest: small dials beside the projections."""
    widest = max((max(linears[name]) for name in names), default=0)
    sides = {name: min(linears[name]) for name in names}
    return {name for name, side in sides.items() if side == 1 or (side < r and NARROW * side <= widest)}


def _kinds(names: Iterable[str]) -> str:
    """What projections belong to: `attention and MLP`."""
    places = {(_place(name) or ("", 0, name))[2] for name in names}
    found = {next(kind for kind, pattern in KINDS.items() if re.search(pattern, place)) for place in places}
    ordered = [kind for kind in KINDS if kind in found]
    return " and ".join(filter(None, [", ".join(ordered[:-1]), *ordered[-1:]]))


def _named(
    targets: Sequence[str],
    body: set[str],
    linears: Mapping[str, object],
    modules: set[str],
    experts: Experts,
) -> set[str]:
    """Every layer that one of the names means; each name must mean at least one."""
    fused = [t for t in targets if _short(t) in experts.names or any(matches(name, t) for name in experts.modules)]
    if fused:
        raise TargetError(
            f"{', '.join(fused)}: the experts here are joined into one tensor in each layer, which takes no adapter",
            got=f"a model with {_some(_leaves(body))}",
            fix=f"use those names, or {flag('targets')} auto",
            gotcha="experts-joined",
        )
    missing = [target for target in targets if not any(matches(name, target) for name in body)]
    if missing:
        leaves = _leaves(body)
        problems = []
        for target in missing:
            guess = nearest(target, leaves)
            refused = next(
                (why for name in {*linears, *modules} if matches(name, target) and (why := never(name))), None
            )
            if refused:
                problems.append(f"{target!r} {refused}")
            elif any(matches(name, target) for name in linears):
                problems.append(f"{target!r} is the output head, which is trained without being named")
            elif any(matches(name, target) for name in modules):
                problems.append(f"{target!r} is not a linear layer" + (f" (did you mean {guess}?)" if guess else ""))
            else:
                problems.append(f"{target!r} matches no layer" + (f" (did you mean {guess}?)" if guess else ""))
        got = f"a model with {_some(leaves)}{', whose experts are joined tensors' if experts.modules else ''}"
        raise TargetError("; ".join(problems), got=got, fix="use those names, or --targets auto")
    return {name for name in body if any(matches(name, target) for target in targets)}


def _top(names: set[str], linears: Iterable[str], top: int) -> set[str]:
    """Those in the last `top` layers of their stack. A shorter second stack keeps all of its layers."""
    depths = layer_counts(linears)
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


def _short(name: str) -> str:
    """The last part of a full name."""
    return name.rpartition(".")[2]


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count:,} layers"


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted(set(map(_short, names)))


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
