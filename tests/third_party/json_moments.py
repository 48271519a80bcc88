"""Adam's moments as lists in JSON: ``{"moments": {name: {"step": 3, "exp_avg": [...], "exp_avg_sq": [...]}}}``."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_state_format.foreign.keyed import named
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Checkpoint
from lora_state_format.model.tensors import Tensor, contiguous
from lora_state_format.registry import Match

NAME = "json_moments"
DESCRIPTION = "Adam's moments in a file that ends in .moments.json"


def detect(path: Path) -> Match | None:
    return Match("a name that ends in .moments.json", path) if path.name.endswith(".moments.json") else None


def read(match: Match, options: Mapping[str, Any]) -> Checkpoint:
    moments = json.loads(match.path.read_text())["moments"]
    state = {
        name: {slot: value if slot == "step" else tensor(value) for slot, value in slots.items()}
        for name, slots in moments.items()
    }
    tree = {"state": state, "param_groups": [{"lr": 1e-3, "params": list(state)}]}
    return Checkpoint(named(from_state_dict(tree, origin={"format": NAME})))


def tensor(values: list[float]) -> Tensor:
    return contiguous("F32", (len(values),), Memory(struct.pack(f"<{len(values)}f", *values)))
