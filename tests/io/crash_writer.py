"""A process that writes states and is killed while it does; ``test_crashes`` runs it.

``python crash_writer.py every FOLDER BEFORE AFTER``: a state is at a path in one layout; a child replaces it by another
state in another layout, and is killed at its first operation on files, at its second, and so on, until one lives to the
end. After each death the path has to mean the old state or the new one, whole, and a further write has to leave nothing
behind. Prints how many deaths there were, and after how many the new state was the one.

``python crash_writer.py random DEATHS [SEED]``: children replace a state by another one, in each of four ways, and are
killed at random moments until so many have died of each. After each death the path has to hold every byte of the old
state or of the new one, and a further replacement has to leave nothing else behind. Prints a line for each way.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from lora_state_format import cli
from lora_state_format.errors import StateFormatError
from lora_state_format.format import reading, writing
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Role, Slot
from lora_state_format.model.tensors import contiguous

NAME: Final = "optimizer.safetensors"
WRITTEN: Final = 1 << 14
"""Elements of a tensor that is written by itself; smaller ones go together."""

LAYOUTS: Final[dict[str, int | None]] = {"file": None, "set": 9 * WRITTEN, "other-set": 13 * WRITTEN}
"""Largest shards, in bytes: of two tensors, of three."""


def state(number: int, elements: int = WRITTEN) -> OptimizerState:
    data = Memory(bytes([number % 256]) * elements * 4)
    slot = Slot(contiguous("F32", (elements,), data), Role.PARAM)
    parameters = tuple(Parameter(name, (elements,), {"exp_avg": slot}) for name in "abcd")
    return OptimizerState((Optimizer(),), (Group(0, (), 4),), parameters, Naming("model"), extra={"number": number})


def number_at(path: Path) -> int:
    """Which state a path means; it has to be whole."""
    result = reading.verify(path)
    assert result.ok, result.problems
    with reading.open_state(path) as found:
        number = found.extra["number"]
        assert isinstance(number, int)
        for parameter in found.parameters:
            assert set(parameter["exp_avg"].bytes()) == {number % 256}
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
        writing.write(state(1), path, force=True, max_shard_size=LAYOUTS[layout])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFEXITED(status)


def every(folder: Path, before: str, after: str) -> None:
    os.fsync = lambda fd: None  # what a process wrote outlives it without; only machines need this
    path, clean = folder / NAME, folder.with_name("clean") / NAME
    clean.parent.mkdir()
    writing.write(state(2), clean, max_shard_size=LAYOUTS[after])
    deaths = new = 0
    alive = False
    while not alive:
        shutil.rmtree(folder)
        folder.mkdir()
        if before != "nothing":
            writing.write(state(0), path, max_shard_size=LAYOUTS[before])
        alive = survives(path, after, deaths + 1)
        try:
            number = number_at(path)
        except FileNotFoundError:
            assert before == "nothing", "a death left no state"
            number = 0
        deaths += not alive
        new += number == 1 and not alive
        writing.write(state(2), path, force=True, max_shard_size=LAYOUTS[after])
        assert number_at(path) == 2
        assert files(folder) == files(clean.parent), "left-overs"
    assert number == 1
    print(deaths, new)  # noqa: T201


# --- random moments -----------------------------------------------------------------------------------------------

ELEMENTS: Final = 50_000

Job = Callable[[Path, int], object]
"""Makes one of two states the one at a path, whatever was there."""


def jobs(folder: Path) -> dict[str, Job]:
    """The four ways. ``folder`` takes two files of ``torch.save``, for conversions to start from."""
    import torch

    from lora_state_format.torch import save_optimizer

    torch.set_num_threads(1)
    runs = []
    for number in range(2):
        model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(ELEMENTS)) for name in "abcd"})
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.full((ELEMENTS,), 1.0 + number)
        optimizer.step()
        torch.save(optimizer.state_dict(), folder / f"{number}.pt")
        runs.append((optimizer, model))
    names = folder / "names.txt"
    names.write_text("a\nb\nc\nd\n")

    def convert(path: Path, number: int) -> None:
        writing.PART = 4 * ELEMENTS  # type: ignore[misc]  # a tensor: so two threads write
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        assert cli.run(["convert", str(folder / f"{number}.pt"), str(path), "--names", str(names), "--force"]) == 0

    def write(path: Path, number: int) -> None:
        writing.write(state(number, ELEMENTS), path, force=True)

    def shards(path: Path, number: int) -> None:
        save_optimizer(*runs[number], path, max_shard_size=2 * 4 * ELEMENTS)

    def background(path: Path, number: int) -> None:
        save_optimizer(*runs[number], path, background=True).wait()

    return {"convert": convert, "write": write, "shards": shards, "background": background}


def lives(job: Job, path: Path, number: int, seconds: float | None = None) -> bool:
    """Whether a child that does a job is through with it before it is killed, if it is."""
    child = os.fork()
    if child == 0:
        try:
            job(path, number)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFEXITED(status)


def kill(job: Job, folder: Path, deaths: int, moments: random.Random) -> dict[str, int]:
    """How many deaths left the old state and how many the new one; how many neither; how many runs left litter."""
    path, references, seconds = folder / NAME, [], []
    for number in (0, 1, 0, 1, 0):
        start = time.monotonic()
        lives(job, path, number)
        seconds.append(time.monotonic() - start)
        references.append(files(folder))
    assert references[0] == references[2] != references[1] == references[3]
    counts = {"killed": 0, "old": 0, "new": 0, "lost": 0, "litter": 0}
    while counts["killed"] < deaths:
        dead = not lives(job, path, 1, moments.uniform(0, statistics.median(seconds)))
        found = which(path, references[:2])
        counts["killed"] += dead
        counts["lost"] += found is None or (not dead and found != 1)
        if dead and found is not None:
            counts["new" if found else "old"] += 1
        lives(job, path, 0)
        counts["litter"] += files(folder) != references[0]
    return counts


def which(path: Path, references: list[dict[str, bytes]]) -> int | None:
    """Which of the states a path means, if every byte of it is there."""
    try:
        if not reading.verify(path).ok:
            return None
    except (StateFormatError, OSError):
        return None
    found = files(path.parent)
    same = (number for number, reference in enumerate(references) if reference.items() <= found.items())
    return next(same, None)


def at_random(deaths: int, seed: str) -> bool:
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for name, job in jobs(Path(temporary)).items():
            folder = Path(temporary, name)
            folder.mkdir()
            counts = kill(job, folder, deaths, random.Random(seed + name))
            print(f"{name}:", ", ".join(f"{count} {what}" for what, count in counts.items()), flush=True)  # noqa: T201
            failed = failed or counts["lost"] + counts["litter"] > 0
    return failed


if __name__ == "__main__":
    if sys.argv[1] == "every":
        every(Path(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        sys.exit(at_random(int(sys.argv[2]), "".join(sys.argv[3:])))
