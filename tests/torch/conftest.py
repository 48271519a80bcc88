"""What ranks have to say that ran next to each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

Said = dict[tuple[str, int], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def ranks_said(run_ranks: Callable[[Path, Path, int, str], None]) -> Callable[[str, Path, Mapping[int, str]], Said]:
    """Run a script of ``runs`` on every number of ranks: (script, folder, cases by number of ranks).

    What each rank has to say is returned by case and number of ranks.
    """

    def run(script: str, folder: Path, cases: Mapping[int, str]) -> Said:
        found: Said = {}
        for world, listed in cases.items():
            run_ranks(Path(__file__).parent / "runs" / f"{script}.py", folder, world, listed)
            for case in listed.split(","):
                texts = [(folder / f"{case}.{world}.{rank}.json").read_text() for rank in range(world)]
                found[case, world] = [json.loads(text) for text in texts]
        return found

    return run
