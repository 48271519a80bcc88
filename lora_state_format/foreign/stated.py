"""The names that an optimizer's state dict itself states of its parameters: in groups, entries, or next to both."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final, TypeAlias

from lora_state_format.errors import FileError

__all__ = ["group_labels", "stated_names"]

IN_GROUPS: Final = ("param_names", "names", "parameter_names", "fqns")
"""Options that list the names of a group's parameters: torch since 2.6, timm, mmengine, OLMo; LoRA-FA; others."""

IN_ENTRIES: Final = ("param_name", "name", "fqn")
"""Slots that hold the name of the parameter: tools that attribute gradients, optimizers with hooks."""

IN_CHECKPOINTS: Final = re.compile(
    r"(param|trainable)\w*name|name\w*param|fqns?$|names?_to_(id|index|idx)|(id|index|idx)s?_to_name"
)
"""Members of a checkpoint that map ids to names or names to ids, or list names in their order: not those of classes."""

IN_STATE_DICTS: Final = re.compile(f"^names$|{IN_CHECKPOINTS.pattern}")
"""Members next to ``state`` and ``param_groups`` that do."""

Statement: TypeAlias = "tuple[str, dict[int | str, Any]]"
"""A place that may state names, and what it holds for each id: names only where all of them are text."""


def stated_names(
    ids: Iterable[int | str], tree: Mapping[str, Any], around: Sequence[Mapping[Any, Any]] = ()
) -> dict[int | str, str]:
    """Return the names that a state dict states of its parameters, by id, in the order of the ids.

    They may be in groups, in the entries of ``state``, next to both, or be the ids themselves. Not every parameter
    has to have one. Names that are not unique are not names.

    Args:
        ids: The ids that the groups list, in order.
        tree: The optimizer's state dict.
        around: The dicts that hold it, if it is the only one of the checkpoint.

    Raises:
        FileError: Two of these places call one parameter by two names.
    """
    ids = list(ids)
    if ids and all(isinstance(identity, str) and not identity.isdecimal() for identity in ids):
        return {identity: str(identity) for identity in ids}
    result: dict[int | str, tuple[str, str]] = {}
    for place, named in _statements(ids, tree, around):
        if all(isinstance(name, str) for name in named.values()) and len(set(named.values())) == len(named):
            _agree(result, place, named)
    return {identity: result[identity][0] for identity in ids if identity in result}


def group_labels(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Return the groups' own names where each has one parameter: Adam-mini and Gaussian splatting name theirs so."""
    names = [group.get("name", group.get("param_name")) for group in groups]
    alone = all(len(group["params"]) == 1 for group in groups)
    return names if alone and names and all(isinstance(name, str) for name in names) else None


def _statements(
    ids: Sequence[int | str], tree: Mapping[str, Any], around: Sequence[Mapping[Any, Any]]
) -> Iterator[Statement]:
    """Yield what every place holds that may state names; of members that are called alike the innermost."""
    state, groups = tree["state"], tree["param_groups"]
    for key in IN_GROUPS:
        lists = [group.get(key) for group in groups]
        if all(_parallel(names, group["params"]) for names, group in zip(lists, groups, strict=True)):
            yield f"param_groups' {key}", dict(zip(ids, chain.from_iterable(lists), strict=True))
    entries = {identity: entry for identity in ids if isinstance(entry := state.get(identity), Mapping) and entry}
    for key in IN_ENTRIES:
        yield f"state's {key}", {identity: entry.get(key) for identity, entry in entries.items()}
    seen: set[str] = set()
    for pattern, members in ((IN_STATE_DICTS, tree), *((IN_CHECKPOINTS, outer) for outer in around)):
        for key, names in members.items():
            fresh = isinstance(key, str) and key not in seen and pattern.search(key)
            if fresh and (named := _by_id(names, ids, groups)):
                seen.add(key)
                yield key, named


def _by_id(names: Any, ids: Sequence[int | str], groups: Sequence[Mapping[str, Any]]) -> dict[int | str, Any]:
    """Return names by id: of a dict of either direction, or a list; of several groups it has to be one for each.

    A list of all names would be in the order of the model, which is not that of several groups.
    """
    if isinstance(names, Mapping):
        turned = {i if isinstance(i, int) else str(i): n for n, i in names.items() if isinstance(i, (int, str))}
        found = names if any(i in names or str(i) in names for i in ids) else turned
        return {identity: found.get(identity, found.get(str(identity))) for identity in ids}
    parts = [names] if len(groups) == 1 and not _parallel(names, groups) else names
    if not _parallel(parts, groups) or not all(map(_parallel, parts, (group["params"] for group in groups))):
        return {}
    return dict(zip(ids, chain.from_iterable(parts), strict=True))


def _agree(result: dict[int | str, tuple[str, str]], place: str, named: Mapping[int | str, str]) -> None:
    """Add the names of one place to those that are known, or raise ``FileError`` where they differ."""
    for identity, name in named.items():
        known, where = result.setdefault(identity, (name, place))
        if known != name:
            raise FileError(f"id {identity!r} is called '{known}' in {where}, but '{name}' in {place}")


def _parallel(names: Any, ids: Sequence[Any]) -> bool:
    return isinstance(names, (list, tuple)) and len(names) == len(ids)
