"""Whole tensors at the ranks that want them: exchanged in rounds of bounded size, read while they arrive.

``gather`` brings the bytes of each tensor to the one rank that wants it, in the order in which it reads them: ranks of
one machine put theirs into its buckets, which they share, and others send them by ``all_to_all_single``. What the rank
holds itself in one run of bytes, as rows of a matrix are, it reads where it is.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from lora_state_format.errors import RankError
from lora_state_format.model.tensors import Box, Flat, Tensor, boxes_between, intersection
from lora_state_format.torch.shared import Buckets, shared_buckets
from lora_state_format.torch.spread import Holders, Spread, Where, holders_of, spread_of

__all__ = ["BUCKET", "gather"]

T = TypeVar("T")

BUCKET: Final = 16 << 20
"""Bytes that a rank sends, and receives, in one round. It holds four times as many: what it sends, what arrives, and
two buckets of whole tensors, of which one is being read."""

SHARED: Final = 64 << 20
"""Bytes of the buckets of all ranks of a machine, where they share them. Each rank has two."""

SMALLEST: Final = 1 << 20
"""Rounds do not become smaller than this, however much one rank has to send in them."""

ALIGNMENT: Final = 64
"""Where the parts of tensors begin in a bucket."""


# --- rounds ---------------------------------------------------------------------------------------------------------


class _Segment(NamedTuple):
    """Bytes ``first`` to ``last`` of a tensor, which stand in a bucket from ``place`` on."""

    spread: Spread
    first: int
    last: int
    place: int


class _Part(NamedTuple):
    """What one rank holds of a segment: a box of bytes of its own tensor, and where that goes in the bucket.

    ``local`` indexes the sender's bytes. In the bucket a run of shape ``run`` begins at ``place``; ``into`` indexes it.
    """

    spread: Spread
    shape: tuple[int, ...]
    local: tuple[slice, ...]
    place: int
    run: tuple[int, ...]
    into: tuple[slice, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def taken(self) -> torch.Tensor:
        """Return the bytes of this rank's own tensor."""
        return self.spread.bytes_of_local[self.local]

    def into_bucket(self, bucket: torch.Tensor, data: torch.Tensor) -> None:
        """Copy bytes of shape ``shape`` to their place."""
        whole = bucket[self.place : self.place + math.prod(self.run)].view(self.run)
        whole[self.into].copy_(data)


def _rounds(missing: Sequence[tuple[Spread, int, int]], size: int) -> list[list[_Segment]]:
    """Return the bytes of tensors that are brought to a rank, in order, cut into buckets of ``size`` bytes."""
    rounds: list[list[_Segment]] = []
    place = size
    for spread, first, end in missing:
        while first < end:
            place += -place % ALIGNMENT
            if place >= size:
                rounds.append([])
                place = 0
            last = min(end, first + size - place)
            rounds[-1].append(_Segment(spread, first, last, place))
            place, first = place + last - first, last
    return rounds


def _parts(segment: _Segment, where: Where) -> Iterator[_Part]:
    """Yield what a rank that holds ``where`` has of a segment."""
    spread, first, last, place = segment
    width = spread.width
    if isinstance(where, Flat):
        low, high = max(first, where.start * width), min(last, (where.start + where.count) * width)
        if low < high:
            own = low - where.start * width
            shape = (high - low,)
            yield _Part(spread, shape, (slice(own, own + shape[0]),), place + low - first, shape, (slice(None),))
        return
    if where is None:
        return
    held = _in_bytes(where, width)
    for position, box in boxes_between((*spread.shape[:-1], spread.shape[-1] * width), first, last):
        common = intersection(held, box)
        if common is not None:
            local, into = _slices(common, held), _slices(common, box)
            yield _Part(spread, common.shape, local, place + position - first, box.shape, into)


def _in_bytes(box: Box, width: int) -> Box:
    return Box((*box.start[:-1], box.start[-1] * width), (*box.shape[:-1], box.shape[-1] * width))


def _slices(box: Box, inside: Box) -> tuple[slice, ...]:
    return tuple(
        slice(start - base, start - base + size)
        for start, size, base in zip(box.start, box.shape, inside.start, strict=True)
    )


class _Plan:
    """What this rank sends and receives in each round. ``wanted`` has the tensors that each rank wants."""

    def __init__(self, wanted: Sequence[Sequence[Spread]], group: Any) -> None:
        self.rank = dist.get_rank(group)
        self.world = len(wanted)
        self._holders = holders_of([spread for spreads in wanted for spread in spreads], group)
        self._missing = [
            [(spread, *gap) for spread in spreads for gap in _around(self._of(spread).run(rank, spread), spread.size)]
            for rank, spreads in enumerate(wanted)
        ]
        self.held = {id(spread): self._of(spread).run(self.rank, spread) for spread in wanted[self.rank]}
        self.size = BUCKET

    def longest(self) -> int:
        """Return the bytes that the rank gets that gets most."""
        return max(sum(last - first + ALIGNMENT for _, first, last in missing) for missing in self._missing)

    def lay(self, size: int) -> None:
        """Lay the rounds out for buckets of ``size`` bytes; a rank has short runs of its own brought as well."""
        self.size = size
        rounds = [_rounds(missing, size) for missing in self._missing]
        self.count = max(map(len, rounds))
        self.own = rounds[self.rank] + [[] for _ in range(self.count - len(rounds[self.rank]))]
        self.sends: list[list[list[_Part]]] = [[[] for _ in rounds] for _ in range(self.count)]
        for receiver, theirs in enumerate(rounds):
            for number, segments in enumerate(theirs):
                for segment in segments:
                    holders = self._of(segment.spread)
                    if holders.sends(self.rank, receiver):
                        self.sends[number][receiver] += _parts(segment, holders.wheres[self.rank])

    def most(self) -> int:
        """Return the bytes that this rank sends in the round in which it sends most."""
        return max(
            (sum(part.size for parts in self.outward(n) for part in parts) for n in range(self.count)), default=0
        )

    def outward(self, number: int) -> list[list[_Part]]:
        """Return what goes to each other rank in a round."""
        return [[] if receiver == self.rank else parts for receiver, parts in enumerate(self.sends[number])]

    def inward(self, number: int) -> list[list[_Part]]:
        """Return what comes from each other rank in a round."""
        found: list[list[_Part]] = [[] for _ in self._missing]
        for segment in self.own[number]:
            holders = self._of(segment.spread)
            for sender in holders.senders(self.rank):
                found[sender] += _parts(segment, holders.wheres[sender]) if sender != self.rank else ()
        return found

    def _of(self, spread: Spread) -> Holders:
        return self._holders[spread.kind, spread.shape]


def _around(run: tuple[int, int], size: int) -> list[tuple[int, int]]:
    """Return the bytes of a tensor of ``size`` bytes before and behind a run, each as first byte and end."""
    first, end = run
    return [(0, first), (end, size)]


class _Incoming:
    """Buckets on their way from the thread that exchanges to the one that reads, and what need not come."""

    def __init__(self, buckets: Sequence[torch.Tensor], held: Mapping[int, tuple[int, int]]) -> None:
        self._held = held
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[torch.Tensor, list[_Segment]] | None] = queue.SimpleQueue()
        for bucket in buckets:
            self._free.put(bucket)
        self._bucket: torch.Tensor | None = None
        self._segments: dict[int, list[tuple[_Segment, memoryview]]] = {}

    def free(self) -> torch.Tensor:
        """Return the next bucket to fill, when it is not being read any more; they take turns."""
        return self._free.get()

    def put(self, bucket: torch.Tensor, segments: list[_Segment]) -> None:
        self._full.put((bucket, segments))

    def end(self) -> None:
        """Tell the reader that nothing more arrives."""
        self._full.put(None)

    def find(self, spread: Spread, offset: int) -> memoryview:
        """Return the bytes of a tensor from ``offset`` on, as far as they stand in one piece."""
        first, end = self._held[id(spread)]
        if first <= offset < end:
            return spread.some_of_local(offset - first, end - offset)
        while True:
            for segment, data in self._segments.get(id(spread), ()):
                if segment.first <= offset < segment.last:
                    return data[offset - segment.first :]
            if not self.advance():
                raise RankError("the exchange between the ranks ended before all tensors had arrived")

    def advance(self) -> bool:
        """Go on to the next bucket; ``False`` if there is none."""
        if self._bucket is not None:
            self._free.put(self._bucket)
        self._bucket, self._segments = None, {}
        item = self._full.get()
        if item is None:
            self._full.put(None)
            return False
        self._bucket, segments = item
        memory = self._bucket.numpy().data
        for segment in segments:
            data = memory[segment.place : segment.place + segment.last - segment.first]
            self._segments.setdefault(id(segment.spread), []).append((segment, data))
        return True


# --- carrying it out ------------------------------------------------------------------------------------------------


def gather(wanted: Sequence[Sequence[Tensor]], read: Callable[[], T], group: Any = None) -> T:
    """Return what ``read`` returns, which finds the whole tensors that its rank wants; every rank must call this.

    Args:
        wanted: For each rank the tensors that it wants, in the order in which its ``read`` reads them, each once;
            those that are not spread are nothing to exchange. The same on every rank.
        read: Called in a thread of its own, so that it writes or hashes one bucket while the next one arrives.
        group: The process group; ``None`` is the default one.

    Raises:
        CaptureError: If the ranks do not hold every element of a tensor.
        Exception: What ``read`` raises, when all rounds are over: the other ranks are not kept waiting.
    """
    spreads = [[source for tensor in tensors if (source := spread_of(tensor))] for tensors in wanted]
    if not any(spreads):
        return read()
    plan = _Plan(spreads, group)
    exchange, incoming = _prepared(plan, group)
    for source in spreads[plan.rank]:
        source.incoming = incoming
    try:
        with ThreadPoolExecutor(1, "lora_state_format exchange") as thread:
            reading = thread.submit(_read, read, incoming)
            try:
                exchange()
            finally:
                incoming.end()
            return reading.result()
    finally:
        for source in spreads[plan.rank]:
            source.incoming = None


def _prepared(plan: _Plan, group: Any) -> tuple[Callable[[], None], _Incoming]:
    """Lay the rounds out, and return what carries them out, and the buckets into which it brings the bytes."""
    if not plan.longest():
        return lambda: None, _Incoming([], plan.held)
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    size = min(BUCKET, max(SMALLEST, SHARED // 2 // plan.world), -(-plan.longest() // ALIGNMENT) * ALIGNMENT)
    buckets = shared_buckets(2, size, group) if device == "cpu" else None
    if buckets is not None:
        plan.lay(size)
        incoming = _Incoming(buckets[plan.rank], plan.held)
        return partial(_put_all, plan, incoming, buckets, group), incoming
    _fit(plan, device, group)
    incoming = _Incoming([torch.empty(plan.size, dtype=torch.uint8) for _ in range(2)], plan.held)
    return partial(_send_all, plan, incoming, device, group), incoming


def _read(read: Callable[[], T], incoming: _Incoming) -> T:
    try:
        return read()
    finally:
        while incoming.advance():  # what was not read, so that no bucket is waited for
            pass


def _fit(plan: _Plan, device: str, group: Any) -> None:
    """Lay the rounds out so that no rank sends more than a bucket in one, as one that holds what all want would."""
    size = BUCKET
    while True:
        plan.lay(size)
        most = torch.tensor([plan.most()], device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        if int(most) <= BUCKET or size <= SMALLEST:
            return
        size = max(SMALLEST, size // 2)


def _put_all(plan: _Plan, incoming: _Incoming, buckets: Buckets, group: Any) -> None:
    """Carry the rounds out where all ranks write into all buckets. A rank that fails goes on, and raises at the end.

    Behind a barrier every bucket of the round is full, and every bucket of the next round is free.
    """
    failure: Exception | None = None
    own = incoming.free()
    for number in range(plan.count):
        try:
            for receiver, parts in enumerate(plan.sends[number]):
                for part in parts:
                    part.into_bucket(buckets[receiver][number % 2], part.taken())
        except Exception as error:
            failure = failure or error
        following = incoming.free() if number + 1 < plan.count else None
        dist.barrier(group)
        incoming.put(own, plan.own[number])
        own = following if following is not None else own
    if failure is not None:
        raise failure


def _send_all(plan: _Plan, incoming: _Incoming, device: str, group: Any) -> None:
    """Carry the rounds out by messages. A rank that fails to pack sends what is there, and raises at the end."""
    sent = torch.empty(plan.most(), dtype=torch.uint8, device=device)
    arrived = torch.empty(0, dtype=torch.uint8, device=device)
    failure: Exception | None = None
    for number in range(plan.count):
        outward, inward = plan.outward(number), plan.inward(number)
        try:
            _pack(outward, sent)
        except Exception as error:
            failure = failure or error
        came, went = ([sum(part.size for part in parts) for parts in both] for both in (inward, outward))
        if sum(came) > len(arrived):
            arrived = torch.empty(plan.size, dtype=torch.uint8, device=device)
        dist.all_to_all_single(arrived[: sum(came)], sent[: sum(went)], came, went, group=group)
        if plan.own[number]:
            bucket = incoming.free()
            for part in plan.sends[number][plan.rank]:
                part.into_bucket(bucket, part.taken())
            _unpack(inward, arrived, bucket)
            incoming.put(bucket, plan.own[number])
    if failure is not None:
        raise failure


def _pack(sends: Sequence[Sequence[_Part]], sent: torch.Tensor) -> None:
    place = 0
    for parts in sends:
        for part in parts:
            sent[place : place + part.size].view(part.shape).copy_(part.taken())
            place += part.size


def _unpack(receives: Sequence[Sequence[_Part]], arrived: torch.Tensor, bucket: torch.Tensor) -> None:
    place = 0
    for parts in receives:
        for part in parts:
            part.into_bucket(bucket, arrived[place : place + part.size].view(part.shape))
            place += part.size
