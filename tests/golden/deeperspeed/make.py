"""Folders that DeepSpeed 0.3.15 writes with ZeRO 1, and what each rank held. Run by make.sh.

``CASE.tar.xz`` holds the folder ``CASE`` and ``CASE.RANK.pt`` for every rank; what they are, run.py says.
"""

import sys
from pathlib import Path

import ranks

CASES = {"dp2": 2, "dp3-one": 3, "dp2-rigid": 2, "dp2-frozen": 2, "pp2-dp2": 4, "tp2-dp2": 4}


def without_scripts(entry):
    return None if entry.name.endswith(".py") else entry


out = Path(sys.argv[1])
for case, world in CASES.items():
    made = out.with_name(f"made-{case}")
    ranks.run(Path(__file__).with_name("run.py"), made, world, case)
    ranks.keep(made, case, out / f"{case}.tar.xz", without_scripts)
