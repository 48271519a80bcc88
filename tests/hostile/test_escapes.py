"""A bounded run of ``escapes.py``; ``make escapes`` is a long one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

SCRIPT: Final = Path(__file__).with_name("escapes.py")


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: an audit hook cannot be taken away."""
    prelude = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import escapes\n"
    call = f"{code}\nsys.exit(escapes.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", prelude + call, *arguments], capture_output=True, text=True, check=False
    )


def test_no_name_leads_out_of_a_folder() -> None:
    done = run("", "--count", "250")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"^(.+): ([\d,]+)$", done.stdout, re.MULTILINE))
    assert counts["inputs"] == "250"
    for writer in ("dcp", "deepspeed_universal", "lerobot", "paddlenlp", "set", "export"):
        assert int(counts[f"written {writer}"]) > 0
        assert int(counts[f"refused to write {writer}"]) > 0
    for reader in ("dcp", "deepspeed_universal", "deepspeed_zero", "paddlenlp", "named", "torch_optimizer", "orbax"):
        assert int(counts[f"read {reader}"]) > 0


def test_readers_without_the_check_are_caught() -> None:
    """Else a hook that sees nothing would pass."""
    done = run(
        "from lora_state_format.foreign import dcp\n"
        "from lora_state_format.converters import deepspeed_zero\n"
        "dcp.is_plain = deepspeed_zero.is_plain = lambda name: len(name) < 200",
        "dcp", "deepspeed_zero", "--count", "40",
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(r"^(open|os\.listdir|os\.scandir) '.*outside", done.stdout, re.MULTILINE), done.stdout


def test_writers_without_the_check_are_caught() -> None:
    done = run(
        "from lora_state_format.io import folders\nfolders.is_plain = lambda name: name[:1] != '/' and len(name) < 200",
        "state", "--count", "120",
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(r"^[a-z_]+: (open|os\.mkdir) '", done.stdout, re.MULTILINE), done.stdout
