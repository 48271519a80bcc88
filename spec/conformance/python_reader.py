"""The command under test for ``spec/reader.py``: a line of JSON for each path. Without XXH3, nothing is verified."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import reader  # type: ignore[import-not-found]


def typed(value: Any, tensors: dict[str, Any]) -> Any:
    """Return a value of the reader as JSON (section 5), tensors with their bytes."""
    if isinstance(value, reader.Scalar):
        return {"$scalar": [value.dtype, value.data.hex()]}
    if isinstance(value, reader.Slot):
        t = tensors[value.key]
        data = t.path.read_bytes()[t.offset : t.offset + t.size]
        return {"$tensor": value.key, "role": value.role, "dtype": t.dtype, "shape": t.shape, "data": data.hex()}
    if isinstance(value, (list, tuple)):
        items = [typed(item, tensors) for item in value]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: typed(item, tensors) for key, item in value.items()}
        return {"$dict": [[typed(key, tensors), typed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": "nan" if value != value else "inf" if value > 0 else "-inf"}
    if type(value) is int and abs(value) >= 2**53:
        return {"$int": str(value)}
    return value


def kept(members: dict[str, Any], *required: str) -> dict[str, Any]:
    """Return members without those that are null or empty, but for the required ones."""
    return {key: value for key, value in members.items() if key in required or value not in (None, [], {})}


def described(state: Any) -> Any:
    """Return a state of the reader as the protocol has it."""
    tensors = state["tensors"]

    def some(source: dict[str, Any], *names: str) -> dict[str, Any]:
        return {name: typed(source.get(name), tensors) for name in names}

    parameters = []
    for p in state["parameters"]:
        plain = some(p, "name", "shape", "dtype", "adapter", "tied", "weights")
        members = {**plain, "keys": p.get("keys"), "id": typed(reader.value_of(p.get("id")), tensors)}
        parameters.append(kept({**members, "slots": typed(p["tree"], tensors)}, "name", "shape", "slots"))
    return kept(
        {
            "optimizers": [kept(some(o, "class", "id"), "class") for o in state["optimizers"]],
            "groups": [
                kept(
                    {
                        **some(g, "optimizer", "count", "name"),
                        "options": [[name, typed(value, tensors)] for name, value in g["options"]],
                    },
                    "options",
                )
                for g in state["groups"]
            ],
            "parameters": parameters,
            "naming": kept(some(state["naming"], "source", "rule", "details"), "source"),
            **some(state, "globals", "origin", "extra", "extensions", "global_step"),
        },
        "optimizers",
        "groups",
        "parameters",
    )


def main() -> int:
    """Write a line for each path; return 1 if a file was refused."""
    code = 0
    for path in sys.argv[1:]:
        try:
            found = {"verified": False, "state": described(reader.read(Path(path)))}
        except reader.Refused as refused:
            rule, what, kind = refused.args
            found, code = {"rule": rule, "kind": kind, "message": f"{rule}: {what}"}, 1
        sys.stdout.write(json.dumps(found) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
