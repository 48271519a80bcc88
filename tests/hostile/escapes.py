"""Names that try to lead out of a folder, for every reader and writer that makes a path of a name in a file.

An input is a checkpoint, or a state, in which names, slots, tags, keys and members of indexes are replaced by paths. It
is read, and what could be read is written in every format. An audit hook sees each file that is opened, made, renamed
or removed meanwhile. A finding is: a file outside the source and the target; a name in the target that is not plain and
printable; anything changed outside the target; an exception that is not in ``lora_state_format.errors``; anything left
where nothing should be. Inputs depend on the seed and their number alone::

    python tests/hostile/escapes.py --seconds 3600
    python tests/hostile/escapes.py --first 4711 --count 1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import site
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from lora_state_format import registry
from lora_state_format.errors import StateFormatError
from lora_state_format.foreign import dcp, pickles, torch_save
from lora_state_format.foreign.pickles import Record
from lora_state_format.format import writing
from lora_state_format.io import plain
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import (
    Group,
    Naming,
    Optimizer,
    OptimizerState,
    Parameter,
    PositionalState,
    Role,
    Scalar,
    Slot,
    Value,
)
from lora_state_format.model.tensors import Tensor, contiguous
from lora_state_format.operations import export

NAMES: Final = ("w", "layers.0.weight", "base_model.model.layers.0.q_proj.lora_A.default.weight")
SLOTS: Final = ("step", "exp_avg", "exp_avg_sq", "master_param")


# --- names ----------------------------------------------------------------------------------------------------------

SEPARATORS: Final = ("/", "/", "/", "//", "\\", "\0", ":", "\n", "/./", "%2f", "\u2215", "\uff0f")
PARTS: Final = (
    "..", "..", "..", ".", "", "~", "$HOME", "*", "-rf", "outside", "PWNED", "canary", "zero", "w", "exp_avg", "fp32",
    "latest", "latest_universal", "optimizer", "model", ".metadata", "__0_0.distcp", "x.pt", "step", "CON", "a" * 300,
    "\u202ecod", "\x1b[2J", "\udc80", "\uff0e\uff0e", "%2e%2e", "optimizer.safetensors", "optimizer_state.safetensors",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt", "model.safetensors", "global_step1_universal",
)  # fmt: skip


def hostile(chance: random.Random, root: Path) -> str:
    """A name that could lead somewhere else."""
    match chance.randrange(8):
        case 0:
            return "../" * chance.randrange(1, 12) + chance.choice(PARTS)
        case 1:
            return f"{root}/outside/{chance.choice(PARTS)}"
        case 2:
            return chance.choice(("/", "file://", "//")) + f"{root}/outside/x.distcp"
        case 3:
            return chance.choice(PARTS)
        case 4:
            return "../../../outside/" + chance.choice(PARTS)
        case _:
            separator = chance.choice(SEPARATORS)
            return separator.join(chance.choice(PARTS) for _ in range(chance.randrange(1, 6)))


def poisoned(tree: Any, chance: random.Random, root: Path, rate: float) -> Any:
    """The tree with some of its texts, keys included, replaced by hostile names."""

    def text(value: str) -> str:
        return hostile(chance, root) if chance.random() < rate else value

    if isinstance(tree, str):
        return text(tree)
    if isinstance(tree, dict):
        return {
            text(key) if isinstance(key, str) else key: poisoned(value, chance, root, rate)
            for key, value in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        return type(tree)(poisoned(value, chance, root, rate) for value in tree)
    if isinstance(tree, Record):
        return replace(
            tree, args=poisoned(tree.args, chance, root, rate), state=poisoned(tree.state, chance, root, rate)
        )
    return tree


# --- what there is to poison ------------------------------------------------------------------------------------------


def numbers(*shape: int) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return contiguous("F32", shape, Memory(bytes(range(4)) * count))


def a_state(chance: random.Random | None = None, root: Path = Path("/")) -> OptimizerState:
    """A state that every format can hold; with ``chance`` some of its names are hostile."""

    aim = chance.choice(("anything", "slot", "slot", "name", "optimizer", "option", "extra")) if chance else ""
    rate = chance.choice((0.02, 0.1, 0.3)) if chance else 0.0

    def text(value: str, what: str) -> str:
        aimed = 0.5 if aim == what else rate if aim == "anything" else 0.0
        return hostile(chance, root) if chance and chance.random() < aimed else value

    several = chance is not None and (aim == "optimizer" or chance.random() < 0.2)
    shared = {slot: text(slot, "slot") for slot in SLOTS}
    if aim == "slot":  # all else has to be in order, or a format refuses before it comes to this
        shared["master_param"] = "master_param"
    parameters = []
    for name in NAMES:
        called = {slot: text(slot, "slot") for slot in SLOTS} if aim == "anything" else shared
        slots: dict[str, Value] = {"step": Scalar.of("F32", 5.0)}
        slots |= {called[slot]: Slot(numbers(2, 2), Role.PARAM) for slot in SLOTS if slot != "step"}
        parameters.append(Parameter(text(name, "name") or "w0", (2, 2), slots, "F32"))
    last = text("k", "option")
    options: tuple[tuple[str, Value], ...] = (("lr", 1e-3), ("betas", (0.9, 0.999)), ("eps", 1e-8), (last, 0.0))
    optimizers = tuple(Optimizer("torch.optim.adamw.AdamW", text(name, "optimizer")) for name in ("a", "b"))
    groups = (Group(0, options, 1), Group(1, options, 2)) if several else (Group(0, options, 3),)
    extra = {text("note", "extra"): text("x", "extra")} if chance is not None else {}
    return OptimizerState(
        optimizers[: 1 + several], groups, tuple(parameters), Naming("model"), extra=extra, global_step=1
    )


def make_base(folder: Path) -> None:
    """What ``deepspeed_universal`` takes the rest from."""
    folder.mkdir()
    shapes = [{name: Record("torch", "Size", ((2, 2),)) for name in NAMES}]
    model = {"param_shapes": shapes, "module": {}, "ds_version": "0.19", "global_steps": 1}
    inner = {"state": {0: {}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    optimizer = {"zero_stage": 1, "base_optimizer_state": inner}
    torch_save.save(model, folder / "mp_rank_00_model_states.pt")
    torch_save.save({"optimizer_state_dict": optimizer}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


Sources = dict[str, Callable[[Path, random.Random, Path], Path]]
"""Makes a hostile checkpoint in a folder from a genuine one; what is returned is to be read."""


def genuine(root: Path, name: str) -> Path:
    """A checkpoint of a format, made once."""
    path = root / "genuine" / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        if not (root / "genuine" / "base").exists():
            make_base(root / "genuine" / "base")
        write(a_state(), path, name, root / "genuine" / "base", force=False)
    return path


def repacked(path: Path, chance: random.Random, root: Path) -> None:
    """A file of ``torch.save`` with hostile names in it."""
    tree = pickles.load(Memory(path.read_bytes()), path).value
    data = b"".join(map(bytes, torch_save.pack(poisoned(tree, chance, root, 0.2))))
    path.write_bytes(data)


def rewritten(path: Path, chance: random.Random, root: Path) -> None:
    """A file of JSON with hostile names in it."""
    path.write_text(json.dumps(poisoned(json.loads(path.read_text()), chance, root, 0.3)))


def from_universal(folder: Path, chance: random.Random, root: Path) -> Path:
    shutil.copytree(genuine(root, "deepspeed_universal"), folder)
    tag = folder / "global_step1_universal"
    match chance.randrange(3):
        case 0:
            (folder / "latest_universal").write_bytes(hostile(chance, root).encode("utf-8", "surrogatepass"))
        case 1:
            repacked(tag / "mp_rank_00_model_states.pt", chance, root)
        case 2:
            repacked(tag / "zero" / "optimizer_state.pt", chance, root)
    return folder


def from_zero(folder: Path, chance: random.Random, root: Path) -> Path:
    shutil.copytree(root / "genuine" / "base", folder / "tag")
    (folder / "latest").write_bytes(hostile(chance, root).encode("utf-8", "surrogatepass"))
    if chance.random() < 0.3:
        repacked(folder / "tag" / "mp_rank_00_model_states.pt", chance, root)
    return folder


def from_dcp(folder: Path, chance: random.Random, root: Path) -> Path:
    shutil.copytree(genuine(root, "dcp"), folder)
    meta = folder / dcp.METADATA
    tree = pickles.load_plain(meta.read_bytes())
    if chance.random() < 0.7:  # only where the bytes are
        for info in tree.state["storage_data"].values():
            if chance.random() < 0.3:
                info.state["relative_path"] = hostile(chance, root)
    else:
        tree = poisoned(tree, chance, root, 0.05)
    meta.write_bytes(torch_save.dumps(tree))
    return folder


def from_paddle(folder: Path, chance: random.Random, root: Path) -> Path:
    shutil.copytree(genuine(root, "paddlenlp"), folder)
    rewritten(folder / "optimizer.safetensors.index.json", chance, root)
    return folder


def from_trainer(folder: Path, chance: random.Random, root: Path) -> Path:
    folder.mkdir()
    shutil.copy(genuine(root, "torch_optimizer"), folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text('{"global_step": 5}')
    names = dict.fromkeys(NAMES, "model-00001-of-00001.safetensors")
    plain.save({name: numbers(2, 2) for name in NAMES}, folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    rewritten(folder / "model.safetensors.index.json", chance, root)
    return folder


def from_set(folder: Path, chance: random.Random, root: Path) -> Path:
    folder.mkdir()
    writing.write(a_state(), folder / "optimizer.safetensors", max_shard_size=70)
    index = folder / "optimizer.safetensors.index.json"
    rewritten(index, chance, root)
    return index


def from_lerobot(folder: Path, chance: random.Random, root: Path) -> Path:
    shutil.copytree(genuine(root, "lerobot"), folder)
    keys = {f"state/{n}/{slot}": numbers(2, 2) for n in range(3) for slot in SLOTS}
    plain.save(
        {poisoned(key, chance, root, 0.3): tensor for key, tensor in keys.items() if "\udc80" not in key},
        folder / "optimizer_state.safetensors",
        force=True,
    )
    rewritten(folder / "optimizer_param_groups.json", chance, root)
    return folder


def from_accelerate(folder: Path, chance: random.Random, root: Path) -> Path:
    folder.mkdir()
    shutil.copy(genuine(root, "torch_optimizer"), folder / "optimizer.bin")
    repacked(folder / "optimizer.bin", chance, root)
    return folder


def from_zip(folder: Path, chance: random.Random, root: Path) -> Path:
    """The archive of stable-baselines3, whose members have hostile names."""
    import zipfile

    folder.mkdir()
    path = folder / "agent.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            name = hostile(chance, root).replace("\0", "").encode("utf-8", "replace").decode()[:200] or "x"
            archive.writestr(
                f"{name}{chance.choice(('', 'optimizer.pth'))}", genuine(root, "torch_optimizer").read_bytes()
            )
    return path


def from_orbax(folder: Path, chance: random.Random, root: Path) -> Path:
    folder.mkdir()
    keys = [poisoned(key, chance, root, 0.4) for key in (("0", "count"), ("0", "mu", "w"), ("0", "nu", "w"))]
    entries = {
        str(keys): {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],
            "value_metadata": {"value_type": "jax.Array"},
        }
        for path in keys
    }
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": entries, "use_zarr3": False}))
    return folder


SOURCES: Final[Sources] = {
    "deepspeed_universal": from_universal, "deepspeed_zero": from_zero, "dcp": from_dcp, "paddlenlp": from_paddle,
    "torch_optimizer": from_trainer, "named": from_set, "lerobot": from_lerobot, "accelerate": from_accelerate,
    "zip": from_zip, "orbax": from_orbax,
}  # fmt: skip


# --- what is done with it ---------------------------------------------------------------------------------------------

TOLD: Final = {"masters": True, "optimizer": "adamw", "map": "none"}
"""Options for reading."""

OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "mlx": {"map": "none"}, "flax_msgpack": {"map": "none"}, "paddlenlp": {"map": "none", "masters": True},
}  # fmt: skip
WRITERS: Final = (
    "accelerate", "dcp", "dcp:flattened", "deepspeed_universal", "flax_msgpack", "lerobot", "mlx", "named", "paddlenlp",
    "torch_optimizer", "export", "set",
)  # fmt: skip


def write(state: OptimizerState, path: Path, name: str, base: Path, *, force: bool) -> None:
    if name in ("mlx", "flax_msgpack"):  # which have no place for master weights
        kept = [{k: v for k, v in (p.state or {}).items() if k != "master_param"} for p in state.parameters]
        state = replace(
            state, parameters=tuple(replace(p, state=s) for p, s in zip(state.parameters, kept, strict=True))
        )
    if name == "export":
        export.export(state, path, "exp_avg", force=force)
    elif name == "set":
        writing.write(state, path, force=force, max_shard_size=70)
    else:
        writer = registry.writer(name.partition(":")[0])
        options = {"flattened": True} if name.endswith(":flattened") else OPTIONS.get(name, {})
        writer.write(
            state, path, base=base if writer.NAME == "deepspeed_universal" else None, force=force,
            options=registry.own_options(options, writer),
        )  # fmt: skip


def names_for(state: OptimizerState | PositionalState, chance: random.Random, root: Path) -> OptimizerState:
    if isinstance(state, OptimizerState):
        return state
    parameters = [
        Parameter(f"{n}.{hostile(chance, root)}", shape or (2, 2), None) for n, shape in enumerate(state.shapes())
    ]
    return state.named(parameters, Naming("names"))


class Watch:
    """Sees what is done to files, and says what should not be."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.allowed: tuple[str, ...] = ()
        self.folders: tuple[str, ...] = ()
        self.seen: list[str] = []
        paths = (*sys.path, *site.getsitepackages(), *sysconfig.get_paths().values(), sys.prefix, sys.base_prefix)
        self.program = tuple({os.path.realpath(path) for path in paths if path})
        self.on = False
        sys.dont_write_bytecode = True  # a reader that is imported now would be compiled next to its source
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or event not in EVENTS:
            return
        for path in arguments[: EVENTS[event]]:
            if isinstance(path, (str, bytes, os.PathLike)):
                self.check(event, os.fsdecode(path), arguments)

    def check(self, event: str, path: str, arguments: tuple[Any, ...]) -> None:
        whole = os.path.abspath(path)  # noqa: PTH100  # links are looked at, not followed
        if whole.startswith(self.allowed) or whole in self.folders:
            return
        changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        reads = event in ("os.listdir", "os.scandir") or (event == "open" and not arguments[2] & changes)
        if reads and os.path.realpath(whole).startswith((*self.program, "/proc/", "/sys/", "/usr/", "/dev/null")):
            return
        self.seen.append(f"{event} {path!r}")


EVENTS: Final = {
    "open": 1, "os.listdir": 1, "os.scandir": 1, "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1,
    "os.link": 2, "os.symlink": 2, "os.truncate": 1, "os.chmod": 1, "shutil.rmtree": 1, "shutil.copyfile": 2,
}  # fmt: skip
"""Audit events, and how many of their arguments are paths."""


def snapshot(root: Path, but: Path) -> dict[str, str]:
    """Every entry outside a folder, with a digest of what is in it."""
    found = {}
    for inner, folders, files in os.walk(root):
        folders[:] = [name for name in folders if Path(inner, name) != but]
        for name in (*folders, *files):
            path = Path(inner, name)
            data = path.read_bytes() if path.is_file() else b"folder"
            found[str(path)] = hashlib.blake2b(data, digest_size=8).hexdigest()
    return found


class Sandbox:
    """Folders with something worth reading, and worth overwriting, wherever a name could lead."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "genuine").mkdir()
        for name in WRITERS:
            if ":" not in name and name not in ("export", "set"):
                genuine(root, name)
        for number, place in enumerate((root, root / "outside", root / "a", root / "a" / "b")):
            place.mkdir(exist_ok=True)
            (place / "canary").write_text(str(number))
        outside = root / "outside"
        shutil.copy(genuine(root, "dcp") / "__0_0.distcp", outside / "x.distcp")
        shutil.copytree(genuine(root, "deepspeed_universal") / "global_step1_universal" / "zero", outside / "zero")
        for name in ("model.safetensors", "optimizer_state.safetensors", "optimizer.safetensors"):
            shutil.copy(genuine(root, "named"), outside / name)
        shutil.copytree(genuine(root, "dcp"), root / "a" / "b" / "PWNED")
        self.source = root / "a" / "b" / "c" / "source"
        self.target = root / "a" / "b" / "c" / "target"
        self.source.parent.mkdir()
        self.watch = Watch(root)

    def clear(self) -> None:
        for path in list(self.source.parent.iterdir()):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def watched(self, action: Callable[[], Any]) -> Any:
        beside, base = str(self.target.parent), str(self.root / "genuine" / "base")
        self.watch.allowed = (
            f"{self.source}/", f"{self.target}/", f"{beside}/.{self.target.name}.",
            f"{base}/", f"{self.target}-",
        )  # fmt: skip
        self.watch.folders = (str(self.source), str(self.target), beside, f"{self.target}.index.json", base)
        self.watch.on = True
        try:
            return action()
        finally:
            self.watch.on = False


def problems(box: Sandbox, before: dict[str, str], listed: set[str], lives: bool) -> Iterator[str]:
    yield from box.watch.seen
    after = snapshot(box.root, box.source.parent)
    if after != before:
        yield f"changed outside: {sorted(set(after.items()) ^ set(before.items()))[:3]}"
    for path in box.target.parent.iterdir():
        if path.name.startswith(".") or (not lives and path.name not in listed):
            yield f"left behind: {path.name!r}"
    if box.target.is_dir():
        for inner, folders, files in os.walk(box.target):
            for name in (*folders, *files):
                if not name.isprintable() or name.startswith(".."):
                    yield f"a name in the target: {name!r}"
                if Path(inner, name).is_symlink():
                    yield f"a link in the target: {name!r}"


def attempt(box: Sandbox, chance: random.Random, counts: Counter[str], kinds: Sequence[str]) -> list[str]:
    """One input: the problems that were found."""
    box.clear()
    box.watch.seen.clear()
    before = snapshot(box.root, box.source.parent)
    listed: set[str] = {"source"}
    found: list[str] = []
    kind = chance.choice(kinds)
    state: OptimizerState | None = None
    try:
        if kind == "state":
            state = a_state(chance, box.root)
            counts["states"] += 1
        else:
            try:
                path = SOURCES[kind](box.source, chance, box.root)
            except (StateFormatError, ValueError, OSError):  # no file can hold such names
                counts["not made"] += 1
                return []
            counts[f"read {kind}"] += 1
            checkpoint = box.watched(partial(registry.read, path, None, TOLD))
            counts["was read"] += 1
            state = names_for(checkpoint.state, chance, box.root)
    except StateFormatError:
        counts["refused to read"] += 1
    except FileNotFoundError as error:  # a path that the caller named
        found.append(traceback.format_exc() if str(box.source) not in str(error) else "")
    except Exception:
        found.append(traceback.format_exc())
    found = [problem for problem in found if problem]
    if state is not None:
        for name in chance.sample(WRITERS, 3):
            force = chance.random() < 0.5
            lives, listed = False, {path.name for path in box.target.parent.iterdir()}
            try:
                base = box.root / "genuine" / "base"
                box.watched(partial(write, state, box.target, name, base, force=force))
                counts[f"written {name}"] += 1
                lives = True
            except StateFormatError:
                counts[f"refused to write {name}"] += 1
            except Exception:
                found.append(f"{name}: {traceback.format_exc()}")
            found += [f"{name}: {problem}" for problem in problems(box, before, listed, lives)]
            box.watch.seen.clear()
            for path in list(box.target.parent.iterdir()):
                if path != box.source and chance.random() < 0.7:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        with state:
            pass
    return [*found, *problems(box, before, listed, True)]


def run(
    kinds: Sequence[str], *, seed: int = 0, first: int = 0, count: int | None = None, seconds: float | None = None
) -> tuple[Counter[str], int]:
    """Try inputs ``first``, ``first + 1``, ...; return what became of them, and how many had findings."""
    counts: Counter[str] = Counter()
    findings = 0
    stop = None if seconds is None else time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        # so deep that no number of steps up leads out of the temporary folder
        root = Path(os.path.realpath(folder), *map(str, range(20)))
        root.mkdir(parents=True)
        box = Sandbox(root)
        number = first
        while number - first != count and (stop is None or time.monotonic() < stop):
            found = attempt(box, random.Random(f"escapes {seed} {number}"), counts, kinds)
            for problem in found[:3]:
                print(f"--- --seed {seed} --first {number} --count 1\n{problem}", flush=True)
            findings += bool(found)
            number += 1
        counts["inputs"] = number - first
    return counts, findings


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Try names that lead out of a folder on every reader and writer.")
    parser.add_argument("kinds", nargs="*", help=f"what to poison, of {', '.join(SOURCES)} and state; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--count", type=int, help="inputs")
    parser.add_argument("--seconds", type=float, help="time")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    kinds = given.kinds or (*SOURCES, *(("state",) * 6))
    counts, findings = run(kinds, seed=given.seed, first=given.first, count=given.count, seconds=given.seconds)
    for what in sorted(counts):
        print(f"{what}: {counts[what]:,}")
    print(f"{findings} findings in {time.monotonic() - start:.0f} s")
    return min(findings, 1)


if __name__ == "__main__":
    sys.exit(main())
