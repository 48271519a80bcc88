"""Statistics of a state's tensors, one block at a time on all cores."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from lora_state_format.io.ledger import Ledger
from lora_state_format.model.dtypes import FLOATS, decoded, item_size
from lora_state_format.model.sources import readable_together
from lora_state_format.model.states import OptimizerState, PositionalState, Slot, Value, walk
from lora_state_format.model.tensors import Tensor
from lora_state_format.operations.entries import Entry, dotted, entries
from lora_state_format.operations.findings import number_of

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Measure", "Statistics", "Update", "measure", "measure_tensor"]

BLOCK: Final = 1 << 16
"""Elements that are held at a time, for each tensor of a parameter and each core."""

PAIRS: Final = (("exp_avg", "exp_avg_sq"), ("m", "v"))
"""First and second moments of Adam and its kin."""

LOWEST: Final = -8.0
HIGHEST: Final = 2.0
"""The histogram of step sizes: its first and last power of ten."""

BINS: Final = 40
"""How many bins lie between them."""

TOLERANCE: Final = 1.05
"""How far a ratio of moments may be above Adam's bound by rounding."""

TINY: Final = 1e-30
"""Second moments below this lose digits in float32; their ratios are not judged."""


@dataclass(slots=True)
class Measure:
    """Sums over the elements of tensors.

    ``zeros`` counts elements equal to zero, ``broken`` NaN and infinities, ``negative`` those below zero. ``squares``
    (the sum of squares) and ``largest`` (the largest magnitude) are over the finite elements.
    """

    elements: int = 0
    zeros: int = 0
    broken: int = 0
    negative: int = 0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, values: np.ndarray[Any, Any]) -> None:
        """Count the elements of an array of floats. Squares are summed as float64, the rest is exact in any type."""
        import numpy as np

        self.elements += int(values.size)
        self.zeros += int(np.count_nonzero(values == 0))
        least, most = float(values.min(initial=0.0)), float(values.max(initial=0.0))  # NaN if one is
        if not (math.isfinite(least) and math.isfinite(most)):
            finite = np.isfinite(values)
            self.broken += int(values.size - np.count_nonzero(finite))
            values = values[finite]
            least, most = float(values.min(initial=0.0)), float(values.max(initial=0.0))
        if least < 0:
            self.negative += int(np.count_nonzero(values < 0))
        wide = values.astype("f8", copy=False)
        self.squares += float(np.einsum("i,i->", wide, wide))  # not @, whose threads fight with ours: 6 s became 3.3
        self.largest = max(self.largest, -least, most)

    def merge(self, other: Measure) -> None:
        """Add the sums of other tensors."""
        self.elements += other.elements
        self.zeros += other.zeros
        self.broken += other.broken
        self.negative += other.negative
        self.squares += other.squares
        self.largest = max(self.largest, other.largest)

    @property
    def rms(self) -> float:
        """The root of the mean square of the finite elements."""
        return math.sqrt(self.squares / max(self.elements - self.broken, 1))

    def to_json(self) -> dict[str, float]:
        """Return the sums as JSON values."""
        return {
            "elements": self.elements, "zeros": self.zeros, "not_finite": self.broken, "negative": self.negative,
            "rms": self.rms, "largest": self.largest,
        }  # fmt: skip


@dataclass(slots=True)
class Update:
    """The sizes of a parameter's next update before the learning rate: ``|m| / (sqrt(v) + eps)``.

    The bias of the start is corrected where step and betas are known.

    ``bins`` counts elements by the power of ten of their size, from ``LOWEST`` to ``HIGHEST``; ``still`` counts those
    of size zero. ``beyond`` counts elements whose moments no run of Adam can reach together.
    """

    sizes: Measure = field(default_factory=Measure)
    bins: list[int] = field(default_factory=lambda: [0] * BINS)
    still: int = 0
    beyond: int = 0

    def add(self, m: np.ndarray[Any, Any], v: np.ndarray[Any, Any], rule: _Rule) -> None:
        """Count the elements of a block of first and second moments."""
        import numpy as np

        m, v = m.astype("f8"), v.astype("f8")
        good = np.isfinite(m) & np.isfinite(v) & (v >= 0)
        if not good.all():
            m, v = m[good], v[good]
        m, root = np.abs(m), np.sqrt(v)
        if rule.bound is not None:
            self.beyond += int(((m > rule.bound * TOLERANCE * root) & (v > TINY)).sum())
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            sizes = (m / rule.first) / (root / math.sqrt(rule.second) + rule.eps)
            if not np.isfinite(sizes).all():
                sizes = np.nan_to_num(sizes, nan=0.0, posinf=0.0)
            self.sizes.add(sizes)
            # The logarithms as float32, which has them for many elements at once: a tenth of the time.
            logs = np.log10(sizes.astype("f4"))
        moving = sizes > 0
        self.still += int(sizes.size - np.count_nonzero(moving))
        places = np.clip((logs[moving] - LOWEST) * BINS / (HIGHEST - LOWEST), 0, BINS - 1).astype(np.int64)
        for place, count in enumerate(np.bincount(places, minlength=BINS)):
            self.bins[place] += int(count)


@dataclass(frozen=True)
class Statistics:
    """What was measured: by a parameter's place in the state, of each slot and of the update."""

    slots: tuple[Mapping[str, Measure], ...]
    updates: tuple[Update | None, ...]

    def by_slot(self) -> dict[str, Measure]:
        """Return the sums over all parameters, by slot."""
        found: dict[str, Measure] = {}
        for own in self.slots:
            for slot, measured in own.items():
                found.setdefault(slot, Measure()).merge(measured)
        return found


@dataclass(frozen=True, slots=True)
class _Rule:
    """How moments become an update: what they are divided by against their bias, eps, and Adam's bound of m/sqrt(v)."""

    first: float
    second: float
    eps: float
    bound: float | None


def measure(state: OptimizerState | PositionalState, progress: Callable[[int, int], None] | None = None) -> Statistics:
    """Read every tensor of a state once, compare it with its digest, and measure it.

    Integers, the codes of quantised moments, are not measured.

    Args:
        state: The state. Blocks of ``BLOCK`` elements are held, whatever its size.
        progress: Called with the bytes measured and their total.

    Returns:
        The statistics, parameter by parameter in the state's order.

    Raises:
        DigestError: A tensor does not have the digest that its file states.
        FileError: Bytes do not have the CRC-32 that their container states, or a file changed meanwhile.
    """
    from concurrent.futures import ThreadPoolExecutor

    found = list(entries(state))
    options = [dict(group.options) for group in state.groups]
    total = sum(leaf.tensor.size for entry in found for _, leaf in walk(entry.state or {}) if isinstance(leaf, Slot))
    done = 0

    ledger = Ledger()

    def one(entry: Entry) -> tuple[dict[str, Measure], Update | None, int]:
        return _measured(entry, {} if entry.group is None else options[entry.group], ledger)

    with ThreadPoolExecutor(os.cpu_count() if readable_together(state.resources) else 1) as cores:
        results = []
        for slots, update, size in cores.map(one, found):
            results.append((slots, update))
            done += size
            if progress:
                progress(done, total)
    for path, leaf in walk(state.globals):
        if isinstance(leaf, Slot):
            _pass_by(leaf.tensor, ledger, dotted(path))
    ledger.check()
    return Statistics(tuple(slots for slots, _ in results), tuple(update for _, update in results))


def measure_tensor(tensor: Tensor) -> Measure:
    """Read a tensor and measure it; integers are not measured."""
    found = Measure()
    for block in _blocks(tensor, Ledger()) if tensor.dtype in FLOATS else ():
        found.add(block)
    return found


def _measured(
    entry: Entry, options: Mapping[str, Value], ledger: Ledger
) -> tuple[dict[str, Measure], Update | None, int]:
    tensors = {dotted(path): leaf.tensor for path, leaf in walk(entry.state or {}) if isinstance(leaf, Slot)}
    measures = {slot: Measure() for slot, tensor in tensors.items() if tensor.dtype in FLOATS}
    pair = next((p for p in PAIRS if set(p) <= set(measures) and tensors[p[0]].shape == tensors[p[1]].shape), ())
    blocks = {slot: _blocks(tensors[slot], ledger, f"{entry.label}/{slot}") for slot in measures}
    for slot, tensor in tensors.items():
        if slot not in measures:
            _pass_by(tensor, ledger, f"{entry.label}/{slot}")
        elif slot not in pair:
            for block in blocks[slot]:
                measures[slot].add(block)
    update = None
    if pair:
        update, rule = Update(), _rule(entry.state or {}, options)
        for m, v in zip(*(blocks[slot] for slot in pair), strict=True):
            measures[pair[0]].add(m)
            measures[pair[1]].add(v)
            update.add(m, v, rule)
    return measures, update, sum(tensor.size for tensor in tensors.values())


def _blocks(tensor: Tensor, ledger: Ledger, key: str = "") -> Iterator[np.ndarray[Any, Any]]:
    """Yield a tensor's elements, a block at a time, which is valid until the next one is asked for."""
    whole = BLOCK * item_size(tensor.dtype)
    held = bytearray()  # of a tensor that lies in several places, whose parts may end anywhere
    left = tensor.size
    for chunk in ledger.chunks(tensor, memoryview(bytearray(max(min(whole, left), 1))), key):
        if not held and len(chunk) == min(whole, left):
            left -= len(chunk)
            yield decoded(chunk, tensor.dtype)
            continue
        held += chunk
        while left and len(held) >= min(whole, left):
            block = bytes(held[: min(whole, left)])
            del held[: len(block)]
            left -= len(block)
            yield decoded(memoryview(block), tensor.dtype)


def _pass_by(tensor: Tensor, ledger: Ledger, key: str) -> None:
    """Read a tensor for its digest alone."""
    for _ in ledger.chunks(tensor, memoryview(bytearray(min(1 << 20, max(tensor.size, 1)))), key):
        pass


def _rule(state: Mapping[str, Value], options: Mapping[str, Value]) -> _Rule:
    """Return what is known of Adam's rule for a parameter.

    By Cauchy and Schwarz, whatever the gradients were, after t steps ``|m| <= bound * sqrt(v)`` with
    ``bound = (1 - b1) / sqrt(1 - b2) * sqrt(sum of (b1 * b1 / b2)**i, i < t)``.
    """
    betas, step, eps = options.get("betas"), number_of(state.get("step")), number_of(options.get("eps"))
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not step or step < 1:
        return _Rule(1.0, 1.0, eps or 0.0, None)
    b1, b2 = (number_of(beta) for beta in betas)
    if b1 is None or b2 is None or not (0 <= b1 < 1 and 0 < b2 < 1):
        return _Rule(1.0, 1.0, eps or 0.0, None)
    ratio = b1 * b1 / b2
    series = step if ratio == 1 else (1 - ratio ** min(step, 1e4)) / (1 - ratio)
    bound = (1 - b1) / math.sqrt(1 - b2) * math.sqrt(series) if "d" not in options else None
    return _Rule(1 - b1**step, 1 - b2**step, eps or 0.0, bound)
