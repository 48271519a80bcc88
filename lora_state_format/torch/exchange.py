"""Whole tensors at the ranks that want them, a piece at a time.

``gather`` lets the one rank that wants a tensor read its bytes: ranks of one machine read each other's memory, and
others send what is wanted by ``all_to_all_single``, in rounds of bounded size, in the order in which it is read. What
the rank holds itself in one run of bytes, as rows of a matrix are, it reads where it is.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import mul
from typing import Any, Final, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from lora_state_format.errors import RankError
from lora_state_format.model.tensors import CHUNK, Box, Flat, Tensor, boxes_between, c_strides, intersection
from lora_state_format.torch.neighbours import can_read, read_memory, shown_memory
from lora_state_format.torch.ranks import Ranks, device_of
from lora_state_format.torch.spread import (
    Holders,
    Incoming,
    Kind,
    Spread,
    Where,
    holders_of,
    holding_of,
    spread_of,
)

__all__ = ["BUCKET", "gather"]

T = TypeVar("T")

BUCKET: Final = 16 << 20
"""Bytes that a rank sends, and receives, in one round. It holds four times as many: what it sends, what arrives, and
two buckets of whole tensors, of which one is being read."""

SMALLEST: Final = 1 << 20
"""Rounds do not become smaller than this, however much one rank has to send in them."""

ALIGNMENT: Final = 64
"""Where the parts of tensors begin in a bucket."""


# --- parts of tensors ------------------------------------------------------------------------------------------------


class _Segment(NamedTuple):
    """Bytes ``first`` to ``last`` of a tensor, which stand in a bucket from ``place`` on."""

    spread: Spread
    first: int
    last: int
    place: int


class _Part(NamedTuple):
    """What one rank holds of a segment: a box of bytes of its own tensor, and where that goes in the bucket.

    ``local`` indexes the sender's bytes, which are one run from byte ``first`` on. In the bucket a run of shape ``run``
    begins at ``place``; ``into`` indexes it.
    """

    spread: Spread
    shape: tuple[int, ...]
    first: int
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

    def of(self, bucket: torch.Tensor) -> torch.Tensor:
        """Return the place of these bytes in a bucket."""
        return bucket[self.place : self.place + math.prod(self.run)].view(self.run)[self.into]


def _parts(segment: _Segment, where: Where) -> Iterator[_Part]:
    """Yield what a rank that holds ``where`` has of a segment."""
    spread, first, last, place = segment
    width = spread.width
    if isinstance(where, Flat):
        low, high = max(first, where.start * width), min(last, (where.start + where.count) * width)
        if low < high:
            own = low - where.start * width
            shape = (high - low,)
            yield _Part(spread, shape, own, (slice(own, own + shape[0]),), place + low - first, shape, (slice(None),))
        return
    if where is None:
        return
    whole, held = (*spread.shape[:-1], spread.shape[-1] * width), _in_bytes(where, width)
    low = _position(held.start, whole)
    if low >= last or low + _position([size - 1 for size in held.shape], whole) < first:
        return
    for position, box in boxes_between(whole, first, last):
        common = intersection(held, box)
        if common is not None:
            local, into = _slices(common, held), _slices(common, box)
            own = _position([index.start for index in local], held.shape)
            yield _Part(spread, common.shape, own, local, place + position - first, box.shape, into)


def _position(index: Sequence[int], shape: tuple[int, ...]) -> int:
    """Return where an element stands in C order."""
    return sum(map(mul, index, c_strides(shape)))


def _in_bytes(box: Box, width: int) -> Box:
    return Box((*box.start[:-1], box.start[-1] * width), (*box.shape[:-1], box.shape[-1] * width))


def _slices(box: Box, inside: Box) -> tuple[slice, ...]:
    return tuple(
        slice(start - base, start - base + size)
        for start, size, base in zip(box.start, box.shape, inside.start, strict=True)
    )


# --- rounds of messages ----------------------------------------------------------------------------------------------


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


class _Plan:
    """What this rank sends and receives in each round. ``wanted`` has the tensors that each rank wants."""

    def __init__(self, wanted: Sequence[Sequence[Spread]], holders: Mapping[Kind, Holders], rank: int) -> None:
        self.rank = rank
        self._holders = holders
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


# --- memory of one machine --------------------------------------------------------------------------------------------


class _Direct:
    """Bytes that are read from the memory of the ranks that hold them when they are wanted, a chunk at a time.

    Attributes:
        rank: The number of this rank.
        holders: Who holds what.
        processes: The number of each rank's process.
        addresses: For each rank where its part of each tensor begins.
        numbers: The place of each tensor among a rank's addresses.
    """

    def __init__(
        self,
        rank: int,
        holders: Mapping[Kind, Holders],
        processes: Sequence[int],
        addresses: Sequence[Sequence[int]],
        numbers: Mapping[int, int],
    ) -> None:
        self.rank = rank
        self.holders = holders
        self.processes = processes
        self.addresses = addresses
        self.numbers = numbers
        self._senders = {kind: found.senders(rank) for kind, found in holders.items()}
        self._bucket, self._scratch = (torch.empty(CHUNK, dtype=torch.uint8) for _ in range(2))

    def find(self, spread: Spread, offset: int) -> memoryview:
        """Return the bytes of a tensor from ``offset`` on, some of them; valid until the next call."""
        kind = spread.kind, spread.shape
        holders = self.holders[kind]
        first, end = holders.run(self.rank, spread)
        if first <= offset < end:
            return spread.some_of_local(offset - first, end - offset)
        last = min(offset + CHUNK, first if offset < first else spread.size)
        segment = _Segment(spread, offset, last, 0)
        for sender in self._senders[kind]:
            for part in _parts(segment, holders.wheres[sender]):
                self._fetch(sender, part)
        found: memoryview = self._bucket.numpy().data[: last - offset]
        return found

    def _fetch(self, sender: int, part: _Part) -> None:
        address = self.addresses[sender][self.numbers[id(part.spread)]] + part.first
        target = part.of(self._bucket)
        between = target if target.is_contiguous() else self._scratch[: part.size].view(part.shape)
        read_memory(self.processes[sender], address, between.data_ptr(), part.size)
        if between is not target:
            target.copy_(between)


def _addresses(spreads: Sequence[Spread]) -> list[int] | None:
    """Return where this rank's part of each tensor begins; ``None`` if one is on a device or not in C order."""
    held = [spread.local for spread in spreads if spread.local is not None]
    if not all(local.device.type == "cpu" and local.is_contiguous() for local in held):
        return None
    return [0 if spread.local is None else spread.bytes_of_local.data_ptr() for spread in spreads]


# --- carrying it out ------------------------------------------------------------------------------------------------


def gather(wanted: Sequence[Sequence[Tensor]], read: Callable[[], T], ranks: Ranks) -> list[T]:
    """Return what each rank's ``read`` returns, which finds the whole tensors that its rank wants.

    Every rank must call this. The tensors must not change before it returns.

    Args:
        wanted: For each rank the tensors that it wants, in the order in which its ``read`` reads them, each once;
            those that are not spread are nothing to exchange. The same on every rank.
        read: It may be called in a thread of its own, so that it writes or hashes what has arrived while more arrives.
        ranks: The ranks.

    Raises:
        CaptureError: If the ranks do not hold every element of a tensor.
        RankError: If another rank failed, with its message.
        Exception: What this rank's ``read`` raises, when all other ranks have read.
    """
    spreads = [[source for tensor in tensors if (source := spread_of(tensor))] for tensors in wanted]
    every = [spread for theirs in spreads for spread in theirs]
    if not every:
        return ranks.share(read)
    own = spreads[ranks.rank]
    with shown_memory() as place:
        told = ranks.share(lambda: (holding_of(every), place))
        holders = holders_of(every, [holding for holding, _ in told], ranks.rank)
        places = [place for _, place in told]

        def look() -> list[int] | None:
            found = _addresses(every)
            return found if found is not None and can_read(places, [*filter(None, found)]) else None

        addresses = [found for found in ranks.share(look) if found is not None]
        if len(addresses) == ranks.world:
            numbers = {id(spread): number for number, spread in enumerate(every)}
            direct = _Direct(ranks.rank, holders, [place.process for place in places], addresses, numbers)
            return ranks.share(lambda: _finding(own, direct, read))
    plan = _Plan(spreads, holders, ranks.rank)
    return ranks.share(lambda: _by_messages(plan, own, read, ranks.group))


def _finding(spreads: Sequence[Spread], incoming: Incoming, read: Callable[[], T]) -> T:
    """Return what ``read`` returns, which finds the bytes of some tensors where they arrive."""
    for spread in spreads:
        spread.incoming = incoming
    try:
        return read()
    finally:
        for spread in spreads:
            spread.incoming = None


def _by_messages(plan: _Plan, own: Sequence[Spread], read: Callable[[], T], group: Any) -> T:
    """Return what ``read`` returns in a thread of its own, while messages bring what it reads."""
    device = device_of(group)
    if plan.longest():
        _fit(plan, device, group)
    incoming = _Incoming([torch.empty(plan.size, dtype=torch.uint8) for _ in range(2)], plan.held)
    with ThreadPoolExecutor(1, "lora_state_format exchange") as thread:
        reading = thread.submit(_finding, own, incoming, lambda: _read(read, incoming))
        try:
            if plan.longest():
                _send_all(plan, incoming, device, group)
        finally:
            incoming.end()
        return reading.result()


def _read(read: Callable[[], T], incoming: _Incoming) -> T:
    try:
        return read()
    finally:
        while incoming.advance():  # what was not read, so that no bucket is waited for
            pass


def _fit(plan: _Plan, device: torch.device, group: Any) -> None:
    """Lay the rounds out so that no rank sends more than a bucket in one, as one that holds what all want would."""
    size = BUCKET
    while True:
        plan.lay(size)
        most = torch.tensor([plan.most()], device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        if int(most) <= BUCKET or size <= SMALLEST:
            return
        size = max(SMALLEST, size // 2)


def _send_all(plan: _Plan, incoming: _Incoming, device: torch.device, group: Any) -> None:
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
                part.of(bucket).copy_(part.taken())
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
            part.of(bucket).copy_(arrived[place : place + part.size].view(part.shape))
            place += part.size
