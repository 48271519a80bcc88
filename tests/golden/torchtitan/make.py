"""Folders that torchtitan's checkpoint manager writes, by parallelism, and the state that the ranks held. Run by make.sh.

``CASE.tar.xz`` holds the folder ``CASE`` and ``CASE.live.pt``; what they are, run.py says, which makes them.
"""

import sys
from pathlib import Path

import ranks

CASES = ["fsdp2-tp2", "pp2-fsdp2", "pp2-tp2", "fsdp4-ep2"]

out = Path(sys.argv[1])
for case in CASES:
    made = out.with_name(f"made-{case}")
    ranks.run(Path(__file__).with_name("run.py"), made.resolve(), 4, case)
    ranks.keep(made, case, out / f"{case}.tar.xz")
