"""The names that an optimizer's state dict itself states of its parameters: in groups, entries, or next to both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from lora_state_format.errors import FileError

__all__ = ["group_labels", "stated_names"]

IN_GROUPS: Final = ("param_names", "names", "parameter_names", "fqns")
"""Options that list the names of a group's parameters: torch since 2.6, timm, mmengine, OLMo; LoRA-FA; others."""

IN_ENTRIES: Final = ("param_name", "name", "fqn")
"""Slots that hold the name of the parameter: tools that attribute gradients, optimizers with hooks."""

IN_STATE_DICTS: Final = ("names", "param_names", "id_to_name")
"""Members next to ``state`` and ``param_groups`` that map ids to names, or list names in the order of the ids."""

Statement: TypeAlias = "tuple[str, dict[int | str, Any]]"
"""A place that may state names, and what it holds for each id: names only where all of them are text."""


def stated_names(ids: Iterable[int | str], tree: Mapping[str, Any]) -> dict[int | str, str]:
    """Return the names that a state dict states of its parameters, by id, in the order of the ids.

    They may be in groups, in the entries of ``state``, next to both, or be the ids themselves. Not every parameter
    has to have one. Names that are not unique are not names.

    Args:
        ids: The ids that the groups list, in order.
        tree: The optimizer's state dict.

    Raises:
        FileError: Two of these places call one parameter by two names.
    """
    ids = list(ids)
    if ids and all(isinstance(identity, str) and not identity.isdecimal() for identity in ids):
        return {identity: str(identity) for identity in ids}
    result: dict[int | str, tuple[str, str]] = {}
    for place, named in _statements(ids, tree):
        if all(isinstance(name, str) for name in named.values()) and len(set(named.values())) == len(named):
            _agree(result, place, named)
    return {identity: result[identity][0] for identity in ids if identity in result}


def group_labels(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Return the groups' own names where each has one parameter: Adam-mini and Gaussian splatting name theirs so."""
    names = [group.get("name", group.get("param_name")) for group in groups]
    alone = all(len(group["params"]) == 1 for group in groups)
    return names if alone and names and all(isinstance(name, str) for name in names) else None


def _statements(ids: Sequence[int | str], tree: Mapping[str, Any]) -> Iterator[Statement]:
    """Yield what every place holds that may state names."""
    state, groups = tree["state"], tree["param_groups"]
    for key in IN_GROUPS:
        lists = [group.get(key) for group in groups]
        if all(_parallel(names, group["params"]) for names, group in zip(lists, groups, strict=True)):
            yield f"param_groups' {key}", dict(zip(ids, (name for names in lists for name in names), strict=True))
    entries = {identity: entry for identity in ids if isinstance(entry := state.get(identity), Mapping) and entry}
    for key in IN_ENTRIES:
        yield f"state's {key}", {identity: entry.get(key) for identity, entry in entries.items()}
    for key in IN_STATE_DICTS:
        names: Any = tree.get(key)
        if _parallel(names, ids):
            yield key, dict(zip(ids, names, strict=True))
        elif isinstance(names, Mapping):
            yield key, {identity: names.get(identity, names.get(str(identity))) for identity in ids}


def _agree(result: dict[int | str, tuple[str, str]], place: str, named: Mapping[int | str, str]) -> None:
    """Add the names of one place to those that are known, or raise ``FileError`` where they differ."""
    for identity, name in named.items():
        known, where = result.setdefault(identity, (name, place))
        if known != name:
            raise FileError(f"id {identity!r} is called '{known}' in {where}, but '{name}' in {place}")


def _parallel(names: Any, ids: Sequence[Any]) -> bool:
    return isinstance(names, (list, tuple)) and len(names) == len(ids)
