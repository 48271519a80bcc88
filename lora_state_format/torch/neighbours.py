"""The memory of the ranks of one machine, read where it is: one copy, made by the kernel, and nobody has to wait.

This is Linux's cross-memory attach (``process_vm_readv(2)``), by which MPI's libraries send messages on one machine. It
needs what a debugger needs: one user, and a container that does not forbid it. Yama, where it restricts debuggers to a
process's descendants, lets a process allow others (``PR_SET_PTRACER`` in ``prctl(2)``).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from lora_state_format.errors import RankError
from lora_state_format.torch.ranks import gone

__all__ = ["Place", "can_read", "read_memory", "shown_memory"]

KERNEL: Final = Path("/proc/sys/kernel/random/boot_id")
PROCESSES: Final = Path("/proc/self/ns/pid")
"""Together these say whether two processes run on one machine, and call a process by the same number."""

YAMA: Final = Path("/proc/sys/kernel/yama/ptrace_scope")
PR_SET_PTRACER: Final = 0x59616D61
"""With any process, or none, as ``prctl``'s next argument."""


class Place(NamedTuple):
    """Where a process can be read, and what is to be found there.

    Attributes:
        machine: What is the same for the processes of one machine; ``None`` if that is unknown.
        process: Its number.
        address: Of the token in its memory.
        token: Random bytes.
    """

    machine: tuple[str, str] | None
    process: int
    address: int
    token: bytes


class _Span(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def shown_memory() -> Iterator[Place]:
    """Let other processes of this user read this one's memory, and yield where. Several threads may do so at once."""
    token = os.urandom(16)
    buffer = ctypes.create_string_buffer(token, len(token))
    _allow(+1)
    try:
        yield Place(_machine(), os.getpid(), ctypes.addressof(buffer), token)
    finally:
        _allow(-1)


def can_read(places: Sequence[Place], addresses: Sequence[int]) -> bool:
    """Return whether this process can read the memory of others, and they what it has at some addresses."""
    own = os.getpid()
    if any(place.machine is None or place.machine != places[0].machine for place in places):
        return False
    buffer = ctypes.create_string_buffer(len(places[0].token))
    try:
        for place in places:
            read_memory(place.process, place.address, ctypes.addressof(buffer), len(place.token))
            if buffer.raw != place.token:
                return False
        for address in addresses:  # memory of a device's driver is not for others
            read_memory(own, address, ctypes.addressof(buffer), 1)
    except (RankError, AttributeError):  # the second: not Linux
        return False
    return True


def read_memory(process: int, address: int, target: int, size: int) -> None:
    """Copy ``size`` bytes at an address of a process to an address of this one.

    Raises:
        RankError: If they cannot be read: the process may have ended.
    """
    call = _process_vm_readv()
    while size:
        local, remote = _Span(target, size), _Span(address, size)
        count = call(process, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if count <= 0:
            raise gone(f"reading the memory of process {process}: {os.strerror(ctypes.get_errno())}")
        address, target, size = address + count, target + count, size - count


@cache
def _process_vm_readv() -> Any:
    call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    spans = ctypes.POINTER(_Span), ctypes.c_ulong
    call.argtypes, call.restype = (ctypes.c_int, *spans, *spans, ctypes.c_ulong), ctypes.c_ssize_t
    return call


def _machine() -> tuple[str, str] | None:
    with contextlib.suppress(OSError):
        return KERNEL.read_text(), str(PROCESSES.readlink())
    return None


def _allow(more: int) -> None:
    """Where Yama restricts it, let others read this process as long as a thread wants that."""
    global _showing
    with _lock:
        before, _showing = _showing, _showing + more
        if bool(before) != bool(_showing) and _restricted():
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(-1 if _showing else 0), 0, 0, 0)


def _restricted() -> bool:
    with contextlib.suppress(OSError):
        return YAMA.read_text().strip() == "1"
    return False


_lock = threading.Lock()
_showing = 0
