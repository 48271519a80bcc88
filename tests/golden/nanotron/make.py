"""Folders that nanotron's writers make, by parallelism, and the state that the ranks held together. Run by make.sh.

``CASE.tar.xz`` holds the folder ``CASE`` and ``CASE.live.pt``; what they are, run.py says, which makes them.
"""

import re
import sys
from math import prod
from pathlib import Path

import ranks

CASES = ["dp2-zero", "tp2", "tp2-dp2-zero-masters", "pp2-dp2-zero", "tp2-pp2-masters"]

out = Path(sys.argv[1])
for case in CASES:
    made = out.with_name(f"made-{case}")
    ranks.run(Path(__file__).with_name("run.py"), made, prod(map(int, re.findall(r"\d", case))), case)
    ranks.keep(made, case, out / f"{case}.tar.xz")
