"""What accelerate's ``save_state`` wrote: one model, several, an adapter; FSDP's full and local state dicts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from lora_state_format import registry
from lora_state_format.converters import accelerate
from lora_state_format.errors import FileError, OptionError, RefusedError, TargetExistsError
from lora_state_format.model.states import OptimizerState
from lora_state_format.operations.conversion import convert, read

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(seed: int, groups: bool = True) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    parameters: Any = list(model.parameters())
    if groups:
        parameters = [
            {"params": [p for p in parameters if p.dim() == 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() == 1]},
            {"params": []},
        ]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(3):
        (model(torch.randn(4, 7)) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, list[torch.nn.Module], list[torch.optim.Optimizer]]:
    """A folder of two models and two optimizers."""
    runs = [trained(0), trained(1, groups=False)]
    accelerator = Accelerator(cpu=True)
    for model, optimizer in runs:
        accelerator.prepare(model, optimizer)
    accelerator.save_state(str(tmp_path / "saved"))
    return tmp_path / "saved", [model for model, _ in runs], [optimizer for _, optimizer in runs]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def test_several_optimizers_come_back_the_same(saved: Any, tmp_path: Path) -> None:
    folder, models, optimizers = saved
    converter, match = registry.detect(folder)
    assert (converter.NAME, match.reason) == ("accelerate", "2 optimizer.bin of accelerate or FSDP")
    names = [
        f"{model}.{n}" for model, order in ((0, (0, 2, 1, 3)), (1, (0, 1, 2, 3))) for n in listed(models[0], order)
    ]
    with read(folder, names=names) as state:
        assert [group.count for group in state.groups] == [2, 2, 0, 4]
        assert torch.equal(state["0.2.bias"]["exp_avg"].torch(), optimizers[0].state[models[0][2].bias]["exp_avg"])
        assert torch.equal(state["1.0.bias"]["exp_avg"].torch(), optimizers[1].state[models[1][0].bias]["exp_avg"])
        accelerate.write(state, tmp_path / "again", base=None, force=False, options={})
        with pytest.raises(TargetExistsError):
            accelerate.write(state, tmp_path / "again", base=None, force=False, options={})
    for name in ("optimizer.bin", "optimizer_1.bin"):
        ours, theirs = (torch.load(place / name, weights_only=True) for place in (tmp_path / "again", folder))
        assert same(ours, theirs)


def listed(model: torch.nn.Module, order: tuple[int, ...]) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    return [names[index] for index in order]


def test_names_come_from_the_adapter_in_the_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    tokens = torch.randint(0, 32, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    accelerator.save_state(str(tmp_path / "saved"))
    report = convert(tmp_path / "saved", tmp_path / "optimizer.safetensors")
    assert (report.parameters, report.naming.source, report.paired) == (12, "adapter", 12)
    with read(tmp_path / "optimizer.safetensors") as state:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(state[name]["exp_avg_sq"].torch(), optimizer.state[parameter]["exp_avg_sq"]), name


def test_fsdp_full_state_dict_has_names(fsdp: Callable[[str], Path], assert_holds: Any, tmp_path: Path) -> None:
    folder = fsdp("full")
    live = torch.load(folder.with_name("full.live.pt"))
    with read(folder) as state:
        assert_holds(state, {name: live["state"].get(name, {}) for name in live["param_groups"][0]["params"]})
        accelerate.write(state, tmp_path / "again", base=None, force=False, options={"fsdp": True})
    assert same(torch.load(tmp_path / "again" / "optimizer.bin"), torch.load(folder / "optimizer.bin"))


def test_files_of_single_ranks_say_where_their_parts_belong(
    fsdp: Callable[[str], Path], assert_holds: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(fsdp("local"), tmp_path / "local"))
    converter, match = registry.detect(folder)
    assert (converter.NAME, match.reason) == ("accelerate", "FSDP state of single ranks")
    live = torch.load(fsdp("local").with_name("local.live.pt"))
    names = [name for group in live["param_groups"] for name in group["params"]]
    report = convert(folder, tmp_path / "optimizer.safetensors")
    assert (report.groups, report.paired) == ((2, 4), 6)
    with read(tmp_path / "optimizer.safetensors") as state:
        assert_holds(state, {name: live["state"].get(name, {}) for name in names})
    (folder / "optimizer_0_rank1.bin").unlink()
    with pytest.raises(FileError) as error:
        read(folder)
    assert str(error.value) == (
        f"{folder}: exp_avg of parameter lora_A.default.weight: the ranks' files do not make up [3, 13] (pieces with "
        "26 elements for a tensor of shape [3, 13]): one is a copy of another, or of another save"
    )


def test_files_of_single_ranks_that_do_not_say_it_are_refused(tmp_path: Path) -> None:
    folder = tmp_path
    for rank in range(2):
        tree = {"state": {"a": {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": ["a"]}]}
        torch.save(tree, folder / f"optimizer_0_rank{rank}.bin")
    with pytest.raises(RefusedError) as error:
        read(folder)
    assert str(error.value) == (
        f"{folder / 'optimizer_0_rank0.bin'}: one of 2 files with the shards of single ranks, which do not say how "
        "they fit together: load them where they were written, and save with FSDP's full or sharded state dict"
    )


def test_a_base_is_refused(tmp_path: Path, saved: Any) -> None:
    state = OptimizerState((), (), (), read(saved[0], names=[str(i) for i in range(8)]).naming)
    with pytest.raises(OptionError) as error:
        accelerate.write(state, tmp_path / "x", base=tmp_path, force=False, options={})
    assert str(error.value) == f"accelerate writes whole files and takes nothing from another ({tmp_path})"


def test_positions_in_the_whole_model_are_lightnings_fsdp_rule(fsdp: Callable[[str], Path], assert_holds: Any) -> None:
    """Ids count frozen parameters too; torch's own rekeying made this file's, as Lightning has it do."""
    path = fsdp("full.ckpt")
    raw = torch.load(path)["optimizer_states"][0]
    assert sorted(raw["param_groups"][0]["params"]) == [0, 3, 4, 5, 6, 7]
    assert registry.detect(path)[0].NAME == "lightning"
    live = torch.load(path.with_name("full.live.pt"))["state"]
    with read(path) as named:
        assert_holds(named, {name: live.get(name, {}) for name in (*live, "idle")})
