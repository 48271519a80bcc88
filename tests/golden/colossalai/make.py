"""The folder that ColossalAI's Booster writes on two ranks, and the state that the optimizer held. Run by make.sh.

``ddp.tar.xz`` holds the folder ``ddp``, ``ddp.whole.bin`` and ``ddp.live.pt``; what they are, run.py says, which makes
them.
"""

import sys
from pathlib import Path

import ranks

out = Path(sys.argv[1])
made = out.with_name("made").resolve()
ranks.run(Path(__file__).with_name("run.py"), made, 2, "ddp")
ranks.keep(made, "ddp", out / "ddp.tar.xz")
