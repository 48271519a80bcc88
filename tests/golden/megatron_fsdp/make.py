"""Folders that Megatron-FSDP writes, by parallelism, and what each rank held. Run by make.sh.

``CASE.tar.xz`` holds the folder ``CASE`` and ``CASE.RANK.pt`` for every rank; what they are,
tests/converters/runs/megatron_fsdp_run.py says, which makes them.
"""

import sys
from pathlib import Path

import ranks

RUN = Path(__file__).parents[2] / "converters" / "runs" / "megatron_fsdp_run.py"
CASES = {2: "dp2", 4: "tp2-dp2-gated"}

out = Path(sys.argv[1])
for world, cases in CASES.items():
    made = out.with_name(f"made-{world}")
    ranks.run(RUN, made, world, cases)
    for case in cases.split(","):
        ranks.keep(made, case, out / f"{case}.tar.xz")
