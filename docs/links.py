"""Ask every address on the web that a page of this repository links to: ``make links``. Needs the network: not in CI.

The exit code is 1 if one does not answer, and each is named with the pages that have it. Links within the repository
are checked by ``tests/test_docs.py``.
"""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
SECONDS: Final = 20
LINK: Final = re.compile(r"\[[^\]]*\]\((https?://[^)\s]+)\)")
AGENT: Final = {"User-Agent": "Mozilla/5.0 (link check)"}
"""Some sites answer only what looks like a browser."""


def pages() -> Iterator[Path]:
    """Yield every page in Markdown, but for what tools put into hidden folders and ``node_modules``."""
    for path in sorted(ROOT.rglob("*.md")):
        parts = path.relative_to(ROOT).parts
        if not any(part.startswith(".") or part in ("node_modules", "site", "target") for part in parts):
            yield path


def answer(address: str) -> str | None:
    """Return what is wrong with an address, or ``None``. A site that only refuses programs (403, 429) is there."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=AGENT), timeout=SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return None if error.code in (403, 429) else f"answers {error.code}"
    except OSError as error:
        return str(error)


def main() -> int:
    """Ask all addresses; return the exit code."""
    found: dict[str, list[str]] = {}
    for page in pages():
        for address in dict.fromkeys(LINK.findall(page.read_text(encoding="utf-8"))):
            found.setdefault(address.partition("#")[0], []).append(str(page.relative_to(ROOT)))
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(answer, found))
    wrong = [(address, problem) for address, problem in zip(found, answers, strict=True) if problem]
    for address, problem in wrong:
        sys.stdout.write(f"{address}: {problem}; linked by {', '.join(found[address])}\n")
    sys.stdout.write(f"{len(found) - len(wrong)} of {len(found)} addresses answer\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
