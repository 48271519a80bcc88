"""The recipe of docs/readers.md for JavaScript, and the example of the npm package."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent.parent
NODE: Final = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.parametrize(
    ("document", "last"),
    [("docs/readers.md", []), ("readers/js/README.md", ["{ verified: true, compared: 6, total: 6 }"])],
)
def test_a_recipe_in_javascript(document: str, last: list[str], tmp_path: Path) -> None:
    found = re.search(r"```js\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    assert found
    (tmp_path / "recipe.mjs").write_text(found[1], encoding="utf-8")
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "named-optimizer-state").symlink_to(ROOT / "readers" / "js")
    shutil.copy(ROOT / "spec" / "vectors" / "valid" / "carried.safetensors", tmp_path / "optimizer.safetensors")
    assert NODE is not None
    done = subprocess.run([NODE, "recipe.mjs"], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["in 1 2", "out 1 2", "out.too 1 2", *last]
