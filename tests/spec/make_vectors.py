"""Makes the files of ``spec/vectors``: ``python tests/spec/make_vectors.py`` writes those that are missing.

It never replaces one: the vectors are the format, and a file that would come out differently is an error. The valid
ones are mostly what the package writes; everything else is put together here, from bytes, by the text.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import xxhash

from lora_state_format.format import writing
from lora_state_format.io.strict_json import dumps
from lora_state_format.model.dtypes import BITS
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
from lora_state_format.model.tensors import Digest, contiguous

FOLDER: Final = Path(__file__).parents[2] / "spec" / "vectors"
NAME: Final = "optimizer.safetensors"
"""The path to open in a folder that holds a set."""

ZERO: Final = "0" * 32


class Vector(NamedTuple):
    """One vector: its name, its files (one without a name, or those of a set), and what is said of it."""

    name: str
    files: dict[str, bytes]
    expected: dict[str, Any]


# --- by the text --------------------------------------------------------------------------------------------------


def text(value: Any) -> str:
    """Canonical JSON, as far as values here need it."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def xxh3(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()


def blake(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


F32: Final = struct.pack("<2f", 1.0, -2.0)
DATA: Final[dict[str, tuple[str, list[int], bytes]]] = {"w/momentum": ("F32", [2], F32)}
TREE: Final = {"momentum": {"$tensor": "momentum", "role": "param"}}


def manifest(data: Mapping[str, tuple[str, list[int], bytes]] = DATA, **members: Any) -> dict[str, Any]:
    """A small manifest with some members changed; ``None`` takes one away."""
    digests = {"algorithm": "xxh3-128", "values": [xxh3(tensor[2]) for tensor in data.values()]}
    result = {
        "format": "named-optimizer-state",
        "version": "1.0",
        "optimizers": [{"class": "torch.optim.sgd.SGD"}],
        "groups": [{"optimizer": 0, "count": 1, "options": [["lr", 0.5]]}],
        "parameters": [{"name": "w", "shape": [2], "state": 0}],
        "states": [TREE],
        "naming": {"source": "model"},
        "digests": digests,
        **members,
    }
    return {key: value for key, value in result.items() if value is not None}


def entries(data: Mapping[str, tuple[str, list[int], bytes]] = DATA) -> dict[str, Any]:
    result, position = {}, 0
    for key, (dtype, shape, content) in data.items():
        offsets = [position, position + len(content)]
        result[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        position = offsets[1]
    return result


def envelope(members: dict[str, Any] | str) -> str:
    return f'{{"digest":"{ZERO}","manifest":{members if isinstance(members, str) else text(members)}}}'


def header(metadata: str | dict[str, str], tensors: str | dict[str, Any]) -> str:
    """A header's text; ``tensors`` as text begin with a comma."""
    if isinstance(metadata, str):
        metadata = {"optimizer_state": metadata}
    if not isinstance(tensors, str):
        tensors = "".join(
            f',{text(key)}:{{"dtype":{text(e.pop("dtype"))},"shape":{text(e.pop("shape"))}'
            f',"data_offsets":{text(e.pop("data_offsets"))}{"".join(f",{text(k)}:{text(v)}" for k, v in e.items())}}}'
            for key, e in tensors.items()
        )
    return f'{{"__metadata__":{text(metadata)}{tensors}}}'


def sealed(head: str | bytes, data: bytes = F32, *, pad: bool = True) -> bytes:
    """A file of a header and data: padded, its digest filled in where there is one."""
    raw = head.encode() if isinstance(head, str) else head
    raw += b" " * (-(8 + len(raw)) % 64 if pad else 0)
    raw = len(raw).to_bytes(8, "little") + raw
    zeros = b'{"__metadata__":{"optimizer_state":"{\\"digest\\":\\"' + ZERO.encode()
    if raw[8:].startswith(zeros):
        raw = raw.replace(ZERO.encode(), blake(raw).encode(), 1)
    return raw + data


def of(members: dict[str, Any] | str, data: Mapping[str, tuple[str, list[int], bytes]] = DATA) -> bytes:
    """A file of a manifest."""
    return sealed(header(envelope(members), entries(data)), b"".join(tensor[2] for tensor in data.values()))


Part = tuple[dict[str, Any], dict[str, tuple[str, list[int], bytes]]]


def parts() -> list[Part]:
    """Two shards of three parameters: two in a group, and one that is carried."""
    one: dict[str, tuple[str, list[int], bytes]] = {"a/momentum": ("F32", [2], F32), "b/momentum": ("F32", [2], F32)}
    two: dict[str, tuple[str, list[int], bytes]] = {"c/momentum": ("F32", [2], F32)}
    group = {"optimizer": 0, "options": [["lr", 0.5]]}
    return [
        (
            manifest(
                one,
                parameters=[{"name": name, "shape": [2], "state": 0} for name in "ab"],
                groups=[{**group, "count": 2}],
                set={"id": ZERO, "index": 1, "count": 2, "positions": [0, 1]},
                origin={"format": "torch_optimizer"},
            ),
            one,
        ),
        (
            manifest(
                two,
                parameters=[{"name": "c", "shape": [2], "state": 0}],
                groups=[{**group, "count": 0}],
                set={"id": ZERO, "index": 2, "count": 2, "positions": [2]},
            ),
            two,
        ),
    ]


def index(metadata: dict[str, Any], shards: list[dict[str, Any]], weight_map: dict[str, str]) -> dict[str, Any]:
    return {"metadata": metadata, "shards": shards, "weight_map": weight_map}


def set_of(
    shards: Sequence[Part], change: Callable[[dict[str, Any]], Any] = lambda index: index, identity: str | None = None
) -> dict[str, bytes]:
    """The files of a set. ``change`` has the last word on the index, ``identity`` on the set's id."""
    if identity is None:
        contents = [blake(raw.replace(_digest(raw), ZERO.encode())) for raw in _raws(shards, ZERO)]
        identity = blake("".join(contents).encode())
    raws = _raws(shards, identity)
    names = [f"optimizer-{identity[:8]}-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    members = index(
        {
            "format": "named-optimizer-state",
            "set": identity,
            "total_size": sum(len(tensor[2]) for _, data in shards for tensor in data.values()),
        },
        [{"digest": _digest(raw).decode(), "file": name} for raw, name in zip(raws, names, strict=True)],
        {key: name for name, (_, data) in zip(names, shards, strict=True) for key in data},
    )
    files = {
        name: raw + b"".join(tensor[2] for tensor in data.values())
        for name, raw, (_, data) in zip(names, raws, shards, strict=True)
    }
    changed = change(members)
    return {f"{NAME}.index.json": changed if isinstance(changed, bytes) else text(changed).encode(), **files}


def _raws(shards: Sequence[Part], identity: str) -> list[bytes]:
    result = []
    for members, data in shards:
        if "set" in members:
            members = {**members, "set": {**members["set"], "id": members["set"]["id"].replace(ZERO, identity)}}
        result.append(sealed(header(envelope(members), entries(data)), b""))
    return result


def _digest(raw: bytes) -> bytes:
    return raw[58:90]


# --- valid --------------------------------------------------------------------------------------------------------


def tensor(dtype: str, shape: Sequence[int], role: Role = Role.OPAQUE, *, seed: int = 0) -> Slot:
    """A tensor of bytes that depend on its dtype, shape and a seed."""
    size = BITS[dtype]
    for n in shape:
        size *= n
    stream = hashlib.shake_128(f"{dtype} {list(shape)} {seed}".encode()).digest(size // 8)
    data = bytes(byte & 1 for byte in stream) if dtype == "BOOL" else stream
    return Slot(contiguous(dtype, shape, Memory(data)), role)


def step(count: float) -> Scalar:
    return Scalar("F32", struct.pack("<f", count))


def adam(shape: Sequence[int], count: float, seed: int) -> dict[str, Value]:
    slots = {name: tensor("F32", shape, Role.PARAM, seed=seed + n) for n, name in enumerate(("exp_avg", "exp_avg_sq"))}
    return {"step": step(count), **slots}


ADAMW: Final = Optimizer("torch.optim.adamw.AdamW")
ADAMW_OPTIONS: Final[tuple[tuple[str, Value], ...]] = (
    ("lr", 0.0002),
    ("betas", (0.9, 0.999)),
    ("eps", 1e-08),
    ("weight_decay", 0.01),
    ("amsgrad", False),
    ("maximize", False),
    ("foreach", None),
)


def state(parameters: Sequence[Parameter], **members: Any) -> OptimizerState:
    default = {
        "optimizers": (ADAMW,),
        "groups": (Group(0, (("lr", 0.5),), len(parameters)),),
        "naming": Naming("model"),
    }
    return OptimizerState(parameters=tuple(parameters), **{**default, **members})


def one(slots: Mapping[str, Value] | None, shape: Sequence[int] = (2,), **members: Any) -> OptimizerState:
    return state([Parameter("w", tuple(shape), slots)], **members)


def written() -> Iterator[tuple[str, str, OptimizerState]]:
    """What the package writes: names, sentences, states."""
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    yield (
        "example",
        "the example of the text: AdamW, a LoRA pair, its B never stepped",
        state(
            [
                Parameter(
                    f"{prefix}.lora_A.default.weight",
                    (2, 4),
                    adam((2, 4), 3.0, 1),
                    dtype="F32",
                    adapter="default",
                    foreign_names={"peft": f"{prefix}.lora_A.weight"},
                    weights=Digest("xxh3-128", "F32", xxh3(bytes(32))),
                ),
                Parameter(f"{prefix}.lora_B.default.weight", (4, 2), None, dtype="F32", adapter="default"),
            ],
            groups=(Group(0, ADAMW_OPTIONS, 2),),
            global_step=3,
            origin={"format": "torch_optimizer"},
        ),
    )
    yield (
        "several-groups",
        "groups with names and options of every plain type; three parameters share one entry of the table",
        state(
            [Parameter(f"layers.{n}.weight", (3,), adam((3,), 7.0, 10 * n)) for n in range(3)]
            + [Parameter("head.bias", (1,), adam((1,), 8.0, 90))],
            groups=(
                Group(0, ADAMW_OPTIONS, 2, "decay"),
                Group(0, (("lr", 0), ("betas", [0.9, 0.95]), ("note", "no decay"), ("lr_t", step(0.25))), 2, "rest"),
            ),
        ),
    )
    yield (
        "empty-groups",
        "groups without parameters, before, between and behind others",
        state(
            [Parameter("w", (2,), {})],
            groups=(Group(0, (), 0), Group(0, (("lr", 0.5),), 1), Group(0, (("lr", 0.0),), 0)),
        ),
    )
    yield "no-parameters", "nothing but a name for it", state([], optimizers=(), groups=())
    yield (
        "never-stepped",
        "no state, no slots, and zeros are three things",
        state(
            [
                Parameter("never", (2,), None),
                Parameter("without", (2,), {}),
                Parameter("zero", (2,), {"momentum": Slot(contiguous("F32", (2,), Memory(bytes(8))), Role.PARAM)}),
            ]
        ),
    )
    yield (
        "carried",
        "parameters whose state is kept though they are in no group",
        state(
            [Parameter(name, (2,), adam((2,), 1.0, n)) for n, name in enumerate(("in", "out", "out.too"))],
            groups=(Group(0, ADAMW_OPTIONS, 1),),
        ),
    )
    yield (
        "several-optimizers",
        "Muon beside two AdamWs; one class is not known",
        state(
            [Parameter(name, (2, 2), {}) for name in ("a", "b", "c")],
            optimizers=(Optimizer("torch.optim.muon.Muon", "muon"), Optimizer(ADAMW.class_path, "0"), Optimizer()),
            groups=(Group(0, (("momentum", 0.95),), 1), Group(1, (), 0), Group(1, (), 1), Group(2, (), 1)),
        ),
    )
    yield (
        "dtypes",
        "a tensor of each dtype; the file begins with the widest",
        one({dtype.lower(): tensor(dtype, (4,)) for dtype in sorted(BITS)}),
    )
    yield (
        "scalars",
        "tensors without axes keep every bit, NaN payloads and signs too",
        one(
            {
                **{dtype.lower(): Scalar(dtype, bytes(range(1, BITS[dtype] // 8 + 1))) for dtype in sorted(BITS)
                   if BITS[dtype] >= 8},
                "nan payload": Scalar("F32", bytes.fromhex("0100a07f")),
                "negative nan": Scalar("F64", bytes.fromhex("efbeadde0000f8ff")),
                "signaling nan": Scalar("BF16", bytes.fromhex("81ff")),
                "minus zero": Scalar("F16", bytes.fromhex("0080")),
            }
        ),
    )  # fmt: skip
    yield (
        "empty-tensors",
        "tensors without elements, in the middle of others",
        one(
            {
                "a": tensor("F32", (0,)),
                "b": tensor("F32", (3,)),
                "c": tensor("F32", (0, 4)),
                "d": tensor("F32", (5, 0, 2)),
                "e": tensor("U8", (1,)),
                "f": tensor("U8", (0,)),
            }
        ),
    )
    odd = [
        "/",
        "a/b",
        "a/b/",
        ".",
        "..",
        "../up",
        "__metadata__",
        "w$",
        "with space",
        "tab\tnew\nline",
        "\0",
        "\x1b[31m",
    ]
    odd += ['"quoted"', "back\\slash", "\x7f\x9b", "é", "e\u0301", "名前", "🜚", "\u2028", "\ufeff", "\uffff", "a" * 300]
    yield "names", "any text is a name", state([Parameter(name, (1,), {"m": tensor("U8", (1,))}) for name in odd])
    yield (
        "tied",
        "other names of a tensor, keys of others, ids that were not 0, 1, 2",
        state(
            [
                Parameter("embed.weight", (2,), None, tied=("head.weight", "decoder.weight"), original_id=3),
                Parameter("w", (2,), None, foreign_names={"peft": "x.w", "mlx": "w"}, original_id=2**64 + 1),
                Parameter("v", (2,), None, original_id="module.v"),
            ]
        ),
    )
    yield (
        "floats",
        "floats as ECMAScript writes them",
        one(
            None,
            extra={
                "floats": [
                    0.0, -0.0, 1.0, -1.5, 0.1, 1e-05, 1e-06, 1e-07, 123456.789, 1e16, 1e20, 1e21, 1.5e300, 5e-324,
                    2.2250738585072014e-308, 1.7976931348623157e308, 9007199254740993.0, float("inf"), float("-inf"),
                    float("nan"),
                ]
            },
        ),
    )  # fmt: skip
    yield (
        "integers",
        "integers as numbers and beyond, beside floats of the same value",
        one(None, extra={"integers": [0, -1, 1, 1.0, 2**53 - 1, 1 - 2**53, 2**53, -(2**53), 10**30, -(10**999)]}),
    )
    yield (
        "values",
        "every other kind of value, nested",
        one(
            None,
            extra={
                "none": None,
                "booleans": [True, False],
                "text": '\u0000\b\t\n\f\r"\\/ é 🜚',
                "bytes": [b"", b"\x00\xff"],
                "empty": [[], (), {}],
                "tuples": (1, (2,), [(3, [4.0])]),
                "scalar": Scalar("I64", struct.pack("<q", -5)),
                "by number": {1: "a", 10: "b", 9: "c", -2: "d", 0.5: "e", 2**60: "f"},
                "by anything": {None: 1, True: 2, "text": 3, (1, ("a", None)): 4, float("inf"): 5},
                "with $": {"$float": "inf", "plain": {"inner": {"$": []}}},
                "": {"": ""},
            },
            naming=Naming("adapter", "hf_trainer", {"parameters": 1, "evidence": {"verdict": "partly"}}),
        ),
    )
    yield (
        "nested-slots",
        "tensors anywhere in a slot tree, and labels that would be the same",
        one(
            {
                "history": [tensor("F32", (2,), Role.PARAM, seed=n) for n in range(3)],
                "pair": (tensor("F32", (2, 2)), {"inner": tensor("F32", (3,)), 5: tensor("F32", (4,))}),
                "a": {"b": tensor("F32", (1,))},
                "a.b": tensor("F32", (1,), seed=1),
                "c/d": tensor("F32", (1,)),
                "c_d": tensor("F32", (1,), seed=1),
                "": tensor("F32", (1,)),
            }
        ),
    )
    yield (
        "roles",
        "each role in each shape that it may have",
        one(
            {
                "param": tensor("BF16", (2, 3, 4), Role.PARAM),
                "row": tensor("F32", (2, 3), Role.ROW),
                "row kept": tensor("F32", (2, 3, 1), Role.ROW),
                "col": tensor("F32", (2, 4), Role.COL),
                "col kept": tensor("F32", (2, 1, 4), Role.COL),
                "block": tensor("U8", (24,), Role.BLOCK),
                "opaque": tensor("F32", (7,), Role.OPAQUE),
            },
            shape=(2, 3, 4),
        ),
    )
    yield (
        "globals",
        "state that belongs to no one parameter; a role says nothing there",
        one(
            None,
            globals={
                "loss_scale": 65536.0,
                "d": [tensor("F32", (3,)), tensor("F32", (2,), Role.PARAM)],
                "nested": {"k": 4},
            },
        ),
    )
    yield (
        "extensions",
        "an extension that may be ignored",
        one(None, extensions={"org.example.rotations": {"must_understand": False, "seed": 7, "angles": (0.5, 1.5)}}),
    )


def sharded() -> OptimizerState:
    return state(
        [Parameter(f"layers.{n}.weight", (4,), adam((4,), 5.0, n)) for n in range(5)]
        + [Parameter("frozen.weight", (4,), adam((4,), 2.0, 50))],
        groups=(Group(0, ADAMW_OPTIONS, 3, "first"), Group(0, (), 0), Group(0, (("lr", 0.1),), 2)),
        globals={"d": tensor("F32", (2,))},
        origin={"format": "torch_optimizer"},
        extra={"note": "in the first shard only"},
        global_step=5,
    )


def valid() -> Iterator[Vector]:
    with tempfile.TemporaryDirectory() as folder:
        for name, what, item in written():
            path = Path(folder) / f"{name}.safetensors"
            writing.write(item, path)
            yield lone(name, path.read_bytes(), what, canonical=True)
        path = Path(folder) / "set" / NAME
        path.parent.mkdir()
        files = writing.write(sharded(), path, max_shard_size=80).files
        yield whole("set", {Path(file).name: Path(file).read_bytes() for file in files}, "five shards", canonical=True)
    yield from unusual()


def unusual() -> Iterator[Vector]:
    """What no writer of this version makes, and every reader takes."""
    newer = manifest(version="1.7", later={"a": [1, {"$new": 2}]}, extra={"a": 1})
    newer["parameters"][0]["later"] = None
    newer["naming"]["later"] = 1.5
    yield lone("newer-minor", of(newer), "members that a later version added are ignored")
    yield lone(
        "unknown-algorithm",
        of(
            manifest(
                digests={"algorithm": "sha-256", "values": [hashlib.sha256(F32).hexdigest()]},
                weights={"algorithm": "crc-32", "values": [["BF16", "00112233"]]},
            )
        ),
        "tensors with digests by an algorithm that this version does not know are not verified",
    )
    loose = (
        '{ "version" : "1.0", "format":"named-optimizer-state","naming":{"source":"m\\u006fdel"},\n'
        '"optimizers":[{"class":null}],"groups":[{"options":[["lr",5E-1],["eps",0.0000001],["n",10]],"count":1,'
        '"optimizer":0}],"states":[{"unused":{"$tensor":"other","role":"row"}},'
        '{"$dict":[["momentum",{"role":"param","$tensor":"momentum"}]]}],"extra":{"d":{"$dict":[["z",1],["a",{}]]}},\t'
        f'"parameters":[{{"shape":[2],"state":1,"name":"w","tied":[]}}],"digests":{{"values":["{xxh3(F32)}"],'
        '"algorithm":"xxh3-128"},"globals":{},"weights":{"algorithm":"xxh3-128","values":[null]}}'
    )
    head = header(envelope(loose), "")
    head = head[:-1] + ' , "w\\u002Fmomentum" : {"shape":[2],"data_offsets":[0,8],"dtype":"F32"} }'
    yield lone("not-canonical", sealed(head), "other spaces, orders, escapes and numbers mean the same")
    data = {"w/a": ("U8", [1], b"a"), "w/b": ("F32", [2], F32), "w/c": ("U8", [0], b""), "w/d": ("I16", [1], b"dd")}
    slots = {label: {"$tensor": label, "role": "opaque"} for label in "abcd"}
    placed = entries(data)
    head = header(envelope(manifest(data, states=[slots])), {key: placed[key] for key in ("w/d", "w/c", "w/a", "w/b")})
    yield lone(
        "order-of-entries",
        sealed(head, b"".join(tensor[2] for tensor in data.values())),
        "the order of entries in the header means nothing; tensors need not be aligned or sorted by size",
    )
    deep: Any = 1
    for _ in range(61):  # and the extra, the manifest and the envelope around it
        deep = [deep]
    yield lone("deep", of(manifest(extra={"deep": deep})), "JSON nested as deep as allowed")
    scattered = parts()
    scattered[0][0]["set"]["positions"] = [1, 2]
    scattered[0][0]["groups"][0]["count"] = 1
    scattered[1][0]["set"]["positions"] = [0]
    scattered[1][0]["groups"][0]["count"] = 1
    yield whole("set-out-of-order", set_of(scattered), "shards that do not hold runs of the parameters")
    lonely = parts()[0]
    lonely[0]["set"]["count"] = 1
    yield whole("set-of-one", set_of([lonely]), "a set of one shard")


def lone(name: str, data: bytes, what: str, *, canonical: bool = False) -> Vector:
    return Vector(name, {"": data}, {"what": what, "canonical": canonical, **described(data)})


def whole(name: str, files: dict[str, bytes], what: str, *, canonical: bool = False) -> Vector:
    shards = {file: described(data) for file, data in files.items() if not file.endswith(".json")}
    index = json.loads(files[f"{NAME}.index.json"])
    return Vector(
        name, files, {"what": what, "canonical": canonical, "set": index["metadata"]["set"], "shards": shards}
    )


def described(data: bytes) -> dict[str, Any]:
    """What a file holds, as the standard library's JSON and slices see it."""
    end = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:end])
    found = json.loads(head.pop("__metadata__")["optimizer_state"])
    tensors = {
        key: {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "sha256": hashlib.sha256(data[end:][slice(*entry["data_offsets"])]).hexdigest(),
        }
        for key, entry in sorted(head.items())
    }
    return {"digest": found["digest"], "manifest": found["manifest"], "tensors": tensors}


# --- invalid ------------------------------------------------------------------------------------------------------


def bad(
    name: str, rule: str, what: str, files: bytes | dict[str, bytes], kind: str = "malformed", **more: Any
) -> Vector:
    """``schema=True`` in ``more``: the manifest breaks the schema too."""
    files = {"": files} if isinstance(files, bytes) else files
    return Vector(name, files, {"rule": rule, "kind": kind, "what": what, **more})


def invalid() -> Iterator[Vector]:
    yield from bad_headers()
    yield from bad_json()
    yield from bad_layouts()
    yield from bad_envelopes()
    yield from bad_manifests()
    yield from bad_names_and_groups()
    yield from bad_slots()
    yield from bad_digests()
    yield from bad_values()
    yield from bad_sets()


def bad_headers() -> Iterator[Vector]:
    good = of(manifest())
    yield bad("length-too-short", "R1", "a file of seven bytes", good[:7])
    yield bad("length-empty", "R1", "a file without bytes", b"")
    yield bad("length-beyond-the-file", "R1", "a header that is longer than its file", good[:100])
    huge = (32 << 20) + 64
    yield bad("length-beyond-the-limit", "R1", "a header that would have 64 bytes more than allowed",
              huge.to_bytes(8, "little") + good[8:])  # fmt: skip
    yield bad("length-of-nonsense", "R1", "a file that begins with 0xff only", b"\xff" * 64)
    head = header(envelope(manifest()), entries())
    latin = header(envelope(manifest(naming={"source": "m\u00e9"})), entries()).encode("latin-1")
    yield bad("text-not-utf8", "R2", "a byte that no UTF-8 has", sealed(latin))
    yield bad("text-leading-space", "R2", "a space before the header", sealed(" " + head))
    yield bad("text-byte-order-mark", "R2", "a byte order mark before the header", sealed("\ufeff" + head))
    yield bad("text-padding-of-newlines", "R2", "newlines behind the header", sealed(head + "\n" * 5))
    yield bad("text-padding-of-zeros", "R2", "zero bytes behind the header", sealed(head + "\0" * 5))
    yield bad("text-array", "R2", "an array for a header", sealed("[]", b""))
    yield bad("text-empty", "R2", "a header of no bytes", sealed("", b"", pad=False))


def bad_json() -> Iterator[Vector]:
    def extra(value: str) -> bytes:
        return of(text(manifest(extra={"a": 0})).replace('"a":0', f'"a":{value}'))

    head = header(envelope(manifest()), entries())
    entry = head[head.index(',"w/momentum"') : -1]
    yield bad("json-unfinished", "R3", "a header that is no JSON", sealed(head[:-1] + ",}"))
    yield bad("json-two-values", "R3", "two values in one text", sealed(head + "{}"))
    yield bad("json-tensor-twice", "R3", "a tensor that the header has twice", sealed(head[:-1] + entry + "}"))
    twice = manifest()
    yield bad("json-member-twice", "R3", "a member that the manifest has twice",
              of(text(twice)[:-1] + ',"version":"1.0"}'))  # fmt: skip
    yield bad("json-member-twice-escaped", "R3", "a member twice, once in other letters",
              extra('{"b":1,"\\u0062":1}'))  # fmt: skip
    yield bad("json-nan", "R3", "the constant NaN", extra("NaN"))
    yield bad("json-infinity", "R3", "the constant -Infinity", extra("-Infinity"))
    yield bad("json-minus-zero", "R3", "an integer zero with a sign", extra("-0"))
    yield bad("json-float-too-large", "R3", "a float that no 64 bits hold", extra("1e400"))
    yield bad("json-lone-surrogate", "R3", "half of a character", extra('"\\ud83d"'))
    yield bad("json-control-character", "R3", "a control character inside a string", extra('"\x01"'))
    yield bad("json-too-deep", "R3", "JSON nested one level deeper than allowed", extra("[" * 62 + "]" * 62))
    yield bad("json-unclosed-depth", "R3", "ten thousand brackets that never close", extra("[" * 10000))
    yield bad("json-leading-zero", "R3", "a number with a zero in front", extra("01"))
    yield bad("json-comment", "R3", "a comment", extra("0/**/"))


def bad_layouts() -> Iterator[Vector]:
    def entry(what: str, name: str, rule: str, data: bytes = F32, **members: Any) -> Vector:
        changed = {key: value for key, value in (entries()["w/momentum"] | members).items() if value is not None}
        tensors = f',"w/momentum":{text(changed)}'
        return bad(name, rule, what, sealed(header(envelope(manifest()), tensors), data))

    yield entry("a dtype that there is not", "entry-dtype", "R4", dtype="F33")
    yield entry("a dtype that is no string", "entry-dtype-number", "R4", dtype=32)
    yield entry("a size below zero", "entry-negative-size", "R4", shape=[-2])
    yield entry("a size that is a float", "entry-float-size", "R4", shape=[2.0])
    yield entry("a size that is a boolean", "entry-boolean-size", "R4", shape=[2, True])
    yield entry("65 axes", "entry-too-many-axes", "R4", shape=[2] + [1] * 64)
    yield entry("sizes that multiply to more than 2^53 beside a zero", "entry-overflow", "R4", b"",
                shape=[2**52, 4, 0], data_offsets=[0, 0])  # fmt: skip
    yield entry("one offset", "entry-one-offset", "R4", data_offsets=[8])
    yield entry("an offset that is a float", "entry-float-offset", "R4", data_offsets=[0, 8.0])
    yield entry("no offsets", "entry-without-offsets", "R4", data_offsets=None)
    yield entry("a member that entries do not have", "entry-unknown-member", "R4", strides=[1])
    head = header(envelope(manifest()), entries())
    yield bad("entry-array", "R4", "an array for an entry",
              sealed(header(envelope(manifest()), ',"w/momentum":["F32",[2],[0,8]]')))  # fmt: skip
    yield bad("metadata-null", "R4", "null for __metadata__",
              sealed('{"__metadata__":null' + head[head.index(',"w/momentum"') :]))  # fmt: skip
    yield bad("metadata-number", "R4", "metadata that are no strings",
              sealed('{"__metadata__":{"a":1}' + head[head.index(',"w/momentum"') :]))  # fmt: skip
    yield entry("fewer bytes than the shape has", "size-too-small", "R5", F32[:4], data_offsets=[0, 4])
    yield entry("more bytes than the shape has", "size-too-large", "R5", F32 + F32[:4], data_offsets=[0, 12])
    yield entry("three elements of four bits", "size-half-a-byte", "R5", F32[:2], dtype="F4", shape=[3],
                data_offsets=[0, 2])  # fmt: skip
    yield entry("an end before its begin", "size-negative", "R5", data_offsets=[8, 0])
    yield entry("a tensor that begins behind byte 0", "layout-hole-in-front", "R6", F32 + b"....", data_offsets=[4, 12])
    yield entry("a file that ends before its tensor", "layout-truncated", "R6", F32[:7])
    yield entry("a byte behind the last tensor", "layout-trailing-byte", "R6", F32 + b".")
    two = {"w/a": ("F32", [2], F32), "w/b": ("F32", [2], F32)}
    slots = {label: {"$tensor": label, "role": "param"} for label in "ab"}

    def pair(name: str, what: str, begin: int, size: int) -> Vector:
        placed = entries(two)
        placed["w/b"]["data_offsets"] = [begin, begin + 8]
        head = header(envelope(manifest(two, states=[slots])), placed)
        return bad(name, "R6", what, sealed(head, bytes(size)))

    yield pair("layout-hole", "a hole between two tensors", 12, 20)
    yield pair("layout-overlap", "two tensors that share four bytes", 4, 12)
    yield pair("layout-same-bytes", "two tensors with the same bytes", 0, 8)
    empty = {"w/a": ("F32", [2], F32), "w/b": ("F32", [0], b"")}
    placed = entries(empty)
    placed["w/b"]["data_offsets"] = [4, 4]
    slots = {"a": slots["a"], "b": {"$tensor": "b", "role": "opaque"}}
    yield bad("layout-empty-inside", "R6", "a tensor without bytes in the middle of another",
              sealed(header(envelope(manifest(empty, states=[slots])), placed)))  # fmt: skip


def bad_envelopes() -> Iterator[Vector]:
    good, tensors = envelope(manifest()), entries()
    plain = '{"w/momentum":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    yield bad("envelope-missing", "R7", "a plain safetensors file", sealed(plain))
    yield bad("envelope-other-metadata", "R7", "a safetensors file of a model",
              sealed(header({"format": "pt"}, entries())))  # fmt: skip
    head = header({"optimizer_state": good, "x": ""}, entries())
    yield bad("envelope-more-metadata", "R7", "metadata beside optimizer_state", sealed(head))
    head = header(good, tensors)
    entry, metadata = head[head.index(',"w/momentum"') + 1 : -1], head[1 : head.index(',"w/momentum"')]
    yield bad("envelope-behind-tensors", "R7", "metadata that come behind the tensors",
              sealed(f"{{{entry},{metadata}}}"))  # fmt: skip
    yield bad("envelope-with-space", "R7", "a space inside the 50 bytes",
              sealed(head.replace('{"__metadata__":', '{"__metadata__": ')))  # fmt: skip
    yield bad("envelope-digest-uppercase", "R7", "a digest in upper case",
              sealed(head.replace(ZERO, "ABCDEF" + ZERO[6:])))  # fmt: skip
    yield bad("envelope-digest-short", "R7", "a digest of 31 digits", sealed(head.replace(ZERO, ZERO[1:])))
    yield bad("envelope-further-member", "R7", "a member beside digest and manifest",
              sealed(header(good[:-1] + ',"more":1}', entries())))  # fmt: skip
    yield bad("envelope-without-manifest", "R7", "a digest alone",
              sealed(header(f'{{"digest":"{ZERO}"}}', entries())))  # fmt: skip
    yield bad("envelope-manifest-array", "R7", "an array for a manifest", of("[]"))
    head += " " * (-(8 + len(head)) % 64 + 8)
    yield bad("alignment", "R8", "data that begin at 8 behind a multiple of 64", sealed(head, pad=False))
    whole = of(manifest())
    at = whole.index(b"0.5")
    yield bad("digest-of-changed-option", "R9", "a learning rate that was changed",
              whole[:at] + b"0.7" + whole[at + 3 :], "digest")  # fmt: skip
    yield bad("digest-of-changed-class", "R9", "an optimizer that was changed", whole.replace(b"sgd.SGD", b"sgd.SGE"),
              "digest")  # fmt: skip
    yield bad("digest-of-zeros", "R9", "a digest that was never filled in",
              whole.replace(whole[58:90], ZERO.encode()), "digest")  # fmt: skip
    damaged = whole[:-1] + bytes([whole[-1] ^ 1])
    yield bad("tensor-changed", "R21", "one bit of a tensor that was changed", damaged, "digest", verify=True)


def bad_manifests() -> Iterator[Vector]:
    def members(
        name: str, rule: str, what: str, kind: str = "malformed", *, schema: bool = True, **changed: Any
    ) -> Vector:
        return bad(name, rule, what, of(manifest(**changed)), kind, schema=schema)

    yield members("format-other", "R10", "another format", format="named-optimizer-states")
    yield members("format-missing", "R10", "no format", format=None)
    yield members("format-number", "R10", "a format that is no string", format=1)
    for name, version in (("short", "1"), ("long", "1.0.0"), ("zero", "01.0"), ("sign", "1.-1"), ("number", 1.0)):
        yield members(f"version-{name}", "R11", f"the version {json.dumps(version)}", version=version)
    yield members("version-major", "R11", "a newer major version", "unsupported", version="2.0")
    yield members("version-major-zero", "R11", "a major version from before", "unsupported", version="0.9")
    yield members("version-missing", "R11", "no version", version=None)
    for member in ("optimizers", "groups", "parameters", "states", "naming", "digests"):
        absent: dict[str, Any] = {member: None}
        yield members(f"member-{member}-missing", "R12", f"no {member}", **absent)
        wrong: Any = {} if member not in ("naming", "digests") else []
        yield members(f"member-{member}-type", "R12", f"{member} of another type", **{member: wrong})
    for member, wrong in {"globals": [], "origin": "a", "extra": 1, "extensions": [], "weights": [], "set": 1}.items():
        yield members(f"member-{member}-type", "R12", f"{member} of another type", **{member: wrong})
    for name, wrong in (("negative", -1), ("float", 3.0), ("boolean", True), ("large", 2**53)):
        yield members(f"member-step-{name}", "R12", f"a global_step of {json.dumps(wrong)}", global_step=wrong,
                      schema=name != "float")  # fmt: skip
    yield members("member-unknown", "R12", "a member that version 1.0 does not have", later=1)
    yield members("member-extra-tuple", "R12", "an extra that is no mapping", extra={"$tuple": []})
    yield members("member-extra-keys", "R12", "an extra with a key that is no string", extra={"$dict": [[1, 2]]})
    yield members("member-naming-source", "R12", "a naming without source", naming={})
    yield members("member-naming-details", "R12", "details that are no mapping",
                  naming={"source": "model", "details": []})  # fmt: skip
    yield members("member-naming-unknown", "R12", "an unknown member of naming", naming={"source": "model", "later": 1})
    yield members("member-digests-algorithm", "R12", "digests without algorithm", digests={"values": [xxh3(F32)]})
    yield members("member-optimizer-class", "R12", "an optimizer without class", optimizers=[{}])
    yield members("member-optimizer-type", "R12", "an optimizer that is no object", optimizers=["AdamW"])
    groups: dict[str, dict[str, Any]] = {
        "optimizer": {"optimizer": None},
        "count-float": {"count": 1.0},
        "count-boolean": {"count": True},
        "count-negative": {"count": -1},
        "options-mapping": {"options": {"lr": 0.5}},
        "options-single": {"options": [["lr"]]},
        "options-triple": {"options": [["lr", 1, 2]]},
        "options-number": {"options": [[1, 2]]},
        "name": {"name": 0},
        "unknown": {"later": 1},
    }
    for name, group in groups.items():
        whole = {"optimizer": 0, "count": 1, "options": [], **group}
        yield members(f"member-group-{name}", "R12", f"a group with {text(group)}", groups=[whole],
                      schema=name != "count-float")  # fmt: skip
    parameters: dict[str, dict[str, Any]] = {
        "name-missing": {"name": None},
        "name-number": {"name": 1},
        "shape-missing": {"shape": None},
        "shape-negative": {"shape": [-2]},
        "shape-float": {"shape": [2.0]},
        "shape-large": {"shape": [2**53]},
        "shape-too-many-axes": {"shape": [1] * 65},
        "dtype": {"dtype": "float32"},
        "adapter": {"adapter": 0},
        "tied": {"tied": "x"},
        "tied-number": {"tied": [1]},
        "keys": {"keys": {"peft": 1}},
        "keys-array": {"keys": []},
        "id-float": {"id": 1.0},
        "id-boolean": {"id": True},
        "id-negative": {"id": -1},
        "id-tuple": {"id": {"$tuple": []}},
        "state-string": {"state": "0"},
        "state-negative": {"state": -1},
        "unknown": {"later": 1},
    }
    for name, parameter in parameters.items():
        whole = {"name": "v", "shape": [2], "state": None, **parameter}
        if name.endswith("-missing"):
            del whole[name.removesuffix("-missing")]
        both = [{"name": "w", "shape": [2], "state": 0}, whole]
        yield members(f"member-parameter-{name}", "R12", f"a parameter with {text(parameter)[:40]}", parameters=both,
                      schema=name not in ("shape-float", "id-float"))  # fmt: skip
    yield members("member-parameter-state-missing", "R12", "a parameter that does not say whether it has state",
                  parameters=[{"name": "w", "shape": [2], "state": 0}, {"name": "v", "shape": [2]}])  # fmt: skip
    yield members("extension-undecided", "R13", "an extension that does not say whether it must be understood",
                  extensions={"org.example": {}})  # fmt: skip
    yield members("extension-undecided-number", "R13", "an extension whose must_understand is 0",
                  extensions={"org.example": {"must_understand": 0}})  # fmt: skip
    yield members("extension-not-a-mapping", "R13", "an extension that is true", extensions={"org.example": True})
    yield members("extension-unknown", "R13", "an extension that must be understood", "unsupported", schema=False,
                  extensions={"org.example": {"must_understand": True}})  # fmt: skip


def bad_names_and_groups() -> Iterator[Vector]:
    def named(name: str, what: str, *parameters: dict[str, Any], schema: bool = False) -> Vector:
        whole = [{"shape": [2], "state": None, **parameter} for parameter in parameters]
        return bad(f"name-{name}", "R14", what, of(manifest({}, parameters=whole, states=[]), {}), schema=schema)

    yield named("empty", "a name without characters", {"name": ""}, schema=True)
    yield named("dollar", "a name that begins with $", {"name": "$globals"}, schema=True)
    yield named("twice", "two parameters of one name", {"name": "w"}, {"name": "w"})
    yield named("tied-to-itself", "a tied name that is the parameter's own", {"name": "w", "tied": ["w"]})
    yield named(
        "tied-twice", "a tied name of two parameters", {"name": "w", "tied": ["x"]}, {"name": "v", "tied": ["x"]}
    )
    yield named(
        "tied-to-another", "a tied name that another parameter has", {"name": "w", "tied": ["v"]}, {"name": "v"}
    )
    yield named("tied-dollar", "a tied name that begins with $", {"name": "w", "tied": ["$w"]}, schema=True)

    def grouped(name: str, what: str, *groups: dict[str, Any], optimizers: int = 1) -> Vector:
        whole = [{"optimizer": 0, "count": 0, "options": [], **group} for group in groups]
        return bad(f"group-{name}", "R15", what, of(manifest(groups=whole, optimizers=[{"class": None}] * optimizers)),
                   schema=False)  # fmt: skip

    yield grouped("count", "groups that count more parameters than there are", {"count": 1}, {"count": 1})
    yield grouped("optimizer", "a group of an optimizer that there is not", {"optimizer": 1})
    yield grouped("without-optimizers", "a group where there is no optimizer", {}, optimizers=0)
    yield grouped("order", "groups that go back to an earlier optimizer", {"optimizer": 1}, {}, optimizers=2)
    yield grouped("option-twice", "an option that a group has twice", {"options": [["lr", 1], ["lr", 1]]})


def bad_slots() -> Iterator[Vector]:
    def slots(
        name: str, rule: str, what: str, *trees: Any, data: Any = DATA, schema: bool = False, **members: Any
    ) -> Vector:
        return bad(name, rule, what, of(manifest(data, states=list(trees), **members), data), schema=schema)

    parameter = {"name": "w", "shape": [2], "state": 1}
    yield slots("state-beyond-the-table", "R16", "a state that the table does not have", TREE, parameters=[parameter])
    none: dict[str, Any] = {}
    yield slots("state-array", "R16", "a slot tree that is an array", [], data=none, schema=True)
    yield slots("state-number", "R16", "a slot tree that is a number", 5, data=none, schema=True)
    yield slots("state-keys", "R16", "a slot tree with a key that is no string", {"$dict": [[1, 2]]}, data=none,
                schema=True)  # fmt: skip
    yield slots("state-unused-tensor", "R16", "a slot tree that nobody uses, and that is a tensor", TREE,
                {"$tensor": "a", "role": "param"}, schema=True)  # fmt: skip
    yield slots("globals-keys", "R16", "globals with a key that is no string", TREE, globals={"$dict": [[None, 2]]},
                schema=True)  # fmt: skip
    yield slots("globals-tuple", "R16", "globals that are a tuple", TREE, globals={"$tuple": []}, schema=True)
    yield slots("tensor-not-in-the-manifest", "R17", "a tensor that no slot names", {})
    yield slots("tensor-not-in-the-header", "R17", "a slot whose tensor is not there",
                {**TREE, "b": {"$tensor": "b", "role": "opaque"}})  # fmt: skip
    yield slots("tensor-of-globals-missing", "R17", "globals whose tensor is not there", TREE,
                globals={"b": {"$tensor": "b", "role": "opaque"}})  # fmt: skip
    yield slots("tensor-of-another", "R17", "a tensor under the name of a parameter without state", TREE,
                parameters=[{"name": "v", "shape": [2], "state": None}, {"name": "w", "shape": [2], "state": None}],
                )  # fmt: skip
    yield slots("label-empty", "R17", "a label without characters", {"m": {"$tensor": "", "role": "param"}},
                data={"w/": DATA["w/momentum"]}, schema=True)  # fmt: skip
    yield slots("label-slash", "R17", "a label with a slash", {"m": {"$tensor": "a/b", "role": "param"}},
                data={"w/a/b": DATA["w/momentum"]}, schema=True)  # fmt: skip
    yield slots("label-twice", "R17", "a label that a tree has twice", {**TREE, "again": TREE["momentum"]})
    yield slots("label-slash-unused", "R17", "a label with a slash in an entry that nobody uses", TREE,
                {"m": {"$tensor": "a/b", "role": "param"}}, schema=True)  # fmt: skip

    def shaped(name: str, role: str, shape: list[int], of_parameter: list[int], what: str) -> Vector:
        size = 4
        for n in shape:
            size *= n
        data = {"w/m": ("F32", shape, bytes(size))}
        parameters = [{"name": "w", "shape": of_parameter, "state": 0}]
        return slots(
            f"role-{name}", "R18", what, {"m": {"$tensor": "m", "role": role}}, data=data, parameters=parameters
        )

    yield shaped("param", "param", [3], [2], "a moment of another size than its parameter")
    yield shaped("param-axes", "param", [2, 1], [2], "a moment with an axis more than its parameter")
    yield shaped("row", "row", [3], [2, 3], "a row slot that kept the last axis")
    yield shaped("row-of-vector", "row", [1], [2], "a row slot of a parameter with one axis")
    yield shaped("col", "col", [2], [2, 3], "a column slot that kept the last but one axis")
    yield shaped("col-of-vector", "col", [2], [2], "a column slot of a parameter with one axis")
    yield shaped("col-kept", "col", [2, 1], [2, 3], "a column slot with the wrong axis kept")
    yield shaped("without-axes", "opaque", [], [2], "a tensor without axes that is no $scalar")


def bad_digests() -> Iterator[Vector]:
    def weights(name: str, what: str, *values: Any, algorithm: str = "xxh3-128", schema: bool = True) -> Vector:
        return bad(f"weights-{name}", "R19", what, schema=schema,
                   files=of(manifest(weights={"algorithm": algorithm, "values": list(values)})))  # fmt: skip

    good = xxh3(F32)
    yield weights("count", "two weights digests for one parameter", None, None, schema=False)
    yield weights("none", "no weights digest for one parameter", schema=False)
    yield weights("short", "a weights digest of 30 digits", ["F32", good[2:]], schema=False)
    yield weights("uppercase", "a weights digest in upper case", ["F32", good.upper()])
    yield weights("dtype", "a weights digest of a dtype that there is not", ["F33", good])
    yield weights("bare", "a weights digest without dtype", good)
    yield weights("odd", "a weights digest of three digits", ["F32", "abc"], algorithm="crc-32")

    def digests(name: str, what: str, *values: Any, algorithm: str = "xxh3-128", schema: bool = True) -> Vector:
        return bad(f"digests-{name}", "R20", what, schema=schema,
                   files=of(manifest(digests={"algorithm": algorithm, "values": list(values)})))  # fmt: skip

    yield digests("count", "two digests for one tensor", good, good, schema=False)
    yield digests("none", "no digest for one tensor", schema=False)
    yield digests("long", "a digest of 34 digits", good + "00", schema=False)
    yield digests("uppercase", "a digest in upper case", good.upper())
    yield digests("null", "null for a digest", None)
    yield digests("empty", "a digest without digits", "", algorithm="sha-256")


def bad_values() -> Iterator[Vector]:
    def value(name: str, what: str, item: Any, *, schema: bool = True) -> Vector:
        return bad(f"value-{name}", "R22", what, of(manifest(extra={"a": [item]})), schema=schema)

    yield value("large-integer", "an integer beyond 2^53 - 1 as a number", 2**53, schema=False)
    yield value("large-negative-integer", "an integer below 1 - 2^53 as a number", -(2**53), schema=False)
    yield value("unknown-tag", "a tag that there is not", {"$complex": [1, 2]})
    yield value("tag-and-member", "a member beside a tag", {"$tuple": [], "a": 1})
    yield value("two-tags", "two tags", {"$tuple": [], "$float": "inf"})
    yield value("tuple", "a tuple that is no array", {"$tuple": {}})
    yield value("float", "a float as text that could be a number", {"$float": "1.5"})
    yield value("float-spelling", "NaN in other letters", {"$float": "NaN"})
    yield value("float-number", "a number for $float", {"$float": 1.5})
    yield value("int-small", "an $int that could be a number", {"$int": "9007199254740991"}, schema=False)
    yield value("int-zeros", "an $int with a zero in front", {"$int": "09007199254740993"})
    yield value("int-number", "a number for $int", {"$int": 5})
    yield value("int-too-long", "an $int of 1,001 digits", {"$int": "1" + "0" * 1000})
    yield value("bytes-odd", "bytes of three digits", {"$bytes": "abc"})
    yield value("bytes-uppercase", "bytes in upper case", {"$bytes": "AB"})
    yield value("scalar-short", "a 32-bit scalar of three bytes", {"$scalar": ["F32", "000000"]}, schema=False)
    yield value("scalar-dtype", "a scalar of a dtype that there is not", {"$scalar": ["F33", "00000000"]})
    yield value("scalar-half", "a scalar of four bits", {"$scalar": ["F4", "00"]})
    yield value("scalar-uppercase", "a scalar in upper case", {"$scalar": ["U8", "AB"]})
    yield value("dict-object", "an object for $dict", {"$dict": {"a": 1}})
    yield value("dict-single", "a $dict with a key alone", {"$dict": [[1]]})
    yield value("dict-twice", "a $dict with a key twice", {"$dict": [[1, "a"], [1, "b"]]}, schema=False)
    yield value(
        "dict-twice-by-value", "a $dict with the keys 1 and 1.0", {"$dict": [[1, "a"], [1.0, "b"]]}, schema=False
    )
    yield value(
        "dict-true-and-one", "a $dict with the keys true and 1", {"$dict": [[True, "a"], [1, "b"]]}, schema=False
    )
    yield value("dict-key-list", "a $dict with a list for a key", {"$dict": [[[1], 2]]})
    yield value("dict-key-bytes", "a $dict with bytes for a key", {"$dict": [[{"$bytes": "00"}, 2]]})
    yield value("dict-key-in-tuple", "a $dict with a mapping inside a key", {"$dict": [[{"$tuple": [{}]}, 2]]})
    yield value("tensor", "a tensor outside of slots", {"$tensor": "a", "role": "param"})
    option = [{"optimizer": 0, "count": 1, "options": [["lr", {"$tensor": "momentum", "role": "param"}]]}]
    yield bad("value-tensor-option", "R22", "a tensor for an option", of(manifest(groups=option)), schema=True)
    for name, slot in {
        "role": {"$tensor": "momentum", "role": "parameter"},
        "role-missing": {"$tensor": "momentum"},
        "role-array": {"$tensor": "momentum", "role": ["param"]},
        "number": {"$tensor": 1, "role": "param"},
    }.items():
        yield bad(f"value-tensor-{name}", "R22", f"the slot {text(slot)}", of(manifest(states=[{"momentum": slot}])),
                  schema=True)  # fmt: skip
    yield bad("value-unused", "R22", "no value in an entry of the table that nobody uses",
              of(manifest(states=[TREE, {"a": {"$new": 1}}])), schema=True)  # fmt: skip


def bad_sets() -> Iterator[Vector]:
    def shard(name: str, what: str, schema: bool = True, **changed: Any) -> Vector:
        place = {"id": "0123456789abcdef" * 2, "index": 1, "count": 2, "positions": [0], **changed}
        return bad(f"shard-{name}", "R23", what, of(manifest(set=place)), schema=schema)

    yield shard("alone", "a shard without its set", schema=False)
    yield shard("id", "a set id of three digits", id="abc")
    yield shard("index-zero", "shards counted from zero", index=0)
    yield shard("index-beyond", "shard 3 of 2", schema=False, index=3)
    yield shard("positions-count", "two positions for one parameter", schema=False, positions=[0, 1])
    yield shard("positions-negative", "a position below zero", positions=[-1])
    yield shard("positions-text", "a position that is text", positions=["0"])

    def changed(name: str, rule: str, what: str, change: Callable[[list[Part]], Any]) -> Vector:
        shards = parts()
        change(shards)
        return bad(f"set-{name}", rule, what, set_of(shards))

    yield changed("positions-twice", "R23", "two parameters of a shard at one position",
                  lambda s: s[0][0]["set"].update(positions=[0, 0]))  # fmt: skip
    yield changed("index", "R23", "a second shard that says it is the first", lambda s: s[1][0]["set"].update(index=1))
    yield changed("count", "R23", "a shard of three in a set of two", lambda s: s[1][0]["set"].update(count=3))
    yield changed("id", "R23", "a shard of another set", lambda s: s[1][0]["set"].update(id="12" * 16))
    yield changed("not-a-shard", "R23", "a file that is no shard", lambda s: s[1][0].pop("set"))
    yield changed("optimizers", "R23", "shards with different optimizers",
                  lambda s: s[1][0].update(optimizers=[{"class": None}]))  # fmt: skip
    yield changed("options", "R23", "shards with different options",
                  lambda s: s[1][0]["groups"][0].update(options=[["lr", 1]]))  # fmt: skip
    yield changed("groups", "R23", "shards with different numbers of groups",
                  lambda s: s[1][0].update(groups=[]))  # fmt: skip
    yield changed("naming", "R23", "shards with different naming", lambda s: s[1][0].update(naming={"source": "names"}))
    yield changed("step", "R23", "shards of different steps", lambda s: s[1][0].update(global_step=3))
    yield changed("extensions", "R23", "an extension in one shard only",
                  lambda s: s[1][0].update(extensions={"org.example": {"must_understand": False}}))  # fmt: skip
    yield changed("globals", "R23", "globals in the second shard", lambda s: s[1][0].update(globals={"a": 1}))
    yield changed("origin", "R23", "an origin in the second shard", lambda s: s[1][0].update(origin={"a": 1}))
    yield changed("extra", "R23", "an extra in the second shard", lambda s: s[1][0].update(extra={"a": 1}))
    yield bad("set-own-id", "R24", "an id that is not the digest of the shards", set_of(parts(), identity="12" * 16))

    def swapped(shards: list[Part]) -> None:
        shards[0][0]["set"]["positions"] = [0, 2]
        shards[1][0]["set"]["positions"] = [1]

    yield changed("position-of-group", "R26", "a parameter of the group at the position of a carried one", swapped)
    yield changed("position-taken", "R26", "two shards with one position",
                  lambda s: (s[1][0]["set"].update(positions=[1]), s[1][0]["groups"][0].update(count=1)))  # fmt: skip
    yield changed("position-beyond", "R26", "a position behind the last parameter",
                  lambda s: s[1][0]["set"].update(positions=[3]))  # fmt: skip

    def same_name(shards: list[Part]) -> None:
        shards[1][0].update(parameters=[{"name": "a", "shape": [2], "state": None}], states=[])
        shards[1][0]["digests"]["values"] = []
        shards[1][1].clear()

    yield changed("name-twice", "R26", "a parameter in two shards", same_name)
    yield changed("tied-name", "R26", "a tied name that a parameter of another shard has",
                  lambda s: s[1][0]["parameters"][0].update(tied=["a"]))  # fmt: skip

    def indexed(name: str, what: str, change: Callable[[dict[str, Any]], Any], rule: str = "R25") -> Vector:
        return bad(f"index-{name}", rule, what, set_of(parts(), change))

    yield indexed("not-utf8", "an index that is not UTF-8", lambda i: b'{"\xff":0}')
    yield indexed("json", "an index that is no JSON", lambda i: b"{", rule="R3")
    yield indexed("member-twice", "an index with a member twice",
                  lambda i: (text(i)[:-1] + f',"shards":{text(i["shards"])}}}').encode(), rule="R3")  # fmt: skip
    yield indexed("array", "an array for an index", lambda i: [])
    yield indexed("of-a-model", "the index of a sharded model",
                  lambda i: {"metadata": {"total_size": 24}, "weight_map": i["weight_map"]})  # fmt: skip
    yield indexed(
        "format", "an index of another format", lambda i: {**i, "metadata": {**i["metadata"], "format": "pt"}}
    )
    yield indexed("unknown-member", "a member that an index does not have", lambda i: {**i, "later": 1})
    yield indexed("unknown-metadata", "a member that its metadata do not have",
                  lambda i: {**i, "metadata": {**i["metadata"], "later": 1}})  # fmt: skip
    yield indexed("total-size", "a wrong total_size", lambda i: {**i, "metadata": {**i["metadata"], "total_size": 25}})
    yield indexed("total-size-float", "a total_size that is a float",
                  lambda i: {**i, "metadata": {**i["metadata"], "total_size": 24.0}})  # fmt: skip
    yield indexed("no-shards", "an index without shards", lambda i: {**i, "shards": []})
    yield indexed("shard-missing", "an index that names a file that is not there",
                  lambda i: {**i, "shards": [i["shards"][0], {**i["shards"][1], "file": "x"}]})  # fmt: skip
    yield indexed("shard-elsewhere", "an index that names a file in another folder",
                  lambda i: {**i, "shards": [i["shards"][0], {**i["shards"][1], "file": "../x"}]})  # fmt: skip
    yield indexed("shard-folder", "an index that names its folder",
                  lambda i: {**i, "shards": [i["shards"][0], {**i["shards"][1], "file": "."}]})  # fmt: skip
    yield indexed("shard-string", "an index that lists names alone",
                  lambda i: {**i, "shards": [s["file"] for s in i["shards"]]})  # fmt: skip
    yield indexed("shard-digest", "an index that states another digest",
                  lambda i: {**i, "shards": [i["shards"][0], {**i["shards"][1], "digest": ZERO}]})  # fmt: skip
    yield indexed("shard-omitted", "an index that leaves out a shard",
                  lambda i: {**i, "shards": i["shards"][:1]}, rule="R23")  # fmt: skip
    yield indexed("shards-swapped", "an index that lists the shards in another order",
                  lambda i: {**i, "shards": i["shards"][::-1]}, rule="R23")  # fmt: skip
    yield indexed(
        "weight-map-wrong",
        "a weight_map with a tensor in the wrong file",
        lambda i: {**i, "weight_map": {**i["weight_map"], "a/momentum": i["weight_map"]["c/momentum"]}},
    )
    yield indexed("weight-map-short", "a weight_map without one of the tensors",
                  lambda i: {**i, "weight_map": {"a/momentum": i["weight_map"]["a/momentum"]}})  # fmt: skip


# --- files --------------------------------------------------------------------------------------------------------


def rendered() -> dict[str, bytes]:
    """Every file of ``spec/vectors`` by its path there."""
    result: dict[str, bytes] = {}
    for kind, vectors in (("valid", valid()), ("invalid", invalid())):
        for vector in vectors:
            for name, data in {**vector.files, ".json": (dumps(vector.expected) + "\n").encode()}.items():
                own = (
                    f"{vector.name}.safetensors"
                    if name == ""
                    else f"{vector.name}{'' if name == '.json' else '/'}{name}"
                )
                assert f"{kind}/{own}" not in result, own
                result[f"{kind}/{own}"] = data
    return result


def main() -> None:
    for name, data in rendered().items():
        path = FOLDER / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        elif path.read_bytes() != data:
            sys.exit(f"{path} would be other bytes: that would change the format")


if __name__ == "__main__":
    main()
