"""Converters by name, and which of them a path belongs to.

A converter is a module (or any object) with the members of ``Converter``. Those of this package are listed in
``BUILT_IN`` by name and imported when they are needed; other packages add theirs through the entry-point
group ``lora_state_format.converters``.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, cast

from lora_state_format.errors import (
    AmbiguousFormatError,
    FileError,
    MissingDependencyError,
    OptionError,
    Remedy,
    UnknownFormatError,
)
from lora_state_format.foreign.kinds import READERS, certain_kind, kind_of_file
from lora_state_format.io.files import steady
from lora_state_format.io.remote import is_remote, spelled

if TYPE_CHECKING:
    from lora_state_format.model.states import Checkpoint, OptimizerState

logger = logging.getLogger("lora_state_format")

__all__ = [
    "BUILT_IN",
    "ENTRY_POINTS",
    "NAMED",
    "Converter",
    "Match",
    "Writer",
    "available",
    "check_options",
    "detect",
    "find",
    "get",
    "latest",
    "names",
    "options",
    "own_options",
    "read",
    "read_match",
    "writer",
]

LOOKED_INTO: Final = 100
"""Folders of a folder without state that are looked into for one, those with the largest numbers first."""

NAMED: Final = "named"
"""The name under which this package's own format is registered."""

BUILT_IN: Final[Mapping[str, str]] = {
    NAMED: "lora_state_format.converters.named",
    "accelerate": "lora_state_format.converters.accelerate",
    "chainer": "lora_state_format.converters.chainer",
    "colossalai": "lora_state_format.converters.colossalai",
    "composer": "lora_state_format.converters.composer",
    "dcp": "lora_state_format.converters.dcp",
    "dcp_safetensors": "lora_state_format.converters.dcp_safetensors",
    "deepspeed_plain": "lora_state_format.converters.deepspeed_plain",
    "deepspeed_universal": "lora_state_format.converters.deepspeed_universal",
    "deepspeed_zero": "lora_state_format.converters.deepspeed_zero",
    "diffusers": "lora_state_format.converters.diffusers",
    "flax_msgpack": "lora_state_format.converters.flax_msgpack",
    "fsdp2_ranks": "lora_state_format.converters.fsdp2_ranks",
    "keras": "lora_state_format.converters.keras",
    "kohya": "lora_state_format.converters.kohya",
    "lerobot": "lora_state_format.converters.lerobot",
    "lightning": "lora_state_format.converters.lightning",
    "megatron": "lora_state_format.converters.megatron",
    "mindspore": "lora_state_format.converters.mindspore",
    "mlx": "lora_state_format.converters.mlx",
    "nanotron": "lora_state_format.converters.nanotron",
    "olmo": "lora_state_format.converters.olmo",
    "orbax": "lora_state_format.converters.orbax",
    "paddle": "lora_state_format.converters.paddle",
    "paddlenlp": "lora_state_format.converters.paddlenlp",
    "rllib": "lora_state_format.converters.rllib",
    "torch_optimizer": "lora_state_format.converters.torch_optimizer",
    "torchtune": "lora_state_format.converters.torchtune",
}
"""Converter name -> its module."""

ENTRY_POINTS: Final = "lora_state_format.converters"
"""The entry-point group for converters of other packages; the entry's name is the converter's."""


class Match(NamedTuple):
    """A converter's claim to a path.

    ``reason`` describes the find in words; ``path`` is the file or folder to read. A ``generic`` match, one whose
    signs many writers leave, gives way to any that is not.
    """

    reason: str
    path: Path
    generic: bool = False


class Converter(Protocol):
    """A reader of one foreign format, under the name ``NAME``; ``DESCRIPTION`` says which files it recognises.

    ``OPTIONS`` lists facts that its files lack and the caller may state: key -> meaning. One whose folders may have
    very many files may also have ``glance(match, options)``: it returns what ``read`` does, from some of the files and
    with tensors that cannot be read, and says so in ``origin["first_look"]``.
    """

    NAME: str
    DESCRIPTION: str

    def detect(self, path: Path) -> Match | None:
        """Return whether a file or folder that exists is of this format, by names, magic bytes and headers.

        Looks at most one folder deep; reads no tensor and runs nothing.
        """

    def read(self, match: Match, options: Mapping[str, Any]) -> Checkpoint:
        """Return the state at ``match.path``, lazily, and the neighbouring files that can name its parameters."""
        ...


class Writer(Converter, Protocol):
    """A converter that can also write its format, exactly or not at all.

    One whose checkpoints are single files may say in ``TARGET`` what such a file is called in a folder.
    """

    def write(
        self, state: OptimizerState, path: Path, *, base: Path | None, force: bool, options: Mapping[str, Any]
    ) -> Any:
        """Write the state. ``base`` is a checkpoint of the format that the rest is taken from."""


def names() -> list[str]:
    """Return the names of all converters, sorted. None is imported."""
    return sorted({*BUILT_IN, *_entries()})


def get(name: str) -> Converter:
    """Return the converter called ``name``.

    Raises:
        OptionError: There is none of that name.
        MissingDependencyError: It cannot be imported.
    """
    if name in BUILT_IN:
        return cast("Converter", import_module(BUILT_IN[name]))
    entry = _entries().get(name)
    if entry is None:
        raise OptionError(f"no converter '{name}'; there are: {', '.join(names())}")
    try:
        return cast("Converter", entry.load())
    except Exception as error:  # a stranger's module may fail in any way
        raise MissingDependencyError(
            f"converter '{name}' of {entry.value} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def available() -> list[Converter]:
    """Return every converter, sorted by name; one of another package that cannot be imported is left out and logged."""
    found = []
    for name in names():
        try:
            found.append(get(name))
        except MissingDependencyError as error:  # noqa: PERF203
            logger.warning("%s; it is left out", error)
    return found


def options(converter: Converter) -> Mapping[str, str]:
    """Return the options of a converter: key -> meaning."""
    found: Mapping[str, str] = getattr(converter, "OPTIONS", {})
    return found


def check_options(options: Mapping[str, Any], *converters: Converter) -> None:
    """Raise ``OptionError`` for an option that none of the converters knows."""
    known = {key: meaning for converter in converters for key, meaning in getattr(converter, "OPTIONS", {}).items()}
    for key in options:
        if key not in known:
            choice = "; ".join(f"{known_key} ({meaning})" for known_key, meaning in known.items()) or "none"
            names = " and ".join(dict.fromkeys(converter.NAME for converter in converters))
            raise OptionError(f"no option '{key}' for {names}; there are: {choice}")


def writer(name: str) -> Writer:
    """Return the converter called ``name``.

    Raises:
        OptionError: There is none of that name, or it cannot write.
        MissingDependencyError: It cannot be imported.
    """
    converter = get(name)
    if not hasattr(converter, "write"):
        raise OptionError(f"format '{name}' can be read but not written")
    return cast("Writer", converter)


def read(
    path: str | os.PathLike[str], source_format: str | None = None, options: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Read a checkpoint with the converter that it belongs to.

    Args:
        path: A file or folder of any known format.
        source_format: The converter's name; by default the format is detected.
        options: The converter's own options; others are ignored.

    Raises ``UnknownFormatError`` for a path that is not of the format, and what ``detect`` and the converter raise.
    """
    converter, match = find(path, source_format)
    return read_match(converter, match, options or {})


def read_match(converter: Converter, match: Match, options: Mapping[str, Any], *, glance: bool = False) -> Checkpoint:
    """Read what a converter found.

    Args:
        converter: The converter.
        match: What it found.
        options: The options of converters; those of others are ignored.
        glance: Whether some of a folder's files are enough, where the converter knows how.

    Raises ``FileError`` for a folder that was replaced meanwhile, and what the converter raises.
    """
    read = getattr(converter, "glance", converter.read) if glance else converter.read
    with steady(match.path):
        checkpoint: Checkpoint = read(match, own_options(options, converter))
    return checkpoint


def find(path: str | os.PathLike[str], source_format: str | None = None) -> tuple[Converter, Match]:
    """Return the converter of a path, and its match: the converter called ``source_format``, or the detected one.

    Raises ``UnknownFormatError`` if the path is not of the format called ``source_format``, and what ``detect`` raises.
    """
    if source_format is None:
        return detect(path)
    converter, path = get(source_format), Path(path)
    with steady(path):
        return converter, _match(converter, path)


def _match(converter: Converter, path: Path) -> Match:
    """Return what the converter that the caller names finds at a path."""
    match = converter.detect(path) if path.exists() or converter.NAME == NAMED else None
    if match is None:
        if not path.exists():
            raise _missing(path)
        raise UnknownFormatError(f"{path}: not recognised as '{converter.NAME}': expected {converter.DESCRIPTION}")
    return match


def _missing(path: Path) -> FileNotFoundError:
    if is_remote(path):
        what = "no file of named state, and of a URL only that is read; copy other checkpoints to this machine first"
        return FileNotFoundError(f"{spelled(path)}: {what}")
    return FileNotFoundError(f"{path}: no such file or folder")


def own_options(given: Mapping[str, Any], converter: Converter) -> dict[str, Any]:
    """Return the given options that a converter knows."""
    return {key: value for key, value in given.items() if key in options(converter)}


def detect(path: str | os.PathLike[str]) -> tuple[Converter, Match]:
    """Return the converter that a path belongs to, and why.

    This package's own format comes first: in a folder that holds both it and the file it was converted from, the one
    with names is meant. Raises ``FileNotFoundError``, ``UnknownFormatError`` and ``AmbiguousFormatError``, and
    ``FileError`` for what is damaged, and for a folder that was replaced meanwhile.
    """
    with steady(Path(path)):
        return _detected(Path(path))


def _detected(path: Path) -> tuple[Converter, Match]:
    named = get(NAMED)
    if match := named.detect(path):  # a set's path need not be there itself: its index is
        return named, match
    if not path.exists():
        raise _missing(path)
    found, damaged = _claims(path, [converter for converter in _possible(path) if converter is not named])
    found = [(converter, match) for converter, match in found if not match.generic] or found
    if len(found) > 1:
        claims = "; ".join(f"{converter.NAME} ({match.reason})" for converter, match in found)
        raise AmbiguousFormatError(
            f"{path}: {len(found)} formats fit: {claims}",
            tuple((converter.NAME, match) for converter, match in found),
            remedy=Remedy("pass the right one as {source_format}", {"source_format": ...}),
        )
    if not found and damaged:
        raise damaged[0]
    if not found:
        raise UnknownFormatError(_nothing_here(path, available()))
    return found[0]


def _possible(path: Path) -> list[Converter]:
    """Return the converters that may read what is there: an image is not msgpack, whatever it begins with."""
    kind = certain_kind(path)
    if kind is None:
        return available()
    return [c for c in available() if c.NAME not in BUILT_IN or c.NAME in READERS.get(kind, ())]


def _claims(path: Path, asked: Iterable[Converter]) -> tuple[list[tuple[Converter, Match]], list[FileError]]:
    """Return who takes a path for theirs, and what those say who found it damaged."""
    found: list[tuple[Converter, Match]] = []
    damaged: list[FileError] = []
    for converter in asked:
        try:
            if match := _asked(converter, path):
                found.append((converter, match))
        except FileError as error:  # noqa: PERF203 # what one cannot read is no reason not to ask the next
            damaged.append(error)
    return found, damaged


def latest(path: str | os.PathLike[str]) -> Path:
    """Return the newest checkpoint of a run's folder: of its folders with a number, the highest that holds state.

    Raises ``FileNotFoundError`` if there is no such folder, and ``UnknownFormatError`` if none in it holds state.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    newest = _newest(path, available())
    if newest is None and any(_asked(converter, path) for converter in available()):
        raise UnknownFormatError(f"{path}: a checkpoint itself, and no folder in it is a newer one")
    if newest is None:
        raise UnknownFormatError(_nothing_here(path, available()))
    return newest


def _newest(path: Path, asked: Sequence[Converter]) -> Path | None:
    """Return the folder with the highest number in its name that holds state; only some are looked into."""
    numbered = [(int(n[-1]), folder) for folder in path.iterdir() if (n := re.findall(r"\d+", folder.name))]
    for _, folder in sorted(numbered, reverse=True)[:LOOKED_INTO]:
        if folder.is_dir() and any(_asked(converter, folder) for converter in asked):
            return folder
    return None


def _nothing_here(path: Path, asked: Sequence[Converter]) -> str:
    """Return what to say of a path without state: which folders in it have some, or else what was looked for."""
    if path.is_dir() and (newest := _newest(path, asked)) is not None:
        return f"{path}: no optimizer state in this folder itself; the newest folder in it that has one is {newest}"
    kind = kind_of_file(path)
    known = sorted(asked, key=lambda converter: (converter.NAME != NAMED, converter.NAME))
    width = max(len(converter.NAME) for converter in known)
    table = "".join(f"\n  {converter.NAME.ljust(width)}  {converter.DESCRIPTION}" for converter in known)
    return f"{path}: no optimizer state found here{f': it is {kind}' if kind else ''}; looked for:{table}"


def _asked(converter: Converter, path: Path) -> Match | None:
    """Return what a converter finds at a path; one of another package that fails finds nothing, and is logged."""
    if converter.NAME in BUILT_IN:
        return converter.detect(path)
    try:
        return converter.detect(path)
    except Exception as error:
        logger.warning("converter '%s' failed on %s: %s: %s", converter.NAME, path, type(error).__name__, error)
        return None


@cache
def _entries() -> Mapping[str, Any]:
    """Return the entry points of other packages by name, listed but not loaded."""
    from importlib.metadata import entry_points

    found: dict[str, Any] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name in found or entry.name in BUILT_IN:
            kept = found[entry.name].value if entry.name in found else BUILT_IN[entry.name]
            logger.warning("two converters are called '%s': %s is used, not %s", entry.name, kept, entry.value)
        else:
            found[entry.name] = entry
    return found
