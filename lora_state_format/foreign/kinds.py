"""What a file is that holds no optimizer state, by its first bytes: for messages."""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["READERS", "certain_kind", "kind_of_file"]

HDF5: Final = "an HDF5 file"
NPZ: Final = "a zip archive of NumPy arrays"

READERS: Final = {HDF5: ("keras",), NPZ: ("chainer", "mlx")}
"""What is built in that reads files of a certain kind; of other kinds there is none."""

MAGIC: Final = (
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF document"),
    (b"\x89HDF\r\n", HDF5),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "a GGUF model, which holds weights alone"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"\xfd7zXZ", "an xz archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"SQLite format 3", "a SQLite database"),
)
"""What a file begins with, and what it is then."""

TAR: Final = (257, b"ustar")

OLD_TORCH: Final = b"sys_info"
"""The first member of the tar archives of torch 0.1, which are refused by name."""

NAMED: Final = 1024
"""Bytes of a zip archive in which its first member is named."""

READ: Final = 4096
"""Bytes that are looked at."""


def certain_kind(path: Path) -> str | None:
    """Return what a file is, in words, if its first bytes leave no doubt; only ``READERS`` read such files."""
    start = _start(path)
    for magic, words in MAGIC:
        if start.startswith(magic):
            return words
    if start[TAR[0] :].startswith(TAR[1]) and not start.startswith(OLD_TORCH):
        return "a tar archive: unpack it first"
    return NPZ if start.startswith(b"PK\3\4") and b".npy" in start[:NAMED] else None


def kind_of_file(path: Path) -> str | None:
    """Return what a file is, in words; ``None`` for a folder, and for a file that its beginning does not tell."""
    start = _start(path)
    if not start:
        return "an empty file" if path.is_file() else None
    if (certain := certain_kind(path)) is not None:
        return certain
    if start.startswith(b"PK\3\4"):
        return "a zip archive without an optimizer in it"
    if start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 1 << 32:
        return "a safetensors file of weights"
    try:
        start[: READ - 4].decode()
    except UnicodeDecodeError:
        return None
    return "a JSON file" if start.lstrip()[:1] in (b"{", b"[") else "a text file"


def _start(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(READ)
