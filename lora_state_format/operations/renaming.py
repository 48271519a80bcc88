"""Names that the caller wants for a state that has names: by a map of names, or by a file of pairs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_state_format import registry
from lora_state_format.errors import ConversionError
from lora_state_format.mapping import apply, cuts, maps
from lora_state_format.mapping.cuts import Heads
from lora_state_format.mapping.maps import Map, MapRule
from lora_state_format.naming.names import MAX_FILE, read_names
from lora_state_format.naming.sources import Named, Names

__all__ = ["OPTIONS", "Renaming", "renaming_of"]

OPTIONS: Final[Mapping[str, str]] = {"map": apply.OPTION, "heads": cuts.OPTION}
"""Options for a source of any format whose converter has no map of its own."""


@dataclass(frozen=True)
class Renaming:
    """What becomes of the names once all parameters have some; ``names`` and ``options`` are what is left to read."""

    names: Names | None
    options: Mapping[str, Any]
    layout: Map | None = None
    heads: Heads | None = None

    def apply(self, named: Named) -> Named:
        """Return a state and its weights under the names of the map.

        Raises ``ConversionError`` for a parameter without a rule, and as ``mapping.apply`` does.
        """
        if self.layout is None:
            return named
        state = apply.apply(named.state, self.layout, self.heads)
        return named._replace(state=state, weights=apply.apply_to_weights(named.weights, self.layout, self.heads))


def renaming_of(
    names: Names | None,
    options: Mapping[str, Any] | None,
    converter: registry.Converter,
    writer: registry.Writer | None = None,
) -> Renaming:
    """Return what the caller says about names that a state has already, apart from the rest of what it says.

    A map belongs to the target or the source, if its converter knows one. Raises ``OptionError`` and ``FileError`` for
    a map that is not one, ``ConversionError`` for a file of pairs that is not.
    """
    options = dict(options or {})
    pairs = _pairs(names)
    if pairs is not None:
        return Renaming(None, options, pairs)
    theirs = "map" in registry.options(converter) or (writer is not None and "map" in registry.options(writer))
    if theirs or options.get("map") in (None, "none"):
        return Renaming(names, options if theirs else {k: v for k, v in options.items() if k != "map"})
    heads = options.pop("heads", None)
    return Renaming(names, options, maps.load(options.pop("map")), None if heads is None else cuts.heads_of(heads))


def _pairs(names: Names | None) -> Map | None:
    """Return the map that a file of pairs is: on every line a name that the state has, a tab, and a name for it."""
    if names is None or isinstance(names, (str, os.PathLike)):
        given = names
    else:
        given = names[0] if len(names) == 1 and isinstance(names[0], os.PathLike) else None
    if given is None:
        return None
    path = Path(given)
    if not path.is_file() or path.stat().st_size > MAX_FILE:
        return None
    with path.open("rb") as file:
        first = file.readline()
    if b"\t" not in first or b"\0" in first:
        return None
    rules = []
    for line in read_names(path):
        theirs, tab, ours = line.partition("\t")
        if not tab or "\t" in ours or not theirs.strip() or not ours.strip():
            raise ConversionError(f"{path}: expected two names with a tab between them, found {line!r}")
        rules.append(MapRule(theirs.strip(), ours.strip()))
    return Map(path.name, "", tuple(rules))
