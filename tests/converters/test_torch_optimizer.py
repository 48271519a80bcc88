from __future__ import annotations

import io
import json
import math
import os
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_state_format as lsf
from lora_state_format import registry
from lora_state_format.errors import (
    ConversionError,
    FileError,
    OptionError,
    RefusedError,
    TargetExistsError,
    UnknownFormatError,
    UnrepresentableError,
)
from lora_state_format.model.states import Checkpoint, OptimizerState, PositionalState, Scalar, Slot

if TYPE_CHECKING:
    from tests.conftest import Founding

WILD = Path(__file__).parents[3] / "shared" / "wild"
converter: Any = registry.get("torch_optimizer")


def trained(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 + number)
    optimizer.step()
    return optimizer


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


NAMES = ["0.weight", "0.bias", "1.weight", "1.bias"]


def positional(checkpoint: Checkpoint) -> PositionalState:
    assert isinstance(checkpoint.state, PositionalState)
    return checkpoint.state


def assert_holds(entries: Any, state: Any) -> None:
    """The entries are those of a torch state dict, bit for bit."""
    assert entries.keys() == state.keys()
    for identity, slots in state.items():
        assert list(entries[identity]) == list(slots)
        for slot, theirs in slots.items():
            ours = entries[identity][slot]
            if isinstance(theirs, torch.Tensor) and not theirs.shape:
                assert ours == Scalar(ours.dtype, theirs.numpy().tobytes())
            elif isinstance(theirs, torch.Tensor):
                assert isinstance(ours, Slot)
                assert ours.tensor.torch().equal(theirs)
            elif isinstance(theirs, dict):
                assert_holds({0: ours}, {0: theirs})
            else:
                assert ours == theirs


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "optimizer.pt"], ids=["folder", "file"])
def test_a_trainer_checkpoint(founding: Founding, part: str) -> None:
    path = founding.path / part
    found, match = registry.detect(path)
    assert found is converter
    assert match == registry.Match(
        "a zip archive, as torch.save writes them" if part else "optimizer.pt beside trainer_state.json",
        founding.path / "optimizer.pt",
        generic=bool(part),
    )
    checkpoint = registry.read(path, converter.NAME)
    state = positional(checkpoint)
    with torch.serialization.safe_globals([]):
        theirs = torch.load(founding.path / "optimizer.pt", weights_only=True)
    assert (state.sizes(), state.global_step) == ([392, 0], 3)
    assert_holds(state.entries, theirs["state"])
    assert [dict(group.options) for group in state.groups] == [
        {key: value for key, value in group.items() if key != "params"} for group in theirs["param_groups"]
    ]
    adapter = load_file(founding.path / "adapter_model.safetensors")
    assert checkpoint.weights.keys() == adapter.keys()
    assert all(checkpoint.weights[key].torch().equal(tensor) for key, tensor in adapter.items())
    assert checkpoint.configs == {"adapter_config.json": founding.path / "adapter_config.json"}
    assert state.origin["format"] == "torch_optimizer"
    for file in state.resources:
        file.close()


def test_what_torch_did_not_save_is_not_claimed(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "notes.txt").write_text("param_groups")
    (tmp_path / "empty").touch()
    for path in (*tmp_path.iterdir(), tmp_path):
        assert converter.detect(path) is None
        with pytest.raises(UnknownFormatError):
            registry.detect(path)


def test_a_file_without_an_optimizer_says_so(tmp_path: Path, model: torch.nn.Module) -> None:
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    assert registry.detect(path)[1].generic
    with pytest.raises(FileError) as caught:
        registry.read(path, converter.NAME)
    assert str(caught.value) == f"{path}: no optimizer's state dict in it (a dict with state and param_groups)"


def test_an_interrupted_save_is_claimed_to_say_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "optimizer.pt", "w") as archive:
        archive.writestr("optimizer/version", "3\n")
    for path in (tmp_path, tmp_path / "optimizer.pt"):
        assert registry.detect(path)[0] is converter
        with pytest.raises(FileError) as caught:
            registry.read(path, converter.NAME)
        assert str(caught.value) == (
            f"{tmp_path / 'optimizer.pt'}: the zip archive has no data.pkl among its 1 members: an interrupted "
            "torch.save, or another kind of archive"
        )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_a_bare_file_and_the_model_beside_it(tmp_path: Path, model: torch.nn.Module, zipped: bool) -> None:
    optimizer = trained(model)
    torch.save(optimizer.state_dict(), tmp_path / "optim_3.pt", _use_new_zipfile_serialization=zipped)
    torch.save(model.state_dict(), tmp_path / "model_3.pt", _use_new_zipfile_serialization=zipped)
    assert registry.detect(tmp_path / "optim_3.pt")[1].generic
    checkpoint = registry.read(tmp_path / "optim_3.pt", converter.NAME)
    assert_holds(positional(checkpoint).entries, optimizer.state_dict()["state"])
    assert {key: tensor.shape for key, tensor in checkpoint.weights.items()} == {
        key: tuple(tensor.shape) for key, tensor in model.state_dict().items()
    }


def test_a_whole_module_beside_it_names_it(tmp_path: Path, model: torch.nn.Module) -> None:
    torch.save(trained(model).state_dict(), tmp_path / "optimizer.pt")
    torch.save(model, tmp_path / "model.pt")
    weights = registry.read(tmp_path, converter.NAME).weights
    assert list(weights) == NAMES
    assert all(weights[name].torch().equal(model.state_dict()[name]) for name in NAMES)
    with lsf.read(tmp_path) as state:
        assert list(state) == NAMES


def test_sharded_weights_and_versions_beside_it(tmp_path: Path, model: torch.nn.Module) -> None:
    torch.save(trained(model).state_dict(), tmp_path / "optimizer.pt")
    weights = model.state_dict()
    for number, keys in enumerate((NAMES[:2], NAMES[2:])):
        save_file({key: weights[key] for key in keys}, tmp_path / f"model-{number}.safetensors")
    index = {key: f"model-{number // 2}.safetensors" for number, key in enumerate(NAMES)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps({"transformers_version": "4.49.0"}))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    checkpoint = registry.read(tmp_path, converter.NAME)
    assert sorted(checkpoint.weights) == sorted(NAMES)
    assert all(checkpoint.weights[key].torch().equal(weights[key]) for key in NAMES)
    assert checkpoint.state.origin == {"format": "torch_optimizer", "transformers": "4.49.0"}
    assert checkpoint.state.global_step == 7


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "trainer_state.json",
            "{",
            "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        ("config.json", "[]", "not a JSON object"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"x": "../model.safetensors"}}',
            "names '../model.safetensors', which is not the name of a file in its folder",
        ),
        ("model.safetensors", "x", "1 bytes: too short for a safetensors file [R1]"),
    ],
)
def test_a_damaged_neighbour_is_named_and_skipped(
    tmp_path: Path, model: torch.nn.Module, name: str, text: str, message: str
) -> None:
    torch.save({"optimizer": trained(model).state_dict(), "net": model.state_dict()}, tmp_path / "optimizer.pt")
    (tmp_path / name).write_text(text)
    (tmp_path / "out").mkdir()
    report = lsf.convert(tmp_path, tmp_path / "out" / "x.safetensors")
    assert report.warnings == (f"{tmp_path / name}: {message}; it was skipped",)
    with lsf.open_state(tmp_path / "out" / "x.safetensors") as state:
        assert list(state) == NAMES


@pytest.mark.parametrize(
    "place", ["optimizer", "optim", "optimizer_state_dict", "state.optimizers", "optimizer_states"]
)
def test_a_state_dict_in_a_checkpoint(tmp_path: Path, model: torch.nn.Module, place: str) -> None:
    optimizer = trained(model)
    tree: Any = optimizer.state_dict()
    where = place
    if place == "optimizer_states":
        tree, where = [tree], "optimizer_states.0"
    for key in reversed(place.split(".")):
        tree = {key: tree}
    torch.save({**tree, "model": model.state_dict(), "global_step": 5, "path": Path("x")}, tmp_path / "last.ckpt")
    checkpoint = registry.read(tmp_path / "last.ckpt", converter.NAME)
    assert_holds(positional(checkpoint).entries, optimizer.state_dict()["state"])
    assert (checkpoint.state.origin["place"], checkpoint.state.global_step) == (where, 5)
    assert sorted(checkpoint.weights) == sorted(NAMES)


def test_the_optimizers_of_one_file_are_one_state(tmp_path: Path, model: torch.nn.Module) -> None:
    optimizers = [trained(module) for module in model.children()]
    torch.save(
        {f"optimizer_{key}": o.state_dict() for key, o in zip("GD", optimizers, strict=True)}, tmp_path / "gan.pt"
    )
    state = positional(registry.read(tmp_path / "gan.pt", converter.NAME))
    assert [optimizer.id for optimizer in state.optimizers] == ["optimizer_G", "optimizer_D"]
    assert state.ids == ("0:0", "0:1", "1:0", "1:1")


def test_an_archive_of_stable_baselines(tmp_path: Path, model: torch.nn.Module) -> None:
    """Its layout by hand: data and versions as text, torch.save files as members."""
    optimizer = trained(model)
    with zipfile.ZipFile(tmp_path / "ppo.zip", "w") as archive:
        archive.writestr("data", "{}")
        for name, value in (("policy.pth", model.state_dict()), ("policy.optimizer.pth", optimizer.state_dict())):
            buffer = io.BytesIO()
            torch.save(value, buffer)
            archive.writestr(name, buffer.getvalue())
    path = tmp_path / "ppo.zip"
    assert registry.detect(path)[1] == registry.Match("a zip archive with members called *optimizer.pth", path)
    checkpoint = registry.read(path, converter.NAME)
    assert_holds(positional(checkpoint).entries, optimizer.state_dict()["state"])
    assert checkpoint.weights["0.weight"].torch().equal(model.state_dict()["0.weight"])


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", ["SAC", "PPO"])
def test_stable_baselines_itself(tmp_path: Path, kind: str) -> None:
    """Each of its optimizers has a part of the policy, whose names are in the same archive."""
    sb3 = pytest.importorskip("stable_baselines3")
    options = {"learning_starts": 2, "buffer_size": 100} if kind == "SAC" else {"n_steps": 8, "batch_size": 4}
    agent = getattr(sb3, kind)("MlpPolicy", "Pendulum-v1", device="cpu", **options)
    agent.learn(16)
    agent.save(tmp_path / "agent")
    live = {"": agent.policy.optimizer} if kind == "PPO" else {"a": agent.actor.optimizer, "c": agent.critic.optimizer}
    expected = {}
    for optimizer in live.values():
        for name, p in agent.policy.named_parameters():
            if p in optimizer.state:
                expected[name] = optimizer.state[p]
    if kind == "SAC":
        expected = {f"policy.{name}": slots for name, slots in expected.items()}
        expected["pytorch_variables.log_ent_coef"] = agent.ent_coef_optimizer.state[agent.log_ent_coef]
    with lsf.read(tmp_path / "agent.zip") as state:
        assert {name for name, p in state.items() if p.state} == set(expected)
        for name, slots in expected.items():
            assert state[name]["exp_avg"].torch().equal(slots["exp_avg"]), name


def test_one_rank_of_deepspeed_is_not_taken_for_a_whole(tmp_path: Path, model: torch.nn.Module) -> None:
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {"base": trained(model).state_dict()}, "ds_version": "0.19"}, path)
    with pytest.raises(FileError) as caught:
        registry.read(path, converter.NAME)
    assert str(caught.value) == (f"{path}: one rank's part of a DeepSpeed checkpoint: convert the folder that holds it")


class Custom:
    pass


def test_an_object_of_ones_own_class_next_to_the_state_is_read_past(tmp_path: Path, model: torch.nn.Module) -> None:
    optimizer = trained(model)
    torch.save(
        {"optimizer": optimizer.state_dict(), "net": model.state_dict(), "callback": Custom()}, tmp_path / "x.pt"
    )
    with lsf.read(tmp_path / "x.pt") as state:
        assert list(state) == NAMES
        assert_holds({0: state[NAMES[0]].state}, {0: optimizer.state_dict()["state"][0]})


class Shell:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch ran",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, model: torch.nn.Module) -> None:
    torch.save({"optimizer": trained(model).state_dict(), "callback": Shell()}, tmp_path / "x.pt")
    with pytest.raises(RefusedError) as caught:
        lsf.convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert "pickle global 'posix.system' refused, at byte " in str(caught.value)
    assert str(caught.value).endswith(" of x/data.pkl; nothing was run")
    assert not (tmp_path / "x.safetensors").exists()


# --- converting ---------------------------------------------------------------------------------------------------


def converted(path: Path, target: Path, names: list[str] | None = None) -> OptimizerState:
    lsf.convert(path, target, names=names, force=True)
    return lsf.open_state(target)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_strided_and_shared_tensors_arrive_whole(tmp_path: Path, zipped: bool) -> None:
    base = torch.randn(8, 6)
    half = base.to(torch.bfloat16)
    state = {
        0: {"exp_avg": base.T, "row": base[1:2].expand(6, 6)},
        1: {"exp_avg": base[3], "qmap": base[0]},
        2: {"exp_avg": base[4], "qmap": base[0]},
        3: {"exp_avg": half.T, "mask": (base > 0)[::2, :3], "codes": torch.arange(9, dtype=torch.uint8)},
    }
    tree = {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1, 2, 3]}]}
    torch.save(tree, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with converted(tmp_path / "x.pt", tmp_path / "x.safetensors", ["a", "b", "c", "d"]) as found:
        for name, slots in zip("abcd", state.values(), strict=True):
            for slot, tensor in slots.items():
                assert found[name][slot].torch().equal(tensor), (name, slot)
    assert lsf.verify(tmp_path / "x.safetensors").ok


@pytest.mark.parametrize("strided", [False, True])
def test_a_flipped_bit_of_a_storage_stops_the_conversion(tmp_path: Path, strided: bool) -> None:
    moment = torch.full((64, 64), 1.5)
    tree = {"state": {0: {"exp_avg": moment.T[:32] if strided else moment}}, "param_groups": [{"params": [0]}]}
    torch.save(tree, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[data.index(bytes(moment.numpy().tobytes())) + 16000] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(FileError) as caught:
        lsf.convert(tmp_path / "x.pt", tmp_path / "x.safetensors", names=["a"])
    assert str(caught.value) == (
        f"{tmp_path / 'x.pt'}: x/data/0 does not have the CRC-32 that the container states: the file is damaged"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt"]


# --- writing ------------------------------------------------------------------------------------------------------


def test_written_back_it_is_what_torch_saved(founding: Founding, tmp_path: Path) -> None:
    """Ids, the empty group, options in their order and of their types, every byte."""
    with converted(founding.path, tmp_path / "x.safetensors") as state:
        converter.write(state, tmp_path / "optimizer.pt", base=None, force=False, options={})
        with pytest.raises(TargetExistsError):
            converter.write(state, tmp_path / "optimizer.pt", base=None, force=False, options={})
    original = torch.load(founding.path / "optimizer.pt", weights_only=True)
    again = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert list(again["state"]) == list(original["state"])
    for identity, slots in original["state"].items():
        assert again["state"][identity].keys() == slots.keys()
        for slot, tensor in slots.items():
            assert again["state"][identity][slot].dtype == tensor.dtype
            assert again["state"][identity][slot].equal(tensor)
    assert [list(group.items()) for group in again["param_groups"]] == [
        list(group.items()) for group in original["param_groups"]
    ]
    assert again["param_groups"][0]["lr"] == original["param_groups"][0]["lr"]


def test_old_ids_and_odd_values_are_written_back(tmp_path: Path) -> None:
    tree = {
        "state": {140302859447320: {"step": 90, "square_avg": torch.ones(2), "none": None, "at": (1, [math.inf])}},
        "param_groups": [
            {"lr": np.float64(0.1), "betas": [0.9, 0.99], "params": [5, 140302859447320]},
            {"lr": torch.tensor(1e-3), "name": "ü", "params": []},
        ],
    }
    torch.save(tree, tmp_path / "optimizer.pt", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "model.pt")
    with converted(tmp_path / "optimizer.pt", tmp_path / "x.safetensors", ["a", "b"]) as state:
        assert state.origin["converted"] == ["param_groups.0.lr: NumPy f8 to float"]
        converter.write(state, tmp_path / "again.pt", base=None, force=False, options={})
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    tree["param_groups"][0]["lr"] = 0.1  # type: ignore[index]
    assert again["param_groups"] == tree["param_groups"]
    assert type(again["param_groups"][0]["lr"]) is float
    (slots,) = again["state"].values()
    assert list(again["state"]) == [140302859447320]
    assert slots.pop("square_avg").equal(torch.ones(2))
    assert slots == {"step": 90, "none": None, "at": (1, [math.inf])}


def test_what_one_optimizer_file_cannot_hold_is_refused(tmp_path: Path, model: torch.nn.Module) -> None:
    optimizers = [trained(module).state_dict() for module in model.children()]
    torch.save({"optimizer_states": optimizers}, tmp_path / "x.pt")
    with converted(tmp_path / "x.pt", tmp_path / "x.safetensors", NAMES) as state:
        with pytest.raises(UnrepresentableError) as caught:
            converter.write(state, tmp_path / "y.pt", base=None, force=False, options={})
        assert str(caught.value) == "the state of 2 optimizers; optimizer.pt holds that of one"
        with pytest.raises(OptionError) as refused:
            converter.write(state, tmp_path / "y.pt", base=tmp_path / "x.pt", force=False, options={})
        assert str(refused.value) == (
            f"torch_optimizer writes a whole file and takes nothing from another ({tmp_path / 'x.pt'})"
        )


# --- other people's checkpoints -----------------------------------------------------------------------------------

NAMED = sorted(path.parent for path in WILD.glob("*/names.json"))


def optimizer_file(folder: Path) -> Path:
    """The file in a folder of the collection that holds the optimizer."""
    return next(path for pattern in ("*optimizer.pt", "*.ckpt", "ep1.pt") for path in folder.glob(pattern))


@pytest.mark.parametrize("folder", NAMED, ids=lambda folder: str(folder.name))
def test_other_peoples_checkpoints_convert_exactly(folder: Path, tmp_path: Path) -> None:
    listed = json.loads((folder / "names.json").read_text())
    names = tmp_path / "names.txt"
    names.write_text("\n".join(listed["names"]))
    source = optimizer_file(folder)
    lsf.convert(source, tmp_path / "x.safetensors", names=names)
    theirs = torch.load(source, weights_only=True, map_location="cpu")
    theirs = theirs["optimizer_states"][0] if "optimizer_states" in theirs else theirs
    with lsf.open_state(tmp_path / "x.safetensors") as state:
        parameters = {i: state[name] for i, name in zip(listed["ids"], listed["names"], strict=True)}
        stepped = {i: parameter.state for i, parameter in parameters.items() if parameter.state is not None}
        assert_holds(
            {i: {slot: stepped[i][slot] for slot in slots} for i, slots in theirs["state"].items()}, theirs["state"]
        )
        assert all(stepped[i].keys() == theirs["state"][i].keys() for i in stepped)


TOLD = [WILD / name for name in ("broken-zip", "composer-momentum-none")]
"""One that cannot be read, and one whose names are in the file."""


@pytest.mark.parametrize("folder", [path for path in NAMED if path.name != "t5-adafactor"], ids=lambda p: str(p.name))
def test_other_peoples_checkpoints_name_themselves(folder: Path) -> None:
    """By the adapter, the model or the state dict next to the state, with nothing else given."""
    with lsf.read(optimizer_file(folder)) as state:
        called = [parameter.foreign_names.get("peft", parameter.name) for parameter in state.values()]
        assert called == json.loads((folder / "names.json").read_text())["names"]


@pytest.mark.parametrize(
    "folder",
    sorted(path for path in WILD.glob("*") if path.is_dir() and path not in (*NAMED, *TOLD)),
    ids=lambda folder: str(folder.name),
)
def test_other_peoples_checkpoints_without_names_ask_for_them(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError):
        lsf.convert(optimizer_file(folder), tmp_path / "x.safetensors")
    state = positional(registry.read(optimizer_file(folder), converter.NAME))
    assert state.ids
    assert state.entries
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_the_files_is_enough(founding: Founding, tmp_path: Path) -> None:
    """Nothing of a path is kept: the same files elsewhere give the same bytes."""
    shutil.copytree(founding.path, tmp_path / "copy")
    first = lsf.convert(founding.path, tmp_path / "a.safetensors")
    second = lsf.convert(tmp_path / "copy", tmp_path / "b.safetensors")
    assert first.digest == second.digest
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
