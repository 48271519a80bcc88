"""Files that LeRobot, Composer, torchtune and OLMo wrote (``tests/golden``), against what their optimizers held."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_state_format import registry
from lora_state_format.cli import run
from lora_state_format.converters import lerobot
from lora_state_format.errors import BindError, RefusedError, TargetExistsError, UnrepresentableError
from lora_state_format.foreign.state_dict import to_state_dict
from lora_state_format.model.states import OptimizerState, PositionalState
from lora_state_format.operations.conversion import convert, read
from lora_state_format.torch import load_optimizer

GOLDEN = Path(__file__).parents[1] / "golden"


def expected(name: str) -> Any:
    return torch.load(GOLDEN / name / "files" / "expected.pt", weights_only=True)


def as_torch(tree: Any) -> Any:
    """A state dict of the model's tensors as one of torch's."""
    if isinstance(tree, dict):
        return {key: as_torch(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(as_torch, tree))
    if hasattr(tree, "item"):
        return torch.tensor(tree.item())
    return tree.torch() if hasattr(tree, "pieces") else tree


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("lerobot/files/000003", "lerobot"),
        ("lerobot/files/several", "lerobot"),
        ("composer/files/ep1-ba3-rank0.pt", "composer"),
        ("torchtune/files/epoch_0", "torchtune"),
        ("torchtune/files/in_backward", "torchtune"),
        ("olmo/files", "olmo"),
    ],
)
def test_inspect_says_what_it_is(path: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(GOLDEN / path)]) == 0
    assert capsys.readouterr().out.startswith(f"{GOLDEN / path} ({name})\n")


def test_from_one_framework_to_others_on_the_command_line(tmp_path: Path, assert_holds: Any) -> None:
    """torchtune to a DCP folder, to FSDP's full file, to our own: every hop keeps all of the state."""
    hops = [str(tmp_path / name) for name in ("dcp", "accelerate", "optimizer.safetensors")]
    source = str(GOLDEN / "torchtune" / "files" / "epoch_0")
    assert run(["convert", source, hops[0], "--to", "dcp", "--option", "key=optim"]) == 0
    assert run(["convert", hops[0], hops[1], "--to", "accelerate", "--option", "fsdp"]) == 0
    assert run(["convert", hops[1], hops[2]]) == 0
    for path in hops:
        assert run(["inspect", path]) == 0
        with read(path) as state:
            assert_holds(state, expected("torchtune")["one"])
            assert dict(state.groups[0].options)["betas"] == (0.9, 0.999)


# --- LeRobot ------------------------------------------------------------------------------------------------------


def test_lerobot_positional(tmp_path: Path) -> None:
    folder = GOLDEN / "lerobot" / "files" / "000003"
    assert registry.detect(folder)[0].NAME == registry.detect(folder / "training_state")[0].NAME == "lerobot"
    checkpoint = registry.read(folder, "lerobot")
    state = checkpoint.state
    assert isinstance(state, PositionalState)
    assert equal(as_torch(to_state_dict(state)), expected("lerobot")["actor"])
    assert set(checkpoint.weights) == {"0.weight", "0.bias", "2.weight", "2.bias", "idle"}

    names = tmp_path / "names.txt"
    names.write_text("0.weight\n2.weight\nidle\n0.bias\n2.bias\n")
    with read(folder, names=names) as named:
        assert named["2.bias"]["exp_avg"].shape == (3,)
        assert named["idle"].state is None
        lerobot.write(named, tmp_path / "training_state", base=None, force=False, options={})
        with pytest.raises(TargetExistsError):
            lerobot.write(named, tmp_path / "training_state", base=None, force=False, options={})
    again = registry.read(tmp_path, "lerobot").state
    assert isinstance(again, PositionalState)
    assert equal(as_torch(to_state_dict(again)), expected("lerobot")["actor"])
    for name in ("optimizer_state.safetensors", "optimizer_param_groups.json"):
        ours, theirs = tmp_path / "training_state" / name, folder / "training_state" / name
        if name.endswith("json"):
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
        else:
            assert ours.read_bytes() == theirs.read_bytes()


def test_lerobot_several_optimizers() -> None:
    folder = GOLDEN / "lerobot" / "files" / "several"
    assert registry.detect(folder)[0].NAME == "lerobot"
    state = registry.read(folder, "lerobot").state
    assert [optimizer.id for optimizer in state.optimizers] == ["actor", "critic"]
    for index, name in enumerate(("actor", "critic")):
        assert equal(as_torch(to_state_dict(state, index)), expected("lerobot")[name])


def test_lerobot_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    with read(GOLDEN / "composer" / "files" / "ep1-ba3-rank0.pt") as state:
        group = state.groups[0]
        odd = type(group)(0, (("lr", float("inf")),), group.count)
        from dataclasses import replace

        with pytest.raises(UnrepresentableError) as error:
            lerobot.write(
                replace(state, groups=(odd, *state.groups[1:])), tmp_path / "x", base=None, force=False, options={}
            )
    assert str(error.value).startswith("an option has no form in JSON: Out of range float values")
    assert list(tmp_path.iterdir()) == []


# --- Composer -----------------------------------------------------------------------------------------------------


def test_composer(assert_holds: Any) -> None:
    path = GOLDEN / "composer" / "files" / "ep1-ba3-rank0.pt"
    converter, match = registry.detect(path)
    assert (converter.NAME, match.generic) == ("composer", False)
    held = expected("composer")
    with read(path) as state:
        names = [name for group in held["groups"] for name in group]
        assert list(state) == names
        assert_holds(state, {name: held["slots"].get(name, {}) for name in names})
        assert [[p.name for p in members] for members in state.members()] == held["groups"]
        assert state["idle"].shape == (2,)
        assert state.global_step == 3
        assert state.origin == {"format": "composer", "composer": "0.32.1"}
    assert isinstance(registry.read(path, "composer").state, OptimizerState)


def test_an_old_public_composer_file_is_positional() -> None:
    path = GOLDEN.parents[2] / "shared" / "wild" / "composer-momentum-none" / "ep1.pt"
    if not path.exists():
        pytest.skip("no public checkpoints beside the project")
    assert registry.detect(path)[0].NAME == "composer"
    state = registry.read(path, "composer").state
    assert isinstance(state, PositionalState)
    assert state.origin == {"format": "composer"}
    assert all(slots == {"momentum_buffer": None} for slots in state.entries.values())


@pytest.mark.parametrize(
    ("optimizers", "model", "sign"),
    [("optimizers", "model", "rank_zero_seed"), ("_optimizers", "_model", "_is_model_ddp_wrapped")],
)
def test_composers_older_layouts_are_positional(
    tmp_path: Path, assert_holds: Any, optimizers: str, model: str, sign: str
) -> None:
    """As Composer laid them out before its ids were names, and in early 2022: by hand, around a state dict of torch."""
    module = torch.nn.Linear(3, 2)
    adam = torch.optim.AdamW(module.parameters(), lr=1e-3)
    (module(torch.randn(4, 3)) ** 2).mean().backward()
    adam.step()
    state = {optimizers: {"AdamW": adam.state_dict()}, model: module.state_dict(), sign: 0}
    torch.save({"state": state, "rng": []}, tmp_path / "ep1.pt")
    assert registry.detect(tmp_path / "ep1.pt")[0].NAME == "composer"
    checkpoint = registry.read(tmp_path / "ep1.pt", "composer")
    assert isinstance(checkpoint.state, PositionalState)
    assert list(checkpoint.weights) == ["weight", "bias"]
    with read(tmp_path / "ep1.pt", names=["weight", "bias"]) as named:
        assert_holds(named, {name: adam.state[p] for name, p in module.named_parameters()})


# --- torchtune ----------------------------------------------------------------------------------------------------


def test_torchtune_with_one_optimizer(assert_holds: Any) -> None:
    folder = GOLDEN / "torchtune" / "files" / "epoch_0"
    assert registry.detect(folder)[0].NAME == registry.detect(folder / "recipe_state.pt")[0].NAME == "torchtune"
    with read(folder) as state:
        assert_holds(state, expected("torchtune")["one"])
        assert [group.count for group in state.groups] == [8]
        assert "layers.0.attn.q_proj.weight" in state.origin["frozen"]  # type: ignore[operator]
        assert dict(state.groups[0].options)["betas"] == (0.9, 0.999)


def test_torchtune_with_one_optimizer_per_parameter(assert_holds: Any) -> None:
    state = registry.read(GOLDEN / "torchtune" / "files" / "in_backward", "torchtune").state
    assert isinstance(state, OptimizerState)
    assert_holds(state, expected("torchtune")["in_backward"])
    assert [group.count for group in state.groups] == [8]


# --- OLMo ---------------------------------------------------------------------------------------------------------


def test_olmo(tmp_path: Path, assert_holds: Any) -> None:
    folder = GOLDEN / "olmo" / "files"
    assert registry.detect(folder)[0].NAME == "olmo"
    state = registry.read(folder, "olmo").state
    assert isinstance(state, PositionalState)
    assert state.names == ("0.weight", "2.weight", "0.bias", "2.bias")
    report = convert(folder, tmp_path / "optimizer.safetensors")
    assert (report.naming.source, report.global_step, report.paired) == ("checkpoint", 3, 4)
    with read(tmp_path / "optimizer.safetensors") as named:
        assert_holds(named, expected("olmo"))


def test_olmo_safetensors_with_pickles_inside_are_refused(tmp_path: Path) -> None:
    path = GOLDEN / "olmo" / "files" / "safetensors" / "optim.safetensors"
    assert registry.detect(path)[1].reason == "optim.safetensors whose keys are pickles"
    shutil.copy(path, tmp_path)
    with pytest.raises(RefusedError) as error:
        read(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'optim.safetensors'}: its tensors' names and all other values are pickles; save the run's state "
        "as optim.pt (save_format torch) and convert that. Nothing was run"
    )


# --- transformers' AdamW, which left it in 5.0 ----------------------------------------------------------------------


def test_the_adamw_of_old_transformers_goes_on_as_torchs(tmp_path: Path) -> None:
    """Its moments are AdamW's, bit for bit; its steps shrink the weights after the update, and torch's before it.

    So three steps part by 3 * lr * weight_decay * update, which is at most about lr.
    """
    folder = GOLDEN / "transformers_adamw"
    made = runpy.run_path(str(folder / "make.py"))
    golden = torch.load(folder / "files" / "expected.pt", weights_only=True)
    stated = tmp_path / "o.safetensors"
    (tmp_path / "names.txt").write_text("a\nb\n")
    kind = "transformers.optimization.AdamW"
    convert(folder / "files" / "optimizer.pt", stated, names=tmp_path / "names.txt", optimizer=kind)

    model = made["model"]()
    model.load_state_dict(golden["saved"]["weights"])
    optimizer = torch.optim.AdamW(model.values())
    with pytest.raises(BindError, match=f"written by {kind}, and the optimizer is torch.optim.adamw.AdamW"):
        load_optimizer(optimizer, model, stated)
    load_optimizer(optimizer, model, stated, mismatch_class="translate")
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["eps"]) == (1e-2, 0.1, 1e-6)
    for name, slots in golden["saved"]["state"].items():
        own = optimizer.state[model[name]]
        assert own["step"] == slots["step"] == 3
        assert all(own[slot].equal(slots[slot]) for slot in ("exp_avg", "exp_avg_sq"))
    made["advance"](model, optimizer, range(3, 6))
    for name, parameter in model.items():
        torch.testing.assert_close(parameter.detach(), golden["later"]["weights"][name], rtol=0, atol=5e-5)
        assert not torch.allclose(parameter, golden["saved"]["weights"][name], rtol=0, atol=1e-3)
        own, slots = optimizer.state[parameter], golden["later"]["state"][name]
        assert all(own[slot].allclose(slots[slot], rtol=1e-6, atol=1e-8) for slot in ("exp_avg", "exp_avg_sq"))
