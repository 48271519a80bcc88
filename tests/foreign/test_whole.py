"""Optimizers that were pickled as objects, next to their model or alone; and what Python's own pickle wrote."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_state_format as lsf
from lora_state_format.errors import FileError, MissingNamesError
from lora_state_format.foreign import pickles
from lora_state_format.foreign.state_dict import find, from_state_dict
from lora_state_format.model.sources import File
from lora_state_format.model.states import Slot


def alike() -> nn.ModuleDict:
    """Layers of one shape: nothing but the file says which state is whose."""
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(3, 3) for name in ("q", "k", "v")})


def trained(parameters: Any, kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> torch.optim.Optimizer:
    """An optimizer after a step with gradients that tell its parameters apart."""
    optimizer = kind(parameters, lr=0.1)
    for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.full_like(p, number + 1.0)
    optimizer.step()
    return optimizer


def turned(model: nn.ModuleDict) -> list[dict[str, Any]]:
    """Groups in an order that is not the model's."""
    q, k, v = model["q"], model["k"], model["v"]
    return [{"params": [*v.parameters()], "weight_decay": 0.5}, {"params": [q.bias, k.weight, q.weight]}]


def names_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def check(path: Path, optimizer: torch.optim.Optimizer, expected: list[str], **reading: Any) -> lsf.OptimizerState:
    """Assert that a file has the state of a live optimizer under these names, in order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with lsf.read(path, **reading) as state:
        assert list(state) == expected
        for name, p in zip(expected, parameters, strict=True):
            for slot, value in optimizer.state[p].items():
                held = state[name][slot]
                assert (held.torch() if value.shape else torch.tensor(held.item())).equal(value), (name, slot)
        return state


MODELS: Mapping[str, Callable[[nn.Module], Any]] = {
    "whole": lambda model: model,
    "state dict": lambda model: model.state_dict(),
    "wrapped": nn.DataParallel,
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("model", MODELS)
def test_the_model_next_to_it_names_it_by_its_very_tensors(tmp_path: Path, model: str, zipped: bool) -> None:
    net = alike()
    optimizer = trained(turned(net))
    tree = {"model": MODELS[model](net), "optimizer": optimizer, "epoch": 1}
    torch.save(tree, tmp_path / "last.pt", _use_new_zipfile_serialization=zipped)
    prefix = "module." if model == "wrapped" else ""
    state = check(tmp_path / "last.pt", optimizer, [prefix + name for name in names_of(optimizer, net)])
    assert state.optimizers[0].class_path == "torch.optim.adamw.AdamW"
    assert [dict(group.options)["weight_decay"] for group in state.groups] == [0.5, 0.01]
    report = lsf.convert(tmp_path / "last.pt", tmp_path / "out" / "x.safetensors")
    assert report.paired == report.parameters == 5


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adafactor])
def test_it_is_its_state_dict(tmp_path: Path, kind: Callable[..., torch.optim.Optimizer]) -> None:
    optimizer = trained(turned(alike()), kind)
    optimizer.state["counter"] = {"calls": 3}  # type: ignore[index]
    found = []
    for saved in (optimizer, optimizer.state_dict()):
        torch.save(saved, tmp_path / "optimizer.pt")
        with File(tmp_path / "optimizer.pt") as file:
            (tree,) = find(pickles.load(file).value)
            state = from_state_dict(tree)
            values = {
                (identity, slot): bytes(value.tensor.bytes()) if isinstance(value, Slot) else value
                for identity, entry in state.entries.items()
                for slot, value in entry.items()
            }
            found.append((state.ids, state.groups, state.globals, values))
    assert found[0] == found[1]


def test_two_of_them_and_their_models(tmp_path: Path) -> None:
    actor, critic = nn.Linear(3, 3), nn.Linear(3, 3)
    a, c = trained(actor.parameters()), trained([critic.bias, critic.weight])
    torch.save({"critic": critic, "actor": actor, "optimizers": [a, c]}, tmp_path / "agent.pt")
    live = {"actor.weight": (a, actor.weight), "actor.bias": (a, actor.bias)}
    live |= {"critic.bias": (c, critic.bias), "critic.weight": (c, critic.weight)}
    with lsf.read(tmp_path / "agent.pt") as state:
        assert list(state) == list(live)
        for name, (optimizer, p) in live.items():
            assert state[name]["exp_avg"].torch().equal(optimizer.state[p]["exp_avg"])


def test_alone_it_is_named_as_a_state_dict_is(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = trained(net.parameters())
    torch.save(optimizer, tmp_path / "optimizer.pt")
    with pytest.raises(MissingNamesError):
        lsf.read(tmp_path / "optimizer.pt")
    check(tmp_path / "optimizer.pt", optimizer, ["a", "b", "c", "d"], names=["a", "b", "c", "d"])
    torch.save(net.state_dict(), tmp_path / "model.pt")
    check(tmp_path / "optimizer.pt", optimizer, names_of(optimizer, net))


class NoamOptimizer:
    """As tutorials wrap one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = optimizer


def test_a_wrapper_of_ones_own_says_what_to_save(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"optimizer": NoamOptimizer(trained(alike().parameters()))}, path)
    with pytest.raises(FileError) as caught:
        lsf.read(path)
    assert str(caught.value) == (
        f"{path}: no optimizer's state dict in it (a dict with state and param_groups); 'optimizer' is a whole "
        f"{NoamOptimizer.__module__}.NoamOptimizer: save its state_dict()"
    )


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("whole", [False, True])
def test_what_pickle_dump_wrote(tmp_path: Path, protocol: int, whole: bool) -> None:
    """It has a stream of torch's for each storage, in bytes."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = trained(net.parameters())
    tree = {"model": net.state_dict(), "optimizer": optimizer if whole else optimizer.state_dict()}
    (tmp_path / "last.pkl").write_bytes(pickle.dumps(tree, protocol))
    check(tmp_path / "last.pkl", optimizer, names_of(optimizer, net))
