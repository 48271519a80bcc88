"""Folders that Megatron-Core writes, by parallelism and sharding type, and what each rank held. Run by make.sh.

``CASE.tar.xz`` holds the folder ``CASE`` and, for every rank, ``CASE.RANK.safetensors`` and ``CASE.RANK.json``; what
they are, tests/converters/runs/megatron_run.py says, which makes them.
"""

import sys
from pathlib import Path

import ranks

RUN = Path(__file__).parents[2] / "converters" / "runs" / "megatron_run.py"
CASES = {
    1: "fp32-tp1,bucket-tp1-gated",
    2: "fp32-tp2,fp32-pp2,full-ep2-gated,bucket-dp2,bucket-pp2-tied,bucket-ep2-gated,bucket-pp2-slow-rms,"
    "full-pp2-vp2,bucket-pp2-vp2-gated,full-pp2-vp2-tied,bucket-pp2-vp2-tied",
    4: "full-tp2-pp2,full-tp4,bucket-tp4,bucket-tp2-dp2-gated,bucket-tp2-pp2-slow,bucket-ep4-gated,bucket-tp2-ep2-gated,"
    "full-pp2-ep2-gated,bucket-pp2-ep2-gated,fp32-pp2-ep2-gated,fp32-tp2-pp2,full-tp2-ep2-gated,"
    "bucket-tp2-pp2-tied-gated",
}

out = Path(sys.argv[1])
for world, cases in CASES.items():
    made = out.with_name(f"made-{world}")
    ranks.run(RUN, made, world, cases)
    for case in cases.split(","):
        ranks.keep(made, case, out / f"{case}.tar.xz")
