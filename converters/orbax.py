"""Orbax checkpoints of an optax state, read with tensorstore: neither jax nor orbax is imported.

``_METADATA`` lists the leaves by path; an array's name is its path joined with dots, and its bytes lie in OCDBT, or in
a folder of its own, as zarr. Arrays are compressed, so they are decoded, one at a time, when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from lora_state_format.errors import FileError, MissingDependencyError, RefusedError
from lora_state_format.foreign import optax
from lora_state_format.foreign.flax import DTYPES
from lora_state_format.foreign.optax_nodes import FIELDS, Keys, Tree, leaves
from lora_state_format.foreign.trees import member
from lora_state_format.io.files import inside
from lora_state_format.io.json_files import read_json, read_json_object
from lora_state_format.mapping import apply
from lora_state_format.model.dtypes import item_size
from lora_state_format.model.states import Checkpoint, Scalar
from lora_state_format.model.tensors import Tensor, contiguous
from lora_state_format.registry import Match

NAME: Final = "orbax"
DESCRIPTION: Final = (
    "an Orbax checkpoint folder of an optax state, a TrainState or an nnx.Optimizer: _METADATA and arrays"
)
OPTIONS: Final = {**optax.OPTIONS, "map": apply.OPTION}

METADATA: Final = "_METADATA"
EMPTY: Final = ("None", "Dict", "List", "Tuple", "NamedTuple")
"""Types of leaves that hold nothing."""


def detect(path: Path) -> Match | None:
    try:
        found = _item(path)
    except FileError:
        return None
    return Match(f"{METADATA} of Orbax, which lists an optimizer's state", found) if found else None


def _item(path: Path) -> Path | None:
    """Return the folder of the state: the path itself, or the only such item of a step of a ``CheckpointManager``."""
    if not path.is_dir():
        return None
    folders = [path] if (path / METADATA).is_file() else sorted(p.parent for p in path.glob(f"*/{METADATA}"))
    found = []
    for folder in folders:
        first = {keys[0] for keys, _ in _listed(folder / METADATA) if keys}
        if first and all(key.isdecimal() or key in FIELDS or key == "params" for key in first) and first != {"params"}:
            found.append(folder)
    return found[0] if len(found) == 1 else None


def _listed(path: Path) -> Iterator[tuple[Keys, str]]:
    """Yield the paths of a tree's leaves, and their types."""
    entries = member(read_json(path), "tree_metadata", dict, path)
    for entry in entries.values():
        keys = tuple(str(member(key, "key", (str, int), path)) for key in member(entry, "key_metadata", list, path))
        yield keys, member(member(entry, "value_metadata", dict, path), "value_type", str, path)


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    """Return the state, and the parameters where they are in the same item.

    Raises ``MissingDependencyError`` without tensorstore, and what ``optax.from_tree`` raises.
    """
    tree = _tree(match.path)
    weights: dict[str, Tensor] = {}
    if "params" in tree and "opt_state" in tree:
        weights = {".".join(keys): leaf for keys, leaf in leaves(tree["params"]) if isinstance(leaf, Tensor)}
        tree = {"opt_state": tree["opt_state"]}
    state = optax.from_tree(
        tree["opt_state"] if tree.keys() == {"opt_state"} else tree,
        path=match.path, options=options, origin={"format": NAME}, weights=weights,
    )  # fmt: skip
    return apply.on_reading(Checkpoint(state, weights), options.get("map"))


def _tree(folder: Path) -> dict[str, Tree]:
    store = _Store(folder)
    tree: dict[str, Any] = {}
    for keys, kind in _listed(folder / METADATA):
        leaf: Tree = {} if kind in EMPTY else store.leaf(keys, kind)
        if keys[-1:] == ("value",):  # nnx keeps the value of a Variable under this name
            keys = keys[:-1]
        inner = tree
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise FileError(f"has a path through the leaf '{'/'.join(keys)}'", path=folder / METADATA)
        inner[keys[-1]] = leaf
    return tree


class _Store:
    """The arrays of an item. The last one that was read is held."""

    def __init__(self, folder: Path) -> None:
        try:
            import tensorstore
        except ImportError as error:
            raise MissingDependencyError(f"Orbax checkpoints need '{error.name}': pip install tensorstore") from error
        self._tensorstore: Any = tensorstore
        self._folder = folder
        metadata = read_json_object(folder / METADATA)
        self._ocdbt = (folder / "manifest.ocdbt").exists()
        self._driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        self._held: tuple[Any, memoryview] | None = None

    def leaf(self, keys: Keys, kind: str) -> Tensor | Scalar:
        if kind == "string":
            raise RefusedError(f"'{'/'.join(keys)}' is a string, where numbers were expected", path=self._folder)
        name, base = ".".join(keys), self._folder.absolute()
        inside(base, name, self._folder / METADATA)
        place = {"driver": "ocdbt", "base": f"file://{base}/", "path": f"{name}/"}
        if not self._ocdbt:
            place = {"driver": "file", "path": f"{base / name}/"}
        try:
            array = self._tensorstore.open({"driver": self._driver, "kvstore": place}, open=True).result()
        except ValueError as error:
            raise FileError(f"has no array '{name}': {str(error)[:200]}", path=self._folder) from error
        if array.dtype.name not in DTYPES:
            raise RefusedError(f"'{name}' is of type {array.dtype.name}, which safetensors lacks", path=self._folder)
        source = _Array(self, array, DTYPES[array.dtype.name])
        if not array.shape:
            return Scalar(source.dtype, bytes(self.bytes(array)))
        return contiguous(source.dtype, array.shape, source)

    def bytes(self, array: Any) -> memoryview:
        import numpy as np

        if self._held is None or self._held[0] is not array:
            self._held = None
            try:
                values = np.ascontiguousarray(array.read().result())
            except ValueError as error:
                raise FileError(f"an array cannot be read: {str(error)[:200]}", path=self._folder) from error
            self._held = array, values.reshape(-1).view(np.uint8).data
        return self._held[1]


class _Array:
    """An array's bytes in C order, as a source."""

    crc32 = None

    def __init__(self, store: _Store, array: Any, dtype: str) -> None:
        self._store, self._array, self.dtype = store, array, dtype
        self.size = int(array.size) * item_size(dtype)

    def readinto(self, offset: int, out: memoryview) -> None:
        out[:] = self._store.bytes(self._array)[offset : offset + len(out)]

    def view(self, offset: int, size: int) -> memoryview | None:
        return self._store.bytes(self._array)[offset : offset + size]
