"""Every error this package raises on purpose.

::

    StateFormatError
    ├── FileError (ValueError)            the bytes break a rule, or are not what they claim        exit 3
    │   ├── UnsupportedVersionError       written by a newer major version of the format            exit 3
    │   └── RefusedError                  a pickle that asks for code, a variant that is not read   exit 3
    ├── UnknownFormatError (ValueError)   no converter knows this path                              exit 3
    │   └── AmbiguousFormatError          two converters claim it                                   exit 3
    ├── DigestError (ValueError)          well-formed, but bytes changed after they were written    exit 1
    ├── UnrepresentableError (TypeError)  a value the format, or a target, has no exact form for    exit 1
    ├── CaptureError (ValueError)         an optimizer and a model that do not belong together      exit 1
    ├── BindError (ValueError)            the state does not fit the live optimizer                 exit 1
    ├── ConversionError (ValueError)      stopped by names, order or evidence                       exit 4
    │   ├── MissingNamesError             positional state, and no source of names                  exit 4
    │   └── AmbiguousOrderError           several orders fit                                        exit 4
    ├── OptionError (ValueError)          a policy or an option that does not exist or apply        exit 2
    ├── RankError (RuntimeError)          another rank of a distributed run failed                  exit 3
    ├── MissingDependencyError (ImportError)  an optional package is needed                         exit 2
    └── TargetExistsError (FileExistsError)   never overwritten without being told to               exit 2

A message names the thing, its value, what was expected and what to do. Programs look at the type and the attributes,
never at the text.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = [
    "AmbiguousFormatError",
    "AmbiguousOrderError",
    "BindError",
    "CaptureError",
    "ConversionError",
    "DigestError",
    "FileError",
    "MissingDependencyError",
    "MissingNamesError",
    "OptionError",
    "RankError",
    "RefusedError",
    "Remedy",
    "StateFormatError",
    "TargetExistsError",
    "UnknownFormatError",
    "UnrepresentableError",
    "UnsupportedVersionError",
]


MAX_DETAIL: Final = 2000
"""Characters of a message about a file's bytes."""

SHORT_OPTIONS: Final[Mapping[str, str]] = {"options": "--option", "source_format": "--from", "target_format": "--to"}
"""Argument of a function -> its option on the command line, where that is not the same word."""


@dataclass(frozen=True)
class Remedy:
    """What to do about an error, in the words of whoever reads it: of Python's, or of the command line.

    Args:
        text: A clause with the name of each argument in braces: ``"pass {force} to replace it"``.
        arguments: Name of an argument -> its value; ``...`` for a value that the reader has to choose. ``options``
            takes a mapping of a converter's options, ``rename`` a list of pairs.

    >>> remedy = Remedy("pass {force} to replace it", {"force": True})
    >>> remedy.in_python()
    'pass force=True to replace it'
    >>> remedy.on_command_line()
    'pass --force to replace it'
    """

    text: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def in_python(self) -> str:
        """Return the text with keyword arguments: ``names=``, ``force=True``, ``options={'step': ...}``."""
        return self._with({name: f"{name}={_literal(value)}" for name, value in self.arguments.items()})

    def on_command_line(self) -> str:
        """Return the text with options: ``--names``, ``--force``, ``--option step=...``."""
        return self._with({name: _option(name, value) for name, value in self.arguments.items()})

    def _with(self, spelled: Mapping[str, str]) -> str:
        """Return the text with the arguments in it; braces of a name from a file stay what they are."""
        text = self.text
        for name, words in spelled.items():
            text = text.replace(f"{{{name}}}", words)
        return text


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        items = (f"{key!r}: {'...' if item is ... else repr(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    return "" if value is ... else repr(value)


def _option(name: str, value: Any) -> str:
    flag = SHORT_OPTIONS.get(name, f"--{name.replace('_', '-')}")
    if isinstance(value, Mapping):
        return " ".join(f"{flag} {key}={'...' if item is ... else item}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(f"{flag} {shlex.join(pair)}" for pair in value)
    return flag if value is ... or value is True else f"{flag} {value}"


class StateFormatError(Exception):
    """Root of the tree. ``exit_code`` is what the command line ends with.

    ``remedy`` says what to do now, if that is a matter of arguments; ``str`` spells them as Python does.
    """

    exit_code = 3

    def __init__(self, message: str, *, remedy: Remedy | None = None) -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(message)

    def __str__(self) -> str:
        return self._with("" if self.remedy is None else self.remedy.in_python())

    def on_command_line(self) -> str:
        """Return the message with the arguments of its remedy as options of a command."""
        return self._with("" if self.remedy is None else self.remedy.on_command_line())

    def _with(self, remedy: str) -> str:
        """Return the message and its remedy: on a line of its own after a message of several lines."""
        if not remedy:
            return self.message
        return f"{self.message}\nhint: {remedy}" if "\n" in self.message else f"{self.message}; {remedy}"


class FileError(StateFormatError, ValueError):
    """The bytes of a file break a rule.

    ``path`` is the file as the caller named it, ``rule`` the id of the broken rule in ``spec/format.md`` (``None`` for
    foreign formats), ``detail`` the message without both.
    """

    def __init__(
        self, detail: str, *, path: object = None, rule: str | None = None, remedy: Remedy | None = None
    ) -> None:
        self.detail = detail
        self.path = path
        self.rule = rule
        super().__init__(_located(detail, path, rule), remedy=remedy)


def _located(detail: str, path: object, rule: str | None) -> str:
    """Return a message with the file in front and the rule behind. A name in it may be as long as a file."""
    if len(detail) > MAX_DETAIL:
        detail = f"{detail[: MAX_DETAIL // 2]} ... {detail[-MAX_DETAIL // 2 :]}"
    return f"{'' if path is None else f'{path}: '}{detail}{'' if rule is None else f' [{rule}]'}"


class UnsupportedVersionError(FileError):
    """The file says a major version of the format that this package does not know."""


class RefusedError(FileError):
    """Reading on would mean running code, or guessing. Nothing was run."""


class UnknownFormatError(StateFormatError, ValueError):
    """No converter recognises the path."""


class AmbiguousFormatError(UnknownFormatError):
    """Several converters recognise the path; ``matches`` names them with their reasons."""

    def __init__(self, message: str, matches: tuple[Any, ...] = (), *, remedy: Remedy | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.matches = matches


class DigestError(StateFormatError, ValueError):
    """A checksum does not match: the bytes changed after they were written. Attributes as those of ``FileError``."""

    exit_code = 1

    def __init__(
        self, detail: str, *, path: object = None, rule: str | None = None, remedy: Remedy | None = None
    ) -> None:
        self.detail = detail
        self.path = path
        self.rule = rule
        super().__init__(_located(detail, path, rule), remedy=remedy)


class UnrepresentableError(StateFormatError, TypeError):
    """A value has no exact form in the format, or in the format it is to be written to."""

    exit_code = 1


class CaptureError(StateFormatError, ValueError):
    """The optimizer holds parameters that the model does not have, or that cannot be named."""

    exit_code = 1


class BindError(StateFormatError, ValueError):
    """The state does not fit the live optimizer; nothing was changed.

    ``plan`` is the ``binding.plan.LoadPlan``, which holds every problem.
    """

    exit_code = 1

    def __init__(self, message: str, plan: Any = None, *, remedy: Remedy | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.plan = plan


class ConversionError(StateFormatError, ValueError):
    """A conversion stopped by names, order or evidence; nothing was written."""

    exit_code = 4


class MissingNamesError(ConversionError):
    """The state is positional and nothing says which parameter a position means."""


class AmbiguousOrderError(ConversionError):
    """Several orders fit; ``candidates`` names them."""

    def __init__(self, message: str, candidates: tuple[str, ...] = (), *, remedy: Remedy | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.candidates = candidates


class OptionError(StateFormatError, ValueError):
    """An argument that does not exist, or does not apply here."""

    exit_code = 2


class RankError(StateFormatError, RuntimeError):
    """Another rank of a distributed run failed, so this one did nothing either; the message is that rank's."""


class MissingDependencyError(StateFormatError, ImportError):
    """An optional package is needed for this; the message says which extra brings it."""

    exit_code = 2


class TargetExistsError(StateFormatError, FileExistsError):
    """The target exists and ``force`` was not given."""

    exit_code = 2
