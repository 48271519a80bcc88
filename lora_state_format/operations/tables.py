"""Tables as data, and as text for a terminal or as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lora_state_format.model.text import printable

__all__ = ["Table", "facts_text", "markdown", "text", "wrapped"]

GAP = "  "
LEAST = 12
"""Characters that a column keeps when a table is made narrower."""


@dataclass(frozen=True)
class Table:
    """Rows under column headings.

    Args:
        title: What the rows are.
        columns: One heading per column.
        rows: One text per column.
        right: Indices of the columns that are aligned to the right, as numbers are.
        notes: Lines that belong under the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()


def text(table: Table, width: int | None, bold: Callable[[str], str] = str) -> Iterator[str]:
    """Yield a table as lines of text.

    Args:
        table: The table.
        width: Columns of the terminal; the longest column loses the middle of its texts until the table fits. ``None``
            keeps every text whole.
        bold: Called with the title and the headings.
    """
    cells = [tuple(map(printable, row)) for row in (table.columns, *table.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.columns))]
    if width is not None:
        longest = max(range(len(widths)), key=lambda column: widths[column], default=0)
        over = sum(widths) + len(GAP) * len(widths) - width
        if over > 0:
            widths[longest] = max(LEAST, widths[longest] - over)
    yield bold(printable(table.title))
    for number, row in enumerate(cells):
        line = GAP + GAP.join(
            _elided(cell, wide).rjust(wide) if column in table.right else _elided(cell, wide).ljust(wide)
            for column, (cell, wide) in enumerate(zip(row, widths, strict=True))
        )
        yield bold(line.rstrip()) if number == 0 else line.rstrip()
    for note in table.notes:
        yield from wrapped(printable(note), GAP, GAP, width)


def facts_text(facts: Sequence[tuple[str, str]], width: int | None, bold: Callable[[str], str] = str) -> Iterator[str]:
    """Yield pairs of a heading and a text as lines, the texts next to each other and wrapped."""
    margin = max((len(key) for key, _ in facts), default=0)
    for key, value in facts:
        head, *rest = wrapped(printable(value), "", "", None if width is None else width - margin - 2 * len(GAP))
        yield f"{GAP}{bold(key.ljust(margin))}{GAP}{head}"
        yield from (" " * (margin + 2 * len(GAP)) + line for line in rest)


def markdown(table: Table) -> Iterator[str]:
    """Yield a table as lines of Markdown."""
    yield f"**{_escaped(table.title)}**"
    yield ""
    yield f"| {' | '.join(map(_escaped, table.columns))} |"
    yield f"|{'|'.join('---:' if column in table.right else '---' for column in range(len(table.columns)))}|"
    yield from (f"| {' | '.join(map(_escaped, row))} |" for row in table.rows)
    for note in table.notes:
        yield ""
        yield _escaped(note)


def _elided(cell: str, width: int) -> str:
    """Return the text, without its middle where it is too long."""
    if len(cell) <= width:
        return cell
    tail = (width - 2) * 2 // 3
    return f"{cell[: width - 2 - tail]}..{cell[len(cell) - tail :]}"


def wrapped(line: str, first: str, other: str, width: int | None) -> list[str]:
    """Return a line as lines of at most ``width`` characters, indented by ``first`` and then by ``other``."""
    if width is None:
        return [first + line]
    return textwrap.wrap(
        line, max(width, 2 * LEAST), initial_indent=first, subsequent_indent=other, break_on_hyphens=False
    ) or [first]


def _escaped(text: str) -> str:
    """Return the text with escapes for the characters that Markdown acts on."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in printable(text))
