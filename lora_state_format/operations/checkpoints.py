"""The checkpoints of a run: which of them keep their optimizer's state."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_state_format.format.envelope import index_of
from lora_state_format.format.rotation import STATE, plan_rotation, remove_states, series_of

__all__ = ["Pruned", "prune_checkpoints"]

LEGACY: Final = re.compile(r"optimizer(_\d+)?\.bin|optimizer\.pt")
"""Files in which Trainer and accelerate keep an optimizer's state, in a folder of each checkpoint."""


@dataclass(frozen=True)
class Pruned:
    """States that stay and states that were removed, or would be; ``size`` is what those have of the disk, in bytes."""

    kept: tuple[Path, ...]
    removed: tuple[Path, ...]
    size: int
    dry_run: bool

    def __str__(self) -> str:
        lines = [f"keep {path}" for path in self.kept] + [f"remove {path}" for path in self.removed]
        done = "would free" if self.dry_run else "freed"
        return "\n".join([*lines, f"{len(self.removed)} removed, {len(self.kept)} kept, {done} {self.size:,} bytes"])


def prune_checkpoints(folder: Path, keep: int, *, legacy: bool = False, dry_run: bool = False) -> Pruned:
    """Remove the optimizer's state from all but the last checkpoints in a folder.

    Args:
        folder: A run's output folder, with a folder for each checkpoint.
        keep: How many of the last keep their state; one that cannot be opened does not count.
        legacy: Do the same with the files of Trainer and accelerate, counted for themselves.
        dry_run: Remove nothing.

    Raises:
        OptionError: If the order of the folder's checkpoints is unknown.
    """
    kept: list[Path] = []
    removed: list[Path] = []
    size = 0
    for series in _series(folder):
        rotation = plan_rotation(series, keep)
        kept += rotation.kept
        removed += rotation.removed
        size += sum(_size(path) for path in rotation.removed)
        if not dry_run:
            remove_states(rotation.removed)
    if legacy:
        old_kept, old = _legacy(folder, keep)
        kept += old_kept
        removed += old
        size += sum(path.stat().st_size for path in old)
        for path in () if dry_run else old:
            path.unlink()
    return Pruned(tuple(kept), tuple(removed), size, dry_run)


def _series(folder: Path) -> Iterator[list[Path]]:
    """Yield the states of each run in a folder, of which there is mostly one."""
    seen: set[Path] = set()
    for entry in sorted(folder.iterdir()):
        for path in (entry / STATE, entry / Path(STATE).name):
            if path not in seen and (path.exists() or index_of(path).exists()):
                series = series_of(path)
                seen.update(series)
                yield series


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}*"))


def _legacy(folder: Path, keep: int) -> tuple[list[Path], list[Path]]:
    """Return the files of other programs that stay, and those to remove."""
    found = [
        (int(number[1]), [file for file in sorted(entry.iterdir()) if LEGACY.fullmatch(file.name) and file.is_file()])
        for entry in folder.iterdir()
        if entry.is_dir() and (number := re.search(r"(\d+)$", entry.name))
    ]
    kept: list[Path] = []
    removed: list[Path] = []
    whole = 0
    for _, files in sorted((item for item in found if item[1]), reverse=True):
        if whole < keep:
            kept += files
            whole += all(map(zipfile.is_zipfile, files))
        else:
            removed += files
    return kept, removed if whole >= keep else []
