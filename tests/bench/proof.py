"""A run that moves from one way of training to another, beside one that never moved: ``docs/proof.md``.

    python tests/bench/proof.py [--folder /dev/shm] [--steps 10] > docs/proof.md

Each leg is a set of processes of its own that builds the model anew, loads the weights and, by name, the optimizer's
state of the leg before, trains some steps, and saves both. Needs deepspeed and mlx, in the frameworks' environment.
Every rank gets the same batch, so that the mean of the gradients is the gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LEGS = (
    ("ddp", 2), ("fsdp2", 2), ("fsdp2", 4), ("zero2", 2), ("zero3", 3), ("tp", 2), ("one", 1),
    ("mlx", 1), ("one", 1),
)  # fmt: skip
TITLES = {
    "ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "tp": "tensor parallel", "one": "one process",
    "mlx": "MLX",
}  # fmt: skip


def build(lora: bool) -> Any:
    """Return the model: four layers, of which two are LoRA's, or a model that is trained whole."""
    import torch

    torch.manual_seed(0)
    if lora:
        model = torch.nn.ModuleDict(
            {
                "base": torch.nn.Linear(32, 48),
                "lora_A": torch.nn.Linear(48, 8, bias=False),
                "lora_B": torch.nn.Linear(8, 48, bias=False),
                "head": torch.nn.Linear(48, 16),
            }
        )
        for name in ("base", "head"):
            model[name].requires_grad_(False)
        return model
    return torch.nn.ModuleDict({"up": torch.nn.Linear(32, 48), "down": torch.nn.Linear(48, 16)})


def forward(model: Any, x: Any) -> Any:
    """Return the loss of a batch."""
    import torch

    if "lora_A" in model:
        hidden = torch.tanh(model["base"](x))
        return model["head"](hidden + model["lora_B"](model["lora_A"](hidden))).square().mean()
    return model["down"](torch.tanh(model["up"](x))).square().mean()


def leg(kind: str, lora: bool, first: int, last: int, before: Path | None, after: Path) -> None:
    """Be one rank of a leg."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from lora_state_format.torch import load_optimizer, save_optimizer

    world = int(os.environ["WORLD_SIZE"])
    if kind.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    layers = build(lora)
    if before:
        layers.load_state_dict(torch.load(before / "weights.pt", weights_only=True))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> Any:
            return forward(self.layers, x)

    model = Model()
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        for layer in layers.values():
            if next(layer.parameters()).requires_grad:
                fully_shard(layer, mesh=mesh)
    elif kind == "tp":
        pair = ("lora_A", "lora_B") if lora else ("up", "down")
        plan = dict(zip(pair, (ColwiseParallel(), RowwiseParallel()), strict=True))
        parallelize_module(layers, init_device_mesh("cpu", (world,)), plan)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=1e-2, foreach=False)
    run: Any = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
    if kind.startswith("zero"):
        config = {
            "train_micro_batch_size_per_gpu": 8,
            "zero_optimization": {"stage": int(kind[-1])},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,
        }
        run, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        optimizer = run
    if before:
        report = load_optimizer(optimizer, model, before / "optimizer.safetensors")
        assert report.restored == len(trained), str(report)
        assert not report.differing, str(report)
    losses = []
    for step in range(first, last):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
        loss = run(x)
        losses.append(float(loss.full_tensor() if isinstance(loss, DTensor) else loss))
        if run is optimizer:
            run.backward(loss)
            run.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    save_optimizer(optimizer, model, after / "optimizer.safetensors", global_step=last)
    weights = {}
    parameters = dict(layers.named_parameters())
    if kind == "zero3":
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            weights = {name: p.detach().clone() for name, p in parameters.items()}
    else:
        weights = {
            n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in parameters.items()
        }
    if dist.get_rank() == 0:
        torch.save(weights, after / "weights.pt")
        (after / "losses.json").write_text(json.dumps(losses))
    dist.barrier()
    os._exit(0)  # threads that the process group leaves sometimes abort the exit of the interpreter


def mlx_leg(lora: bool, first: int, last: int, before: Path, after: Path) -> None:
    """Be the leg in MLX: the state goes there as a file of its own format, and comes back by name."""
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np
    import torch
    from mlx.optimizers import AdamW
    from mlx.utils import tree_flatten, tree_unflatten

    from lora_state_format import convert

    weights = torch.load(before / "weights.pt", weights_only=True)
    trained = [name for name in weights if not lora or name.startswith("lora_")]

    def arrays(tensors: dict[str, torch.Tensor]) -> Any:
        return tree_unflatten([(f"layers.{name}", mx.array(tensor.numpy())) for name, tensor in tensors.items()])

    class Model(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = {
                name: nn.Linear(*reversed(layer.weight.shape), bias=layer.bias is not None)
                for name, layer in build(lora).items()
            }

        def __call__(self, x: mx.array) -> mx.array:
            layers = self.layers
            if lora:
                hidden = mx.tanh(layers["base"](x))
                return layers["head"](hidden + layers["lora_B"](layers["lora_A"](hidden)))
            return layers["down"](mx.tanh(layers["up"](x)))

    model = Model()
    if lora:
        model.freeze()
        for name in ("lora_A", "lora_B"):
            model.layers[name].unfreeze()
    model.update(arrays(weights))
    optimizer = AdamW(learning_rate=1e-2, betas=[0.9, 0.999], eps=1e-8, weight_decay=1e-2, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    convert(before / "optimizer.safetensors", after / "mlx.safetensors", target_format="mlx", options={"map": "none"})
    optimizer.state = tree_unflatten(list(mx.load(str(after / "mlx.safetensors")).items()))
    losses = []
    step_of = nn.value_and_grad(model, lambda model, x: mx.mean(mx.square(model(x))))
    for step in range(first, last):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
        loss, gradients = step_of(model, mx.array(x.numpy()))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    mx.save_safetensors(str(after / "trained.safetensors"), dict(tree_flatten(optimizer.state)))
    options = {
        "map": "none", "bias_correction": True, "lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2,
    }  # fmt: skip
    convert(
        after / "trained.safetensors", after / "optimizer.safetensors", source_format="mlx",
        optimizer="torch.optim.adamw.AdamW", options=options,
    )  # fmt: skip
    flat = dict(tree_flatten(model.parameters()))
    moved = {name: torch.from_numpy(np.array(flat[f"layers.{name}"])) for name in trained}
    torch.save({**weights, **moved}, after / "weights.pt")
    (after / "losses.json").write_text(json.dumps(losses))


def start(kind: str, world: int, lora: bool, first: int, last: int, before: Path | None, after: Path) -> list[float]:
    """Carry a leg out and return its losses."""
    after.mkdir(parents=True)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    own = [__file__, "--leg", kind, str(int(lora)), str(first), str(last), str(before or ""), str(after)]
    done = subprocess.run(
        [*command, "--nproc-per-node", str(world), *own],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    losses: list[float] = json.loads((after / "losses.json").read_text())
    return losses


def table(lora: bool, steps: int, folder: Path) -> None:
    """Print the legs of one run."""
    title = "LoRA: two matrices trained, the rest frozen" if lora else "A full fine-tune"
    print(
        f"\n## {title}\n\n| leg | steps | last loss | the run that never moved | largest relative difference "
        "| bit-equal |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    expected = start("one", 1, lora, 0, steps * len(LEGS), None, folder / "still")
    before: Path | None = None
    for number, (kind, world) in enumerate(LEGS):
        first, last = number * steps, (number + 1) * steps
        after = folder / f"leg{number}"
        losses = start(kind, world, lora, first, last, before, after)
        pairs = list(zip(losses, expected[first:last], strict=True))
        off = max(abs(a - b) / abs(b) for a, b in pairs)
        equal = sum(a == b for a, b in pairs)
        name = TITLES[kind] + (f" on {world} ranks" if world > 1 else "")
        print(
            f"| {name} | {first + 1} to {last} | {losses[-1]:.9g} | {pairs[-1][1]:.9g} | {off:.1e} "
            f"| {equal} of {steps} |",
            flush=True,
        )
        assert off <= 1e-5, (kind, off)
        before = after


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--leg", nargs=6, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.leg:
        kind, lora, first, last, before, after = chosen.leg
        if kind == "mlx":
            mlx_leg(bool(int(lora)), int(first), int(last), Path(before), Path(after))
            return
        leg(kind, bool(int(lora)), int(first), int(last), Path(before) if before else None, Path(after))
    print("# A run that moved\n")
    print(
        "`python tests/bench/proof.py` made this page: one run that goes on, by name, in another way of training every "
        f"{chosen.steps} steps,\nand its losses next to those of a run in one process that never moved. Each leg loads "
        "the weights and the optimizer's\nstate that the leg before saved, on the CPU with gloo; the script stops if a "
        "loss is off by more than 1e-5. Where a sum\nor a mean is taken in another order (three ranks, tensor "
        "parallel, MLX), losses differ by\nrounding from there on."
    )
    for lora in (True, False):
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            table(lora, chosen.steps, Path(folder))


if __name__ == "__main__":
    main()
