"""Tensors brought to the ranks that want them by messages, in rounds of bounded size; one is read while one arrives."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist

from lora_state_format.errors import RankError
from lora_state_format.torch.ranks import device_of
from lora_state_format.torch.segments import Portion, Segment, portions
from lora_state_format.torch.spread import Holders, Incoming, Kind, Spread

__all__ = ["BUCKET", "Rounds", "by_messages"]

T = TypeVar("T")

BUCKET: Final = 16 << 20
"""Bytes that a rank sends, and receives, in one round. It holds four times as many: what it sends, what arrives, and
two buckets of whole tensors, of which one is being read."""

SMALLEST: Final = 1 << 20
"""Rounds do not become smaller than this, however much one rank has to send in them."""

ALIGNMENT: Final = 64
"""Where the parts of tensors begin in a bucket."""


def _rounds(missing: Sequence[tuple[Spread, int, int]], size: int) -> list[list[Segment]]:
    """Return the bytes of tensors that are brought to a rank, in order, cut into buckets of ``size`` bytes."""
    rounds: list[list[Segment]] = []
    place = size
    for spread, first, end in missing:
        while first < end:
            place += -place % ALIGNMENT
            if place >= size:
                rounds.append([])
                place = 0
            last = min(end, first + size - place)
            rounds[-1].append(Segment(spread, first, last, place))
            place, first = place + last - first, last
    return rounds


class Rounds:
    """What this rank sends and receives in each round of messages. ``wanted`` has the tensors that each rank wants."""

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
        self.sends: list[list[list[Portion]]] = [[[] for _ in rounds] for _ in range(self.count)]
        for receiver, theirs in enumerate(rounds):
            for number, segments in enumerate(theirs):
                for segment in segments:
                    holders = self._of(segment.spread)
                    if holders.sends(self.rank, receiver):
                        self.sends[number][receiver] += portions(segment, holders.wheres[self.rank])

    def most(self) -> int:
        """Return the bytes that this rank sends in the round in which it sends most."""
        return max(
            (sum(part.size for parts in self.outward(n) for part in parts) for n in range(self.count)), default=0
        )

    def outward(self, number: int) -> list[list[Portion]]:
        """Return what goes to each other rank in a round."""
        return [[] if receiver == self.rank else parts for receiver, parts in enumerate(self.sends[number])]

    def inward(self, number: int) -> list[list[Portion]]:
        """Return what comes from each other rank in a round."""
        found: list[list[Portion]] = [[] for _ in self._missing]
        for segment in self.own[number]:
            holders = self._of(segment.spread)
            for sender in holders.senders(self.rank):
                found[sender] += portions(segment, holders.wheres[sender]) if sender != self.rank else ()
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
        self._full: queue.SimpleQueue[tuple[torch.Tensor, list[Segment]] | None] = queue.SimpleQueue()
        for bucket in buckets:
            self._free.put(bucket)
        self._bucket: torch.Tensor | None = None
        self._segments: dict[int, list[tuple[Segment, memoryview]]] = {}

    def free(self) -> torch.Tensor:
        """Return the next bucket to fill, when it is not being read any more; they take turns."""
        return self._free.get()

    def put(self, bucket: torch.Tensor, segments: list[Segment]) -> None:
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


def by_messages(rounds: Rounds, read: Callable[[Incoming], T], group: Any) -> T:
    """Return what ``read`` returns, in a thread of its own, while messages bring what it reads; for every rank."""
    device = device_of(group)
    if rounds.longest():
        _fit(rounds, device, group)
    incoming = _Incoming([torch.empty(rounds.size, dtype=torch.uint8) for _ in range(2)], rounds.held)
    with ThreadPoolExecutor(1, "lora_state_format exchange") as thread:
        reading = thread.submit(_read, read, incoming)
        try:
            if rounds.longest():
                _send_all(rounds, incoming, device, group)
        finally:
            incoming.end()
        return reading.result()


def _read(read: Callable[[Incoming], T], incoming: _Incoming) -> T:
    try:
        return read(incoming)
    finally:
        while incoming.advance():  # what was not read, so that no bucket is waited for
            pass


def _fit(rounds: Rounds, device: torch.device, group: Any) -> None:
    """Lay the rounds out so that no rank sends more than a bucket in one, as one that holds what all want would."""
    size = BUCKET
    while True:
        rounds.lay(size)
        most = torch.tensor([rounds.most()], device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        if int(most) <= BUCKET or size <= SMALLEST:
            return
        size = max(SMALLEST, size // 2)


def _send_all(rounds: Rounds, incoming: _Incoming, device: torch.device, group: Any) -> None:
    """Carry the rounds out by messages. A rank that fails to pack sends what is there, and raises at the end."""
    sent = torch.empty(rounds.most(), dtype=torch.uint8, device=device)
    arrived = torch.empty(0, dtype=torch.uint8, device=device)
    failure: Exception | None = None
    for number in range(rounds.count):
        outward, inward = rounds.outward(number), rounds.inward(number)
        try:
            _pack(outward, sent)
        except Exception as error:
            failure = failure or error
        came, went = ([sum(part.size for part in parts) for parts in both] for both in (inward, outward))
        if sum(came) > len(arrived):
            arrived = torch.empty(rounds.size, dtype=torch.uint8, device=device)
        dist.all_to_all_single(arrived[: sum(came)], sent[: sum(went)], came, went, group=group)
        if rounds.own[number]:
            bucket = incoming.free()
            for part in rounds.sends[number][rounds.rank]:
                part.of(bucket).copy_(part.taken())
            _unpack(inward, arrived, bucket)
            incoming.put(bucket, rounds.own[number])
    if failure is not None:
        raise failure


def _pack(sends: Sequence[Sequence[Portion]], sent: torch.Tensor) -> None:
    place = 0
    for parts in sends:
        for part in parts:
            sent[place : place + part.size].view(part.shape).copy_(part.taken())
            place += part.size


def _unpack(receives: Sequence[Sequence[Portion]], arrived: torch.Tensor, bucket: torch.Tensor) -> None:
    place = 0
    for parts in receives:
        for part in parts:
            part.of(bucket).copy_(arrived[place : place + part.size].view(part.shape))
            place += part.size
