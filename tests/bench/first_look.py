"""What ``inspect`` of a folder of 10,000 files costs, in processor time, Python and imports included.

``python tests/bench/first_look.py [--files 10000] [--chunks 1 2] [--rounds 5] [--disk /tmp]``. The folders are made of
a small one that torch, or Megatron-Core, wrote: its ``.metadata`` is given more chunks, spread over copies of an item.
"""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

MEGATRON: Final = Path(__file__).parents[1] / "golden" / "megatron" / "files"


def of_torch(folder: Path, chunks: int) -> tuple[Path, list[str]]:
    """Write a folder with so many moments; return it, and the keys of what is to be spread."""
    names = [f"layers.{number}.weight" for number in range(chunks)]
    state = {name: {"exp_avg": torch.randn(1, 4), "step": torch.tensor(3.0)} for name in names}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "params": names}]
    save({"optimizer": {"state": state, "param_groups": groups}}, checkpoint_id=folder, no_dist=True)
    return folder, [f"optimizer.state.{name}.exp_avg" for name in names]


def of_megatron(folder: Path, _: int) -> tuple[Path, list[str]]:
    """Unpack Megatron's folder; the embeddings, their moments and masters are to be spread."""
    name = "embedding.word_embeddings.weight"
    return unpacked("full-tp2-pp2", folder), [
        name, *(f"optimizer.state.{slot}.{name}" for slot in ("param", "exp_avg", "exp_avg_sq"))
    ]  # fmt: skip


def of_buckets(folder: Path, _: int) -> tuple[Path, list[str]]:
    """Unpack Megatron's folder of flat buckets, which are to be spread."""
    bucket = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0"
    return unpacked("bucket-dp2", folder), [f"{bucket}.{slot}" for slot in ("param", "exp_avg", "exp_avg_sq")]


def unpacked(case: str, folder: Path) -> Path:
    """Unpack one of Megatron's folders."""
    with tarfile.open(MEGATRON / f"{case}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return next(folder.rglob(".metadata")).parent


MAKERS: Final[dict[str, Callable[[Path, int], tuple[Path, list[str]]]]] = {
    "torch": of_torch, "Megatron": of_megatron, "Megatron, flat buckets": of_buckets,
}  # fmt: skip


def spread(folder: Path, keys: list[str], files: int, chunks: int) -> None:
    """Give the tensors together ``chunks`` chunks for each of ``files`` files, every one the tensor's first."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    places, number = metadata.storage_data, 0
    for key in keys:
        described = metadata.state_dict_metadata[key]
        old = {index: info for index, info in places.items() if index.fqn == key}
        first = next(info for index, info in old.items() if not any(index.offset))
        item = (folder / first.relative_path).read_bytes()[first.offset : first.offset + first.length]
        rows, *rest = described.chunks[0].sizes
        described.chunks = []
        for index in old:
            del places[index]
        for place in range(files * chunks // len(keys)):
            offset, info = torch.Size((place * rows, *(0 for _ in rest))), copy.copy(first)
            info.relative_path = f"__{1000 + number % files}_0.distcp"
            with (folder / info.relative_path).open("ab") as file:
                info.offset = file.tell()
                file.write(item)
            described.chunks.append(ChunkStorageMetadata(offset, torch.Size((rows, *rest))))
            places[MetadataIndex(key, offset, place)] = info
            number += 1
        described.size = torch.Size((len(described.chunks) * rows, *rest))
    path.write_bytes(pickle.dumps(metadata))


def seconds(folder: Path) -> float:
    """Return the processor time of one ``inspect``."""
    before = os.times()
    command: list[Any] = [sys.executable, "-m", "lora_state_format", "inspect", folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--files", type=int, default=10_000)
    options.add_argument("--chunks", type=int, nargs="+", default=[1, 2])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    given = options.parse_args()
    for kind, make in MAKERS.items():
        for chunks in given.chunks:
            with tempfile.TemporaryDirectory(dir=given.disk) as place:
                folder, keys = make(Path(place) / "step", chunks)
                spread(folder, keys, given.files, chunks)
                size = (folder / ".metadata").stat().st_size
                times = sorted(seconds(folder) for _ in range(given.rounds))
            least, median = times[0], times[len(times) // 2]
            print(f"{kind}, {given.files} files, {chunks} chunks a file, .metadata of {size / 1e6:.1f} MB: ", end="")
            print(f"median {median:.2f} s, least {least:.2f} s")


if __name__ == "__main__":
    main()
