"""Folders that DeepSpeed writes with pipelines, tensor parallelism and experts, and what ranks held. Run by make.sh.

``RANKS-CASE.tar.xz`` holds the folder ``CASE`` and, for every rank, ``CASE.RANK.pt``; what they are,
tests/converters/runs/deepspeed_parallel_run.py says, which makes them.
"""

import socket
import subprocess
import sys
import tarfile
from pathlib import Path

RUN = Path(__file__).parents[2] / "converters" / "runs" / "deepspeed_parallel_run.py"
CASES = ["2-pipeline0", "4-pipeline1", "2-tensor0", "4-tensor1", "2-experts0", "4-experts0", "2-experts1", "4-experts2",
         "4-hpz3"]


def without_scripts(entry):
    return None if entry.name.endswith(".py") else entry


out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
for name in CASES:
    world, case = name.split("-")
    made = out.with_name(f"made-{name}")
    made.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [[sys.executable, str(RUN), str(made), str(rank), world, str(port), case] for rank in range(int(world))]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait() == 0
    with tarfile.open(out / f"{name}.tar.xz", "w:xz") as archive:
        for path in (made / case, *sorted(made.glob(f"{case}.*"))):
            archive.add(path, path.name, filter=without_scripts)
