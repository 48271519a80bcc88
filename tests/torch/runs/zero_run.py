"""One rank of runs under DeepSpeed's ZeRO, on the CPU with gloo, whose state is kept by name.

Usage: zero_run.py OUT RANK WORLD PORT CASE[,CASE..]
A case is STAGE, STAGE-offload or STAGE-bf16; "plain" is a run without DeepSpeed. Those in bfloat16 have a file of their
own, with float32 masters. Each loads OUT/state.safetensors (the first one
makes it) into a fresh run, saves it as OUT/CASE.WORLD.safetensors, goes on for three steps, and writes what it has to
say as JSON to OUT/CASE.WORLD.RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

out, rank, world, port, cases = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
os.environ.update(
    DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank),
    WORLD_SIZE=str(world), OMP_NUM_THREADS="1",
)  # fmt: skip
warnings.filterwarnings("ignore")

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402

from lora_state_format import open_state, verify  # noqa: E402
from lora_state_format.torch import carried, load_optimizer, save_optimizer  # noqa: E402
from lora_state_format.torch.zero import view_of  # noqa: E402

Run = tuple[Any, torch.nn.Module, Any]


class Net(torch.nn.Module):
    """Odd sizes, so that partitions cut rows and need padding; a frozen layer; two groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = torch.nn.Linear(7, 13)
        self.lora_A = torch.nn.Linear(13, 3, bias=False)
        self.norm = torch.nn.LayerNorm(3)
        self.lora_B = torch.nn.Linear(3, 11)
        self.base.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.lora_B(self.norm(self.lora_A(torch.tanh(self.base(x)))))
        return result


def build(case: str, weights: dict[str, torch.Tensor] | None) -> Run:
    """The engine (or the model), the model, and what has the optimizer's state."""
    model = Net()
    if weights:
        model.load_state_dict(weights)
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() == 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
    if case == "plain":
        return model, model, optimizer
    stage, _, option = case.partition("-")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": int(stage)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": 1000,
    }
    if option == "bf16":
        config["bf16"] = {"enabled": True}
    if option == "offload":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, model, engine


def train(run: Run, first: int, last: int) -> None:
    """The same batch on every rank, so that the mean of the gradients is the gradient."""
    engine, _, optimizer = run
    for step in range(first, last):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        loss = engine(x.to(next(engine.parameters()).dtype)).square().mean()
        if engine is optimizer:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def masters_of(run: Run) -> list[torch.Tensor]:
    return [safe_get_full_fp32_param(p).clone() for p in run[1].parameters() if p.requires_grad]


def begin(path: Path, case: str) -> None:
    """What all cases resume from, and where the run that was not interrupted arrives."""
    run = build(case, None)
    train(run, 0, 3)
    save_optimizer(run[2], run[1], path, global_step=3)
    kept = weights_of(run[1])
    train(run, 3, 6)
    final, masters = weights_of(run[1]), masters_of(run) if case.endswith("bf16") else []
    if rank == 0:
        torch.save((kept, final, masters), path.with_suffix(".pt"))
    dist.barrier()


def states(run: Run) -> int:
    """How many parameters have state."""
    view = view_of(run[2])
    assert view is not None
    return len(view.state)


def failed(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fail_late(run: Run, path: Path) -> str:
    """Load, and fail when everything is in its place."""
    replace = carried.replace

    def fails(*_: Any) -> None:
        raise RuntimeError(f"{states(run)} parameters have state")

    carried.replace = fails  # type: ignore[assignment]
    try:
        return failed(lambda: load_optimizer(run[2], run[1], path))
    finally:
        carried.replace = replace


def resume_bf16(case: str) -> dict[str, Any]:
    path = out / "bf16.safetensors"
    if not path.exists():
        begin(path, case)
    kept, final, masters = torch.load(path.with_suffix(".pt"), weights_only=True)
    strange = build(case, None)
    result: dict[str, Any] = {"strange": failed(lambda: load_optimizer(strange[2], strange[1], path))}
    run = build(case, kept)
    before = masters_of(run)
    result["late"] = fail_late(run, path)
    result["back"] = states(run) == 0 and all(map(torch.equal, before, masters_of(run)))
    report = load_optimizer(run[2], run[1], path)
    result |= {"report": report.line(), "notes": report.notes}
    result["masters"] = not any(map(torch.equal, before, masters_of(run)))
    target = out / f"{case}.{world}.safetensors"
    save_optimizer(run[2], run[1], target, global_step=3)
    result["same"] = target.read_bytes() == path.read_bytes()
    train(run, 3, 6)
    arrived = weights_of(run[1])
    result["equal"] = all(torch.equal(arrived[n], final[n]) for n in final)
    result["equal masters"] = all(map(torch.equal, masters_of(run), masters))
    off = max(float((a - b).abs().max()) for a, b in zip(masters_of(run), masters, strict=True))
    result["off"] = off
    lacking = build(case, kept)
    result["lacking"] = load_optimizer(lacking[2], lacking[1], out / "state.safetensors").notes
    plain = build("plain", kept)
    result["left"] = load_optimizer(plain[2], plain[1], path).notes
    result["slots"] = sorted({slot for slots in plain[2].state.values() for slot in slots})
    with open_state(path) as state:
        result["saved"] = sorted({slot for parameter in state.values() if parameter.state for slot in parameter.state})
    return result


def resume(case: str, path: Path) -> dict[str, Any]:
    kept, final, _ = torch.load(path.with_suffix(".pt"), weights_only=True)
    run = build(case, kept)
    late = fail_late(run, path) if case != "plain" else ""
    back = case == "plain" or states(run) == 0
    report = load_optimizer(run[2], run[1], path)
    target = out / f"{case}.{world}.safetensors"
    written = save_optimizer(run[2], run[1], target, global_step=3)
    shards = save_optimizer(run[2], run[1], target.with_suffix(".shards.safetensors"), max_shard_size=150)
    train(run, 3, 6)
    arrived = weights_of(run[1])
    off = max(float((arrived[name] - final[name]).abs().max()) for name in final)
    return {
        "report": report.line(), "same": target.read_bytes() == path.read_bytes(), "off": off,
        "files": len(shards.files), "verified": verify(shards.path).ok, "digest": written.digest,
        "late": late, "back": back,
    }  # fmt: skip


deepspeed.init_distributed("gloo")
try:
    state = out / "state.safetensors"
    if not state.exists():
        begin(state, cases.split(",")[0])
    for case in cases.split(","):
        said = resume_bf16(case) if case.endswith("bf16") else resume(case, state)
        (out / f"{case}.{world}.{rank}.json").write_text(json.dumps(said))
except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
dist.barrier()
# Threads that the process group leaves sometimes abort the exit of the interpreter; everything is done by then.
sys.stdout.flush()
os._exit(0)
