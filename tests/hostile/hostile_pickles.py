"""Files that attack whoever reads them as ``torch.save`` files, each with the one error that it has to meet.

``CASES`` maps a name to how the bytes are made, the exception's exact type and its whole detail, position included.
``python hostile_pickles.py FOLDER`` writes them all.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lora_state_format.errors import FileError, RefusedError

CANARY = "lora-state-canary"
"""The file that appears in the working directory if a case got its code run."""


@dataclass(frozen=True)
class Case:
    make: Callable[[], bytes]
    error: type[FileError]
    detail: str


CASES: dict[str, Case] = {}

# --- assembling pickles and archives ------------------------------------------------------------------------------

PROTO = b"\x80\x02"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<L", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", count: int = 4, kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(shape: bytes = numbers(4), strides: bytes = numbers(1), offset: int = 0, store: bytes = storage()) -> bytes:
    """A tensor up to the opcode that builds it."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + store + number(offset) + shape + strides + b"\x89}t"


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def saved(body: bytes = tensor() + b"R.", **others: bytes) -> bytes:
    """An archive around a pickle, with one storage of 16 bytes."""
    members = {"archive/data.pkl": PROTO + body, "archive/byteorder": b"little", "archive/data/0": bytes(16)}
    return archive(members | {f"archive/{name}": data for name, data in others.items()})


# --- adding cases -------------------------------------------------------------------------------------------------


def pickled(
    name: str,
    before: bytes,
    offending: bytes | Callable[[], bytes],
    detail: str,
    error: type[FileError] = FileError,
    at: int | None = None,
) -> None:
    """A pickle that is in order for the bytes ``before`` and goes wrong at the opcode that follows, or ``at``."""
    position = len(PROTO) + len(before) if at is None else at
    nothing = "; nothing was run" if error is RefusedError else ""
    CASES[name] = Case(
        lambda: saved(before + (offending if isinstance(offending, bytes) else offending())),
        error,
        f"{detail}, at byte {position} of archive/data.pkl{nothing}",
    )


def refused(name: str, offending: bytes, named: str, before: bytes = b"") -> None:
    pickled(name, before, offending, f"pickle global '{named}' refused", RefusedError)


def zipped(name: str, make: Callable[[], bytes], detail: str, error: type[FileError] = FileError) -> None:
    CASES[name] = Case(make, error, detail)


# --- code that wants to run ---------------------------------------------------------------------------------------

RUN = text(f"touch {CANARY}") + b"\x85R."

refused("os-system", b"cos\nsystem\n" + RUN, "os.system")
refused("posix-system", b"cposix\nsystem\n" + RUN, "posix.system")
refused("nt-system", b"cnt\nsystem\n" + RUN, "nt.system")
refused("popen", b"csubprocess\ngetoutput\n" + RUN, "subprocess.getoutput")
refused("eval", b"cbuiltins\neval\n" + text(f"open('{CANARY}', 'w')") + b"\x85R.", "builtins.eval")
refused("exec-python-2", b"c__builtin__\nexec\n" + text(f"open('{CANARY}', 'w')") + b"\x85R.", "__builtin__.exec")
refused("open", b"cio\nopen\n" + text(CANARY) + text("w") + b"\x86R.", "io.open")
refused("import", b"cbuiltins\n__import__\n" + text("os") + b"\x85R.", "builtins.__import__")
refused("getattr", b"cos\nsystem\n" + text("x") + b"\x86R.", "os.system", b"cbuiltins\ngetattr\n")
refused(
    "getattr-walk", b"coperator\nattrgetter\n" + text("__class__") + b"\x85R.", "operator.attrgetter", tensor() + b"R"
)
refused("partial", b"cos\nsystem\n" + RUN, "os.system", b"cfunctools\npartial\n(")
refused("in-a-foreign-object", b"cos\nsystem\n" + RUN, "os.system", b"csome.library\nCallback\n)R}" + text("x"))
refused("nested-name", b"\x93.", "builtins.eval.__call__", text("builtins") + text("eval.__call__"))
refused("pickle-in-pickle", b"c_pickle\nloads\n" + RUN, "_pickle.loads")
refused("torch-load", b"ctorch\nload\n" + text("x") + b"\x85R.", "torch.load")
refused("numpy-load", b"cnumpy\nload\n" + RUN, "numpy.load")
refused("stack-global", b"\x93" + RUN, "os.system", text("os") + text("system"))
refused("terminal-escape", b"cos\n\x1b[2J\n.", "os.\\x1b[2J")
refused("after-a-tensor", b"cos\nsystem\n" + RUN, "os.system", tensor() + b"R0")
refused("inside-a-known-call", b"cos\nsystem\n" + RUN, "os.system", b"ctorch._utils\n_rebuild_parameter\n(")
pickled("inst", b"(" + text("x"), b"ios\nsystem\n.", "pickle opcode b'i' is not read")
pickled("obj", b"(" + text("x"), b"o.", "pickle opcode b'o' is not read")
pickled("ext1", b"", b"\x82\1.", "pickle opcode b'\\x82' is not read")
pickled("persid-text", b"", b"Pos.system\n.", "pickle opcode b'P' is not read")
pickled("protocol-0", b"", b"I1\n.", "pickle opcode b'I' is not read")
pickled("out-of-band-buffer", b"", b"\x97.", "pickle opcode b'\\x97' is not read")
pickled("protocol-77", b"", b"\x80\x4d.", "pickle protocol 77 is not one of 2 to 5")
pickled(
    "build-on-a-class", b"ctorch\nTensor\n}" + text("__init__") + b"Ns", b"b.",
    "the pickle sets the state of something that has none",
)  # fmt: skip
pickled("build-on-a-tensor", tensor() + b"R}", b"b.", "the pickle sets the state of something that has none")
pickled("call-a-string", text("os.system") + b")", b"R.", "the pickle calls something that is no global")
pickled("call-with-a-list", b"ctorch\nSize\n]", b"R.", "the pickle calls something that is no global")
pickled("other-persistent-id", text("os.system"), b"Q.", "a persistent id that is no storage")

# --- memory and time ----------------------------------------------------------------------------------------------


def doubling(kind: bytes, levels: int) -> bytes:
    """A container that holds the one before it twice, and so on down."""
    parts = [b"]q\0"]
    for level in range(levels):
        parts.append(b"0" + {b"l": b"](h%ch%ce", b"t": b"h%ch%c\x86", b"d": b"}(K\0h%cK\1h%cu"}[kind] % (level, level))
        parts.append(b"q" + bytes([level + 1]))
    return b"".join(parts)


DEEP = "the pickle nests values more than 200 deep, or a value in itself"
BUILDS = "the pickle builds more than 430000000 bytes of objects"

pickled("memo-bomb", b"N", b"r\xff\xff\xff\xff.", "memo entry 4294967295 is written before entry 0")
pickled("memo-bomb-small", b"N", b"q\1.", "memo entry 1 is written before entry 0")
pickled("memo-unknown", b"", b"j\xff\xff\xff\x7f.........", "the pickle is not well-formed")
for kind, called in ((b"l", "lists"), (b"t", "tuples"), (b"d", "dicts")):
    lists = doubling(kind, 100)
    most = 1_000_000 + len(PROTO + lists + b".")
    pickled(f"doubling-{called}", lists, b".", f"the pickle unfolds to more than {most} values")
pickled("deep-lists", b"]" * 100_000 + b"a" * 99_999, b".", DEEP)
pickled("deep-tuples", b")" + b"\x85" * 100_000, b".", DEEP)
pickled("deep-marks", b"(" * 200, b"(.", "more than 200 open marks")
pickled("in-itself", b"]q\0h\0a", b".", DEEP)
pickled(
    "doubling-as-a-name", doubling(b"l", 100) + text("x"), b"\x93.",
    "a global whose name is no text",
)  # fmt: skip
pickled(
    "doubling-as-a-shape", doubling(b"l", 100) + b"0" + tensor(shape=b"h\x64\x85"), b"R.",
    "a tensor whose shape or strides are not natural numbers",
)  # fmt: skip
pickled(
    "doubling-as-a-type",
    doubling(b"l", 100) + b"0cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\nh\x64\x85RC\1x\x86", b"R.",
    "a NumPy type whose name is no text",
)  # fmt: skip
pickled(
    "deep-key", b"})" + b"\x85" * 100_000 + b"N", b"s.",
    "a key that is a tuple of more than plain values",
)  # fmt: skip
ODD = "more than 10000 tuples as keys and integers beyond 64 bits"
PRIME = 2**61 - 1
pickled(
    "colliding-integers", b"}(" + b"".join(number(i * PRIME << 8) + b"N" for i in range(1, 10_001)),
    lambda: number(PRIME << 30) + b"Nu.", ODD,
)  # fmt: skip
pickled("colliding-tuples", b"}(" + b"".join(numbers(i, 1) + b"N" for i in range(10_001)), b"u.", ODD)
pickled("brace-bomb", b"", lambda: b"}" * 6_000_000 + b".", BUILDS, at=4_849_663)


BLOB = b"B" + struct.pack("<L", 1 << 20) + bytes(1 << 20)
TEXT = text("x" * (1 << 20))
LIST = b"](" + b"".join(b"M" + struct.pack("<H", n) for n in range(60_000)) + b"e"
AGAIN = {  # what is copied, what copies it, and how often that fits into the memory that is counted
    "bytearrays": (BLOB, b"cbuiltins\nbytearray\nh\0\x85R0", 409),
    "bytes": (TEXT, b"c_codecs\nencode\nh\0\x8c\6latin1\x86R0", 410),
    "sets": (LIST, b"cbuiltins\nset\nh\0\x85R0", 111),
    "sizes": (LIST, b"ctorch\nSize\nh\0\x85R0", 895),
    "counters": (b"}(" + LIST[2:-1] + b"u", b"ccollections\nCounter\nh\0\x85R0", 143),
}
for called, (of, copy, fitting) in AGAIN.items():
    before = of + b"q\0" + copy * fitting
    pickled(f"copies-of-{called}", before, copy + b".", BUILDS, at=len(PROTO) + len(before) + copy.index(b"R"))


def recursion() -> bytes:
    """A subclass of a tensor that is to be rebuilt by rebuilding a subclass, and so on."""
    first = b"ctorch._tensor\n_rebuild_from_type_v2\nq\0ctorch\nTensor\nq\1)q\2"
    indices = [struct.pack("<L", index) for index in range(2, 5_001)]
    return first + b"".join(b"0(h\0h\1j" + a + b"Ntr" + b for a, b in pairwise(indices)) + b"h\0j" + indices[-1]


pickled("recursion", recursion(), b"R.", "the pickle is not well-formed")

# --- values and sizes that are not true ---------------------------------------------------------------------------

CUT = "the pickle in archive/data.pkl is cut short"

for called, body in {
    "nothing": b"",
    "no-stop": b"}",
    "text": b"X\xff\xff\xff\xff.",
    "short-text": b"\x8c\xff.",
    "long-text": b"\x8d" + struct.pack("<Q", 1 << 63) + b".",
    "bytes": b"B\xff\xff\xff\xff.",
    "long-bytes": b"\x8e" + struct.pack("<Q", (1 << 64) - 1) + b".",
    "bytearray": b"\x96" + struct.pack("<Q", 1 << 62) + b".",
    "python-2-string": b"T\xff\xff\xff\x7f.",
    "long-integer": b"\x8b\xff\xff\xff\x7f.",
    "negative-integer-size": b"\x8b\xff\xff\xff\xff.",
    "frame": b"\x95" + struct.pack("<Q", 1 << 40) + b"N.",
    "global": b"ctorch",
    "float": b"G\0\0",
}.items():
    zipped(f"cut-short-{called}", lambda body=body: saved(body), CUT)  # type: ignore[misc]

pickled(
    "huge-integer", b"", b"\x8b" + struct.pack("<L", 1 << 20) + bytes(1 << 20) + b".", "an integer of 1048576 bytes"
)
pickled("endless-global", b"", b"c" + b"x" * 1000 + b".", "a global has no name")
pickled("not-utf-8", b"", b"X\1\0\0\0\xff.", "the pickle is not well-formed")
pickled("empty-stack", b"", b"\x86...........", "the pickle is not well-formed")
pickled("no-mark", b"N", b"t...........", "the pickle is not well-formed")
pickled("two-values", b"NN", b".", "the pickle stops with 2 values")
pickled("open-mark", b"(N", b".", "the pickle stops with 1 values")
pickled("unhashable-key", b"}]N", b"s...........", "the pickle is not well-formed")
pickled("odd-items", b"}(N", b"u.", "the pickle sets items of something that is no dict")
pickled("items-of-a-list", b"]NN", b"s.", "the pickle sets items of something that is no dict")
pickled("append-to-a-dict", b"}N", b"a.", "the pickle appends to something that is no list")
pickled("set-of-lists", b"\x8f(]", b"\x90...........", "the pickle is not well-formed")
pickled(
    "other-codec",
    b"c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86",
    b"R.",
    "bytes that are not written as latin-1",
)
pickled(
    "short-numpy-scalar", b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\n" + text("f8") + b"\x85RC\1x\x86",
    b"R...........", "the pickle is not well-formed",
)  # fmt: skip
zipped("more-behind-the-pickle", lambda: saved(b"N.cos\nsystem\n)R."), "14 bytes follow the pickle in archive/data.pkl")

for called, before, detail in (
    ("beyond-its-storage", tensor(numbers(5)), "a tensor of 5 elements from 0 on, in a storage of 4"),
    ("behind-its-storage", tensor(offset=1), "a tensor of 4 elements from 1 on, in a storage of 4"),
    ("before-its-storage", tensor(offset=-1), "a tensor of 4 elements from -1 on, in a storage of 4"),
    ("strided-out", tensor(strides=numbers(2)), "a tensor of 7 elements from 0 on, in a storage of 4"),
    ("backwards", tensor(strides=numbers(-1)), "a tensor whose shape or strides are not natural numbers"),
    ("negative", tensor(numbers(-4)), "a tensor whose shape or strides are not natural numbers"),
    (
        "huge",
        tensor(numbers(1 << 40, 1 << 40), numbers(1 << 40, 1)),
        f"a tensor of {1 << 80} elements from 0 on, in a storage of 4",
    ),
    ("expanded", tensor(numbers(1 << 40), numbers(0)), "the tensors would hold more than 16 times the file's bytes"),
    (
        "of-no-storage",
        tensor(store=text("0")),
        "a tensor that is not made of a storage, an offset, a shape and strides",
    ),
    (
        "of-another-rank",
        tensor(numbers(2, 2)),
        "a tensor that is not made of a storage, an offset, a shape and strides",
    ),
):
    pickled(f"tensor-{called}", before, b"R.", detail)
pickled(
    "tensors-repeated",
    tensor(numbers(1 << 20), numbers(0))
    + b"q\0R"
    + b"0ctorch._utils\n_rebuild_tensor_v2\nh\0R" * 15
    + b"0ctorch._utils\n_rebuild_tensor_v2\nh\0",
    b"R.",
    "the tensors would hold more than 16 times the file's bytes",
)

for called, part, detail in (
    ("larger", storage(count=5)[:-1], "storage '0' of 20 bytes, for which the file holds 16"),
    ("negative", storage(count=-1)[:-1], "storage '0' of -4 bytes, for which the file holds 16"),
    ("huge", storage(count=1 << 62)[:-1], f"storage '0' of {1 << 64} bytes, for which the file holds 16"),
    ("endless-key", storage("x" * 1000)[:-1], "a storage with a key of 1000 characters"),
    ("view", storage()[:-2] + text("view") + b"t", "a storage that is a view of another"),
    ("other-class", storage(kind=b"ctorch\nTensor\n")[:-1], "the pickle is not well-formed"),
):
    pickled(f"storage-{called}", part, b"Q" + b"." * 10, detail, RefusedError if called == "view" else FileError)
zipped(
    "storage-missing", lambda: saved(tensor(store=storage("../../1")) + b"R."),
    "the zip archive has no member 'archive/data/../../1', which its pickle refers to",
)  # fmt: skip

# --- archives -----------------------------------------------------------------------------------------------------

LOCAL, CENTRAL, END = 30, 46, 22


def patched(data: bytes, at: int, layout: str, *values: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, at % len(changed), *values)
    return bytes(changed)


def directory_entry(data: bytes, name: bytes) -> int:
    """Where the directory's entry of a member begins."""
    return data.rindex(name) - CENTRAL


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


GOOD = saved()
ENTRY = directory_entry(GOOD, b"archive/data/0")
LAST = GOOD.index(b"archive/data/0") - LOCAL
DIRECTORY = struct.unpack_from("<L", GOOD, len(GOOD) - 6)[0]
STORED = "; torch.save stores its members as they are: unpack the archive and zip it again without compression (zip -0)"

zipped(
    "pickle-damaged", lambda: flipped(GOOD, GOOD.index(b"FloatStorage")),
    "archive/data.pkl does not have the CRC-32 that the container states: the file is damaged",
)  # fmt: skip
zipped(
    "compressed", lambda: archive({"archive/data.pkl": PROTO + b"N."}, zipfile.ZIP_DEFLATED),
    f"member 'archive/data.pkl' is compressed or encrypted{STORED}", RefusedError,
)  # fmt: skip
zipped(
    "compressed-storage", lambda: patched(GOOD, ENTRY + 10, "<H", 8),
    f"member 'archive/data/0' is compressed or encrypted{STORED}", RefusedError,
)  # fmt: skip
zipped(
    "encrypted", lambda: patched(GOOD, LAST + 6, "<H", 1),
    f"member 'archive/data/0' is compressed or encrypted{STORED}", RefusedError,
)  # fmt: skip
zipped("overlapping", lambda: patched(GOOD, ENTRY + 42, "<L", 0), "member 'archive/data.pkl' overlaps what follows it")
zipped(
    "longer-than-stored",
    lambda: patched(GOOD, ENTRY + 20, "<2L", 1 << 20, 1 << 20),
    "member 'archive/data/0' overlaps what follows it",
)
zipped(
    "two-sizes", lambda: patched(GOOD, ENTRY + 24, "<L", 8), "member 'archive/data/0' is stored, but has 16 bytes for 8"
)
zipped(
    "member-moved",
    lambda: patched(GOOD, LAST, "<L", 0),
    f"member 'archive/data/0' is not where the directory says, at byte {LAST}",
)
zipped(
    "member-renamed", lambda: GOOD.replace(b"archive/data/0", b"archive/data/1", 1),
    f"member 'archive/data/0' is not where the directory says, at byte {LAST}",
)  # fmt: skip
zipped(
    "zip64-size",
    lambda: patched(GOOD, ENTRY + 20, "<2L", 0xFFFFFFFF, 0xFFFFFFFF),
    "member 'archive/data/0' lacks its zip64 size or offset",
)
zipped(
    "zip64-end",
    lambda: GOOD[:-END] + struct.pack("<4sLQL", b"PK\6\7", 0, 1 << 62, 1) + GOOD[-END:],
    f"the zip archive points at byte {(1 << 62) + 56}; the file ends at {len(GOOD) + 20}",
)
zipped(
    "zip64-end-elsewhere",
    lambda: GOOD[:-END] + struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1) + GOOD[-END:],
    "the zip archive has no zip64 end record at byte 0",
)
zipped("entries-missing", lambda: patched(GOOD, -END + 8, "<2H", 4, 4), "the zip directory holds fewer than 4 members")
zipped(
    "entries-hidden",
    lambda: patched(GOOD, -END + 8, "<2H", 2, 2),
    "the zip directory holds 60 bytes behind its 2 members",
)
zipped(
    "entries-in-millions",
    lambda: patched(GOOD, -END + 8, "<2H", 65535, 65535),
    "the zip archive claims 65535 members in a directory of 185 bytes",
)
zipped(
    "directory-elsewhere",
    lambda: patched(GOOD, -END + 16, "<L", 0),
    f"the zip directory holds {len(GOOD) - END - DIRECTORY} bytes from byte 0 on, but ends at byte {len(GOOD) - END}",
)
zipped(
    "directory-damaged", lambda: patched(GOOD, DIRECTORY, "<L", 0), f"the zip directory is broken at byte {DIRECTORY}"
)
zipped("several-volumes", lambda: patched(GOOD, -END + 4, "<H", 1), "the zip archive is one of several volumes")
zipped("cut-off", lambda: GOOD[: len(GOOD) // 2], "the zip archive has no directory at its end: the file is cut short")
zipped(
    "cut-off-in-the-end-record", lambda: GOOD[:-1], "the zip archive has no directory at its end: the file is cut short"
)
zipped("more-behind-the-archive", lambda: GOOD + b"#!/bin/sh\n", "10 bytes follow the zip archive's end record")
zipped("only-the-magic-number", lambda: b"PK\3\4", "the zip archive has no directory at its end: the file is cut short")
zipped(
    "absolute-name",
    lambda: archive({"/etc/passwd": b""}),
    "a member is called '/etc/passwd', which is no relative path",
)
zipped("name-outside", lambda: archive({"a/../../b": b""}), "a member is called 'a/../../b', which is no relative path")
zipped("name-of-windows", lambda: archive({"c:\\a": b""}), "a member is called 'c:\\\\a', which is no relative path")
zipped(
    "name-not-utf-8",
    lambda: GOOD[:ENTRY] + GOOD[ENTRY:].replace(b"archive/data/0", b"archive/data/\xff"),
    f"the zip directory names a member at byte {ENTRY} that is not UTF-8",
)
zipped("name-too-long", lambda: archive({"x" * 2000: b""}), "the zip directory is broken at byte 2030")
zipped(
    "two-of-one-name", lambda: saved(byteordes=b"").replace(b"archive/byteordes", b"archive/byteorder"),
    "two members are called 'archive/byteorder'",
)  # fmt: skip
zipped(
    "two-pickles",
    lambda: archive({"a/data.pkl": b"", "b/data.pkl": b""}),
    "the zip archive has 2 data.pkl among its 2 members: not one that torch.save wrote",
)
zipped(
    "no-pickle",
    lambda: archive({"archive/version": b"3\n"}),
    "the zip archive has no data.pkl among its 1 members: an interrupted torch.save, or another kind of archive",
)
zipped(
    "big-endian",
    lambda: archive({"a/data.pkl": PROTO + b"N.", "a/byteorder": b"big"}),
    "written on a big-endian machine: save it again on a little-endian one",
    RefusedError,
)

# --- the stream from before torch 1.6, and other files ------------------------------------------------------------

MAGIC = PROTO + number(0x1950A86A20F9469CFC6C) + b"."


def stream(
    body: bytes = tensor() + b"R.",
    keys: bytes = b"](" + text("0") + b"e.",
    storages: bytes = struct.pack("<q", 4) + bytes(16),
    little: bytes = b"\x88",
) -> bytes:
    machine = b"}" + text("little_endian") + little + b"s."
    return b"".join((MAGIC, PROTO + b"M\xe9\3.", PROTO + machine, PROTO + body, PROTO + keys, storages))


BEFORE = len(stream(b"", b"", b"")) - 2 * len(PROTO)
"""Bytes before the pickle that holds the value."""

zipped(
    "stream-os-system", lambda: stream(b"cos\nsystem\n" + RUN),
    f"pickle global 'os.system' refused, at byte {BEFORE + 2} of the file; nothing was run", RefusedError,
)  # fmt: skip
zipped(
    "stream-os-system-among-the-keys", lambda: stream(b"N.", b"cos\nsystem\n" + RUN),
    f"pickle global 'os.system' refused, at byte {BEFORE + 6} of the file; nothing was run", RefusedError,
)  # fmt: skip
STREAM_CUT = "storage '0' at byte 171 is cut short, or not of 16 bytes"
zipped("stream-cut-short", lambda: stream()[:-1], STREAM_CUT)
zipped("stream-without-storages", lambda: stream(storages=b""), STREAM_CUT)
zipped("stream-of-another-size", lambda: stream(storages=struct.pack("<q", 1 << 62) + bytes(16)), STREAM_CUT)
zipped(
    "stream-with-a-huge-storage",
    lambda: stream(tensor(store=storage(count=1 << 60)) + b"R."),
    f"storage '0' of {1 << 62} bytes in a file of 194",
)
zipped("stream-with-more", lambda: stream() + b"x", "1 bytes follow the last storage")
zipped(
    "stream-without-keys",
    lambda: stream(keys=b"]."),
    "the storages in the file are not those that its pickle refers to",
)
zipped(
    "stream-with-odd-keys",
    lambda: stream(keys=b"]]a."),
    "the storages in the file are not those that its pickle refers to",
)
zipped(
    "stream-big-endian",
    lambda: stream(little=b"\x89"),
    "written on a big-endian machine: save it again on a little-endian one",
    RefusedError,
)
zipped("stream-cut-in-the-pickle", lambda: stream()[: BEFORE + 20], "the pickle in the file is cut short")
zipped(
    "another-pickle-with-more", lambda: pickle.dumps([1, 2]) + b"x",
    "1 bytes follow the pickle, which torch.save did not write",
)  # fmt: skip

# --- streams in the bytes of a pickle, as pickle.dump has them ------------------------------------------------------

LOAD = b"ctorch.storage\n_load_from_bytes\n"


def blob(body: bytes) -> bytes:
    data = stream(body)
    return LOAD + b"B" + struct.pack("<L", len(data)) + data + b"\x85"


zipped(
    "blob-of-code", lambda: saved(blob(b"cos\nsystem\n" + RUN) + b"R."),
    f"pickle global 'os.system' refused, at byte {BEFORE + 2} of the file; nothing was run", RefusedError,
)  # fmt: skip
zipped("blob-of-nothing", lambda: saved(LOAD + b"C\1x\x85R."), "pickle opcode b'x' is not read, at byte 0 of the file")
zipped(
    "blob-in-a-blob", lambda: saved(blob(blob(storage() + b".") + b"R.") + b"R."),
    "a storage that is not written in bytes, at byte "
    f"{BEFORE + 2 + len(blob(storage() + b'.'))} of the file",
)  # fmt: skip
pickled(
    "blob-of-a-tensor", blob(tensor() + b"R."), b"R.", "bytes that hold something else than a storage",
)  # fmt: skip
pickled("blob-of-text", LOAD + text("x") + b"\x85", b"R.", "a storage that is not written in bytes")
CALLED = blob(storage() + b".") + b"q\0" + LOAD + b"q\1"
CALLS = 430_000_000 // (20_000 + len(stream(storage() + b".")))
pickled(
    "blob-again-and-again", CALLED + b"h\1h\0R0" * CALLS, b"h\1h\0R0" * CALLS, BUILDS,
    at=len(PROTO + CALLED) + 6 * CALLS + 4,
)  # fmt: skip
zipped(
    "tar",
    lambda: b"sys_info" + bytes(249) + b"ustar\0" + bytes(1000),
    "a tar archive of torch 0.1: save it again with a newer torch",
    RefusedError,
)
zipped("empty", lambda: b"", "not a file that torch.save wrote: neither a zip archive nor a pickle")
zipped(
    "text",
    lambda: b"version 1\n",
    "not a file that torch.save wrote: neither a zip archive nor a pickle",
)

# --- what only looks dangerous ------------------------------------------------------------------------------------

HARMLESS: dict[str, Callable[[], bytes]] = {}
"""Values next to an optimizer's state that its file may hold: the state is read, and nothing of them is built."""

SLOTS = b"}" + text("exp_avg") + tensor() + b"Rs"


def harmless(name: str, value: bytes) -> None:
    HARMLESS[name] = lambda: saved(
        b"}(" + text("x") + value + text("optimizer") + b"}(" + text("state") + b"}K\0" + SLOTS + b"s"
        + text("param_groups") + b"]}" + text("params") + b"]K\0asau" + b"u."
    )  # fmt: skip


FOREIGN = b"csome.library\nThing\n"

harmless("a-name", FOREIGN)
harmless("a-dotted-name", text("torch") + text("Tensor.__init__") + b"\x93")
harmless("called", FOREIGN + text("touch " + CANARY) + b"\x85R")
harmless("called-again", FOREIGN + b")R" + text("touch " + CANARY) + b"\x85R")
harmless("made", FOREIGN + b")\x81")
harmless("made-with-options", FOREIGN + b")}\x92")
harmless("rebuilt", b"ccopy_reg\n_reconstructor\n" + FOREIGN + b"c__builtin__\nobject\nN\x87R}" + text("x") + b"Nsb")
harmless("with-state", FOREIGN + b")R}" + text("__reduce__") + text(CANARY) + b"sb")
harmless("with-items", FOREIGN + b")R(K\0K\1u")
harmless("with-an-item", FOREIGN + b")RK\0K\1s")
harmless("appended-to", FOREIGN + b")R(K\0K\1eK\2a")
harmless("added-to", FOREIGN + b")R(K\0K\1\x90")
harmless("in-itself", FOREIGN + b")Rq\0}" + text("x") + b"h\0sb")
harmless("in-its-own-list", FOREIGN + b"]q\0h\0a\x85R")
harmless("as-a-key", b"}" + FOREIGN + b")RNs")
harmless("doubling", doubling(b"l", 100) + b"0" + FOREIGN + b"h\x64\x85R")
harmless("deep", FOREIGN + b")" + b"\x85" * 100_000 + b"\x85R")
harmless("partial", b"cfunctools\npartial\n(" + FOREIGN + b"tR")
harmless("a-module-of-old", b"(" + text("module") + FOREIGN + text("thing.py") + text("import os") + b"tQ)\x81")
harmless("a-method", b"c__builtin__\ngetattr\n" + FOREIGN + text("mean") + b"\x86R")
GROUPS = b")R}(" + text("state") + b"}" + text("param_groups") + b"]"
"""The state of an object that looks like a whole optimizer, up to its first group."""

OPTIONS = {"in-itself": b"]q\0h\0a", "doubling": doubling(b"l", 100), "deep": b"]" * 100_000 + b"a" * 99_999}
for name, option in OPTIONS.items():
    group = b"}(" + text("params") + b"]" + tensor() + b"Ra" + text("x") + option + b"u"
    harmless(f"a-whole-optimizer-{name}", FOREIGN + GROUPS + group + b"aub")
harmless("a-whole-optimizer-of-nothing", FOREIGN + GROUPS + b"Naub")
harmless("python-2", b"c__builtin__\nlong\nc__builtin__\nunicode\n\x86")


if __name__ == "__main__":
    for name, case in CASES.items():
        Path(sys.argv[1], f"{name}.pt").write_bytes(case.make())
