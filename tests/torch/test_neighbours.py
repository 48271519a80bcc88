"""The memory of another process of this machine, read where it is."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import IO

import pytest

from lora_state_format.errors import RankError
from lora_state_format.torch.neighbours import Place, can_read, read_memory, shown_memory

OTHER = """
from lora_state_format.torch.neighbours import shown_memory
with shown_memory() as place:
    print(repr(tuple(place)), flush=True)
    input()
"""


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], Place]]:
    """A process of its own, and where it can be read."""
    command = [sys.executable, "-c", OTHER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        output: IO[str] = process.stdout  # type: ignore[assignment]
        yield process, Place(*eval(output.readline()))
        if process.poll() is None:
            process.communicate("\n")


def test_memory_of_another_process_is_read(other: tuple[subprocess.Popen[str], Place]) -> None:
    _, place = other
    buffer = ctypes.create_string_buffer(8)
    read_memory(place.process, place.address + 4, ctypes.addressof(buffer), 8)
    assert buffer.raw == place.token[4:12]
    with shown_memory() as own:
        assert can_read([own, place], [ctypes.addressof(buffer)])


def test_a_process_that_has_ended_is_named(other: tuple[subprocess.Popen[str], Place]) -> None:
    process, place = other
    process.communicate("\n")
    with pytest.raises(RankError) as caught:
        read_memory(place.process, place.address, ctypes.addressof(ctypes.create_string_buffer(8)), 8)
    assert str(caught.value) == (
        "another rank does not answer any more, its process may have ended: reading the memory of process "
        f"{place.process}: No such process"
    )
    with shown_memory() as own:
        assert not can_read([own, place], [])


def test_what_cannot_be_read_is_not(other: tuple[subprocess.Popen[str], Place]) -> None:
    _, place = other
    with shown_memory() as own:
        assert own.machine is not None
        assert own.process == os.getpid()
        assert can_read([own], [own.address])
        assert not can_read([own], [8])  # no memory of this process is there
        assert not can_read([own, place._replace(machine=("another", "machine"))], [])
        assert not can_read([own._replace(machine=None)], [])
        assert not can_read(
            [own, place._replace(token=bytes(16))], []
        )  # the process that has this number here is another
