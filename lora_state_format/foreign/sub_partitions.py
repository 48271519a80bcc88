"""The flat fp32 masters of DeepSpeed 0.3's ZeRO 1: how they are cut up, and which parameters they are of.

A group's parameters, end to end, are cut into sub-partitions of equal size; of ``n`` ranks, rank ``r`` has the
sub-partitions ``r``, ``n + r``, ``2 n + r``, ... (``get_data_parallel_sub_partitions`` in ``runtime/zero/stage1.py``).
No file says which parameters a group has. They keep the model's order in it, as every optimizer's groups do that were
picked out of ``named_parameters()`` or ``modules()``, and the masters, rounded, are the weights in the same folder:
where only one way of dealing the parameters out to the groups fits, it is proven.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, Final

from lora_state_format.errors import AmbiguousOrderError, FileError, RefusedError
from lora_state_format.foreign.masters import REMEDY, ROUNDED, SAMPLE, elements, rounded
from lora_state_format.foreign.trees import member
from lora_state_format.model.dtypes import item_size
from lora_state_format.model.tensors import Flat, Piece, Tensor

__all__ = ["Interval", "grouped", "intervals"]

MAX_WAYS: Final = 4096
"""Ways of dealing out the parameters that are followed at a time."""

BEGIN: Final = 8
"""Elements by which parameters are told apart that may be taken for each other."""

MAX_GROUPS: Final = 256
"""Groups that parameters are dealt out to; an optimizer has two, or one for each layer."""

_LATER: Final = "convert a later checkpoint of the run, whose weights differ"


@dataclass(frozen=True)
class Interval:
    """A sub-partition of each group: its masters, and its optimizer state by slot. Those of short groups are empty."""

    masters: Sequence[Tensor]
    states: Sequence[Mapping[str, Any]]


def intervals(tree: Mapping[str, Any], path: object) -> tuple[list[Interval], list[Mapping[str, Any]]]:
    """Return a rank's sub-partitions, and the groups' hyperparameters, which only a rigid checkpoint has.

    Args:
        tree: the ``optimizer_state_dict`` of its file.
        path: the file, for messages.

    Raises:
        FileError: something is missing in it.
    """
    masters = member(tree, "local_sub_partitions_of_fp32_groups", list, path)
    groups = [member(masters, number, list, path) for number in range(len(masters))]
    base = member(tree, "base_optimizer_state", (list, dict), path)
    if isinstance(base, list):  # elastic: states only, of which padding was taken off
        states = [member(base, number, list, path) for number in range(len(groups))]
        options: list[Mapping[str, Any]] = [{} for _ in groups]
    else:
        options = [member({"group": group}, "group", dict, path) for group in member(base, "param_groups", list, path)]
        held = member(base, "state", dict, path)
        states = [[held.get(key) for key in member(group, "params", list, path)] for group in options]
    found = [
        Interval(
            [_share(group, place, Tensor, path) for group in groups],
            [_share(group, place, dict, path) for group in states],
        )
        for place in range(max(map(len, groups), default=0))
    ]
    return found, [{**group, "params": [number]} for number, group in enumerate(options)]


def _share(group: list[Any], place: int, kind: type, path: object) -> Any:
    """Return a group's sub-partition at a place, or an empty one like its last."""
    if place < len(group):
        return member(group, place, kind, path)
    last: Any = member(group, len(group) - 1, kind, path)
    if isinstance(last, Tensor):
        return last.part((0,) * len(last.shape), (0,) * len(last.shape))
    empty = {slot: _share([value], 1, Tensor, path) for slot, value in last.items() if _is_flat(value)}
    return {**last, **empty}


def _is_flat(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(value.shape)


def grouped(
    shares: Sequence[Sequence[Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, Tensor],
    *,
    padded: bool,
    path: object,
) -> list[dict[str, tuple[int, ...]]]:
    """Return the names and shapes of each group's parameters, in their order.

    Args:
        shares: the fp32 masters of each group, end to end.
        shapes: what may be in the groups, in the model's order.
        weights: the model's weights, as this model-parallel rank has them.
        padded: whether zeros may follow a group's last parameter.
        path: the file, for messages.

    Raises:
        FileError: no way of dealing out the parameters fits the masters.
        RefusedError: more groups than are tried.
        AmbiguousOrderError: several ways fit.
    """
    if len(shares) > MAX_GROUPS:
        raise RefusedError(
            f"{len(shares):,} groups of parameters, where up to {MAX_GROUPS} are read: load it in the DeepSpeed that "
            "wrote it, with fewer groups",
            path=path,
        )
    flats = [_end_to_end(tensors) for tensors in shares]
    shapes = {name: shape for name, shape in shapes.items() if prod(shape)}
    weights = {
        name: weights[name] for name, shape in shapes.items() if name in weights and weights[name].shape == shape
    }
    ways = _ways(_Dealing(flats, shapes, weights, padded, path))
    if len(ways) > 1:
        _raise_ambiguous(list(shapes), ways, weights, path)
    if not ways:
        raise FileError(
            f"the fp32 masters in its groups, of {' and '.join(f'{flat.count:,}' for flat in flats)} elements, are not "
            f"the model's {len(shapes)} parameters, of {sum(map(prod, shapes.values())):,} elements, rounded and in "
            f"their order: {REMEDY}",
            path=path,
        )
    return [
        {name: shape for (name, shape), group in zip(shapes.items(), ways[0], strict=True) if group == number}
        for number in range(len(flats))
    ]


def _ways(dealing: _Dealing) -> Sequence[tuple[int | None, ...]]:
    """Return up to two ways of dealing out all parameters, or else those that are trained."""
    room, sizes = sum(flat.count for flat in dealing.flats), sum(map(prod, dealing.shapes.values()))
    all_fit = sizes == room or (dealing.padded and sizes < room)
    if all_fit and (ways := dealing.ways(skipping=False)):
        return ways
    return dealing.ways(skipping=True) if dealing.padded or sizes > room else ()


def _raise_ambiguous(
    names: Sequence[str], ways: Sequence[tuple[int | None, ...]], weights: Mapping[str, Tensor], path: object
) -> None:
    unsure = tuple(name for name, *groups in zip(names, *ways, strict=True) if len(set(groups)) > 1)
    missing = any(name not in weights for name in unsure)
    reason = "there are no weights of them in this folder" if missing else "weights are equal"
    remedy = "put the files with the model's weights next to the optimizer's" if missing else _LATER
    raise AmbiguousOrderError(
        f"{path}: it does not say which group a parameter is in, and several ways of dealing them out fit, as "
        f"{reason}: two ways differ in {', '.join(unsure[:3])}{', ...' if len(unsure) > 3 else ''}: {remedy}",
        unsure,
    )


def _end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    starts = accumulate((tensor.count for tensor in tensors), initial=0)
    pieces = [Piece(t, 0, Flat(start, t.count)) for t, start in zip(tensors, starts, strict=False) if t.count]
    return Tensor("F32", (sum(tensor.count for tensor in tensors),), tuple(pieces))


@dataclass(frozen=True)
class _Way:
    """One way of dealing out the first parameters: the group of the last of them, and the way of those before it."""

    group: int | None
    before: _Way | None

    def groups(self) -> tuple[int | None, ...]:
        found: list[int | None] = []
        way = self
        while way.before is not None:
            found.append(way.group)
            way = way.before
        return tuple(reversed(found))


@dataclass(frozen=True)
class _Dealing:
    """The groups' masters, what may be in them, and the ways of dealing it out that fit."""

    flats: Sequence[Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, Tensor]
    padded: bool
    path: object

    def ways(self, *, skipping: bool) -> list[tuple[int | None, ...]]:
        """Return up to two ways that leave nothing of the groups over.

        ``skipping`` is whether parameters may be in none of them. One that fits is only left out where a later one
        begins with the same elements: the groups would stay at a place that nothing else fits. What is left out is no
        more than there is besides what fills the groups.
        """
        likely = self._left_out() if skipping else frozenset()
        seen, spare = 0, sum(map(prod, self.shapes.values()))
        spare -= 0 if self.padded else sum(flat.count for flat in self.flats)
        frontier = {(0,) * len(self.flats): [_Way(None, None)]}
        for name, shape in self.shapes.items():
            seen += prod(shape)
            following: dict[tuple[int, ...], list[_Way]] = {}
            for taken, ways in frontier.items():
                groups = self._groups(name, taken)
                for group in groups:
                    moved = tuple(at + prod(shape) * (group == number) for number, at in enumerate(taken))
                    following.setdefault(moved, []).extend(_Way(group, way) for way in ways)
                if skipping and (not groups or name in likely) and seen - sum(taken) <= spare:
                    following.setdefault(taken, []).extend(_Way(None, way) for way in ways)
            if len(following) > MAX_WAYS:
                raise AmbiguousOrderError(
                    f"{self.path}: more than {MAX_WAYS:,} ways of dealing out the parameters up to '{name}' to groups "
                    f"fit, as their weights are equal: {_LATER}",
                    (name,),
                )
            frontier = {place: ways[:2] for place, ways in following.items()}
        return [way.groups() for place, ways in frontier.items() if self._is_full(place) for way in ways][:2]

    def _left_out(self) -> frozenset[str]:
        """Return the parameters that may be left out although they fit: those that later ones may be taken for."""
        begins = {name: self._begin(name) for name in self.shapes}
        longer: dict[tuple[bytes, ...], str] = {}
        whole: dict[tuple[bytes, ...], str] = {}
        for name, begin in begins.items():
            for count in range(len(begin) + 1):
                longer[begin[:count]] = name
            if len(begin) < BEGIN:
                whole[begin] = name
        unseen = next((name for name in reversed([*self.shapes]) if name not in self.weights), "")
        place = {name: number for number, name in enumerate(self.shapes)}
        return frozenset(
            name
            for name, begin in begins.items()
            if any(
                place.get(later, -1) > place[name]
                for later in (unseen, longer[begin], *(whole.get(begin[:count], "") for count in range(len(begin))))
            )
        )

    def _begin(self, name: str) -> tuple[bytes, ...]:
        """Return the first elements of a parameter's weight, none of one that is not there."""
        weight = self.weights.get(name)
        if weight is None:
            return ()
        count = min(BEGIN, weight.count)
        found, size = bytes(elements(weight, 0, count)), item_size(weight.dtype)
        return tuple(found[number * size :][:size] for number in range(count))

    def _groups(self, name: str, taken: Sequence[int]) -> list[int]:
        """Return the groups in which a parameter fits behind what they have taken."""
        return [number for number, at in enumerate(taken) if self._fits(name, number, at)]

    def _fits(self, name: str, number: int, at: int) -> bool:
        """Whether a parameter's weights, as far as they are there, are what follows in a group, by its two ends."""
        flat, weight, count = self.flats[number], self.weights.get(name), prod(self.shapes[name])
        if at + count > flat.count:
            return False
        if weight is None or weight.dtype not in ROUNDED:
            return True
        length = min(SAMPLE, count)
        return all(
            b"".join(rounded(flat.part((at + start,), (length,)), weight.dtype)) == elements(weight, start, length)
            for start in {0, count - length}
        )

    def _is_full(self, place: tuple[int, ...]) -> bool:
        """Whether nothing is left of the groups, or nothing but padding."""
        rests = [flat.part((at,), (flat.count - at,)) for flat, at in zip(self.flats, place, strict=True)]
        return not any(any(any(chunk) for chunk in rest.chunks()) if self.padded else rest.count for rest in rests)
