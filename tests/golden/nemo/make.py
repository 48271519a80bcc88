"""A folder that NeMo 2 writes, and what each rank held. Run by make.sh.

``CASE.tar.xz`` holds the folder ``CASE`` and, for every rank, ``CASE.RANK.safetensors`` and ``CASE.RANK.json``; what
they are, run.py says, which makes them.
"""

import sys
from pathlib import Path

import ranks

CASES = {4: "space-tp2-dp2"}

out = Path(sys.argv[1])
for world, cases in CASES.items():
    made = out.with_name(f"made-{world}")
    ranks.run(Path(__file__).with_name("run.py"), made, world, cases)
    for case in cases.split(","):
        ranks.keep(made, case, out / f"{case}.tar.xz")
