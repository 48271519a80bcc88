"""Names that a file itself states, wherever it states them: they name the state, and no order may contradict them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lora_state_format as lsf
from lora_state_format.errors import ConversionError, FileError, MissingNamesError
from lora_state_format.foreign.state_dict import from_state_dict
from lora_state_format.torch import load_optimizer


def swapped(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The model's parameters with v_proj before k_proj: equal shapes, another order than the model's."""
    rank = {"k_proj": 1, "v_proj": 0}
    named = list(model.named_parameters())
    places = [n for n, (name, _) in enumerate(named) if any(part in name for part in rank)]
    moved = iter(
        sorted((named[n] for n in places), key=lambda item: (item[0].split(".")[2], rank[item[0].split(".")[4]]))
    )
    return [next(moved) if n in places else item for n, item in enumerate(named)]


def trained(path: Path) -> tuple[torch.nn.Module, torch.optim.Optimizer, dict[int, str]]:
    """A model whose config is in the folder, an optimizer with another order of parameters, and the name of each id."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(path)
    parameters = swapped(model)
    optimizer = torch.optim.AdamW([p for _, p in parameters], lr=1e-3)
    x = torch.arange(12)[None]
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    return model, optimizer, {number: name for number, (name, _) in enumerate(parameters)}


def in_entries(key: str) -> Callable[[dict[str, Any], dict[int, str]], None]:
    def state(tree: dict[str, Any], names: dict[int, str]) -> None:
        for identity, entry in tree["state"].items():
            entry[key] = names[identity]

    return state


def in_groups(key: str) -> Callable[[dict[str, Any], dict[int, str]], None]:
    def state(tree: dict[str, Any], names: dict[int, str]) -> None:
        for group in tree["param_groups"]:
            group[key] = [names[identity] for identity in group["params"]]

    return state


def beside(key: str, of: Callable[[dict[int, str]], Any]) -> Callable[[dict[str, Any], dict[int, str]], None]:
    def state(tree: dict[str, Any], names: dict[int, str]) -> None:
        tree[key] = of(names)

    return state


PLACES = {
    "param_name in entries": in_entries("param_name"),
    "name in entries": in_entries("name"),
    "fqn in entries": in_entries("fqn"),
    "param_names in groups": in_groups("param_names"),
    "names in groups": in_groups("names"),
    "fqns in groups": in_groups("fqns"),
    "names by id": beside("names", lambda names: names),
    "names by id as text": beside("id_to_name", lambda names: {str(i): name for i, name in names.items()}),
    "a list of names": beside("param_names", lambda names: list(names.values())),
    "ids by name": beside("param_name_to_id", lambda names: {name: i for i, name in names.items()}),
}


@pytest.mark.parametrize("place", PLACES)
def test_stated_names_go_before_the_order_of_the_config(tmp_path: Path, place: str) -> None:
    model, optimizer, names = trained(tmp_path)
    tree = optimizer.state_dict()
    PLACES[place](tree, names)
    torch.save(tree, tmp_path / "optimizer.pt")
    with lsf.read(tmp_path) as state:
        assert list(state) == list(names.values())
        for name, p in model.named_parameters():
            assert state[name]["exp_avg"].torch().equal(optimizer.state[p]["exp_avg"]), name


AROUND: dict[str, Callable[[dict[int, str]], Any]] = {
    "param_names": lambda names: list(names.values()),
    "optimizer_param_names": lambda names: [list(names.values())],
    "param_id_to_name": lambda names: names,
    "name_to_id": lambda names: {name: i for i, name in names.items()},
    "fqns": lambda names: {str(i): name for i, name in names.items()},
}


@pytest.mark.parametrize("key", AROUND)
@pytest.mark.parametrize("deep", [False, True])
def test_names_next_to_the_only_optimizer_of_a_checkpoint(tmp_path: Path, key: str, deep: bool) -> None:
    model, optimizer, names = trained(tmp_path)
    tree: dict[str, Any] = {"optimizers": [optimizer.state_dict()]} if deep else {"optimizer": optimizer.state_dict()}
    torch.save({"args": {"lr": 1}, key: AROUND[key](names), **tree}, tmp_path / "last.pt")
    with lsf.read(tmp_path / "last.pt") as state:
        assert list(state) == list(names.values())
        for name, p in model.named_parameters():
            assert state[name]["exp_avg"].torch().equal(optimizer.state[p]["exp_avg"]), name


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("names", lambda names: names),  # of classes, as detectors have them
        ("slot_names", lambda names: list(names.values())),
        ("param_names", lambda names: list(names.values())[1:]),
        ("param_names", lambda names: dict.fromkeys(names.values(), 0)),
    ],
)
def test_what_is_no_statement_of_names(tmp_path: Path, key: str, said: Callable[[dict[int, str]], Any]) -> None:
    _, optimizer, names = trained(tmp_path)
    (tmp_path / "config.json").unlink()
    torch.save({"optimizer": optimizer.state_dict(), key: said(names)}, tmp_path / "last.pt")
    with pytest.raises(MissingNamesError):
        lsf.read(tmp_path / "last.pt")


def test_a_list_of_all_names_says_nothing_of_several_groups(tmp_path: Path) -> None:
    """It is in the order of the model: only a list for each group is in theirs."""
    _, optimizer, names = trained(tmp_path)
    (tmp_path / "config.json").unlink()
    tree = optimizer.state_dict()
    whole = tree["param_groups"].pop()
    tree["param_groups"] = [{**whole, "params": ids} for ids in (list(range(5, 21)), list(range(5)))]
    torch.save({"optimizer": tree, "param_names": list(names.values())}, tmp_path / "last.pt")
    with pytest.raises(MissingNamesError):
        lsf.read(tmp_path / "last.pt")
    lists = [[names[i] for i in group["params"]] for group in tree["param_groups"]]
    torch.save({"optimizer": tree, "param_names": lists}, tmp_path / "last.pt")
    with lsf.read(tmp_path / "last.pt") as state:
        assert list(state) == [*lists[0], *lists[1]]


def test_a_live_optimizer_in_another_order_takes_the_stated_names(tmp_path: Path) -> None:
    model, optimizer, names = trained(tmp_path)
    tree = optimizer.state_dict()
    in_groups("param_names")(tree, names)
    torch.save(tree, tmp_path / "optimizer.pt")
    saved = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    straight = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        straight.state[p]["param_name"] = ""
    straight = torch.optim.AdamW(model.parameters(), lr=1e-3)
    load_optimizer(straight, model, tmp_path)
    for name, p in model.named_parameters():
        assert straight.state[p]["exp_avg"].equal(saved[name]), name


def test_names_of_stepped_parameters_alone(tmp_path: Path) -> None:
    """The one that never took a step has no entry to say its name, and no state to lose."""
    _, optimizer, names = trained(tmp_path)
    tree = optimizer.state_dict()
    in_entries("param_name")(tree, names)
    del tree["state"][3]
    torch.save(tree, tmp_path / "optimizer.pt")
    with lsf.read(tmp_path) as state:
        assert list(state) == list(names.values())
        assert state[names[3]].state is None
        assert all(state[name]["param_name"] == name for name in names.values() if name != names[3])


def test_names_that_the_caller_gives_in_another_order_are_refused(tmp_path: Path) -> None:
    model, optimizer, names = trained(tmp_path)
    tree = optimizer.state_dict()
    in_entries("param_name")(tree, names)
    torch.save(tree, tmp_path / "optimizer.pt")
    given = [name for name, _ in model.named_parameters()]
    with pytest.raises(ConversionError) as caught:
        lsf.read(tmp_path / "optimizer.pt", names=given)
    assert str(caught.value) == (
        "no order of the 21 parameters fits the 21 of the optimizer, whose groups hold [21]:\n"
        "  listed: takes id 2 for 'model.layers.0.self_attn.k_proj.weight', but the file itself calls it "
        "'model.layers.0.self_attn.v_proj.weight'"
    )


def test_two_statements_that_contradict_each_other(tmp_path: Path) -> None:
    _, optimizer, names = trained(tmp_path)
    tree = optimizer.state_dict()
    in_entries("param_name")(tree, names)
    in_groups("param_names")(tree, {**names, 2: names[3], 3: names[2]})
    torch.save(tree, tmp_path / "optimizer.pt")
    with pytest.raises(FileError) as caught:
        lsf.read(tmp_path)
    assert str(caught.value) == (
        "id 2 is called 'model.layers.0.self_attn.k_proj.weight' in param_groups' param_names, but "
        "'model.layers.0.self_attn.v_proj.weight' in state's param_name"
    )


def test_text_that_is_not_unique_is_no_name(tmp_path: Path) -> None:
    tree = {"state": {i: {"step": 1, "name": "adam"} for i in range(2)}, "param_groups": [{"params": [0, 1]}]}
    state = from_state_dict(tree)
    assert (state.stated, state.names) == ({}, None)
