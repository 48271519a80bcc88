"""Whole tensors at the ranks that want them, a piece at a time.

``gather`` lets the one rank that wants a tensor read its bytes: ranks of one machine read each other's memory, and
others send what is wanted by ``all_to_all_single``, in rounds of bounded size, in the order in which it is read. What
the rank holds itself in one run of bytes, as rows of a matrix are, it reads where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

import torch

from lora_state_format.model.tensors import Tensor
from lora_state_format.torch.messages import Rounds, by_messages
from lora_state_format.torch.neighbours import can_read, read_memory, shown_memory
from lora_state_format.torch.ranks import Ranks
from lora_state_format.torch.segments import Portion, Segment, portions
from lora_state_format.torch.spread import Holders, Incoming, Kind, Spread, holders_of, holding_of, spread_of

__all__ = ["gather"]

T = TypeVar("T")

READ: Final = 2 << 20
"""Bytes that a rank reads of others at once: with half of it, what leads to each system call takes a fifth longer."""


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
    rounds = Rounds(spreads, holders, ranks.rank)
    return ranks.share(lambda: by_messages(rounds, lambda incoming: _finding(own, incoming, read), ranks.group))


def _finding(spreads: Sequence[Spread], incoming: Incoming, read: Callable[[], T]) -> T:
    """Return what ``read`` returns, which finds the bytes of some tensors where they arrive."""
    for spread in spreads:
        spread.incoming = incoming
    try:
        return read()
    finally:
        for spread in spreads:
            spread.incoming = None


class _Direct:
    """Bytes that are read from the memory of the ranks that hold them when they are wanted, a segment at a time.

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
        self._bucket, self._scratch = (torch.empty(READ, dtype=torch.uint8) for _ in range(2))
        self._segment: Segment | None = None

    def find(self, spread: Spread, offset: int) -> memoryview:
        """Return the bytes of a tensor from ``offset`` on, some of them; valid until the next call."""
        segment = self._segment
        if segment is None or segment.spread is not spread or not segment.first <= offset < segment.last:
            holders = self.holders[spread.kind, spread.shape]
            first, end = holders.run(self.rank, spread)
            if first <= offset < end:
                return spread.some_of_local(offset - first, end - offset)
            segment = Segment(spread, offset, min(offset + READ, first if offset < first else spread.size), 0)
            self._fill(segment, holders)
        found: memoryview = self._bucket.numpy().data[offset - segment.first : segment.last - segment.first]
        return found

    def _fill(self, segment: Segment, holders: Holders) -> None:
        self._segment = None
        for sender in self._senders[segment.spread.kind, segment.spread.shape]:
            for part in portions(segment, holders.wheres[sender]):
                self._fetch(sender, part)
        self._segment = segment

    def _fetch(self, sender: int, part: Portion) -> None:
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
