"""Chooses the linear layers that get an adapter, by name and shape alone; imports no torch."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hatrack.adapter.count import Experts
from hatrack.errors import RecipeError, TargetError, join_first
from hatrack.recipe import flag, nearest

NEVER_ADAPTED = {
    r"(^|\.)(gate|shared_experts?_gate|\w*router\w*)(\.|$)": "sends tokens to experts",
    r"(^|\.)(indexer|scorer)\.": "chooses the tokens that attention looks at, and gets no gradient",
    r"(^|\.)(mamba|mixer)\.(x_proj|dt_proj|out_proj)$": "is read directly by state-space kernels, which skip adapters",
}
"""Layers that never get an adapter, and why: one on a router changes which experts run, not what they say."""

OTHER_MODALITIES = re.compile(r"vision|visual|image|img_|audio|speech", re.IGNORECASE)
"""Parts of a model that text does not pass through. An adapter there would learn nothing."""

NARROW_RATIO = 8
"""A layer narrower than the adapter's rank is left out if the widest layer is at least 8 times as wide."""

NO_EXPERTS = Experts()

KINDS = {
    "attention": r"attn|attention|(^|\.)([qkvo]|qkv)_proj$",
    "shared expert": r"shared_expert|shared_mlp",
    "expert": r"(^|\.)experts\.",
    "state-space": r"(^|\.)(mamba|mixer)\.in_proj$",
    "MLP": "",
}
"""Kind of block -> pattern of a projection's path inside its layer. The first match counts."""

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
class ModelLayers:
    """The layers of a model to choose targets from. `linears`: full name -> (d_in, d_out). `heads`: modules of the
    output head. `modules`: every module's name, so that no short target name matches something else."""

    linears: Mapping[str, tuple[int, int]]
    heads: Collection[str] = ()
    modules: Collection[str] = ()
    experts: Experts = NO_EXPERTS


@dataclass(frozen=True)
class TargetChoice:
    """`names`: the layers that get an adapter, by full name; `target_modules`: what peft's config calls them; `why`
    these; `notes`: which layers get none although one might expect it, and why."""

    names: tuple[str, ...]
    target_modules: tuple[str, ...]
    why: str
    notes: tuple[str, ...] = ()


def choose_targets(layers: ModelLayers, targets: str, top_layers: int | None, r: int = 1) -> TargetChoice:
    """Chooses the layers that get an adapter of rank `r`.

    `targets`: auto (every projection inside the repeated layers), all-linear (every linear layer but the output head),
    or comma-separated names. auto and all-linear leave out parts that no text passes through, and layers 1 wide or much
    narrower than `r`. `top_layers`: only the last N of the repeated layers; None for all.

    Raises TargetError for names that match nothing or layers that never get an adapter, RecipeError if there are
    fewer than N layers.
    """
    linears, experts = layers.linears, layers.experts
    allowed = {name for name in linears if not _in_head(name, layers.heads) and not reason_not_adapted(name)}
    taken_for_experts = {name for name in allowed if _last_part(name) in experts.names}
    allowed -= taken_for_experts
    notes = _expert_notes(experts, taken_for_experts)
    if targets in ("auto", "all-linear"):
        names = {name for name in allowed if not OTHER_MODALITIES.search(name)}
        if targets == "auto":
            names = {name for name in names if _split_name(name)}
        narrow = _narrow_layers(names, linears, r)
        names -= narrow
        if narrow:
            shown = join_first(last_parts(narrow), 12)
            notes.append(f"no adapter on {_count(narrow)} narrower than {flag('r')} {r} ({shown})")
        why = f"{_kinds(names)} projections" if targets == "auto" else "every linear layer but the output's"
    else:
        names = _match_targets([name.strip() for name in targets.split(",")], allowed, layers)
        why = f"the layers named {targets}"
    if top_layers is not None:
        names = _in_top_layers(names, linears, top_layers)
        why = f"{why}, in the last {top_layers} layers"
    if not names:
        raise TargetError(
            f"no layer to adapt: {why}",
            got=join_first(last_parts(allowed), 12),
            fix="name layers with --targets NAME,NAME",
        )
    ordered = tuple(name for name in linears if name in names)
    every_name = {*layers.modules, *linears}
    return TargetChoice(ordered, tuple(_short_targets(ordered, every_name)), why, tuple(notes))


def check_rank(r: int, choice: TargetChoice, linears: Mapping[str, tuple[int, int]]) -> None:
    """Raises RecipeError if an adapter would be wider than a layer it is put on."""
    narrow = min(choice.names, key=lambda name: min(linears[name]))
    side = min(linears[narrow])
    if r > side:
        raise RecipeError(f"--r is larger than {narrow} is wide", got=f"{r} and {side}", fix=f"at most --r {side}")


def matches(name: str, target: str) -> bool:
    """Whether peft takes `target` for this module: it is the whole name, or its last parts."""
    return name == target or name.endswith("." + target)


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """Number of layers of each repeated stack: `{"model.layers": 32}`."""
    found: dict[str, int] = defaultdict(int)
    for name in names:
        split = _split_name(name)
        if split:
            found[split[0]] = max(found[split[0]], split[1] + 1)
    return dict(found)


def _split_name(name: str) -> tuple[str, int, str] | None:
    """Stack, layer index and path inside it: `model.layers.7.mlp.up_proj` -> (model.layers, 7, mlp.up_proj)."""
    match = re.match(r"(.*?)\.(\d+)\.(.+)$", name)
    return (match[1], int(match[2]), match[3]) if match else None


def _in_head(name: str, heads: Collection[str]) -> bool:
    first = name.split(".")[0]
    return first in OUTPUT_HEADS or any(name == head or name.startswith(head + ".") for head in heads)


def reason_not_adapted(name: str) -> str | None:
    """Why a layer gets no adapter, whatever the targets are; None if it may get one."""
    return next((why for pattern, why in NEVER_ADAPTED.items() if re.search(pattern, name)), None)


def _expert_notes(experts: Experts, taken_for_experts: Collection[str]) -> list[str]:
    joined = "no adapter on the experts: each layer joins them into one tensor, which takes none"
    notes = [joined] if experts.modules else []
    if taken_for_experts:
        shown = join_first(last_parts(taken_for_experts), 12)
        notes.append(
            f"no adapter on {_count(taken_for_experts)} beside them, which peft takes for experts by name ({shown})"
        )
    return notes


def _narrow_layers(names: Collection[str], linears: Mapping[str, tuple[int, int]], r: int) -> set[str]:
    """Layers that are 1 wide, or narrower than `r` and than an eighth of the widest: gates rather than projections."""
    widest = max((max(linears[name]) for name in names), default=0)
    sides = {name: min(linears[name]) for name in names}
    return {name for name, side in sides.items() if side == 1 or (side < r and NARROW_RATIO * side <= widest)}


def _kinds(names: Iterable[str]) -> str:
    """The kinds of blocks that projections belong to: `attention and MLP`."""
    paths = {(_split_name(name) or ("", 0, name))[2] for name in names}
    found = {next(kind for kind, pattern in KINDS.items() if re.search(pattern, path)) for path in paths}
    ordered = [kind for kind in KINDS if kind in found]
    return " and ".join(filter(None, [", ".join(ordered[:-1]), *ordered[-1:]]))


def _match_targets(targets: Sequence[str], allowed: set[str], layers: ModelLayers) -> set[str]:
    """The allowed layers that the targets name. Raises TargetError if a target names none."""
    experts, found = layers.experts, join_first(last_parts(allowed), 12)
    fused = [t for t in targets if _last_part(t) in experts.names or any(matches(name, t) for name in experts.modules)]
    if fused:
        raise TargetError(
            f"{', '.join(fused)}: each layer joins its experts into one tensor, which takes no adapter",
            got=f"a model with {found}",
            fix=f"use those names, or {flag('targets')} auto",
            gotcha="experts-joined",
        )
    problems = [
        _why_no_match(target, allowed, layers)
        for target in targets
        if not any(matches(name, target) for name in allowed)
    ]
    if problems:
        got = f"a model with {found}{', whose experts are joined tensors' if experts.modules else ''}"
        raise TargetError("; ".join(problems), got=got, fix="use those names, or --targets auto")
    return {name for name in allowed if any(matches(name, target) for target in targets)}


def _why_no_match(target: str, allowed: set[str], layers: ModelLayers) -> str:
    """Why a target names no layer that may get an adapter."""
    modules = {*layers.linears, *layers.modules}
    for name in sorted(modules):
        if matches(name, target) and (reason := reason_not_adapted(name)):
            return f"{target!r} {reason}"
    if any(matches(name, target) for name in layers.linears):
        return f"{target!r} is the output head, which is trained without being named"
    guess = nearest(target, last_parts(allowed))
    hint = f" (did you mean {guess}?)" if guess else ""
    if any(matches(name, target) for name in modules):
        return f"{target!r} is not a linear layer{hint}"
    return f"{target!r} matches no layer{hint}"


def _in_top_layers(names: set[str], linears: Iterable[str], top: int) -> set[str]:
    """The names in the last `top` layers of their stack. A shorter second stack keeps all of its layers."""
    depths = layer_counts(linears)
    deepest = max(depths.values(), default=0)
    if top > deepest:
        raise RecipeError(
            f"--layers top-{top} is more than this model has", got=f"{deepest} layers", fix="use --layers all"
        )
    splits = {name: _split_name(name) for name in names}
    return {name for name, split in splits.items() if split and split[1] >= depths[split[0]] - top}


def _short_targets(names: Sequence[str], modules: set[str]) -> list[str]:
    """The shortest endings that mean exactly these modules to peft; the full names if no endings do."""
    wanted = set(names)
    found: list[str] = []
    for path in dict.fromkeys((_split_name(name) or ("", 0, name))[2] for name in names):
        parts = path.split(".")
        tails = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        tail = next((tail for tail in tails if all(name in wanted for name in modules if matches(name, tail))), None)
        if tail is None:
            return list(names)
        if tail not in found:
            found.append(tail)
    return found


def _count(layers: Collection[str]) -> str:
    return "1 layer" if len(layers) == 1 else f"{len(layers):,} layers"


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def last_parts(names: Iterable[str]) -> list[str]:
    """The last parts of full names, each once: `["down_proj", "q_proj"]`."""
    return sorted(set(map(_last_part, names)))
