"""Files in which other libraries keep a model next to its optimizer, read as their live optimizers were."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lora_state_format as lsf
from lora_state_format.foreign import pickles
from lora_state_format.foreign.weights import in_tree
from lora_state_format.model.sources import File
from lora_state_format.operations.conversion import convert

FILES = Path(__file__).parents[1] / "golden" / "bundles" / "files"
RULES = {
    "hydra.pt": "flat", "mmengine.pth": "one-per-parameter", "timm.pth.tar": "timm", "ultralytics.pt": "ultralytics",
}  # fmt: skip


class Anything:
    """Stands in for a class that torch.load asks for."""

    def __new__(cls, *arguments: Any, **options: Any) -> Anything:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class Unpickler(__import__("pickle").Unpickler):  # type: ignore[misc]
    """torch's own reading of the optimizer, with every class of another library replaced."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in ("torch", "collections", "builtins", "numpy", "_codecs") and "nn" not in module:
            return super().find_class(module, name)
        return Anything


def optimizer_of(path: Path) -> Any:
    stand_in = ModuleType("stand_in")
    stand_in.Unpickler, stand_in.load = Unpickler, lambda file, **options: Unpickler(file).load()  # type: ignore[attr-defined]
    sys.modules.setdefault("stand_in", stand_in)
    return torch.load(path, weights_only=False, pickle_module=stand_in)["optimizer"]


@pytest.mark.parametrize("name", RULES)
def test_its_parameters_have_the_names_of_the_live_optimizer(name: str, tmp_path: Path) -> None:
    groups = json.loads((FILES / "names.json").read_text())[name]
    convert(FILES / name, tmp_path / "optimizer.safetensors")
    tree = optimizer_of(FILES / name)
    with lsf.read(FILES / name) as state, lsf.open_state(tmp_path / "optimizer.safetensors") as named:
        assert state.naming.rule == RULES[name]
        for found in (state, named):
            assert [[p.name for p in members] for members in found.members()] == groups
            for identity, parameter in enumerate(found.parameters):
                slots = tree["state"].get(identity)
                assert (slots or {}).keys() == parameter.keys()
                for slot, value in (slots or {}).items():
                    ours = parameter[slot]
                    assert (ours.torch() if value.shape else torch.tensor(ours.item())).equal(value), (parameter, slot)


def test_a_whole_module_has_the_names_of_its_parameters(tmp_path: Path) -> None:
    """Nothing of it is run; shared modules count once, and a module in itself ends nowhere."""
    model = torch.nn.ModuleDict({"b": torch.nn.Linear(2, 3), "a": torch.nn.Sequential(torch.nn.LayerNorm(3))})
    model["again"] = model["b"]
    model.extra = torch.nn.Parameter(torch.ones(4))
    torch.save({"net": model, "step": 1}, tmp_path / "whole.pt")
    with File(tmp_path / "whole.pt") as file:
        (weights,) = in_tree(pickles.load(file).value)
        assert list(weights.tensors) == [name for name, _ in model.named_parameters()]
        for name, parameter in model.named_parameters():
            assert weights.tensors[name].torch().equal(parameter)
    model["itself"] = model
    torch.save(model, tmp_path / "whole.pt")
    with File(tmp_path / "whole.pt") as file:
        (weights,) = in_tree(pickles.load(file).value)
        assert len(weights.tensors) == 5


def test_an_average_of_the_weights_names_them_and_is_none_of_them(tmp_path: Path) -> None:
    """The file of ultralytics has the average alone: no digests of it are kept with the state."""
    convert(FILES / "ultralytics.pt", tmp_path / "optimizer.safetensors")
    with lsf.open_state(tmp_path / "optimizer.safetensors") as state:
        assert not any(parameter.weights for parameter in state.parameters)
