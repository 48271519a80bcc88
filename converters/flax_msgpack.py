"""Optax states in flax's msgpack.

``flax.serialization.to_bytes`` makes them of an ``opt_state``, a ``TrainState``, or the dict of an ``nnx.Optimizer`` by
``nnx.to_pure_dict``; EasyLM writes a stream of a ``TrainState``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.foreign import flax, optax
from lora_state_format.foreign.optax_nodes import FIELDS, Tree, leaves
from lora_state_format.mapping import apply
from lora_state_format.model.sources import File
from lora_state_format.model.states import Checkpoint, OptimizerState
from lora_state_format.model.tensors import Tensor
from lora_state_format.registry import Match

NAME: Final = "flax_msgpack"
DESCRIPTION: Final = "flax's to_bytes of an optax state (opt_state.msgpack, a TrainState, nnx), or EasyLM's stream"
OPTIONS: Final = {**optax.OPTIONS, "map": apply.OPTION}

STATE: Final = "opt_state.msgpack"
TARGET: Final = STATE
WEIGHTS: Final = "flax_model.msgpack"


def detect(path: Path) -> Match | None:
    path = path / STATE if path.is_dir() else path
    if not path.is_file():
        return None
    with File(path) as file:
        key = flax.first_key(file)
    if key is None or not (key.isdecimal() or key in FIELDS):
        return None
    return Match(f"msgpack whose first key, '{key}', is one of an optimizer's state as flax writes it", path)


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Return the state, and the parameters of the file, or of ``flax_model.msgpack`` next to ``opt_state.msgpack``.

    Raises ``FileError`` for a damaged file, ``RefusedError`` for a tree that is not known or does not convert, and
    ``OptionError`` where the rule has to be said.
    """
    path = match.path
    beside = path.with_name(WEIGHTS)
    files = [File(path)]
    try:
        whole = flax.load(files[0])
        tree, weights = _parts(whole)
        if path.name == STATE and beside.is_file():
            files.append(File(beside))
            weights = _weights(flax.load(files[1]))
        state = optax.from_tree(
            tree, path=path, options=options, origin={"format": NAME}, weights=weights, resources=tuple(files)
        )
        return apply.on_reading(Checkpoint(state, weights), options.get("map"))
    except BaseException:
        for file in files:
            file.close()
        raise


def write(state: OptimizerState, path: Path, *, base: Path | None, force: bool, options: Mapping[str, Any]) -> None:
    """Write bytes for ``flax.serialization.from_bytes(tx.init(params), ...)``.

    ``base`` is a file of the same optimizer, ``to_bytes(tx.init(params))`` for example, or a ``TrainState``, all of
    which but the optimizer's state is copied. Without one the optimizer is taken to be ``optax.NAME(learning_rate)``.
    """
    state = apply.on_writing(state, options.get("map"), NAME)
    if base is None:
        flax.save(optax.to_tree(state, options=options), path, force=force)
        return
    with File(base) as file:
        whole = flax.load(file)
        tree, _ = _parts(whole)
        filled = optax.to_tree(state, options=options, base=tree)
        flax.save({**whole, "opt_state": filled} if tree is not whole else filled, path, force=force)


def _parts(tree: Mapping[str, Tree]) -> tuple[Tree, dict[str, Tensor]]:
    """Return the optimizer's state, and the parameters where the tree is of a ``TrainState``."""
    if "params" in tree and "opt_state" in tree:
        return tree["opt_state"], _weights(tree["params"])
    return tree, {}


def _weights(tree: Tree) -> dict[str, Tensor]:
    return {".".join(keys): leaf for keys, leaf in leaves(tree) if isinstance(leaf, Tensor)}
