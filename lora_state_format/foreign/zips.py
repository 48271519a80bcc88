"""Zip archives whose members are stored uncompressed: byte ranges of one source, as ``torch.save`` writes them.

Only the directory and the members' heads are read, and everything that could point elsewhere is checked: overlaps,
duplicates, sizes beyond the archive, two different names for one member. APPNOTE.TXT (PKWARE) is the zip format's text.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Final

from lora_state_format.errors import FileError, RefusedError
from lora_state_format.model.sources import Range, Source

__all__ = ["MAX_MEMBERS", "Archive", "Member"]

MAX_MEMBERS: Final = 600_000
"""Members of an archive; an Adam state of 140,000 parameters has 420,000."""

MAX_DIRECTORY: Final = 64 << 20
"""Bytes of the directory of an archive."""

MAX_NAME: Final = 1024
"""Bytes of a member's name."""

READ_AHEAD: Final = 4096
"""Bytes read at a time at the end, and where members begin: those of small tensors are close together."""

LOCAL: Final = struct.Struct("<4s5H3L2H")
CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
END: Final = struct.Struct("<4s4H2LH")
LOCATOR: Final = struct.Struct("<4sLQL")
END64: Final = struct.Struct("<4sQ2H2L4Q")

ENCRYPTED: Final = 0x1
IN_ZIP64: Final = 0xFFFFFFFF


class Member(Range):
    """A member's bytes. ``crc32`` is stated by the archive."""

    def __init__(self, source: Source, start: int, size: int, crc32: int | None, name: str, path: object) -> None:
        super().__init__(source, start, size, crc32)
        self.name = name
        self.path = path

    def bytes(self) -> bytearray:
        """Return all bytes."""
        buffer = bytearray(self.size)
        self.readinto(0, memoryview(buffer))
        return buffer


class Archive(Mapping[str, Member]):
    """The members of a zip archive by name, in the order of its directory.

    Raises ``FileError`` for an archive that is not whole or contradicts itself, ``RefusedError`` for a compressed or
    encrypted member on access. ``path`` is only for messages.
    """

    def __init__(self, source: Source, path: object = None) -> None:
        self._source = source
        self.path = path
        self._ahead_from, self._ahead = 0, bytearray()
        count, size, start = self._directory()
        self._entries = self._members(count, start, size)
        # A member has to end before the next one starts, and the last one before the directory does.
        by_offset = sorted((entry[0], name) for name, entry in self._entries.items())
        self._stops = dict(
            zip((name for _, name in by_offset), [*(offset for offset, _ in by_offset[1:]), start], strict=True)
        )
        for offset, name in by_offset:
            if offset + LOCAL.size + len(name) + self._entries[name][1] > self._stops[name]:
                raise self._error(f"member {name!r} overlaps what follows it")
        # torch can be told not to compute checksums; all of them are zero then.
        self._has_crc = any(crc for _, _, crc, _ in self._entries.values())
        self._opened: dict[str, Member] = {}

    def __getitem__(self, name: str) -> Member:
        if name not in self._opened:
            self._opened[name] = self._open(name)
        return self._opened[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _open(self, name: str) -> Member:
        offset, size, crc, method = self._entries[name]
        raw = name.encode()
        header = self._read_near(offset, LOCAL.size + len(raw))
        signature, _, flags, local_method, _, _, _, _, _, name_size, extra_size = LOCAL.unpack_from(header)
        if method != 0 or local_method != 0 or flags & ENCRYPTED:
            raise RefusedError(
                f"member {name!r} is compressed or encrypted; torch.save stores its members as they are: unpack the "
                "archive and zip it again without compression (zip -0)",
                path=self.path,
            )
        if signature != b"PK\3\4" or name_size != len(raw) or not header.endswith(raw):
            raise self._error(f"member {name!r} is not where the directory says, at byte {offset}")
        start = offset + len(header) + extra_size
        if start + size > self._stops[name]:
            raise self._error(f"member {name!r} overlaps what follows it")
        return Member(self._source, start, size, crc if self._has_crc else None, name, self.path)

    def _directory(self) -> tuple[int, int, int]:
        """Return members, size and offset of the central directory, from the records at the end of the archive."""
        for tail_size in (READ_AHEAD, END.size + 0xFFFF):  # which is as long as a comment can make it
            self._ahead_from = max(self._source.size - tail_size, 0)
            self._ahead = self._read(self._ahead_from, self._source.size - self._ahead_from)
            at = self._ahead.rfind(b"PK\5\6", 0, max(len(self._ahead) - END.size, 0) + 4)
            if at >= 0:
                break
        else:
            raise self._error("the zip archive has no directory at its end: the file is cut short")
        _, disk, first_disk, _, count, size, start, comment = END.unpack_from(self._ahead, at)
        end = self._ahead_from + at
        if end + END.size + comment != self._source.size:
            raise self._error(f"{self._source.size - end - END.size} bytes follow the zip archive's end record")
        if disk or first_disk:
            raise self._error("the zip archive is one of several volumes")
        if end >= LOCATOR.size:
            signature, _, end64, _ = LOCATOR.unpack(self._read(end - LOCATOR.size, LOCATOR.size))
            if signature == b"PK\6\7":
                signature, *_, count, size, start = END64.unpack(self._read(end64, END64.size))
                end = end64
                if signature != b"PK\6\6":
                    raise self._error(f"the zip archive has no zip64 end record at byte {end64}")
        if start + size != end:
            raise self._error(f"the zip directory holds {size} bytes from byte {start} on, but ends at byte {end}")
        if count > MAX_MEMBERS or size > MAX_DIRECTORY or count * CENTRAL.size > size:
            raise self._error(f"the zip archive claims {count} members in a directory of {size} bytes")
        return count, size, start

    def _members(self, count: int, start: int, size: int) -> dict[str, tuple[int, int, int, int]]:
        """Return each member's name -> offset, size in the archive, CRC-32 and compression."""
        data = bytes(self._read(start, size))
        entries: dict[str, tuple[int, int, int, int]] = {}
        at = 0
        for _ in range(count):
            if at + CENTRAL.size > size:
                raise self._error(f"the zip directory holds fewer than {count} members")
            signature, _, _, _, method, _, _, crc, packed, plain, named, extra, comment, _, _, _, offset = (
                CENTRAL.unpack_from(data, at)
            )
            fields = at + CENTRAL.size + named
            stop = fields + extra + comment
            if signature != b"PK\1\2" or named > MAX_NAME or stop > size:
                raise self._error(f"the zip directory is broken at byte {start + at}")
            try:
                name = data[at + CENTRAL.size : fields].decode()
            except UnicodeDecodeError:
                raise self._error(f"the zip directory names a member at byte {start + at} that is not UTF-8") from None
            if plain == IN_ZIP64 or packed == IN_ZIP64 or offset == IN_ZIP64:
                plain, packed, offset = self._zip64(data[fields : fields + extra], name, plain, packed, offset)
            if name[:1] == "/" or "\0" in name or "\\" in name or ".." in name.split("/"):
                raise self._error(f"a member is called {name!r}, which is no relative path")
            if method == 0 and packed != plain:
                raise self._error(f"member {name!r} is stored, but has {packed} bytes for {plain}")
            if name in entries:
                raise self._error(f"two members are called {name!r}")
            entries[name] = (offset, packed, crc, method)
            at = stop
        if at != size:
            raise self._error(f"the zip directory holds {size - at} bytes behind its {count} members")
        return entries

    def _zip64(self, extra: bytes, name: str, *values: int) -> Iterator[int]:
        """Return sizes and offset, those that do not fit in 32 bits taken from the extra field with id 1."""
        field, at = b"", 0
        while at + 4 <= len(extra):
            identity, size = struct.unpack_from("<2H", extra, at)
            if identity == 1:
                field = extra[at + 4 : at + 4 + size]
                break
            at += 4 + size
        at = 0
        for value in values:
            if value == IN_ZIP64:
                if at + 8 > len(field):
                    raise self._error(f"member {name!r} lacks its zip64 size or offset")
                value = int.from_bytes(field[at : at + 8], "little")
                at += 8
            yield value

    def _read_near(self, start: int, size: int) -> bytearray:
        """Return bytes; those that follow are read too and kept."""
        if not self._kept(start, size):
            self._ahead = self._read(start, max(size, min(READ_AHEAD, self._source.size - start)))
            self._ahead_from = start
        return self._read(start, size)

    def _read(self, start: int, size: int) -> bytearray:
        if self._kept(start, size):
            return self._ahead[start - self._ahead_from : start - self._ahead_from + size]
        if start < 0 or start + size > self._source.size:
            raise self._error(f"the zip archive points at byte {start + size}; the file ends at {self._source.size}")
        buffer = bytearray(size)
        self._source.readinto(start, memoryview(buffer))
        return buffer

    def _kept(self, start: int, size: int) -> bool:
        return self._ahead_from <= start <= start + size <= self._ahead_from + len(self._ahead)

    def _error(self, detail: str) -> FileError:
        return FileError(detail, path=self.path)
