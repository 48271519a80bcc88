"""Genuine checkpoints of DeepSpeed on 2 and 3 CPU ranks, against the state that the ranks gathered when saving."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_state_format import registry
from lora_state_format.cli import run
from lora_state_format.errors import FileError, OptionError
from lora_state_format.format.reading import open_state
from lora_state_format.model.states import OptimizerState, Role
from lora_state_format.operations.conversion import convert
from lora_state_format.operations.conversion import read as read_any
from lora_state_format.torch import load_optimizer

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

ORDERED = "param_shapes, as the masters prove: param_slice_mappings are those of another order"
PARAMETERS = {
    "lora_A.weight": (3, 13),
    "lora_B.weight": (11, 3),
    "norm.weight": (3,),
    "norm.bias": (3,),
    "lora_B.bias": (11,),
}


def live_of(path: Path) -> Any:
    """What the run held. With round-robin order that is what the same run without it held: the order changes no value,
    and DeepSpeed's own gathering mixes up parameters there (it looks at the places of another order)."""
    return torch.load(path.with_name(f"{path.name.removesuffix('-robin')}.live.pt"))


def read(path: Path) -> OptimizerState:
    state = registry.read(path, "deepspeed_zero", {"masters": True}).state
    assert isinstance(state, OptimizerState)
    return state


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        *((2, case) for case in ("1-bf16", "2-bf16-robin", "2-fp32-frozen", "3-bf16-next", "3-bf16-sub")),
        (2, "1-bf16-accum-flat"),
        (2, "2-bf16-elastic"),
        *((3, case) for case in ("1-bf16", "2-bf16-robin", "3-bf16-sub")),
    ],
)
def test_it_holds_what_the_ranks_held(
    zero: Callable[[int, str], Path], assert_holds: Any, ranks: int, case: str
) -> None:
    path = zero(ranks, case)
    saved = path / "global_step3"  # a case may have gone on and saved again
    converter, match = registry.detect(saved)
    assert converter.NAME == "deepspeed_zero"
    assert match.reason == f"{ranks} ZeRO optimizer files, one per rank"

    with read(saved) as state:
        assert_holds(state, live_of(path)["saved"])
        assert {name: parameter.shape for name, parameter in state.items()} == PARAMETERS
        assert {parameter["step"].item() for parameter in state.parameters} == {3.0}
        assert all(slot.role is Role.PARAM for parameter in state.parameters for _, slot in parameter.tensors())
        assert [group.count for group in state.groups] == ([5] if "flat" in case else [2, 3])
        assert state.global_step == 3
        if "elastic" in case:  # DeepSpeed leaves the options out
            assert [group.options for group in state.groups] == [(), ()]
        elif "flat" not in case:
            assert state.origin.get("layout") == (ORDERED if (ranks, case) == (2, "2-bf16-robin") else None)
            assert [dict(group.options)["weight_decay"] for group in state.groups] == [0.1, 0.0]
            assert [dict(group.options)["lr"] for group in state.groups] == [1e-3, 2e-3]


def test_masters_come_on_request_only(zero: Callable[[int, str], Path]) -> None:
    path = zero(2, "1-bf16")
    state = registry.read(path, "deepspeed_zero").state
    assert isinstance(state, OptimizerState)
    assert set(state["norm.bias"].state or {}) == {"step", "exp_avg", "exp_avg_sq"}
    state.close()
    with pytest.raises(OptionError) as error:
        read_any(path, options={"weights": True})
    assert str(error.value) == (
        "no option 'weights' for deepspeed_zero; there are: masters (keep the fp32 master weights as a slot "
        "'master_param'); slices (how tensor-parallel slices join if no file says it: 'megatron', or a JSON file with "
        "DeepSpeed's patterns)"
    )
    with read_any(path, options={"masters": True}) as asked:
        assert "master_param" in (asked["norm.bias"].state or {})


@pytest.mark.parametrize(
    ("ranks", "case"), [(2, "1-bf16"), (2, "2-fp32-frozen"), (2, "3-bf16-next"), (3, "3-bf16-sub")]
)
def test_plain_adamw_goes_on_as_the_distributed_run_did(
    zero: Callable[[int, str], Path], tmp_path: Path, ranks: int, case: str
) -> None:
    """On the fp32 masters, fed the same averaged gradients, three steps end in the same masters and moments."""
    path = zero(ranks, case)
    with read(path / "global_step3") as state:
        masters = {name: parameter["master_param"].torch() for name, parameter in state.items()}
        groups = [
            {"params": [masters[p.name] for p in members], **dict(group.options)}
            for group, members in zip(state.groups, state.members(), strict=True)
        ]
        optimizer = torch.optim.AdamW(groups)
        for name, parameter in state.items():
            optimizer.state[masters[name]] = {
                "step": torch.tensor(parameter["step"].item()),
                "exp_avg": parameter["exp_avg"].torch(),
                "exp_avg_sq": parameter["exp_avg_sq"].torch(),
            }
    for gradients, expected in live_of(path)["steps"]:
        for name, master in masters.items():
            master.grad = gradients[name]
        optimizer.step()
        for name, master in masters.items():
            assert torch.equal(master, expected[name]["master_param"]), name
            assert torch.equal(optimizer.state[master]["exp_avg"], expected[name]["exp_avg"]), name
            assert torch.equal(optimizer.state[master]["exp_avg_sq"], expected[name]["exp_avg_sq"]), name


def test_it_converts_to_one_file_with_the_weights_digests(
    zero: Callable[[int, str], Path], tmp_path: Path, assert_holds: Any
) -> None:
    path = zero(2, "2-bf16-robin")
    report = convert(path, tmp_path / "optimizer.safetensors")
    assert (report.source_format, report.parameters, report.groups) == ("deepspeed_zero", 5, (2, 3))
    assert report.paired == 5
    with open_state(report.target) as state:
        saved = live_of(path)["saved"]
        assert_holds(state, {n: {slot: saved[n][slot] for slot in ("exp_avg", "exp_avg_sq")} for n in saved})


def test_steps_that_a_group_counts_become_the_parameters(zero: Callable[[int, str], Path], tmp_path: Path) -> None:
    """Apex's fused Adam, and DeepSpeed's until 0.10, kept ``step`` in the group, as an integer."""
    folder = copied(zero(2, "1-bf16"), tmp_path)
    for rank in range(2):
        tree = torch.load(folder / optim_file(rank), weights_only=False)
        base = tree["optimizer_state_dict"]["base_optimizer_state"]
        for number, group in enumerate(base["param_groups"]):
            group["step"] = int(base["state"][number].pop("step"))
        torch.save(tree, folder / optim_file(rank))
    with read(folder) as state:
        assert {parameter["step"] for parameter in state.parameters} == {3}
        assert not any("step" in dict(group.options) for group in state.groups)


# --- what is refused ----------------------------------------------------------------------------------------------


def copied(path: Path, to: Path) -> Path:
    return Path(shutil.copytree(path / "global_step3", to / "global_step3"))


def optim_file(rank: int) -> str:
    return f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def test_a_missing_rank_is_named(zero: Callable[[int, str], Path], tmp_path: Path) -> None:
    folder = copied(zero(3, "1-bf16"), tmp_path)
    (folder / optim_file(1)).unlink()
    with pytest.raises(FileError) as error:
        registry.read(folder, "deepspeed_zero")
    assert str(error.value) == f"{folder / optim_file(1)}: missing: there are files of ranks [0, 2]"


def test_a_last_rank_that_is_missing_is_a_wrong_number_of_ranks(
    zero: Callable[[int, str], Path], tmp_path: Path
) -> None:
    for case in ("1-bf16", "3-bf16-sub"):
        folder = copied(zero(3, case), tmp_path / case)
        (folder / optim_file(2)).unlink()
        with pytest.raises(FileError) as error:
            registry.read(folder, "deepspeed_zero")
        assert str(error.value) == (f"{folder / optim_file(0)}: says the state was cut over 3 ranks; there are 2 files")


def test_files_of_two_steps_are_refused(zero: Callable[[int, str], Path], tmp_path: Path) -> None:
    path = zero(2, "3-bf16-next")
    folder = copied(path, tmp_path)
    shutil.copy(path / "global_step6" / optim_file(1), folder)
    with pytest.raises(FileError) as error:
        registry.read(folder, "deepspeed_zero")
    assert str(error.value) == (
        f"{folder / optim_file(1)}: 'step' is 6.0, where {optim_file(0)} has 3.0: files of different steps"
    )


def test_a_truncated_file_is_refused(zero: Callable[[int, str], Path], tmp_path: Path) -> None:
    folder = copied(zero(2, "1-bf16"), tmp_path)
    damaged = folder / optim_file(1)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(FileError) as error:
        registry.read(folder, "deepspeed_zero")
    assert str(error.value) == f"{damaged}: the zip archive has no directory at its end: the file is cut short"


def test_a_changed_byte_of_a_share_is_found_while_it_streams(zero: Callable[[int, str], Path], tmp_path: Path) -> None:
    folder = copied(zero(2, "1-bf16"), tmp_path)
    damaged = folder / optim_file(1)
    with read(folder) as state:
        run = state["lora_B.weight"]["exp_avg"].runs[-1]
        offset = run.source.start + run.offset
    data = bytearray(damaged.read_bytes())
    data[offset] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(FileError, match="does not have the CRC-32 that the container states"):
        convert(folder, tmp_path / "optimizer.safetensors")
    assert not (tmp_path / "optimizer.safetensors").exists()


def test_model_file_of_another_world_is_refused(zero: Callable[[int, str], Path], tmp_path: Path) -> None:
    folder = copied(zero(2, "1-bf16"), tmp_path)
    shutil.copy(zero(3, "1-bf16") / "global_step3" / "mp_rank_00_model_states.pt", folder)
    with pytest.raises(FileError) as error:
        registry.read(folder, "deepspeed_zero")
    assert str(error.value) == (
        f"{folder / 'mp_rank_00_model_states.pt'}: says there were 3 ranks; there are optimizer files of 2"
    )
    (folder / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(FileError) as error:
        registry.read(folder, "deepspeed_zero")
    assert str(error.value) == (
        f"{folder / 'mp_rank_00_model_states.pt'}: missing: it has the parameters' names and shapes"
    )


def test_a_model_parallel_rank_that_the_model_files_do_not_know(
    zero: Callable[[int, str], Path], tmp_path: Path
) -> None:
    folder = copied(zero(2, "1-bf16"), tmp_path)
    for kind in ("bf16_zero_pp_rank_0_mp_rank_{}_optim_states.pt", "mp_rank_{}_model_states.pt"):
        shutil.copy(folder / kind.format("00"), folder / kind.format("01"))
    with pytest.raises(FileError) as error:
        registry.read(folder, "deepspeed_zero")
    assert str(error.value) == (
        f"{folder / 'bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt'}: says the state was cut over 2 ranks; there "
        "are 1 files"
    )


# --- a walk-through -----------------------------------------------------------------------------------------------


def command(*arguments: object) -> tuple[int, str]:
    """Run a command; returns its exit code and all that it printed."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        code = run([str(argument) for argument in arguments])
    return code, out.getvalue()


CONVERTED = """converted global_step3 (deepspeed_zero) to optimizer.safetensors (named)
5 parameters in groups of [2, 3], step 3
slots: step x 5, exp_avg x 5, exp_avg_sq x 5; 10 tensors, 712 bytes
names: from the checkpoint itself
weights: digests of 5 of 5 parameters kept with their state
digest: {}
"""
EXPORTED = "exported master_param of 5 parameters from global_step3 to weights.safetensors, 356 bytes\n"


@pytest.mark.parametrize("case", ["2-fp32-frozen", "2-bf16"])
def test_from_the_folder_to_a_resumed_run_on_one_machine(
    case: str, zero: Callable[[int, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of docs/guides.md, by a user who has the folder and the base model: its next steps."""
    path = zero(2, case)
    shutil.copytree(path / "global_step3", tmp_path / "global_step3")
    monkeypatch.chdir(tmp_path)
    code, printed = command("convert", "global_step3", "optimizer.safetensors")
    digest = re.findall(r"^digest: ([0-9a-f]{32})$", printed, re.MULTILINE)
    assert (code, printed) == (0, CONVERTED.format(*digest))
    masters = ("--slot", "master_param", "--option", "masters")
    assert command("export", "global_step3", "weights.safetensors", *masters) == (0, EXPORTED)

    torch.manual_seed(0)
    layers = {
        "base": torch.nn.Linear(7, 13),
        "lora_A": torch.nn.Linear(13, 3, bias=False),
        "norm": torch.nn.LayerNorm(3),
        "lora_B": torch.nn.Linear(3, 11),
    }
    model = torch.nn.ModuleDict(layers)
    model["base"].requires_grad_(False)
    found = model.load_state_dict(load_file("weights.safetensors"), strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["base.weight", "base.bias"], [])
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in trained if p.dim() == 2]
    plain = [p for p in trained if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": plain}])
    matching = "; weights match 5/5" if "fp32" in case else ""
    report = load_optimizer(optimizer, model, "optimizer.safetensors")
    assert str(report).splitlines()[0] == f"restored 5/5 parameters, 2 slots each, step 3{matching}"

    parameters = dict(model.named_parameters())
    for gradients, expected in live_of(path)["steps"]:
        for name, gradient in gradients.items():
            parameters[name].grad = gradient.float()
        optimizer.step()
        for name, slots in expected.items():
            assert torch.equal(parameters[name], slots["master_param"]), name
            for slot in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[parameters[name]][slot], slots[slot]), name
