"""Memory that all ranks of one machine see, so that bytes go from rank to rank by one copy instead of through sockets.

Each rank makes a piece of anonymous memory (``memfd_create``) and the others map it through ``/proc``. It has no name
in any folder, no limit of ``/dev/shm``, and is gone with the last rank that has mapped it, however that ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

__all__ = ["Buckets", "shared_buckets"]

Buckets = list[list[torch.Tensor]]
"""For each rank its buckets, as bytes."""

KERNEL: Final = Path("/proc/sys/kernel/random/boot_id")
PROCESSES: Final = Path("/proc/self/ns/pid")
"""Together these say whether two processes run on one machine, and call a process by the same number."""


def shared_buckets(count: int, size: int, group: Any) -> Buckets | None:
    """Return ``count`` buckets of each rank, which every rank may write into; every rank must call this.

    ``None``, on every rank, where the ranks are on several machines or their system has no such memory.
    """
    descriptor = _made(count * size)
    try:
        told: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, (_machine(), os.getpid(), descriptor), group=group)
        maps = _mapped(told, count * size)
        agreed: list[Any] = [None] * len(told)
        dist.all_gather_object(agreed, maps is not None, group=group)
    finally:
        if descriptor is not None:
            os.close(descriptor)
    if maps is None or not all(agreed):
        return None
    return [[whole[number * size : (number + 1) * size] for number in range(count)] for whole in maps]


def _made(size: int) -> int | None:
    with contextlib.suppress(OSError, AttributeError):  # not Linux, or forbidden
        descriptor = os.memfd_create("lora_state_format")
        os.ftruncate(descriptor, size)
        return descriptor
    return None


def _machine() -> tuple[str, str] | None:
    with contextlib.suppress(OSError):
        return KERNEL.read_text(), str(PROCESSES.readlink())
    return None


def _mapped(told: list[tuple[tuple[str, str] | None, int, int | None]], size: int) -> list[torch.Tensor] | None:
    maps = []
    for machine, process, descriptor in told:
        if machine is None or machine != told[0][0] or descriptor is None:
            return None
        try:
            opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # another user's process
            return None
        try:
            maps.append(torch.frombuffer(mmap.mmap(opened, size), dtype=torch.uint8))
        finally:
            os.close(opened)
    return maps
