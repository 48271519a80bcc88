"""For mkdocs: pages that lie elsewhere in the repository, and links to files that are no pages."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent

ELSEWHERE: Final = {"format.md": "spec/format.md", "mappings.md": "spec/mappings.md", "security.md": "SECURITY.md"}
"""Page -> the file of the repository that it shows."""

NO_PAGES: Final = "docs/upstream/"
"""A folder of docs that is for other projects' maintainers."""

LINK: Final = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return a page's text, its links made to lead to pages, or to name a file of the repository."""
    here = page.file.src_uri
    source = ELSEWHERE.get(here, f"docs/{here}")
    if here in ELSEWHERE:
        markdown = (ROOT / source).read_text(encoding="utf-8")
    pages = {path: name for name, path in ELSEWHERE.items()}

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in pages:
            return f"[{text}]({pages[path]}{anchor or ''})"
        if path.startswith("docs/") and not path.startswith(NO_PAGES):
            return f"[{text}]({posixpath.relpath(path, f'docs/{posixpath.dirname(here)}')}{anchor or ''})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{source}: a link to {path}, which is not there")
        return f"{text} (`{path}` in the repository)" if text.strip("`") != path else f"`{path}`"

    return LINK.sub(link, markdown)
