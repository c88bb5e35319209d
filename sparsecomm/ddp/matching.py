"""Whether a checkpoint is of the model at hand: by the names and shapes of its parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch

from sparsecomm.ddp.checkpoint import Checkpoint
from sparsecomm.errors import StateError

__all__ = ["matched"]

Shapes = Mapping[str, tuple[int, ...]]

_NONE = (0,)  # the shape that stands for no residual
_LISTED = 8  # names in a message
_STARTS = 8  # names for which a rule is looked for
_Rule = tuple[int, tuple[str, ...], tuple[str, ...]]  # from this part on, these parts become those


def matched(loaded: Checkpoint, shapes: Shapes, *, strict: bool) -> Checkpoint:
    """Returns the checkpoint as far as it is of a given model.

    Args:
        loaded: a checkpoint that passed `Checkpoint.check`. Not changed.
        shapes: parameter shapes of the model, by name, frozen parameters included.
        strict: whether model and checkpoint must have the same parameters. Otherwise new parameters start without a
            residual, and a warning says how much of it vanished ones had. The moments of Adam correction, which count
            their steps together, start again if there are new parameters.

    Raises:
        StateError: if the checkpoint is of another model; names the parameters that only one of the two has, or has in
            another shape, and says what would map their names.
    """
    for kind, memory in loaded.memories.items():
        for name, t in memory.items():
            if name in shapes and tuple(t.shape) not in (_NONE, shapes[name]):
                raise StateError(
                    f"{kind} of {name!r} in the checkpoint has shape {tuple(t.shape)}, the parameter has {shapes[name]}"
                )
    entries: list[tuple[str, Mapping[str, object]]] = [*loaded.memories.items(), ("alignment", loaded.alignments)]
    for kind, named in entries:
        extra = set(named) - set(shapes)
        missing = set(shapes) - set(named) if named and kind != "alignment" else set()
        if (extra or missing) and (strict or not set(named) & set(shapes)):
            raise StateError(_difference(loaded, shapes, kind, extra, missing))
        if extra or missing:
            return _fitted(loaded, shapes)
    return loaded


def _fitted(loaded: Checkpoint, shapes: Shapes) -> Checkpoint:
    """Returns what the checkpoint has of the model's parameters, and warns of the residual that is lost."""
    residuals = loaded.memories["residual"]
    gone = {name: t for name, t in residuals.items() if name not in shapes}
    memories = {kind: {n: t for n, t in named.items() if n in shapes} for kind, named in loaded.memories.items()}
    said = []
    if gone:
        lost, everything = _norm(gone), _norm(residuals)
        share = 100.0 * (lost / everything) ** 2 if everything else 0.0
        said.append(
            f"rank {loaded.rank}: the model lacks {_listed(gone)} of the checkpoint. Their residual is dropped, with a "
            f"norm of {lost:.4g} of {everything:.4g} in all ({share:.1f}% of its square)"
        )
    moments, steps = memories["second_moment"], loaded.moment_steps
    if moments and set(shapes) - set(moments):
        new = sorted(set(shapes) - set(moments))
        said.append(f"rank {loaded.rank}: the moments of Adam correction start again, since {_listed(new)} has none")
        memories["velocity"], memories["second_moment"], steps = {}, {}, 0
    for text in said:
        warnings.warn(text, UserWarning, stacklevel=5)
    alignments = {name: a for name, a in loaded.alignments.items() if name in shapes}
    return replace(loaded, memories=memories, moment_steps=steps, selectors={}, alignments=alignments)


def _norm(named: Mapping[str, torch.Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in named.values()))


def _shapes_of(loaded: Checkpoint, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of these parameters in the checkpoint; (0,) of those it does not tell of."""
    found: dict[str, tuple[int, ...]] = dict.fromkeys(sorted(names), _NONE)
    for named in loaded.memories.values():
        found |= {name: tuple(t.shape) for name, t in named.items() if name in found and found[name] == _NONE}
    return found


# --- what a message says ------------------------------------------------------------------------------------------


def _difference(loaded: Checkpoint, shapes: Shapes, kind: str, extra: set[str], missing: set[str]) -> str:
    """Returns the message that a checkpoint is of another model, with what would map its names."""
    said = [f"it has the {kind} of {_listed(extra)}, unknown here"] if extra else []
    said += [f"it lacks the {kind} of {_listed(missing)}"] if missing else []
    text = f"the checkpoint is of another model: {' and '.join(said)}"
    hint = (
        _hint(_shapes_of(loaded, extra), {name: shapes[name] for name in sorted(missing)})
        if extra and missing
        else None
    )
    if hint is not None:
        return f"{text}; {hint}"
    return text if missing == set(shapes) else f"{text}; strict=False loads the others"


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:_LISTED]))
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


def _hint(extra: Shapes, missing: Shapes) -> str | None:
    """Returns what turns the checkpoint's names into the model's: one changed part of all names, or the same shapes."""
    found = [(rule, _mapped(rule, extra, missing)) for rule in _rules(extra, missing)]
    for (start, old, new), pairs in found:
        if len(pairs) == min(len(extra), len(missing)):
            name = next(iter(pairs))
            gone, made = ".".join(old), ".".join(new)
            where = "the prefix" if start == 0 else "the part"
            how = f"{gone!r} became {made!r}"
            if not new:
                how = f"without {where} {gone + '.'!r}"
            elif not old:
                how = f"with {where} {made + '.'!r}"
            return f"{len(pairs)} of its names are the model's {how}: {name!r} is {pairs[name]!r} here"
    alike = list(zip(sorted(extra), sorted(missing), strict=False))
    if len(extra) == len(missing) and all(_compatible(extra[a], missing[b]) for a, b in alike):
        shown = ", ".join(f"{a!r} may be {b!r}" for a, b in alike[:3])
        return f"in alphabetical order they have the same shapes: {shown}" + (", ..." if len(alike) > 3 else "")
    return None


def _rules(extra: Shapes, missing: Shapes) -> list[_Rule]:
    """Returns the changes of one part that turn one of the first names into a missing one."""
    rules: dict[_Rule, None] = {}
    for name in sorted(extra)[:_STARTS]:
        for other in missing:
            if _compatible(extra[name], missing[other]):
                rules.setdefault(_rule(name.split("."), other.split(".")))
    return list(rules)


def _rule(old: Sequence[str], new: Sequence[str]) -> _Rule:
    """Returns the change between two names: what is left of both without their common end and beginning."""
    most, end = min(len(old), len(new)), 0
    while end < most and old[-1 - end] == new[-1 - end]:
        end += 1
    start = 0
    while start < most - end and old[start] == new[start]:
        start += 1
    return start, tuple(old[start : len(old) - end]), tuple(new[start : len(new) - end])


def _mapped(rule: _Rule, extra: Shapes, missing: Shapes) -> dict[str, str]:
    """Returns the names that a rule turns into missing ones of the same shape."""
    start, old, new = rule
    found = {}
    for name, shape in extra.items():
        parts = tuple(name.split("."))
        if parts[start : start + len(old)] == old:
            other = ".".join((*parts[:start], *new, *parts[start + len(old) :]))
            if other in missing and _compatible(shape, missing[other]):
                found[name] = other
    return found


def _compatible(theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    return theirs in (_NONE, ours)
