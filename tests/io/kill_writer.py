"""Every writer, stopped at the system calls that change the disk; ``test_kills`` runs a part of it.

``python kill_writer.py [WRITER ...] [--points N]``: in every format, a process makes a state where there was none, and
replaces another one. ``strace`` kills it (SIGKILL) as it enters a system call that changes the disk: its first, its
second, and so on. Then each such call fails in turn, with ``EIO`` or ``ENOSPC``; and ``fsync`` and ``renameat2`` with
``EINVAL``, as on file systems that do not know them. After each, the target has to be the old state or the new one,
whole, and one more writer has to leave nothing else behind. ``--points`` takes so many calls of each kind.

``python kill_writer.py --once WRITER TARGET NUMBER BASE`` writes one state; this is the process that is killed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from lora_state_format import registry
from lora_state_format.errors import StateFormatError
from lora_state_format.foreign import torch_save
from lora_state_format.foreign.dcp import write_folder
from lora_state_format.foreign.pickles import Record
from lora_state_format.format import reading, writing
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import (
    Group,
    Naming,
    Optimizer,
    OptimizerState,
    Parameter,
    Role,
    Scalar,
    Slot,
    Value,
)
from lora_state_format.model.tensors import contiguous
from lora_state_format.operations import edit, export
from lora_state_format.operations.conversion import convert

NAMES: Final = ("layers.0.weight", "layers.1.weight")
CALLS: Final = ("pwrite64", "write", "fsync", "flock", "rename", "renameat2", "unlink", "mkdir", "rmdir")
"""What is done between two of these calls changes nothing on the disk but opens files, or reads."""


LITTER: Final = re.compile(r"(^|/)\.[^/]+\.[0-9a-f]{16}\.(tmp|old|names)(/|$)")
"""What a writer may leave behind until the next one comes."""


# --- the writers ------------------------------------------------------------------------------------------------------


MEGATRON: Final[Mapping[str, Value]] = {
    "wd_mult": 0.0,
    "lr_mult": 1.0,
    "is_expert_parallel": False,
    "is_decoupled_lr": False,
}
"""What Megatron-Core finds a group again by."""


def a_state(
    number: int,
    elements: int = 64,
    *,
    masters: bool = False,
    optimizers: int = 1,
    more: Mapping[str, Value] = MappingProxyType({}),
) -> OptimizerState:
    slot = Slot(contiguous("F32", (elements,), Memory(bytes([number + 1]) * elements * 4)), Role.PARAM)
    slots: dict[str, Value] = {"step": Scalar.of("F32", 1.0), "exp_avg": slot, "exp_avg_sq": slot}
    if masters:
        slots["master_param"] = slot
    parameters = tuple(Parameter(name, (elements,), slots) for name in NAMES)
    options: tuple[tuple[str, Value], ...] = (("lr", 0.5 + number), ("betas", (0.9, 0.999)), *more.items())
    groups = tuple(Group(index, options, len(NAMES) // optimizers) for index in range(optimizers))
    return OptimizerState(
        (Optimizer("torch.optim.adamw.AdamW"),) * optimizers, groups, parameters, Naming("model"), global_step=1
    )


def make_base(folder: Path, elements: int = 64) -> None:
    """What ``deepspeed_universal``, ``lightning`` and ``megatron`` take the rest from."""
    shapes = [{name: Record("torch", "Size", ((elements,),)) for name in NAMES}]
    inner = {"state": {0: {}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    optimizer = {"zero_stage": 1, "base_optimizer_state": inner}
    model = {"param_shapes": shapes, "module": {}, "ds_version": "0.19", "global_steps": 1}
    (folder / "zero").mkdir(parents=True)
    torch_save.save(model, folder / "zero" / "mp_rank_00_model_states.pt")
    torch_save.save({"optimizer_state_dict": optimizer}, folder / "zero" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    checkpoint = {"optimizer_states": [{"state": {}, "param_groups": []}], "pytorch-lightning_version": "2.6.6"}
    torch_save.save({**checkpoint, "state_dict": {}}, folder / "last.ckpt")
    torch_save.save({"optimizer": {"param_groups": []}}, folder / "common.pt")
    weights = {(name,): contiguous("F32", (elements,), Memory(bytes(4 * elements))) for name in NAMES}
    others = {
        "metadata.json": [b'{"sharded_backend": "torch_dist"}'],
        "common.pt": [(folder / "common.pt").read_bytes()],
    }
    write_folder(weights, folder / "torch_dist", others=others)


Write = Callable[[Path, int, Path], object]
"""Makes a state the one at a path, whatever was there, with a folder that ``make_base`` filled."""


def to(
    name: str,
    base: str | None = None,
    *,
    masters: bool = False,
    optimizers: int = 1,
    more: Mapping[str, Value] = MappingProxyType({}),
    **options: Any,
) -> Write:
    def write(path: Path, number: int, folder: Path) -> None:
        state = a_state(number, masters=masters, optimizers=optimizers, more=more)
        given = folder / base if base else None
        registry.writer(name).write(state, path, base=given, force=True, options=options)

    return write


def converted(path: Path, number: int, folder: Path) -> None:
    """From a file of ``torch.save``, by ``convert``."""
    source = folder / f"{number}.pt"
    if not source.exists():
        registry.writer("torch_optimizer").write(a_state(number), source, base=None, force=False, options={})
    convert(source, path, names=NAMES, force=True)


WRITERS: Final[dict[str, Write]] = {
    "convert": converted,
    "write": lambda path, number, _: writing.write(a_state(number), path, force=True),
    "write, 2 shards": lambda path, number, _: writing.write(a_state(number), path, force=True, max_shard_size=600),
    "edit": lambda path, number, _: writing.write(edit.reset(a_state(number), "0").state, path, force=True),
    "export": lambda path, number, _: export.export(a_state(number), path, "exp_avg", force=True),
    "torch_optimizer": to("torch_optimizer"),
    "accelerate": to("accelerate"),
    "accelerate, 2 optimizers": to("accelerate", optimizers=2),
    "dcp": to("dcp"),
    "dcp, flattened": to("dcp", flattened=True),
    "deepspeed_universal": to("deepspeed_universal", "zero", masters=True),
    "flax_msgpack": to("flax_msgpack", map="none"),
    "lerobot": to("lerobot"),
    "lerobot, 2 optimizers": to("lerobot", optimizers=2),
    "lightning": to("lightning", "last.ckpt"),
    "megatron": to("megatron", "torch_dist", more=MEGATRON),
    "mlx": to("mlx", map="none"),
    "paddlenlp": to("paddlenlp", masters=True, map="none"),
}


# --- what is on the disk ----------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every empty folder, by its path."""
    found = {}
    for inner, folders, files in os.walk(folder):
        for name in files:
            path = Path(inner, name)
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
        if not folders and not files and Path(inner) != folder:
            found[f"{Path(inner).relative_to(folder).as_posix()}/"] = b""
    return found


def meaning(folder: Path, references: dict[int, dict[str, bytes]]) -> int | None:
    """Which state the target is: ``-1`` for none, ``None`` for neither of them or for a part of one."""
    target = folder / "target"
    found = {name: data for name, data in contents(folder).items() if not LITTER.search(name)}
    if not target.is_dir():  # a file, whose shards may lie beside it, or have been left there
        try:
            which = reading.verify(target)
        except FileNotFoundError:
            return -1 if not found or not target.exists() else None
        except StateFormatError:  # of another format
            pass
        else:
            if not which.ok:
                return None
        return next((n for n, reference in references.items() if reference.items() <= found.items()), None)
    return next((n for n, reference in references.items() if reference == found), None)


# --- stopping ---------------------------------------------------------------------------------------------------------


def strace(
    writer: str, folder: Path, base: Path, *options: str, log: str | Path = os.devnull
) -> subprocess.CompletedProcess[str]:
    trace = ["strace", "-f", "-qq", "-o", os.fspath(log), "-e", f"trace={','.join(CALLS)}", *options]
    own = [sys.executable, "-B", __file__, "--once", writer, os.fspath(folder / "target"), "1", os.fspath(base)]
    return subprocess.run([*trace, *own], capture_output=True, text=True, check=False)


def calls(log: Path) -> Counter[str]:
    """How often each call was made."""
    return Counter(re.findall(r"^\d+ +(\w+)\(", log.read_text(errors="replace"), re.MULTILINE))


def faults(counted: Counter[str], points: int | None) -> Iterator[tuple[str, str]]:
    """The kinds of faults, and strace's way to say them."""
    for call, count in sorted(counted.items()):
        numbers = range(1, count + 1)
        if points is not None and count > points:
            numbers = range(1 + count // points // 2, count + 1, max(count // points, 1))
        for number in numbers:
            yield "killed", f"inject={call}:signal=SIGKILL:when={number}"
            if call in ("pwrite64", "write", "fsync", "rename", "renameat2", "mkdir"):
                error = "ENOSPC" if call in ("pwrite64", "write", "mkdir") else "EIO"
                yield error, f"inject={call}:error={error}:when={number}"
    for call in ("fsync", "renameat2"):
        if counted[call]:
            yield "EINVAL", f"inject={call}:error=EINVAL"


def stop_at_every_call(writer: str, folder: Path, points: int | None) -> Counter[str]:
    """Stop a writer in every way, before and over another state; count what was found."""
    base, place, log = folder / "base", folder / "place", folder / "log"
    make_base(base)
    references: dict[int, dict[str, bytes]] = {}
    for number in (0, 1):
        place.mkdir()
        WRITERS[writer](place / "target", number, base)
        references[number] = contents(place)
        shutil.rmtree(place)
    assert references[0] != references[1]
    counts: Counter[str] = Counter()
    for before in (0, -1):
        place.mkdir()
        if before == 0:
            WRITERS[writer](place / "target", 0, base)
        done = strace(writer, place, base, log=log)
        assert done.returncode == 0, done.stderr
        counted = calls(log)
        shutil.rmtree(place)
        for kind, inject in faults(counted, points):
            place.mkdir()
            if before == 0:
                WRITERS[writer](place / "target", 0, base)
            done = strace(writer, place, base, "-e", inject)
            if kind == "killed" and done.returncode == 0:  # strace counts the calls of every thread by themselves
                kind = "not reached"
            found = meaning(place, references)
            counts[kind] += 1
            clean = done.returncode == -signal.SIGKILL if kind == "killed" else done.returncode in (0, 3)
            if found not in (before, 1) or (done.returncode == 0 and found != 1) or not clean:
                counts["lost"] += 1
                print(f"{writer}: {inject}: lost: {found}, exit {done.returncode}\n{done.stderr[-2000:]}")
            counts["old" if found == before else "new"] += 1
            left = list(filter(LITTER.search, contents(place)))
            if kind != "killed" and left:
                counts["litter"] += 1
                print(f"{writer}: {inject}: left behind {left}")
            WRITERS[writer](place / "target", 0, base)
            if contents(place) != references[0]:
                counts["litter"] += 1
                print(f"{writer}: {inject}: litter {sorted(contents(place).keys() ^ references[0].keys())}")
            shutil.rmtree(place)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description="Stop every writer at every system call that changes the disk.")
    parser.add_argument("writers", nargs="*", help=f"of {', '.join(WRITERS)}; all, if none is named")
    parser.add_argument("--points", type=int, help="calls of each kind, spread evenly; all by default")
    parser.add_argument("--once", nargs=4, metavar=("WRITER", "TARGET", "NUMBER", "BASE"))
    given = parser.parse_args()
    if given.once:
        writer, target, number, base = given.once
        try:
            WRITERS[writer](Path(target), int(number), Path(base))
        except (OSError, StateFormatError) as error:
            print(error)
            return 3
        return 0
    failed = False
    for writer in given.writers or WRITERS:
        with tempfile.TemporaryDirectory() as folder:
            counts = stop_at_every_call(writer, Path(folder), given.points)
        kinds = ("killed", "ENOSPC", "EIO", "EINVAL", "old", "new", "lost", "litter")
        print(f"{writer}:", ", ".join(f"{counts[kind]} {kind}" for kind in kinds), flush=True)
        failed = failed or counts["lost"] + counts["litter"] > 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
