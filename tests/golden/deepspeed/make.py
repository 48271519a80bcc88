"""Folders that DeepSpeed writes with pipelines, tensor parallelism and experts, and what ranks held. Run by make.sh.

``RANKS-CASE.tar.xz`` holds the folder ``CASE`` and, for every rank, ``CASE.RANK.pt``; what they are,
tests/converters/runs/deepspeed_parallel_run.py says, which makes them.
"""

import sys
from pathlib import Path

import ranks

RUN = Path(__file__).parents[2] / "converters" / "runs" / "deepspeed_parallel_run.py"
CASES = ["2-pipeline0", "4-pipeline1", "2-tensor0", "4-tensor1", "2-experts0", "4-experts0", "2-experts1", "4-experts2",
         "4-hpz3", "4-staged0", "4-staged1", "4-uneven0", "4-routed0", "4-routed1",
         "4-routed2", "4-tensor2", "4-wide0", "4-wide1", "4-grid0", "4-grid1"]


def without_scripts(entry):
    return None if entry.name.endswith(".py") else entry


out = Path(sys.argv[1])
for name in CASES:
    world, case = name.split("-")
    made = out.with_name(f"made-{name}")
    ranks.run(RUN, made, int(world), case)
    ranks.keep(made, case, out / f"{name}.tar.xz", without_scripts)
