"""Texts out of files as they may be shown, classes as they are named, and regular expressions as they are given."""

from __future__ import annotations

import re

from lora_state_format.errors import OptionError

__all__ = ["class_path", "expression", "printable"]


def class_path(kind: type) -> str:
    """Return the import path of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def printable(text: str) -> str:
    """Return a text on one line, with nothing in it that a terminal would act on, marks of direction included."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def expression(text: str | re.Pattern[str]) -> re.Pattern[str]:
    """Return a regular expression of a caller, compiled. Raises ``OptionError`` for a text that is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise OptionError(f"'{text}' is not a regular expression: {error}") from error
