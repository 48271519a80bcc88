"""Texts out of files as they may be shown, and classes as they are named."""

from __future__ import annotations

__all__ = ["class_path", "printable"]


def class_path(kind: type) -> str:
    """Return the import path of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def printable(text: str) -> str:
    """Return a text on one line, with nothing in it that a terminal would act on, marks of direction included."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
