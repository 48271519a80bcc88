"""The command under test for the package ``lora_state_format``: a line of JSON for each path."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from lora_state_format.errors import DigestError, FileError, RefusedError, UnsupportedVersionError
from lora_state_format.format.reading import open_state, verify
from lora_state_format.io.safetensors import read_header
from lora_state_format.model.sources import File
from lora_state_format.model.states import OptimizerState, Parameter, Scalar, Slot, Value
from lora_state_format.model.tensors import Tensor

Place = tuple[Path, int, str, tuple[int, ...]]
Keys = dict[Place, list[str]]
"""The keys of the tensors of one dtype and shape that begin at a byte of a file: several where they are empty."""


def keys_of(state: OptimizerState) -> Keys:
    """Return where the tensors of a state's files lie."""
    found: Keys = {}
    for file in state.resources:
        header = read_header(file)
        for key in header.entries:
            found.setdefault(place_of(header.tensor(key)), []).append(key)
    return found


def place_of(tensor: Tensor) -> Place:
    """Return where a tensor lies, and what it is."""
    (piece,) = tensor.pieces
    assert isinstance(piece.source, File)
    return Path(piece.source.path), piece.offset, tensor.dtype, tensor.shape


def typed(owner: str, value: Value, keys: Keys | None = None) -> Any:
    """Return a value of an owner as JSON (section 5), tensors with their keys and bytes."""
    if isinstance(value, Slot) and keys is not None:
        tensor = value.tensor
        key = next(key for key in keys[place_of(tensor)] if key.startswith(f"{owner}/"))
        data = b"".join(map(bytes, tensor.chunks())).hex()
        members = {"$tensor": key, "role": value.role.value, "dtype": tensor.dtype}
        return {**members, "shape": list(tensor.shape), "data": data}
    if isinstance(value, Scalar):
        return {"$scalar": [value.dtype, value.data.hex()]}
    if isinstance(value, (list, tuple)):
        items = [typed(owner, item, keys) for item in value]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: typed(owner, item, keys) for key, item in value.items()}
        return {"$dict": [[typed(owner, key), typed(owner, item, keys)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": "nan" if value != value else f"{value}"}
    if type(value) is int and abs(value) >= 2**53:
        return {"$int": str(value)}
    return value


def given(members: Mapping[str, Any], *required: str) -> dict[str, Any]:
    """Return the members that are not empty, and the required ones."""
    return {key: value for key, value in members.items() if key in required or value not in (None, (), [], {})}


def parameter_of(p: Parameter, keys: Keys) -> dict[str, Any]:
    """Return a parameter as the protocol has it."""
    weights = p.weights and [p.weights.algorithm, p.weights.dtype, p.weights.hex]
    plain = {"name": p.name, "shape": list(p.shape), "dtype": p.dtype, "adapter": p.adapter, "tied": list(p.tied)}
    others = {"keys": dict(p.foreign_names), "id": typed(p.name, p.original_id), "weights": weights}
    slots = None if p.state is None else typed(p.name, p.state, keys)
    return given({**plain, **others, "slots": slots}, "name", "shape", "slots")


def described(state: OptimizerState) -> dict[str, Any]:
    """Return a state as the protocol has it."""
    keys = keys_of(state)
    groups = [
        given(
            {
                "optimizer": group.optimizer,
                "count": group.count,
                "name": group.name,
                "options": [[name, typed(name, value)] for name, value in group.options],
            },
            "optimizer",
            "count",
            "options",
        )
        for group in state.groups
    ]
    free = {"origin": state.origin, "extra": state.extra, "extensions": state.extensions}
    return {
        "optimizers": [given({"class": o.class_path, "id": o.id}, "class") for o in state.optimizers],
        "groups": groups,
        "parameters": [parameter_of(p, keys) for p in state.parameters],
        "naming": given(
            {
                "source": state.naming.source,
                "rule": state.naming.rule,
                "details": typed("naming", state.naming.details),
            }
        ),
        **given({name: typed(name, value) for name, value in free.items()}),
        **given({"globals": typed("$globals", state.globals, keys), "global_step": state.global_step}),
    }


def answer(path: Path) -> dict[str, Any]:
    """Return what the package says of a path."""
    try:
        with open_state(path) as state:
            members = described(state)
        found = verify(path)
    except (FileError, DigestError) as error:
        kind = "digest" if isinstance(error, DigestError) else "malformed"
        kind = "unsupported" if isinstance(error, (RefusedError, UnsupportedVersionError)) else kind
        return {"rule": error.rule, "kind": kind, "message": str(error)}
    if found.problems:
        return {"rule": "R21", "kind": "digest", "message": found.problems[0]}
    return {"verified": not found.unverified, "state": members}


def main() -> int:
    """Write a line for each path; return 1 if a file was refused."""
    code = 0
    for path in sys.argv[1:]:
        found = answer(Path(path))
        code |= int("rule" in found)
        sys.stdout.write(json.dumps(found) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
