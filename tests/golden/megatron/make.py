"""Folders that Megatron-Core writes, by parallelism and sharding type, and what each rank held. Run by make.sh.

``CASE.tar.xz`` holds the folder ``CASE`` and, for every rank, ``CASE.RANK.safetensors`` and ``CASE.RANK.json``; what
they are, tests/converters/runs/megatron_run.py says, which makes them.
"""

import socket
import subprocess
import sys
import tarfile
from pathlib import Path

RUN = Path(__file__).parents[2] / "converters" / "runs" / "megatron_run.py"
CASES = {
    2: "fp32-tp2,fp32-pp2,full-ep2-gated,bucket-dp2,bucket-pp2-tied,bucket-ep2-gated,bucket-pp2-slow-rms,"
    "full-pp2-vp2,bucket-pp2-vp2-gated",
    4: "full-tp2-pp2,full-tp4,bucket-tp4,bucket-tp2-dp2-gated,bucket-tp2-pp2-slow,bucket-ep4-gated,bucket-tp2-ep2-gated",
}

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
for world, cases in CASES.items():
    made = out.with_name(f"made-{world}")
    made.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [[sys.executable, str(RUN), str(made), *map(str, (rank, world, port)), cases] for rank in range(world)]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait() == 0
    for case in cases.split(","):
        with tarfile.open(out / f"{case}.tar.xz", "w:xz") as archive:
            for path in (made / case, *sorted(made.glob(f"{case}.*"))):
                archive.add(path, path.name)
