"""The budgets' table: what this package takes beside the plainest way to do the same.

::

    python tests/bench/bench.py [--megabytes 2048 1024 8192] [--rounds 9] [--folder /dev/shm] [--only NAME ...]
        [--json FILE]

AdamW over matrices of 2048 x 2048, so many megabytes of moments, in a folder that should be in memory: ``cp`` does not
wait for a disk, and we do. It takes twice the size, a process one and a half times more. What depends on the size is
measured for all that are given, the rest for the first. What is written is a fresh file each time, never an old one
again: its memory or blocks are part of the cost. Every measurement is a process of its own, so that peaks are
those of whole processes; what is compared takes turns, in rotated order, after as many bytes as it writes were written
and removed, so that the machine has them. A table in Markdown is printed: least and median seconds, processor time, the
median of the ratios to the yardstick of the same round and their first and third quarters. Each limit is said to be
met, or by how much it is missed. The exit code is 1 if one is missed. ``measure.py`` draws what ``--json`` writes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import measure

SIDE: Final = 2048
CLI: Final = (sys.executable, "-m", "lora_state_format")


class Case(NamedTuple):
    """A contender: a command of its own, or a worker in this file, which times a part of itself."""

    title: str
    worker: str = ""
    command: tuple[str, ...] = ()


class Group(NamedTuple):
    """What takes turns; the first one is the yardstick.

    ``budgets`` are the cases' limits: ``ratio`` to the yardstick, ``cpu`` seconds of processor time, MiB of ``peak``.
    ``files`` are made before, by the worker ``make``; of so many ``parameters``, if they are given, by ``write_many``.
    ``scales``: its cost is a matter of size.
    """

    name: str
    cases: tuple[Case, ...]
    budgets: tuple[Mapping[str, float], ...]
    files: tuple[str, ...] = ()
    parameters: int = 0
    scales: bool = False


# --- workers: each prepares, then returns what is timed -----------------------------------------------------------


def trained(megabytes: int, *, stepped: bool = True) -> tuple[Any, Any]:
    """A model, and AdamW over it with or without state."""
    import torch

    layers = max(megabytes * 2**20 // (2 * 4 * SIDE * SIDE), 1)
    noise = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(*(torch.nn.Linear(SIDE, SIDE, bias=False, device="meta") for _ in range(layers)))
    for layer in model:
        layer.weight = torch.nn.Parameter(noise.clone())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number, parameter in enumerate(model.parameters() if stepped else ()):
        state = optimizer.state[parameter]
        state["step"] = torch.tensor(3.0)
        state["exp_avg"], state["exp_avg_sq"] = noise - number, noise + number
    return model, optimizer


def buffers(megabytes: int) -> list[Any]:
    """The moments as NumPy arrays: what there is to write, whoever writes it."""
    _, optimizer = trained(megabytes)
    return [slot.numpy() for state in optimizer.state.values() for slot in state.values() if slot.ndim]


def make(folder: Path, megabytes: int) -> Callable[[], Any]:
    """The two files that others read."""
    import torch

    from lora_state_format.torch import save_optimizer

    model, optimizer = trained(megabytes)
    (folder / "names.txt").write_text("".join(f"{name}\n" for name, _ in model.named_parameters()), encoding="utf-8")
    wanted = os.environ["FILES"].split()
    if "pt" in wanted:
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    if "named" in wanted:
        save_optimizer(optimizer, model, folder / "optimizer.safetensors")
    if "configs" in wanted:
        make_configs(folder / "configs")
    return lambda: None


def make_configs(folder: Path) -> None:
    """A folder of LoRA over Llama 7B without weights: the names come from a model that its configs describe."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(architectures=["LlamaForCausalLM"])  # its defaults are those of 7B
    config.save_pretrained(folder)
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    lora = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", base_model_name_or_path=str(folder))
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    lora.save_pretrained(folder)
    trained = [torch.nn.Parameter(torch.zeros(p.shape)) for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def raw_write(folder: Path, megabytes: int) -> Callable[[], Any]:
    """Write the moments and take the digests that a saved state has: of each moment, and of each weight."""
    import xxhash

    model, optimizer = trained(megabytes)
    moments = [slot.numpy() for state in optimizer.state.values() for slot in state.values() if slot.ndim]
    weights = [parameter.detach().numpy() for parameter in model.parameters()]

    def run() -> None:
        for weight in weights:
            xxhash.xxh3_128(weight).hexdigest()
        with (folder / "out").open("wb", buffering=0) as file:
            for array in moments:
                view, hasher = memoryview(array).cast("B"), xxhash.xxh3_128()
                for start in range(0, len(view), 1 << 20):  # hashed while it is near
                    chunk = view[start : start + (1 << 20)]
                    hasher.update(chunk)
                    file.write(chunk)
                hasher.hexdigest()
            os.fsync(file.fileno())

    return run


def write(folder: Path, megabytes: int) -> Callable[[], Any]:
    from lora_state_format.format import writing
    from lora_state_format.model.sources import Memory
    from lora_state_format.model.states import Group as Options
    from lora_state_format.model.states import Naming, Optimizer, OptimizerState, Parameter, Role, Slot
    from lora_state_format.model.tensors import contiguous

    slots = [Slot(contiguous("F32", array.shape, Memory(array)), Role.PARAM) for array in buffers(megabytes)]
    parameters = tuple(
        Parameter(f"{n}.weight", (SIDE, SIDE), {"exp_avg": slots[2 * n], "exp_avg_sq": slots[2 * n + 1]})
        for n in range(len(slots) // 2)
    )
    state = OptimizerState((Optimizer(),), (Options(0, (), len(parameters)),), parameters, Naming("model"))
    return lambda: writing.write(state, folder / "out", force=True)


def save(folder: Path, megabytes: int, *, weights: bool = True) -> Callable[[], Any]:
    from lora_state_format.torch import save_optimizer

    model, optimizer = trained(megabytes)
    return lambda: save_optimizer(optimizer, model, folder / "out", weights=weights)


def save_without_weights(folder: Path, megabytes: int) -> Callable[[], Any]:
    return save(folder, megabytes, weights=False)


def torch_save(folder: Path, megabytes: int) -> Callable[[], Any]:
    import torch

    _, optimizer = trained(megabytes)
    return lambda: torch.save(optimizer.state_dict(), folder / "out")


def save_file(folder: Path, megabytes: int) -> Callable[[], Any]:
    from safetensors.torch import save_file

    model, optimizer = trained(megabytes)
    tensors = {
        f"{name}/{key}": slot
        for name, parameter in model.named_parameters()
        for key, slot in optimizer.state[parameter].items()
    }
    return lambda: save_file(tensors, folder / "out")


def dcp_save(folder: Path, megabytes: int) -> Callable[[], Any]:
    from torch.distributed.checkpoint.state_dict_saver import save

    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    _, optimizer = trained(megabytes)
    return lambda: save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder / "dcp", no_dist=True)


def torch_load(folder: Path, megabytes: int) -> Callable[[], Any]:
    import torch

    _, optimizer = trained(megabytes, stepped=False)
    return lambda: optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))


def load(folder: Path, megabytes: int) -> Callable[[], Any]:
    from lora_state_format.torch import load_optimizer

    model, optimizer = trained(megabytes, stepped=False)
    return lambda: load_optimizer(optimizer, model, folder / "optimizer.safetensors")


def read(folder: Path, megabytes: int) -> Callable[[], Any]:
    """Every byte of the file into one buffer of a mebibyte."""

    def run() -> None:
        buffer = memoryview(bytearray(1 << 20))
        with (folder / "optimizer.safetensors").open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    return run


def statistics(folder: Path, megabytes: int) -> Callable[[], Any]:
    """All that ``inspect --stats`` says of each slot, without the sizes of updates; by one core."""
    from lora_state_format.format import reading
    from lora_state_format.operations.statistics import measure_tensor

    state = reading.open_state(folder / "optimizer.safetensors")
    tensors = [slot.tensor for parameter in state.parameters for _, slot in parameter.tensors()]
    return lambda: [measure_tensor(tensor) for tensor in tensors]


def many(count: int) -> Any:
    """A state of a mixture of experts: so many small LoRA matrices, two moments each."""
    from lora_state_format.model.sources import Memory
    from lora_state_format.model.states import Group as Options
    from lora_state_format.model.states import Naming, Optimizer, OptimizerState, Parameter, Role, Scalar, Slot
    from lora_state_format.model.tensors import Digest, contiguous

    data, parameters = Memory(bytes(64)), []
    for number in range(count):
        layer, expert = number // 2000, number // 4 % 500
        module = f"layers.{layer}.mlp.experts.{expert}.{('gate', 'up')[number // 2 % 2]}_proj"
        key = f"base_model.model.model.{module}.lora_{'AB'[number % 2]}"
        slots = {name: Slot(contiguous("F32", (4, 4), data), Role.PARAM) for name in ("exp_avg", "exp_avg_sq")}
        parameters.append(
            Parameter(
                name=f"{key}.default.weight",
                shape=(4, 4),
                state={"step": Scalar("F32", b"\0\0\x80\x3f"), **slots},
                dtype="F32",
                adapter="default",
                foreign_names={"peft": f"{key}.weight"},
                weights=Digest("xxh3-128", "F32", f"{number:032x}"),
            )
        )
    groups = (Options(0, (("lr", 1e-4),), count),)
    return OptimizerState((Optimizer("torch.optim.adamw.AdamW"),), groups, tuple(parameters), Naming("model"))


def write_many(folder: Path, count: int) -> Callable[[], Any]:
    from lora_state_format.format import writing

    state = many(count)
    return lambda: writing.write(state, folder / f"many-{count}", force=True)


def open_many(folder: Path, count: int) -> Callable[[], Any]:
    from lora_state_format.format import reading

    return lambda: reading.open_state(folder / f"many-{count}")


def verify_many(folder: Path, count: int) -> Callable[[], Any]:
    from lora_state_format.format import reading

    return lambda: reading.verify(folder / f"many-{count}")


def decide_many(folder: Path, count: int) -> Callable[[], Any]:
    from lora_state_format.foreign.state_dict import from_state_dict, to_state_dict
    from lora_state_format.naming import order

    state = many(count)
    positional = from_state_dict(to_state_dict(state))
    return lambda: order.decide(positional, state.parameters, rule="listed", source="names")


def diff_many(folder: Path, count: int) -> Callable[[], Any]:
    from lora_state_format.operations.diff import diff

    state, other = many(count), many(count)
    return lambda: diff(state, other)


def plan_many(folder: Path, count: int) -> Callable[[], Any]:
    from lora_state_format.binding.live import LiveGroup, LiveOptimizer, LiveParameter
    from lora_state_format.binding.plan import plan
    from lora_state_format.format import reading

    state = reading.open_state(folder / f"many-{count}")
    live = LiveOptimizer(
        state.optimizers,
        (LiveGroup(0, state.groups[0].options, tuple(state)),),
        {name: LiveParameter(name, parameter.shape, "F32") for name, parameter in state.items()},
    )
    return lambda: plan(state, live).check()


# --- the table ----------------------------------------------------------------------------------------------------


NONE: Final[Mapping[str, float]] = {}
"""The limits of what is measured for comparison only."""


def groups(folder: Path, megabytes: int) -> list[Group]:
    """What is measured, with the limits that are to be reached one day; ``docs/speed.md`` has what came of it."""
    source, named, target = (str(folder / name) for name in ("optimizer.pt", "optimizer.safetensors", "out"))
    convert = (*CLI, "convert", source, target, "--force", "--names", str(folder / "names.txt"))
    configs = (*CLI, "convert", str(folder / "configs"), target, "--force")
    imports = Case("`import safetensors, click`", command=(sys.executable, "-c", "import safetensors, click"))
    llama = (sys.executable, "-c", "import peft, transformers.models.llama.modeling_llama")
    disk = ("sh", "-c", f"cp {source} {target} && sync {target}")
    many = (
        Case("`open_state`", "open_many"),
        Case("`plan`", "plan_many"),
        Case("order of names", "decide_many"),
        Case("`verify`", "verify_many"),
        Case("`diff`", "diff_many"),
        Case("`write`", "write_many"),
    )
    return [
        Group("convert", (Case("`cp` of `optimizer.pt`", command=("cp", source, target)),
                          Case("`lora-state convert optimizer.pt`", command=convert)),
              (NONE, {"ratio": 1.05, "peak": 96}), files=("pt",), scales=True),
        Group("convert, synced", (Case("`cp` and `sync`", command=disk),
                                  Case("`lora-state convert optimizer.pt`", command=convert)),
              (NONE, {"ratio": 1.02, "peak": 96}), files=("pt",)),
        Group("verify", (Case("`cp` of the file", command=("cp", named, target)), Case("reading the file", "read"),
                         Case("`lora-state verify`", command=(*CLI, "verify", named))),
              (NONE, NONE, {"ratio": 0.6, "peak": 96}), files=("named",), scales=True),
        Group("save", (Case("raw `write` of the moments, digests of them and the weights", "raw_write"),
                       Case("`write(state)` from memory", "write"),
                       Case("`save_optimizer(weights=False)`", "save_without_weights"),
                       Case("`save_optimizer`, with digests of the weights", "save"),
                       Case("safetensors `save_file`", "save_file"), Case("`torch.save`", "torch_save"),
                       Case("DCP `save`", "dcp_save")),
              (NONE, NONE, NONE, {"ratio": 1.03}, NONE, NONE, NONE), scales=True),
        Group("load", (Case("`torch.load` and `load_state_dict`", "torch_load"), Case("`load_optimizer`", "load")),
              (NONE, {"ratio": 0.5}), files=("pt", "named"), scales=True),
        Group("start", (imports, Case("`lora-state --help`", command=(*CLI, "--help")),
                        Case("`lora-state inspect`", command=(*CLI, "inspect", named))),
              (NONE, {"ratio": 1.3}, {"ratio": 1.3}), files=("named",)),
        Group("names from configs of 7B", (Case("importing Llama and peft", command=llama),
                                           Case("`lora-state convert FOLDER`", command=configs)),
              (NONE, {"cpu": 6}), files=("configs",)),
        Group("statistics", (Case("reading the file", "read"), Case("RMS, largest, zeros, NaN", "statistics"),
                             Case("`inspect --stats`", command=(*CLI, "inspect", named, "--stats"))),
              (NONE, {"cpu": megabytes * 2**20 / 1.5e9}, NONE), files=("named",)),
        Group("100,000 parameters", many,
              ({"cpu": 1.0}, {"cpu": 0.7}, {"cpu": 1.5}, NONE, NONE, {"cpu": 2.5}), parameters=100_000),
        Group("200,000 parameters", (many[0], many[1], many[3], many[-1]),
              ({"peak": 1024}, {"peak": 1024}, {"peak": 1024}, {"peak": 1024}), parameters=200_000),
    ]  # fmt: skip


def command(case: Case, folder: Path, size: int) -> Sequence[str]:
    """The process that is measured."""
    return case.command or measure.worker(__file__, case.worker, folder, size)


def run(case: Case, folder: Path, size: int) -> measure.Run:
    """Measure a case once, and remove what it wrote."""
    found = measure.measured(command(case, folder, size))
    for name in ("out", "dcp"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return found


def compared(group: Group, folder: Path, size: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table: every case of a group, measured in turn."""
    found = measure.in_turn([partial(run, case, folder, size) for case in group.cases], rounds)
    return [
        measure.row(case.title, own, found[0], budget)
        for case, own, budget in zip(group.cases, found, group.budgets, strict=True)
    ]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--megabytes", type=int, nargs="+", default=[2048])
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    options.add_argument("--only", nargs="*")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    about = f"{chosen.rounds} rounds, {measure.machine('lora_state_format', 'torch', 'safetensors')}"
    print(about)
    tables: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled once
        os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")
        for group in groups(folder, chosen.megabytes[0]):
            if chosen.only is not None and group.name not in chosen.only:
                continue
            for size in chosen.megabytes if group.scales else chosen.megabytes[:1]:
                title = f"{group.name}, {size:,} MB" if group.scales else group.name
                number = group.parameters or size
                os.environ["FILES"] = " ".join(group.files)
                run(Case("making the files", "write_many" if group.parameters else "make"), folder, number)
                measure.warm(folder, (size << 20) + (size << 16))
                run(group.cases[-1], folder, number)  # compiles what is imported
                tables[title] = compared(group, folder, number, chosen.rounds)
                print("", *measure.lines(title, tables[title]), sep="\n", flush=True)
                for path in (folder / "optimizer.pt", folder / "optimizer.safetensors", *folder.glob("many-*")):
                    path.unlink(missing_ok=True)
    if chosen.json:
        measure.save(chosen.json, about, tables)
    sys.exit(any(row["missed"] for rows in tables.values() for row in rows))


if __name__ == "__main__" and not measure.work(globals()):
    main()
