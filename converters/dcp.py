"""Folders of ``torch.distributed.checkpoint``.

FSDP2, sharded FSDP1, torchtitan, torchtune's async saves, accelerate (``optimizer_0``), Lightning and Composer write
them.

The optimizer's state dict stands somewhere in the saved tree, in one of two forms: nested (``state``, ``param_groups``,
the latter a list), keyed by name or, where the writer saved ``optimizer.state_dict()`` itself, by id; or flattened
(``state.<name>.<slot>``, ``param_groups.<name>.<option>``), which repeats the options for every parameter and forgets
which group it was in: there, consecutive parameters with equal options become a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, UnrepresentableError
from lora_state_format.foreign import fsdp_dtensor, keyed
from lora_state_format.foreign.dcp import Folder, is_folder, metadata, open_folder, seen, write_folder
from lora_state_format.foreign.state_dict import Found, from_state_dict, is_state_dict
from lora_state_format.io.files import folders_in
from lora_state_format.model.states import Checkpoint, OptimizerState, PositionalState, Weights, leaf_of
from lora_state_format.model.tensors import Tensor
from lora_state_format.registry import Match

NAME: Final = "dcp"
DESCRIPTION: Final = "a torch.distributed.checkpoint folder (FSDP, torchtitan, ...): .metadata and *.distcp files"
OPTIONS: Final = {
    "key": "where the optimizer stands in the tree that is written: 'optimizer' if not said, '' for the top",
    "flattened": "write torch's flattened layout (flatten_optimizer_state_dict=True)",
}


def detect(path: Path) -> Match | None:
    folders = _folders(path)
    if not folders:
        return None
    return Match("a .metadata file that lists an optimizer's param_groups", path)


def _folders(path: Path) -> list[Path]:
    """Return the DCP folders with optimizer state: the path itself, or folders in it (``optimizer_0``)."""
    if not path.is_dir() or (path / "metadata.json").exists():  # metadata.json: Megatron
        return []
    candidates = [path] if is_folder(path) else [folder for folder in folders_in(path) if is_folder(folder)]
    found = [
        folder
        for folder in candidates
        if any(word in metadata(folder) for word in (b"param_groups", fsdp_dtensor.KEY.encode()))
    ]
    parts = len(found) == 1 or all(folder.name.startswith("optim") for folder in found)
    return found if parts else []  # the checkpoints of a run, step after step


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """``options`` are for writing."""
    return _read(match.path, open_folder)


def glance(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Return what the folder holds by ``.metadata``, the values in it, and the names of its files.

    A folder of up to ``FEW`` files is read as a whole. Raises what ``read`` raises, for what is seen.
    """
    return _read(match.path, partial(open_folder, glance=lambda _: True))


def _read(path: Path, opener: Callable[[Path], Folder]) -> Checkpoint:
    places = _folders(path)
    others = [] if is_folder(path) else [f for f in folders_in(path) if is_folder(f) and f not in places]
    opened: list[Folder] = []
    try:
        opened.extend(map(opener, (*places, *others)))
        _check_whole(opened, path)
        found = [item for folder in opened[: len(places)] for item in _optimizers(folder.tree())]
        if not found:
            raise FileError("no optimizer's state dict (state and param_groups) in it", path=path)
        for item in found:
            _check_steps(item)
        state = from_state_dict(*found, origin={"format": NAME, **seen(opened)}, resources=tuple(opened))
        weights = {name: tensor for folder in opened for name, tensor in _weights(folder)}
        weights = fsdp_dtensor.under_its_names(weights, state.ids)
        candidates = ((Weights("the folder", weights, ordered=True),),) if weights else ()
        named = keyed.named(state, weights=weights)
        return Checkpoint(named, {**weights, **_own(named, weights)}, candidates=candidates)
    except BaseException:
        for folder in opened:
            folder.close()
        raise


def _check_whole(opened: Sequence[Folder], path: Path) -> None:
    """Raise ``RefusedError`` for a local state dict of FSDP1: each rank's flat parameters, saved over each other."""
    for folder in opened:
        for where in folder.entries:
            if where and str(where[-1]).endswith(keyed.FLAT):
                raise keyed.local_state(path)


def _own(state: OptimizerState | PositionalState, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of parameters whose names lost a wrapper's segments, by the names that are left."""
    if isinstance(state, PositionalState):
        return {}
    raw = {p.name: p.original_id for p in state.parameters if isinstance(p.original_id, str)}
    return {name: weights[original] for name, original in raw.items() if original in weights}


def _weights(folder: Folder) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that are no optimizer state, under the last step of their path: the name."""
    for path, value in folder.entries.items():
        if isinstance(value, Tensor) and not any(str(step).partition(".")[0] == "state" for step in path):
            yield str(path[-1]), value


def _optimizers(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[Found]:
    """Yield every optimizer's state dict in a tree."""
    if not isinstance(node, dict):
        return
    if "param_groups" in node:
        yield Found(path, _nested(node))
        return
    if fsdp_dtensor.KEY in node:
        yield Found(path, fsdp_dtensor.state_dict(node[fsdp_dtensor.KEY], _lists(node.get("state", {}))))
        return
    if any(str(key).startswith("param_groups.") for key in node):
        yield Found(path, _flattened(node))
    for key, inner in node.items():
        yield from _optimizers(inner, (*path, key))


def _nested(node: Mapping[Any, Any]) -> dict[str, Any]:
    groups, state = _lists(node["param_groups"]), node.get("state", {})
    if not is_state_dict({"state": state, "param_groups": groups}):
        raise FileError("holds param_groups that are no list of dicts with params, or a state that is no dict")
    state = {key: _lists(slots) for key, slots in state.items()}
    listed = {identity for group in groups for identity in group["params"] if type(identity) is int}
    # The path of an entry is of strings, also where a state dict's ids are numbers.
    state = {int(key) if str(key).isdecimal() and int(key) in listed else key: slots for key, slots in state.items()}
    return {"state": state, "param_groups": groups}


def _lists(node: Any) -> Any:
    """Return the node with every dict whose keys are 0..n-1 made the list that it was."""
    if not isinstance(node, dict):
        return node
    inner = {key: _lists(value) for key, value in node.items()}
    if inner and set(inner) == set(range(len(inner))):
        return [inner[index] for index in range(len(inner))]
    return inner


def _flattened(node: Mapping[Any, Any]) -> dict[str, Any]:
    options: dict[str, dict[str, Any]] = {}
    for key, value in node.items():
        if str(key).startswith("param_groups."):
            name, _, option = key.removeprefix("param_groups.").rpartition(".")
            options.setdefault(name, {})[option] = leaf_of(value) if isinstance(value, Tensor) else value
    groups: list[dict[str, Any]] = []
    last = ""
    for name, chosen in options.items():
        if not groups or repr(chosen) != last:
            groups.append({**chosen, "params": []})
        last = repr(chosen)  # where 1, 1.0 and True differ, and NaN does not
        groups[-1]["params"].append(name)
    state: dict[str, dict[str, Any]] = {}
    for key, value in node.items():
        if str(key).startswith("state."):
            rest = key.removeprefix("state.")
            # A name may begin with another name: the longest that is one is meant.
            cut = next((i for i in range(len(rest) - 1, 0, -1) if rest[i] == "." and rest[:i] in options), None)
            if cut is None:
                raise FileError(f"'{key}' is the state of no parameter that param_groups lists")
            state.setdefault(rest[:cut], {})[rest[cut + 1 :]] = value
    return {"state": state, "param_groups": groups}


def _check_steps(found: Found) -> None:
    """Raise ``FileError`` if every file counts another step: then they are of different saves."""
    counts: dict[Path, set[bytes]] = {}
    for slots in found.tree["state"].values():
        step = slots.get("step") if isinstance(slots, dict) else None
        if isinstance(step, Tensor) and not step.shape:
            source = step.pieces[0].source
            counts.setdefault(source.place.file.path, set()).add(bytes(step.bytes()))  # type: ignore[attr-defined]
    if len(counts) > 1 and all(len(seen) == 1 for seen in counts.values()):
        (first, ours), *rest = counts.items()
        for path, theirs in rest:
            if theirs != ours:
                raise FileError(
                    f"every step in it differs from those in {first.name}: files of two checkpoints", path=path
                )


def write(state: OptimizerState, path: Path, *, base: Path | None, force: bool, options: Mapping[str, Any]) -> None:
    """Write a folder for ``torch.distributed.checkpoint.load`` and ``set_optimizer_state_dict``."""
    key, flattened = str(options.get("key", "optimizer")), bool(options.get("flattened"))
    laid_out = _flat_entries if flattened else _nested_entries
    entries: dict[tuple[Any, ...], Any] = {}
    for index in range(len(state.optimizers)):
        name = key if len(state.optimizers) == 1 else f"{key}_{index}"
        prefix = (name,) if name else ()
        tree = keyed.by_name(state, index)
        _check(tree, flattened)
        entries |= {(*prefix, *where): value for where, value in laid_out(tree)}
    write_folder(entries, path, force=force)


def _check(tree: Mapping[str, Any], flattened: bool) -> None:
    """Raise ``UnrepresentableError`` for what would be read back as something else, or not at all."""
    if others := tree.keys() - {"state", "param_groups"}:
        raise UnrepresentableError(f"'{min(others)}' belongs to no parameter, and a DCP folder has no place for it")
    for name, slots in tree["state"].items():
        _check_keys(slots, f"slot of '{name}'")
    for number, group in enumerate(tree["param_groups"]):
        _check_keys({key: value for key, value in group.items() if key != "params"}, f"option of group {number}")
    if flattened:
        _check_flattened(tree)


def _check_flattened(tree: Mapping[str, Any]) -> None:
    """Raise ``UnrepresentableError`` for what the flattened layout would lose."""

    def lost(what: str) -> UnrepresentableError:
        return UnrepresentableError(f"{what}: the flattened layout would lose it; write the nested one")

    listed = {identity for group in tree["param_groups"] for identity in group["params"]}
    for name, slots in tree["state"].items():
        if name not in listed or not slots or any("." in slot for slot in slots):
            raise lost(f"'{name}' has no slots, one with a dot in its name, or is in no group")
    before = ""
    for number, group in enumerate(tree["param_groups"]):
        options = {key: value for key, value in group.items() if key != "params"}
        if not options or any("." in key for key in options):
            raise lost(f"group {number} has no options, or one with a dot in its name")
        if repr(options) == before or not group["params"]:
            raise lost(f"group {number} has no parameters, or the same options as the one before")
        before = repr(options)


def _check_keys(node: Any, where: str) -> None:
    if isinstance(node, dict):
        if node and set(node) == set(range(len(node))):
            raise UnrepresentableError(
                f"a {where} is a mapping with the keys 0 to {len(node) - 1}: DCP makes it a list"
            )
        if not all(type(key) in (str, int) for key in node):
            raise UnrepresentableError(f"a {where} is a mapping with keys that are neither texts nor numbers")
    if isinstance(node, (dict, list, tuple)):
        for inner in node.values() if isinstance(node, dict) else node:
            _check_keys(inner, where)


def _nested_entries(tree: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for path, value in _leaves(tree["state"]):
        yield ("state", *path), value
    for number, group in enumerate(tree["param_groups"]):
        for key, value in group.items():
            yield ("param_groups", number, key), value


def _flat_entries(tree: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for name, slots in tree["state"].items():
        for slot, value in slots.items():
            yield (f"state.{name}.{slot}",), value
    for group in tree["param_groups"]:
        options = {key: value for key, value in group.items() if key != "params"}
        for name in group["params"]:
            for key, value in options.items():
                yield (f"param_groups.{name}.{key}",), value


def _leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(node, (dict, list)) and node:
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(inner, (*path, key))
    else:
        yield path, node
