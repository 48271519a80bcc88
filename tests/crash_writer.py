"""A process that writes states and is killed while it does; ``test_crashes`` runs it.

``python crash_writer.py every FOLDER BEFORE AFTER``: a state is at a path in one layout; a child replaces it by another
state in another layout, and is killed at its first operation on files, at its second, and so on, until one lives to the
end. After each death the path has to mean the old state or the new one, whole, and a further write has to leave nothing
behind. Prints how many deaths there were, and after how many the new state was the one.

``python crash_writer.py forever FOLDER LAYOUT``: writes states 0, 1, 2 and so on, printing each when it is done.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from lora_state_format import container
from lora_state_format.model import Group, Naming, Optimizer, OptimizerState, Parameter, Role, Slot, contiguous
from lora_state_format.sources import Memory

NAME: Final = "optimizer.safetensors"
LAYOUTS: Final[dict[str, int | None]] = {"file": None, "set": 70, "other-set": 100}


def state(number: int, elements: int = 8) -> OptimizerState:
    data = Memory(bytes([number % 256]) * elements * 4)
    slot = Slot(contiguous("F32", (elements,), data), Role.PARAM)
    parameters = tuple(Parameter(name, (elements,), {"m": slot}) for name in "abcd")
    return OptimizerState((Optimizer(),), (Group(0, (), 4),), parameters, Naming("model"), extra={"number": number})


def number_at(path: Path) -> int:
    """Which state a path means; it has to be whole."""
    result = container.verify(path)
    assert result.ok, result.problems
    with container.open_state(path) as found:
        number = found.extra["number"]
        assert isinstance(number, int)
        for parameter in found.parameters:
            assert set(parameter["m"].bytes()) == {number % 256}
        assert len(found) == 4
    return number


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def mortal(name: str, fuse: list[int]) -> Callable[..., Any]:
    """An operation of ``os`` that kills the process before it, or half way through, when the fuse has burnt down."""
    original: Callable[..., Any] = getattr(os, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        fuse[0] -= 1
        if fuse[0] == 0:
            if name == "pwrite":
                original(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    return call


def survives(path: Path, layout: str, operations: int) -> bool:
    """Whether a child that replaces the state at a path lives through so many operations."""
    child = os.fork()
    if child == 0:
        fuse = [operations]
        for name in ("open", "pwrite", "fsync", "replace", "unlink"):
            setattr(os, name, mortal(name, fuse))
        container.write(state(1), path, force=True, max_shard_size=LAYOUTS[layout])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFEXITED(status)


def every(folder: Path, before: str, after: str) -> None:
    os.fsync = lambda fd: None  # what a process wrote outlives it without; only machines need this
    path, clean = folder / NAME, folder.with_name("clean") / NAME
    clean.parent.mkdir()
    container.write(state(2), clean, max_shard_size=LAYOUTS[after])
    deaths = new = 0
    alive = False
    while not alive:
        shutil.rmtree(folder)
        folder.mkdir()
        if before != "nothing":
            container.write(state(0), path, max_shard_size=LAYOUTS[before])
        alive = survives(path, after, deaths + 1)
        try:
            number = number_at(path)
        except FileNotFoundError:
            assert before == "nothing", "a death left no state"
            number = 0
        deaths += not alive
        new += number == 1 and not alive
        container.write(state(2), path, force=True, max_shard_size=LAYOUTS[after])
        assert number_at(path) == 2
        assert files(folder) == files(clean.parent), "left-overs"
    assert number == 1
    print(deaths, new)  # noqa: T201


def forever(folder: Path, layout: str) -> None:
    number = 0
    while True:
        container.write(state(number, 50_000), folder / NAME, force=True, max_shard_size=LAYOUTS[layout] and 200_000)
        print(number, flush=True)  # noqa: T201
        number += 1


if __name__ == "__main__":
    if sys.argv[1] == "every":
        every(Path(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        forever(Path(sys.argv[2]), sys.argv[3])
