"""Layouts read off a framework's source and laid out by hand: kohya's, nanotron's; and diffusers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_state_format import registry
from lora_state_format.cli import run
from lora_state_format.errors import FileError, MissingNamesError, RefusedError
from lora_state_format.operations.conversion import convert, read

pytestmark = pytest.mark.filterwarnings("ignore")


def adam(*shapes: tuple[int, ...], seed: int = 0) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize(
    ("name", "marker"), [("kohya", "train_state.json"), ("diffusers", "pytorch_lora_weights.safetensors")]
)
def test_accelerates_files_with_another_scripts_mark(tmp_path: Path, name: str, marker: str, assert_holds: Any) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    parameters, optimizer = adam((2, 4), (4, 2))
    keys = {
        "kohya": ["lora_unet_mid_block_attn1_to_q.lora_down.weight", "lora_unet_mid_block_attn1_to_q.lora_up.weight"],
        "diffusers": ["transformer.blocks.0.to_q.lora_A.weight", "transformer.blocks.0.to_q.lora_B.weight"],
    }[name]
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    tensors = dict(zip(keys, (p.detach() for p in parameters), strict=True))
    if name == "kohya":
        save_file(
            {**tensors, keys[0].replace("lora_down.weight", "alpha"): torch.ones(())}, folder / "model.safetensors"
        )
        (folder / marker).write_text(json.dumps({"current_epoch": 1, "current_step": 3}))
        assert set(registry.read(folder, "kohya").weights) == set(keys)
    else:
        save_file(tensors, folder / marker)
    assert name == registry.detect(folder)[0].NAME
    names = keys if name == "kohya" else [key.replace(".weight", ".default.weight") for key in keys]
    with read(folder, names=keys) as state:  # keys of PEFT's form stand for the parameters of its adapter
        assert_holds(state, dict(zip(names, (optimizer.state[p] for p in parameters), strict=True)))
        assert state.global_step == 3
        assert state.origin.get("support") == ("from source only" if name == "kohya" else None)


# --- nanotron -----------------------------------------------------------------------------------------------------


def nanotron_folder(path: Path, data_ranks: int) -> tuple[Path, dict[str, Any]]:
    """``optimizer.state_dict()`` with names beside it; with several ranks flat parts, as ZeRO-1 has them."""
    folder = path / "optimizer"
    folder.mkdir()
    shapes = {"model.a.weight": (3, 5), "model.b.weight": (7,)}
    parameters, optimizer = adam(*shapes.values())
    held = dict(zip(shapes, (optimizer.state[p] for p in parameters), strict=True))
    config: dict[str, Any] = {
        "type": "NamedOptimizer",
        "parallelism": {"tp_size": "1", "dp_size": str(data_ranks), "pp_size": "1", "expert_parallel_size": "1"},
        "configs": {},
    }
    if data_ranks == 1:
        tree = {**optimizer.state_dict(), "names": dict(enumerate(shapes))}
        torch.save(tree, folder / "optimizer_pp-0-of-1_tp-0-of-1_exp-0-of-1.pt")
    else:
        offsets: dict[str, dict[str, list[str]]] = {name: {} for name in shapes}
        for rank in range(data_ranks):
            state = {}
            for identity, (name, slots) in enumerate(held.items()):
                flat = slots["exp_avg"].numel()
                share = -(-flat // data_ranks)
                start, stop = rank * share, min((rank + 1) * share, flat)
                offsets[name][str(rank)] = [str(start), str(stop)]
                state[identity] = {
                    key: value.flatten()[start:stop].clone() if value.dim() else value for key, value in slots.items()
                }
            groups = [{**group, "params": [0, 1]} for group in optimizer.state_dict()["param_groups"]]
            tree = {"state": state, "param_groups": groups, "names": dict(enumerate(shapes))}
            torch.save(tree, folder / f"optimizer_pp-0-of-1_dp-{rank}-of-{data_ranks}_tp-0-of-1_exp-0-of-1.pt")
        config["configs"] = {
            "param_name_to_dp_rank_offsets": offsets,
            "orig_param_shapes": {name: [str(n) for n in shape] for name, shape in shapes.items()},
        }
    (folder / "optimizer_config.json").write_text(json.dumps(config))
    return folder, held


@pytest.mark.parametrize("data_ranks", [1, 2, 3])
def test_nanotron(tmp_path: Path, data_ranks: int, assert_holds: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, held = nanotron_folder(tmp_path, data_ranks)
    assert registry.detect(tmp_path)[0].NAME == "nanotron"
    said = "support of this format is from source only: it was never tried on a file of a real run"
    assert run(["inspect", str(tmp_path)]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    report = convert(tmp_path, tmp_path / "optimizer.safetensors")
    assert report.notes == (said,)
    assert report.naming.source == "checkpoint"
    with read(tmp_path / "optimizer.safetensors") as state:
        assert_holds(state, held)
        assert state.origin["support"] == "from source only"


def test_nanotron_refuses_what_it_cannot_put_together(tmp_path: Path) -> None:
    folder, _ = nanotron_folder(tmp_path, 3)
    (folder / "optimizer_pp-0-of-1_dp-1-of-3_tp-0-of-1_exp-0-of-1.pt").unlink()
    with pytest.raises(FileError) as missing:
        registry.read(folder, "nanotron")
    assert str(missing.value) == f"{folder}: no file of pipeline rank 0, data rank 1"
    config = json.loads((folder / "optimizer_config.json").read_text())
    config["parallelism"]["tp_size"] = "2"
    (folder / "optimizer_config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError) as parallel:
        registry.read(folder, "nanotron")
    assert str(parallel.value) == f"{folder}: parameters are sharded (tp_size 2), and nothing says how"


def test_positional_files_without_names_say_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "train_state.json").write_text('{"current_step": 3}')
    torch.save(adam((2, 2))[1].state_dict(), tmp_path / "optimizer.bin")
    with pytest.raises(MissingNamesError):
        convert(tmp_path, tmp_path / "optimizer.safetensors")
