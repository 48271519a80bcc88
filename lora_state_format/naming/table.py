"""A table of how well each pair of modules fits, and the losses of every exchange."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = "NDArray[np.float32]"

from lora_state_format.naming.signals import (
    BIAS,
    CONSERVED,
    MAGNITUDE,
    PRIOR,
    SURE,
    WEIGHT,
    A,
    B,
    Balance,
    Loss,
    Share,
    Sources,
    Unit,
)

__all__ = ["Table"]


class Table:
    """Every state against every weight of the same shape.

    ``scores`` are z-values: square roots of twice a log-likelihood ratio. The noise of a signal is what it shows where
    states and weights do not belong together; in nats its square divides the ratio.
    """

    def __init__(self, units: Sequence[Unit], balances: Sequence[Balance] = ()) -> None:
        import numpy as np

        self.units = units
        self.balances = balances
        self.balanced: dict[int, set[int]] = defaultdict(set)
        for number, balance in enumerate(balances):
            for share in (*balance.left, *balance.right):
                self.balanced[share.unit].add(number)
        self._sums: dict[tuple[int, Share], Array] = {}
        self.members: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
        self.row: dict[tuple[str, int], int] = {}
        for number, unit in enumerate(units):
            for kind, part in unit.parts.items():
                members = self.members[kind, part.shape]
                self.row[kind, number] = len(members)
                members.append(number)
        self.history: dict[tuple[str, tuple[int, ...]], Array] = {}
        self.identity: dict[tuple[str, tuple[int, ...]], tuple[Array, Array]] = {}
        for key, members in self.members.items():
            parts = [units[number].parts[key[0]] for number in members]
            weight, update, first, drift = (
                np.stack([getattr(part, name) for part in parts]) for name in ("weight", "update", "first", "drift")
            )
            cosines = _centred(update) @ _centred(weight).T
            self.history[key] = _z(cosines, weight[0].size)
            if key[0] in {A, B}:
                self.identity[key] = _identity(key[0], weight, first, drift)
        self.classes: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = defaultdict(list)
        for number, unit in enumerate(units):
            self.classes[unit.shapes].append(number)
        self.classes = {shapes: members for shapes, members in self.classes.items() if len(members) > 1}
        self.noise = self._noise()

    def _moves(self) -> Iterator[tuple[tuple[str, ...], list[int], bool]]:
        """Return the possible exchanges: of whole units, and of single parts of units that have several."""
        for shapes, members in self.classes.items():
            yield tuple(kind for kind, _ in shapes), members, True
        for (kind, _), members in self.members.items():
            several = [number for number in members if len(self.units[number].parts) > 1]
            if len(several) > 1:
                yield (kind,), several, False

    def scores(self, moved: tuple[str, ...], members: Sequence[int]) -> dict[str, Array]:
        """Return for each signal: row i, column k: the score of unit i with the moved parts' state of unit k."""
        import numpy as np

        parts = [self.units[number].parts for number in members]
        result: dict[str, Array] = {}

        def rows(kind: str) -> list[int]:
            return [self.row[kind, number] for number in members]

        def halves(kind: str) -> tuple[Array, Array]:
            """Return both halves of one side of the identity, [i, k or 1, elements]."""
            if kind in moved:
                grid = np.ix_(rows(kind), rows(kind))
                symmetric, skew = (half[grid].swapaxes(0, 1) for half in self.identity[kind, parts[0][kind].shape])
                return symmetric, skew
            own = [(self.identity[kind, part[kind].shape], row) for part, row in zip(parts, rows(kind), strict=True)]
            symmetric, skew = (np.stack([half[side][row, row] for half, row in own])[:, None] for side in (0, 1))
            return symmetric, skew

        if {A, B} & set(moved) and all({A, B} <= set(part) for part in parts):
            for name, left, right in zip(("balance", "skew"), halves(A), halves(B), strict=True):
                result[name] = _z((left * right).sum(-1), left.shape[-1])
        for kind in moved:
            history = self.history[kind, parts[0][kind].shape][np.ix_(rows(kind), rows(kind))].T
            copied = all(part[kind].copied for part in parts)
            result["copy" if copied else f"history of {kind}"] = history if copied else np.abs(history)
        if moved in {(MAGNITUDE,), (BIAS,)} and all(B in part for part in parts):
            own, of_b = (np.stack([part[kind].profile for part in parts]) for kind in (moved[0], B))
            result["rows"] = _z(_centred(of_b) @ _centred(own).T, own.shape[1])
        return result

    def _noise(self) -> dict[str, float]:
        """Return the deviation of each signal's score where state and weights do not belong together; 1 at least.

        The far tail counts as much as the bulk. In a wrong order some of these do belong together, which makes the
        noise larger and every answer more careful; only copies are beyond doubt.
        """
        import numpy as np

        wrong: dict[str, list[Array]] = defaultdict(list)
        for moved, members, _ in self._moves():
            for name, score in self.scores(moved, members).items():
                wrong[name].append(score[~np.eye(len(score), dtype=bool)])
        if elsewhere := [self._balance(n, sources) for n, _, sources in self._elsewhere()]:
            wrong["layer"].append(np.array(elsewhere))
        assumed, count = PRIOR
        result = {
            "layer": max(1.0, assumed)
        }  # where a single layer was trained, there is no other one to measure it by
        for name, scores in wrong.items():
            values = np.concatenate(scores)
            # Half of a standard normal's absolute values lie above 0.6745, one in a hundred above 2.576.
            middle, tail = (float(v) for v in np.quantile(np.abs(values), [0.5, 0.99]) / [0.6745, 2.576])
            seen = middle**2 if name == "copy" else max(float(np.square(values).mean()), tail**2)
            result[name] = max(1.0, math.sqrt((len(values) * seen + count * assumed**2) / (len(values) + count)))
        return result

    def nats(self, moved: tuple[str, ...], members: Sequence[int]) -> Array:
        """Return the nats of each unit of ``members`` for the moved parts of each other: by sure signals, by all."""
        import numpy as np

        total = np.zeros((2, len(members), len(members)), np.float32)
        for name, score in self.scores(moved, members).items():
            value = np.sign(score) * np.square(score / self.noise[name]) / 2
            total += value * np.array([name in SURE, True])[:, None, None]
        return total

    def exchanges(self) -> Iterator[tuple[str | None, dict[tuple[int, int], Loss]]]:
        """Return the losses of each exchange, by the two units: whole (``None``), or one kind of part alone."""
        for moved, members, whole in self._moves():
            nats = self.nats(moved, members)
            own = nats.diagonal(axis1=1, axis2=2)
            loss = (own[:, :, None] + own[:, None] - nats - nats.swapaxes(1, 2)).tolist()
            found = {}
            for i, k in combinations(range(len(members)), 2):
                pair = members[i], members[k]
                if any(self.units[number].stepped for number in pair):
                    swapped = {(pair[0], WEIGHT): pair[1], (pair[1], WEIGHT): pair[0]}
                    more = sum(self._layer_losses(swapped)) if whole and self.balances else 0.0
                    found[pair] = loss[0][i][k] + more, loss[1][i][k] + more
            yield None if whole else moved[0], found

    def support(self) -> list[Loss]:
        """Return the loss of each unit with the state of another one of its shapes, on average."""
        result: list[Loss] = []
        for moved, members, whole in self._moves():
            if whole:
                nats = self.nats(moved, members)
                own = nats.diagonal(axis1=1, axis2=2)
                others = (nats.sum(axis=2) - own) / (len(members) - 1)
                result += [
                    (sure, every)
                    for number, sure, every in zip(members, *(own - others).tolist(), strict=True)
                    if self.units[number].speaks
                ]
        apart: dict[int, list[float]] = defaultdict(list)
        for number, value, sources in self._elsewhere():
            apart[number].append(self._layer_nats(value) - self._layer_nats(self._balance(number, sources)))
        losses = [sum(values) / len(values) for values in apart.values()]
        return [*result, *zip(losses, losses, strict=True)]

    def losses(self, sources: Sources) -> list[Loss]:
        """Return the loss of each unit that gets another state."""
        moved = {n for (n, _), source in sources.items() if source != n and self.units[n].speaks}
        pairs = [(self._value(number, {}), self._value(number, sources)) for number in sorted(moved)]
        layers = self._layer_losses(sources)
        return [*((own[0] - other[0], own[1] - other[1]) for own, other in pairs), *zip(layers, layers, strict=True)]

    def _layer_losses(self, sources: Sources) -> list[float]:
        """Return the loss of each balance of a layer in which some of the units share."""
        touched = {number for (unit, _), source in sources.items() if unit != source for number in self.balanced[unit]}
        pairs = [(self._balance(number, {}), self._balance(number, sources)) for number in sorted(touched)]
        return [self._layer_nats(own) - self._layer_nats(other) for own, other in pairs]

    def _layer_nats(self, score: float) -> float:
        return math.copysign((score / self.noise.get("layer", PRIOR[0])) ** 2 / 2, score)

    def _balance(self, number: int, sources: Sources) -> float:
        """Return the score of a layer's balance with the state of other units."""
        import numpy as np

        _, *sides = self.balances[number]
        left, right = (
            reduce(operator.add, (self._sum(sources.get((s.unit, WEIGHT), s.unit), s) for s in side)) for side in sides
        )
        # A few channels may hold most of a sum; only as many count as would have it evenly.
        energy = left * left + right * right
        count = energy.sum() ** 2 / max(np.square(energy).sum(), 1e-38)
        return float(_z((_unit_length(left) * _unit_length(right)).sum(), count))

    def _sum(self, source: int, share: Share) -> Any:
        if (source, share) not in self._sums:
            weight = self.units[share.unit].parts[WEIGHT].lines[share.lines][0]
            first = self.units[source].parts[WEIGHT].lines[share.lines][1]
            self._sums[source, share] = (weight * first).sum(axis=1)
        return self._sums[source, share]

    def _elsewhere(self) -> Iterator[tuple[int, float, Sources]]:
        """Yield each balance, its score, and its right side's state replaced by that of a layer nearby."""
        for number, (kind, _, right) in enumerate(self.balances):
            for other in range(
                max(0, number - 4 * len(CONSERVED)), min(len(self.balances), number + 4 * len(CONSERVED))
            ):
                shares = self.balances[other].right
                same = [
                    self.units[a.unit].shapes == self.units[b.unit].shapes for a, b in zip(right, shares, strict=False)
                ]
                if other != number and self.balances[other].kind == kind and len(right) == len(shares) and all(same):
                    sources = {(a.unit, WEIGHT): b.unit for a, b in zip(right, shares, strict=True)}
                    yield number, self._balance(number, {}), sources

    def _value(self, number: int, sources: Sources) -> Loss:
        parts = self.units[number].parts

        def row(kind: str) -> int:
            return self.row[kind, sources.get((number, kind), number)]

        found: list[tuple[str, float]] = []
        if {A, B} <= set(parts):
            for side, name in enumerate(("balance", "skew")):
                left, right = (
                    self.identity[kind, parts[kind].shape][side][row(kind), self.row[kind, number]] for kind in (A, B)
                )
                found.append((name, float(_z(left @ right, len(left)))))
        for kind, part in parts.items():
            score = float(self.history[kind, part.shape][row(kind), self.row[kind, number]])
            found.append(("copy", score) if part.copied else (f"history of {kind}", abs(score)))
        nats = [
            (name, math.copysign((score / self.noise.get(name, PRIOR[0])) ** 2 / 2, score)) for name, score in found
        ]
        return sum(value for name, value in nats if name in SURE), sum(value for _, value in nats)


def _z(cosine: Any, count: Any) -> Any:
    """Return the signed root of twice the log-likelihood ratio of a correlation over ``count`` elements."""
    import numpy as np

    cosine = np.clip(cosine, -1 + 1e-6, 1 - 1e-6)
    return np.sign(cosine) * np.sqrt(-count * np.log1p(-cosine * cosine))


def _unit_length(values: NDArray[np.floating[Any]]) -> Array:
    import numpy as np

    length = np.linalg.norm(values, axis=-1, keepdims=True)
    result: Array = np.divide(values, length, out=np.zeros_like(values), where=length > 0)
    return result


def _centred(values: Array) -> Array:
    """Return each entry as one vector of mean 0 and length 1; a constant one becomes zero."""
    flat = values.reshape(len(values), -1)
    return _unit_length(flat - flat.mean(axis=1, keepdims=True))


def _identity(kind: str, weight: Array, first: Array, drift: Array) -> tuple[Array, Array]:
    """Return one side of ``B.T @ grad(B) == grad(A) @ A.T``: its symmetric and skew part, [state, weight, elements].

    The weights are moved back to where the gradients were taken, as far as the state tells: not A's in the symmetric
    part, where ``grad(A) @ update(A).T`` has a positive diagonal whatever it is paired with.
    """
    import numpy as np

    count, ranks, _ = weight.shape

    def product(left: Array, right: Array) -> Array:
        return (left.reshape(count * ranks, -1) @ right.reshape(count * ranks, -1).T).reshape(
            count, ranks, count, ranks
        )

    if kind == A:
        now = product(first, weight).transpose(0, 2, 1, 3)
        back = first @ drift.swapaxes(1, 2)
    else:
        now = product(weight, first).transpose(2, 0, 1, 3)
        back = drift @ first.swapaxes(1, 2)
    back = back[:, None]
    symmetric = now + back if kind == B else now
    symmetric = symmetric + symmetric.swapaxes(2, 3)
    index = np.arange(ranks)
    symmetric[:, :, index, index] /= math.sqrt(2)
    skew = now + back
    skew = skew - skew.swapaxes(2, 3)
    upper, above = np.triu_indices(ranks), np.triu_indices(ranks, 1)
    return _unit_length(symmetric[:, :, upper[0], upper[1]]), _unit_length(skew[:, :, above[0], above[1]])
