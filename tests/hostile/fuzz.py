"""Inputs made at random out of genuine and hostile ones, for every reader of foreign bytes.

A reader may return or raise a ``StateFormatError``; anything else that escapes is a finding. Inputs depend on the seed
and their number alone, so that a finding can be made again::

    python tests/hostile/fuzz.py --seconds 600            # all targets, one after the other
    python tests/hostile/fuzz.py container --first 4711 --count 1
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from lora_state_format import registry
from lora_state_format.errors import FileError, StateFormatError
from lora_state_format.foreign import dcp, flax, pickles, torch_save
from lora_state_format.foreign.pickles import Global, Record
from lora_state_format.foreign.zips import Archive
from lora_state_format.format import envelope, reading, writing
from lora_state_format.io import safetensors
from lora_state_format.io.ledger import Ledger
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import Checkpoint, Naming, Parameter, PositionalState, Scalar
from lora_state_format.model.tensors import Tensor, contiguous

HERE: Final = Path(__file__).parent
VECTORS: Final = HERE.parents[1] / "spec" / "vectors"

Make = Callable[[random.Random], bytes]
Read = Callable[[bytes, Path], None]


@dataclass(frozen=True)
class Target:
    """What makes an input, and what reads it from bytes, with a folder to put files in."""

    make: Make
    read: Read


@dataclass
class Result:
    """What became of the inputs of one target."""

    inputs: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    findings: list[tuple[int, str]] = field(default_factory=list)

    def line(self, name: str) -> str:
        rules = sum(rule[1:].isdecimal() for rule in self.refused)
        cited = f", {rules} rules cited" if rules else ""
        return (
            f"{name}: {self.inputs:,} inputs, {self.accepted:,} read, {sum(self.refused.values()):,} refused{cited}; "
            f"slowest {self.slowest:.2f} s; {len(self.findings)} findings"
        )


# --- changing bytes and trees -------------------------------------------------------------------------------------

EDGES: Final = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)


def changed(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """The bytes with one to eight changes: bits, integers at the edges, pieces cut out, doubled, or of other inputs."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 8))):
        at = chance.randrange(len(out) + 1)
        size = min(chance.choice((1, 1, 2, 4, 8, 64)), len(out) - at)
        match chance.choice((0, 0, 1, 1, 2, 2, 2, 3, 4, 5, 5, 6)):
            case 0:
                out[at : at + 1] = bytes([(out[at] if at < len(out) else 0) ^ 1 << chance.randrange(8)])
            case 1:
                out[at : at + 1] = bytes([chance.randrange(256)])
            case 2:
                width = chance.choice((1, 2, 4, 8))
                value = chance.choice(EDGES) + chance.choice((-1, 0, 0, 1))
                out[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, chance.choice(("little", "big")))
            case 3:
                del out[at : at + size]
            case 4:
                out[at:at] = out[at : at + size] * chance.choice((1, 2, 16))
            case 5:
                other = chance.choice(others)
                start = chance.randrange(len(other) + 1)
                out[at : at + size] = other[start : start + size]
            case 6:
                del out[at if chance.random() < 0.1 else len(out) - size :]
    return bytes(out)


ODD: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, -0.0, 0.5, 1e308, "", "$", "w", "0", "\x00", "\x1b[2J", "../x", "a/b",
    "é\U0001f600", {}, {"$": 1},
)  # fmt: skip
ODD_JSON: Final = (
    *ODD, [], [[]], [0], [1, 2], 2**64, 10**30, {"": 0}, {"$tuple": []}, {"$dict": [[1, 2]]}, {"$float": "nan"},
    {"$int": "9" * 40}, {"$scalar": ["F32", "00000000"]}, {"$bytes": "00"}, {"$tensor": "x", "role": "param"},
)  # fmt: skip


def regrown(tree: Any, chance: random.Random, odd: Sequence[Any] = ODD_JSON) -> Any:
    """The tree with one to four of its nodes replaced, removed, doubled or exchanged."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        nodes = [(None, None, tree), *_below(tree)]
        holder, key, node = chance.choice(nodes)
        if holder is None:
            continue
        match chance.randrange(5):
            case 0 | 1:
                holder[key] = _copy(chance.choice(odd))
            case 2:
                del holder[key]
            case 3:
                holder[key] = _copy(chance.choice(nodes)[2])
            case 4:
                name = _copy(chance.choice(odd))
                if isinstance(holder, dict):
                    holder[name if isinstance(name, (str, int)) else "odd"] = _copy(node)
                else:
                    holder.insert(key, _copy(node))
    return tree


def _below(tree: Any) -> list[tuple[Any, Any, Any]]:
    """Every node with the list or dict that holds it."""
    found = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, node in items:
        found.append((tree, key, node))
        found += _below(node)
    return found


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(node) for key, node in tree.items()}
    return [_copy(node) for node in tree] if isinstance(tree, list) else tree


def mutated(seeds: Callable[[], Sequence[bytes]], repair: Callable[[bytes], bytes] | None = None) -> Make:
    """Changed seeds; every other one repaired, so that the checks behind a checksum are reached too."""

    def make(chance: random.Random) -> bytes:
        data = changed(chance.choice(seeds()), chance, seeds())
        return repair(data) if repair and chance.random() < 0.5 else data

    return make


# --- named optimizer state ----------------------------------------------------------------------------------------


@cache
def files() -> list[bytes]:
    return [path.read_bytes() for path in sorted(VECTORS.glob("*valid/*.safetensors"))]


@cache
def manifests() -> list[tuple[Any, list[tuple[str, Any]], bytes]]:
    """Manifest, entries and data of each valid vector of one file."""
    found = []
    for path in sorted((VECTORS / "valid").glob("*.safetensors")):
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        members = json.loads(header.pop("__metadata__")["optimizer_state"])["manifest"]
        found.append((members, list(header.items()), raw[end:]))
    return found


def packed(manifest: Any, entries: Any, data: bytes) -> bytes:
    """A file with a digest that is right, whatever the manifest says."""
    state = '{"digest":"' + "0" * 32 + '","manifest":' + json.dumps(manifest) + "}"
    body = ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries)
    header = '{"__metadata__":' + json.dumps({"optimizer_state": state}, separators=(",", ":")) + f",{body}}}"
    raw = header.replace(",}", "}").encode()
    raw += b" " * (-(8 + len(raw)) % safetensors.ALIGNMENT)
    return sealed(len(raw).to_bytes(8, "little") + raw) + data


def sealed(data: bytes) -> bytes:
    """The file with the digest that its header has now."""
    end = 8 + int.from_bytes(data[:8], "little")
    start = 8 + len(envelope.PREFIX)
    if end > min(len(data), 1 << 20) or end < start + 32:
        return data
    return data[:start] + envelope.header_digest(data[:end]).encode() + data[start + 32 :]


def make_manifest(chance: random.Random) -> bytes:
    manifest, entries, data = chance.choice(manifests())
    manifest = regrown(_copy(manifest), chance)
    if chance.random() < 0.2:
        entries = [(name, regrown(_copy(entry), chance)) for name, entry in entries]
    return packed(manifest, entries, data)


def read_container(data: bytes, folder: Path) -> None:
    """What opens can be verified, and, where the digests are right, written; and that reads back as the same."""
    path = folder / "optimizer.safetensors"
    path.write_bytes(data)
    with reading.open_state(path) as state:
        if not reading.verify(path).ok:
            return
        try:
            writing.write(state, folder / "again.safetensors", force=True)
        except StateFormatError:
            return
    with reading.open_state(folder / "again.safetensors") as again:
        assert list(again) == list(state)
        assert again.groups == state.groups or "nan" in repr(state.groups)


def make_index(chance: random.Random) -> bytes:
    index = next((VECTORS / "valid" / "set").glob("*.index.json")).read_bytes()
    if chance.random() < 0.3:
        return changed(index, chance, [index])
    return json.dumps(regrown(json.loads(index), chance)).encode()


def read_set(data: bytes, folder: Path) -> None:
    for shard in (VECTORS / "valid" / "set").glob("*.safetensors"):
        if not (folder / shard.name).exists():
            (folder / shard.name).write_bytes(shard.read_bytes())
    index = folder / "optimizer.safetensors.index.json"
    index.write_bytes(data)
    try:
        reading.open_state(index).close()
    finally:
        index.unlink()


# --- files of torch.save ------------------------------------------------------------------------------------------


def numbers(*shape: int, dtype: str = "F32") -> Tensor:
    tensor = contiguous(dtype, shape, Memory(bytes(4096)))
    return contiguous(dtype, shape, Memory(bytes(range(64)) * (tensor.size // 64 + 1)))


def state_dict() -> dict[str, Any]:
    moments = {"exp_avg": numbers(2, 3), "exp_avg_sq": numbers(2, 3), "step": Scalar("F32", bytes(4))}
    quantised = {"state1": numbers(8, dtype="U8"), "absmax1": numbers(1), "qmap1": numbers(256), "step": 3}
    group = {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0, "foreach": None, "params": [0, 1, 2]}
    return {"state": {0: moments, 1: quantised, 2: {}}, "param_groups": [group, {**group, "params": []}]}


TREES: Final[tuple[Callable[[], dict[str, Any]], ...]] = (
    state_dict,
    lambda: {"optimizer": state_dict(), "model": {"w": numbers(2, 3)}, "epoch": 1},
    lambda: {"optimizer_states": [state_dict(), state_dict()], "lr_schedulers": [{"last_epoch": 3}]},
)
ODD_ARRAYS: Final = (*ODD, b"\0", numbers(0, 3), numbers(2, 3, dtype="BF16"), numbers(1024), Scalar("F64", bytes(8)))
ODD_VALUES: Final = (
    *ODD_ARRAYS, [], [[]], [0], [1, 2], 2**64, (1, (2,)), {1: 2}, {None: 0},
    Record("collections", "OrderedDict"), Record("torch", "Size", ((1,),)), Record("torch", "device", ("cuda",)),
    Record("argparse", "Namespace", (), {"a": 1}), Record("numpy", "dtype", ("f8",)), Global("torch", "float32"),
)  # fmt: skip


def archived(value: Any) -> bytes:
    return b"".join(bytes(chunk) for chunk in torch_save.archive(value, Ledger()))


@cache
def corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hostile_pickles", HERE / "hostile_pickles.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def archives() -> list[bytes]:
    hostile = (case.make() for case in corpus().CASES.values())
    return [*(archived(tree()) for tree in TREES), *(data for data in hostile if len(data) < 1 << 16)]


@cache
def programs() -> list[dict[str, bytes]]:
    """The members of the archives that have a pickle; those of genuine ones first."""
    found = (_members(data) for data in archives())
    return [members for members in found if any("data.pkl" in name for name in members)]


def _members(data: bytes) -> dict[str, bytes]:
    try:
        archive = Archive(Memory(data))
        return {name: bytes(archive[name].bytes()) for name in archive}
    except FileError:
        return {}


def make_program(chance: random.Random) -> bytes:
    """A changed pickle in its archive, with a CRC that is right."""
    pool = programs()[: len(TREES)] if chance.random() < 0.5 else programs()
    members = dict(chance.choice(pool))
    name = next(name for name in members if "data.pkl" in name)
    others = [other for held in pool for member, other in held.items() if "data.pkl" in member]
    members[name] = changed(members[name], chance, others)
    whole: bytes = corpus().archive(members)
    return whole


def make_state_dict(chance: random.Random) -> bytes:
    try:
        return archived(regrown(chance.choice(TREES)(), chance, ODD_VALUES))
    except (StateFormatError, OverflowError, ValueError, TypeError):  # no pickle can hold it
        return archived(TREES[0]())


def read_archive(data: bytes, folder: Path) -> None:
    found = pickles.load(Memory(data), "fuzzed.pt")
    for tensor in _tensors(found.value):
        if tensor.size < 1 << 20:
            tensor.bytes()


def _tensors(value: Any, depth: int = 0) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if depth == 6 or not isinstance(value, (dict, list, tuple)):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [tensor for item in list(inner)[:20] for tensor in _tensors(item, depth + 1)]


def read_state_dict(data: bytes, folder: Path) -> None:
    path = folder / "optimizer.pt"
    path.write_bytes(data)
    write_converted(registry.read(path, "torch_optimizer"), folder)


def write_converted(checkpoint: Checkpoint, folder: Path) -> None:
    """What a converter reads can be named, written and opened, or is refused in words."""
    state = checkpoint.state
    if isinstance(state, PositionalState):
        parameters = [Parameter(f"layers.{n}.weight", shape or (2, 3), None) for n, shape in enumerate(state.shapes())]
        state = state.named(parameters, Naming("names"))
    with state:
        writing.write(state, folder / "converted.safetensors", force=True)
    reading.open_state(folder / "converted.safetensors").close()


# --- msgpack and DCP ----------------------------------------------------------------------------------------------


def flax_tree() -> dict[str, Any]:
    moments = {"dense": {"kernel": numbers(2, 3), "bias": numbers(3)}}
    adam = {"count": Scalar("I32", b"\3\0\0\0"), "mu": moments, "nu": _copy(moments)}
    return {"0": adam, "1": {}, "2": {"count": Scalar("I32", b"\3\0\0\0")}}


@cache
def messages() -> list[bytes]:
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": numbers(1), "1": numbers(1)}}
    trees = [flax_tree(), {"opt_state": flax_tree(), "params": {"w": numbers(2, 3)}, "step": 3}, {"0": {"mu": chunked}}]
    return [b"".join(bytes(chunk) for chunk in flax.packed(tree)) for tree in trees]


def make_message(chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        return changed(chance.choice(messages()), chance, messages())
    return b"".join(bytes(chunk) for chunk in flax.packed(regrown(flax_tree(), chance, ODD_ARRAYS)))


def read_message(data: bytes, folder: Path) -> None:
    path = folder / "opt_state.msgpack"
    path.write_bytes(data)
    write_converted(registry.read(path, "flax_msgpack", {"optimizer": "adamw"}), folder)


def _entries() -> dict[tuple[Any, ...], Any]:
    slots = {name: {"exp_avg": numbers(2, 3), "exp_avg_sq": numbers(2, 3), "step": 3} for name in ("a.w", "b.w")}
    entries: dict[tuple[Any, ...], Any] = {
        ("optim", "state", name, slot): value for name, entry in slots.items() for slot, value in entry.items()
    }
    return {**entries, ("optim", "param_groups"): [{"lr": 1e-3, "params": list(slots)}]}


@cache
def dcp_folder() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        dcp.write_folder(_entries(), Path(folder, "made"))
        return {path.name: path.read_bytes() for path in Path(folder, "made").iterdir()}


def make_metadata(chance: random.Random) -> bytes:
    plain = dcp_folder()[dcp.METADATA]
    if chance.random() < 0.3:
        return changed(plain, chance, [plain, torch_save.dumps({"state": 1})])
    tree = pickles.load_plain(plain)
    nodes = _records(tree)
    for _ in range(chance.choice((1, 1, 2))):
        holder = chance.choice(nodes)
        key = chance.choice(list(holder))
        sizes = (0, 0), (2, 3), (1 << 62, 1 << 62), (0, 2, 3)
        holder[key] = chance.choice((*ODD, *sizes, *holder.values()))
    try:
        return torch_save.dumps(tree)
    except (StateFormatError, ValueError):
        return plain


def _records(tree: Any) -> list[dict[Any, Any]]:
    """Every dict with something in it: those of records too."""
    if isinstance(tree, Record):
        return [*_records(tree.state), *(found for item in tree.args for found in _records(item))]
    if isinstance(tree, dict):
        return [*([tree] if tree else []), *(found for item in (*tree.values(), *tree) for found in _records(item))]
    return [found for item in tree for found in _records(item)] if isinstance(tree, (list, tuple)) else []


def read_metadata(data: bytes, folder: Path) -> None:
    for name, content in (dcp_folder() | {dcp.METADATA: data}).items():
        (folder / name).write_bytes(content)
    write_converted(registry.read(folder, "dcp"), folder)


# --- models' configs ----------------------------------------------------------------------------------------------

SIZES: Final[dict[str, Any]] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
CONFIGS: Final[tuple[dict[str, Any], ...]] = (
    {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **SIZES,
        "layer_types": ["full_attention"] * 2, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    },
    {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **SIZES, "head_dim": 8, "num_experts": 4},
    {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 32, "d_ff": 48, "d_kv": 8,
     "num_layers": 2, "num_heads": 4, "vocab_size": 64},
    {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
     "text_config": {"model_type": "qwen2", **SIZES}, "vision_config": {"model_type": "clip_vision_model", **SIZES}},
)  # fmt: skip
LORA: Final[dict[str, Any]] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none", "modules_to_save": None,
    "target_modules": ["q_proj", "q"], "rank_pattern": {"q_proj": 2}, "layers_to_transform": [0], "auto_mapping": None,
}  # fmt: skip


def make_configs(chance: random.Random) -> bytes:
    """A model's configuration and an adapter's, as a list."""
    pair = [_copy(chance.choice(CONFIGS)), _copy(LORA)]
    untouched = chance.randrange(3)
    return json.dumps([part if n == untouched else regrown(part, chance) for n, part in enumerate(pair)]).encode()


def read_configs(data: bytes, folder: Path) -> None:
    from lora_state_format.torch.rebuild import rebuild

    for name, members in zip(("config.json", "adapter_config.json"), json.loads(data), strict=True):
        (folder / name).write_text(json.dumps(members))
    rebuild(folder)


TARGETS: Final[dict[str, Target]] = {
    "container": Target(mutated(files, sealed), read_container),
    "manifest": Target(make_manifest, read_container),
    "set": Target(make_index, read_set),
    "zip": Target(mutated(archives), read_archive),
    "pickle": Target(make_program, read_archive),
    "state_dict": Target(make_state_dict, read_state_dict),
    "msgpack": Target(make_message, read_message),
    "dcp": Target(make_metadata, read_metadata),
    "configs": Target(make_configs, read_configs),
}


# --- running ------------------------------------------------------------------------------------------------------


def run(name: str, *, seed: int = 0, first: int = 0, count: int | None = None, seconds: float | None = None) -> Result:
    """Inputs ``first``, ``first + 1``, ... of a target, as many as are asked for, or for so long."""
    target, result = TARGETS[name], Result()
    stop = None if seconds is None else time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while result.inputs != count and (stop is None or time.monotonic() < stop):
            number = first + result.inputs
            data = target.make(random.Random(f"{name} {seed} {number}"))
            start = time.process_time()
            try:
                target.read(data, Path(folder))
                result.accepted += 1
            except StateFormatError as error:
                result.refused[str(getattr(error, "rule", None) or type(error).__name__)] += 1
            except Exception:  # whatever it is, it is what is looked for
                result.findings.append((number, traceback.format_exc()))
            result.slowest = max(result.slowest, time.process_time() - start)
            result.inputs += 1
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Try random inputs on the readers of foreign bytes.")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all, if none is named")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--count", type=int, help="inputs for each target")
    parser.add_argument("--seconds", type=float, help="time for all targets together")
    given = parser.parse_args(arguments)
    names = given.targets or list(TARGETS)
    share = None if given.seconds is None else given.seconds / len(names)
    findings = 0
    for name in names:
        result = run(name, seed=given.seed, first=given.first, count=given.count, seconds=share)
        for number, trace in result.findings[:5]:
            print(f"--- {name} --seed {given.seed} --first {number} --count 1\n{trace}", flush=True)
        print(result.line(name), flush=True)
        findings += len(result.findings)
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
    return min(findings, 1)


if __name__ == "__main__":
    sys.exit(main())
