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
    "StateFormatError",
    "TargetExistsError",
    "UnknownFormatError",
    "UnrepresentableError",
    "UnsupportedVersionError",
]


MAX_DETAIL: Final = 2000
"""Characters of a message about a file's bytes."""


class StateFormatError(Exception):
    """Root of the tree. ``exit_code`` is what the command line ends with."""

    exit_code = 3


class FileError(StateFormatError, ValueError):
    """The bytes of a file break a rule.

    ``path`` is the file as the caller named it, ``rule`` the id of the broken rule in ``spec/format.md`` (``None`` for
    foreign formats), ``detail`` the message without both.
    """

    def __init__(self, detail: str, *, path: object = None, rule: str | None = None) -> None:
        self.detail = detail
        self.path = path
        self.rule = rule
        super().__init__(_located(detail, path, rule))


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

    def __init__(self, message: str, matches: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.matches = matches


class DigestError(StateFormatError, ValueError):
    """A checksum does not match: the bytes changed after they were written. Attributes as those of ``FileError``."""

    exit_code = 1

    def __init__(self, detail: str, *, path: object = None, rule: str | None = None) -> None:
        self.detail = detail
        self.path = path
        self.rule = rule
        super().__init__(_located(detail, path, rule))


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

    def __init__(self, message: str, plan: Any = None) -> None:
        super().__init__(message)
        self.plan = plan


class ConversionError(StateFormatError, ValueError):
    """A conversion stopped by names, order or evidence; nothing was written."""

    exit_code = 4


class MissingNamesError(ConversionError):
    """The state is positional and nothing says which parameter a position means."""


class AmbiguousOrderError(ConversionError):
    """Several orders fit; ``candidates`` names them."""

    def __init__(self, message: str, candidates: tuple[str, ...] = ()) -> None:
        super().__init__(message)
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
