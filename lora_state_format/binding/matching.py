"""Which live parameter a saved one is: by name, and by the bytes of the weights where the file has their digests."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from lora_state_format.binding.live import LiveOptimizer
from lora_state_format.binding.policies import BY_WEIGHTS, Renaming
from lora_state_format.errors import ConversionError
from lora_state_format.model.digests import ALGORITHM
from lora_state_format.model.states import OptimizerState, Parameter
from lora_state_format.model.tensors import Digest
from lora_state_format.naming.names import (
    DATA_PARALLEL,
    rename,
    split_adapter,
    with_adapter,
    without_wrappers,
)

__all__ = ["Matching", "Weights", "compare", "match", "suggestion"]


@dataclass(frozen=True, slots=True)
class Matching:
    """Saved parameters and live ones.

    ``found`` maps saved names to names in the live optimizer, ``wanted`` every saved name to the live one that it would
    have (``None`` for a parameter whose name another one has now), ``clashes`` a saved name to the one that took its
    place.
    """

    found: dict[str, str]
    wanted: Mapping[str, str | None]
    clashes: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Weights:
    """What the digests of the weights say of a matching.

    ``matching`` and ``differing`` are live parameters whose bytes are those of the time of the save, or others.
    ``moved`` maps live names to the saved name under which exactly these bytes stand.
    """

    matching: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    moved: Mapping[str, str] | None = None


# --- by name --------------------------------------------------------------------------------------------------------


def match(state: OptimizerState, live: LiveOptimizer, rule: Renaming | None) -> Matching:
    """Match by the caller's rule; then names as they are; then without wrapper segments; then by another adapter's."""
    if rule == BY_WEIGHTS:
        return _by_weights(state, live)
    saved = list(state)
    wanted = rename(saved, rule) if rule is not None and not isinstance(rule, str) else {name: name for name in saved}
    canonical = _canonical(live)
    absent = [name for name in saved if wanted[name] not in canonical]
    notes: list[str] = []
    with contextlib.suppress(ConversionError):  # if two of them became one, they stay as they are, and are reported
        stripped, segments = without_wrappers(wanted[name] for name in absent)
        wanted |= dict(zip(absent, stripped, strict=True))
        if DATA_PARALLEL in segments:
            notes.append(
                f"the names of {len(absent)} saved parameters begin with '{DATA_PARALLEL}.', as "
                "DistributedDataParallel puts it there; they are matched without it"
            )
    adapted, note = _other_adapter(state, live, wanted) if absent else ({}, ())
    wanted |= adapted
    return _matched(state, live, wanted, (*notes, *note))


def _canonical(live: LiveOptimizer) -> dict[str, str]:
    """Return the first name of every live parameter by each of its names."""
    aliases = {alias: p.name for p in live.parameters.values() for alias in p.tied}
    return aliases | {name: name for name in live.parameters}


def _matched(
    state: OptimizerState, live: LiveOptimizer, wanted: Mapping[str, str | None], notes: tuple[str, ...] = ()
) -> Matching:
    canonical = _canonical(live)
    found: dict[str, str] = {}
    clashes: dict[str, str] = {}
    owners: dict[str, str] = {}
    # A parameter's own name goes before names that are only tied to it.
    for name in sorted(state, key=lambda name: canonical.get(wanted[name] or "") != wanted[name]):
        new = wanted[name]
        names = () if new is None else (new, *state[name].tied)
        target = next((canonical[alias] for alias in names if alias in canonical), None)
        if target is None or target not in live.members:
            continue
        if owners.setdefault(target, name) == name:
            found[name] = target
        else:
            clashes[name] = owners[target]
    return Matching(found, wanted, clashes, notes)


def _other_adapter(
    state: OptimizerState, live: LiveOptimizer, wanted: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the saved names under the live adapter's name, where the one saved adapter can only be the one live one.

    It must be absent from the whole model, and each of its names be there with the same shape.
    """
    saved = {name: parts[1] for name, other in wanted.items() if (parts := split_adapter(other))}
    here = {parts[1] for name in live.members if (parts := split_adapter(name))}
    anywhere = {parts[1] for name in live.parameters if (parts := split_adapter(name))}
    if len(set(saved.values())) != 1 or len(here) != 1 or set(saved.values()) & anywhere:
        return {}, ()
    (new,) = here
    result = {name: with_adapter(wanted[name], new) for name in saved}
    for name, other in result.items():
        if other not in live.members or live.parameters[other].shape != state[name].shape:
            return {}, ()
    old = next(iter(saved.values()))
    return result, (f"the saved adapter '{old}' goes into '{new}', the only one in the optimizer",)


# --- by weights -----------------------------------------------------------------------------------------------------


def compare(state: OptimizerState, live: LiveOptimizer, matching: Matching) -> Weights:
    """Compare the digests of the live parameters with those that the file has of the saved ones.

    Digests are comparable for the same algorithm and dtype. Bytes that stand under several saved names, or are one
    value again and again, identify nothing.
    """
    sources = {target: state[name] for name, target in matching.found.items()}
    own = _digests(live, any(p.weights for p in state.parameters))
    same = tuple(name for name, digest in own.items() if name in sources and sources[name].weights == digest)
    at_home = {sources[name].name for name in same}
    moved = {
        name: other
        for name, other in _elsewhere(state, own, set(same)).items()
        if other not in at_home and state[other].shape == live.parameters[name].shape and not _constant(live, name)
    }
    differing = tuple(
        name
        for name in own
        if name in sources and name not in same and name not in moved and _comparable(sources[name], live, name)
    )
    return Weights(same, differing, moved)


def _elsewhere(state: OptimizerState, own: Mapping[str, Digest], same: set[str]) -> dict[str, str]:
    """Return for live parameters with other bytes than before the saved name under which exactly theirs stand."""
    known: dict[Digest, str | None] = {}
    for parameter in state.parameters:
        if parameter.weights:
            known[parameter.weights] = None if parameter.weights in known else parameter.name
    return {name: other for name, digest in own.items() if name not in same and (other := known.get(digest))}


def _constant(live: LiveOptimizer, name: str) -> bool:
    asked = live.parameters[name].constant
    return asked is not None and asked()


def _digests(live: LiveOptimizer, needed: bool) -> dict[str, Digest]:
    """Return the digest of each parameter of the optimizer that has one; two at a time, hashing waits for memory."""
    asked = [(name, digest) for name in live.members if needed and (digest := live.parameters[name].digest)]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((name for name, _ in asked), pool.map(lambda item: item[1](), asked), strict=True))


def _comparable(parameter: Parameter, live: LiveOptimizer, name: str) -> bool:
    stated, own = parameter.weights, live.parameters[name]
    return (
        stated is not None
        and (stated.algorithm, stated.dtype) == (ALGORITHM, own.narrow or own.dtype)
        and parameter.shape == own.shape
    )


def _by_weights(state: OptimizerState, live: LiveOptimizer) -> Matching:
    """Match by bytes where they stand under another name, and with them the other parameters of the same modules.

    Raises ``ConversionError`` if the bytes put one saved module at two places, or if the file has no digests.
    """
    plain = match(state, live, None)
    if not any(p.weights for p in state.parameters):
        raise ConversionError(
            "rename='weights': the file has no digests of the weights; it was saved with weights=False"
        )
    moved = compare(state, live, plain).moved or {}
    heads: dict[str, str] = {}
    for new, old in moved.items():
        before, after = _heads(old, new)
        if heads.setdefault(before, after) != after:
            raise ConversionError(
                f"rename='weights': parts of '{before}' are in '{heads[before]}' and in '{after}'; give the names as a "
                "mapping"
            )
    exact = {old: new for new, old in moved.items()}
    wanted: dict[str, str | None] = {}
    for name, other in plain.wanted.items():
        wanted[name] = exact.get(name) or _moved_with(other or name, heads)
    taken = {new for name, new in wanted.items() if new != plain.wanted[name]}
    wanted = {name: None if new in taken and new == plain.wanted[name] else new for name, new in wanted.items()}
    return _matched(
        state, live, wanted, (*plain.notes, f"{len(moved)} parameters are named by the bytes of the weights")
    )


def _heads(old: str, new: str) -> tuple[str, str]:
    """Return the two names without the segments that they end in alike."""
    a, b = old.split("."), new.split(".")
    tail = common(a[::-1], b[::-1])
    return ".".join(a[: len(a) - tail]), ".".join(b[: len(b) - tail])


def _moved_with(name: str, heads: Mapping[str, str]) -> str:
    """Return the name with the longest head that moved replaced."""
    segments = name.split(".")
    for stop in range(len(segments), 0, -1):
        head = ".".join(segments[:stop])
        if head in heads:
            return ".".join(filter(None, (heads[head], *segments[stop:])))
    return name


# --- suggestions ----------------------------------------------------------------------------------------------------


def suggestion(left: Sequence[Parameter], live: LiveOptimizer, matching: Matching) -> list[tuple[str, str]] | None:
    """Return the pairs of ``rename`` that put every saved parameter that found no place on a live one of its shape.

    One run of segments is replaced by another: the first parameter's possible partners propose it, all must fit, and no
    name that has found its own may change. Where others have found their own, segments may only come or go, as where
    one module was wrapped: another module in the place of one is another module.
    """
    for pairs in _KNOWN:
        if left and _all_fit(pairs, left, live, matching):
            return list(pairs)
    free = {n: live.parameters[n].shape for n in live.members if n not in set(matching.found.values())}
    for candidate in (name for name, shape in free.items() if shape == left[0].shape):
        if matching.found and candidate.count(".") == left[0].name.count("."):
            continue
        for pair in _substitutions(left[0].name, candidate):
            if _all_fit((pair,), left, live, matching):
                return [pair]
    return None


_KNOWN: Final = (
    (("weight_g$", "parametrizations.weight.original0"), ("weight_v$", "parametrizations.weight.original1")),
    (("weight_orig$", "parametrizations.weight.original"),),
    ((r"(?<=\.)gamma$", "weight"), (r"(?<=\.)beta$", "bias")),
)
"""Renames that libraries made: torch's weight_norm and spectral_norm became parametrizations, BERT's norms torch's."""


def _all_fit(
    pairs: Sequence[tuple[str, str]], left: Sequence[Parameter], live: LiveOptimizer, matching: Matching
) -> bool:
    """Return whether a rename puts each of these on a free live parameter of its shape, and moves no other."""
    renamed = rename([p.name for p in left] + list(matching.found), pairs)
    taken = set(matching.found.values())
    free = {name: live.parameters[name].shape for name in live.members if name not in taken}
    return all(free.get(renamed[p.name]) == p.shape for p in left) and all(
        renamed[name] == name for name in matching.found
    )


def _substitutions(old: str, new: str) -> Iterator[tuple[str, str]]:
    """Yield the ``re.sub`` arguments that make ``new`` of ``old`` by replacing one run of segments.

    Anchored at the start of the name first, where they say which of several equal segments is meant; then anywhere.
    """
    a, b = old.split("."), new.split(".")
    head = common(a, b)
    tail = common(a[head:][::-1], b[head:][::-1])
    if head and (len(a) == head + tail or len(b) == head + tail):
        head -= 1  # segments only come or go: the one in front of them says where
    before, after = a[head : len(a) - tail], b[head : len(b) - tail]
    if head == 0:
        yield "^" + re.escape("".join(f"{s}." for s in before)), "".join(f"{s}." for s in after)
        return
    yield rf"(?<=\.){re.escape('.'.join(before))}(?=\.|$)", ".".join(after)


def common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return how many leading items are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
