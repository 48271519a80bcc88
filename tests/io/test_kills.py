"""Writers that are stopped at system calls; ``make crashes`` has every writer and every call."""

from __future__ import annotations

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
