"""What libraries write that trained published models, for tiny models of their own. Run by make.sh.

``FAMILY.tar.xz`` holds the folder ``FAMILY`` with ``expected.pt`` in it, or with ``FAMILY.RANK.pt`` next to it for each
rank: what the optimizer held, and what the model computes.
"""

import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

MEGATRON = {"neox": "neox", "neox_sequential": "neox", "bloom": "bloom"}
HERE, SOURCES = Path(__file__).parent, Path(os.environ["SOURCES"])


def without_scripts(entry):
    return None if entry.name.endswith(".py") else entry


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
made = out.with_name("made")
made.mkdir(exist_ok=True)
for family in (*MEGATRON, "litgpt", "tinyllama", "olmo", "olmo2"):
    if family in MEGATRON:
        shared, run = port(), str(HERE / "megatron_run.py")
        commands = [
            [sys.executable, "-W", "ignore", run, str(made), str(rank), "2", shared, family, str(SOURCES / MEGATRON[family])]
            for rank in range(2)
        ]
    else:
        commands = [[sys.executable, "-W", "ignore", str(HERE / "models_run.py"), str(made / family), family]]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait() == 0
    with tarfile.open(out / f"{family}.tar.xz", "w:xz") as archive:
        for path in (made / family, *sorted(made.glob(f"{family}.*.pt"))):
            archive.add(path, path.name, filter=without_scripts)
