"""Writers that are stopped at system calls; ``make crashes`` has every writer and every call."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

from lora_state_format import registry
from lora_state_format.errors import FileError
from lora_state_format.model.states import OptimizerState, PositionalState, Slot

SCRIPT: Final = Path(__file__).with_name("kill_writer.py")
WAYS: Final = ("write", "write, 2 shards", "accelerate, 2 optimizers", "dcp", "deepspeed_universal", "lerobot")
"""Each way to make files appear."""


def test_every_format_is_in_the_table(load_module: Callable[[Path], ModuleType]) -> None:
    named = {name.partition(",")[0] for name in load_module(SCRIPT).WRITERS}
    writable = {name for name in registry.names() if hasattr(registry.get(name), "write")}
    assert writable - {registry.NAMED} <= named
    assert {"write", "convert", "export", "edit"} <= named


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("way", WAYS)
def test_a_writer_that_is_stopped(way: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT, way, "--points", "1"], capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr.lower() and "not permitted" in done.stderr.lower():
        pytest.skip("this machine does not let a process be traced")
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(
        r": (\d+) killed, (\d+) ENOSPC, (\d+) EIO, (\d+) EINVAL, (\d+) old, (\d+) new, 0 lost, 0 litter$",
        done.stdout.strip(),
    )
    assert found is not None
    killed, full, broken, unknown, old, new = map(int, found.groups())
    assert min(killed, full, broken, unknown, old, new) > 0


FOLDERS: Final = ("dcp", "deepspeed_universal", "lerobot, 2 optimizers", "paddlenlp")
TOLD: Final = {"masters": True, "optimizer": "adamw", "betas": (0.9, 0.999), "map": "none"}


@pytest.mark.parametrize("way", FOLDERS)
def test_a_reader_meanwhile(way: str, tmp_path: Path, load_module: Callable[[Path], ModuleType]) -> None:
    """A reader finds the old folder or the new one, or is told that it was replaced; never a part of both."""
    writers = load_module(SCRIPT)
    base, target = tmp_path / "base", tmp_path / "target"
    writers.make_base(base)
    writers.WRITERS[way](target, 0, base)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import kill_writer, pathlib\n"
        "for n in range(40):\n"
        "    kill_writer.WRITERS[sys.argv[2]](pathlib.Path(sys.argv[3]), n % 2, pathlib.Path(sys.argv[4]))\n"
    )
    command = [sys.executable, "-c", code, str(SCRIPT.parent), way, str(target), str(base)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        found, optimizers = [], set()
        while process.poll() is None:
            with contextlib.suppress(FileError, FileNotFoundError):
                state = registry.read(target, way.partition(",")[0], TOLD).state
                found.append(_numbers(state))
                optimizers.add(len(state.optimizers))
        assert process.returncode == 0, process.communicate()[1]
    assert found
    wanted = [{number + 1, 0.5 + number} for number in (0, 1)]
    wanted += [{number + 1} for number in (0, 1)]  # Paddle's files hold no options
    assert all(numbers in wanted for numbers in found)
    assert len(optimizers) == 1, "one of two would be a part"


def _numbers(state: OptimizerState | PositionalState) -> set[float]:
    """The bytes that the moments are made of, and the learning rates."""
    trees = [p.state or {} for p in state.parameters] if isinstance(state, OptimizerState) else state.entries.values()
    moments = [slot.tensor for tree in trees for slot in tree.values() if isinstance(slot, Slot)]
    rates = [dict(group.options).get("lr") for group in state.groups]
    return {
        *(byte for tensor in moments for byte in tensor.bytes()),
        *(rate for rate in rates if isinstance(rate, float)),
    }
