"""The table of parallelisms in docs/cluster.md, out of the cases that the tests prove: run this file to print it.

A case's name says how it was made: ``tests/golden`` has a folder for each, and ``test_megatron.py``,
``test_megatron_fsdp.py``, ``test_deepspeed_parallel.py``, ``test_sub_partitions.py``, ``test_nanotron.py`` and
``test_torchtitan.py`` compare all that there are with what the ranks held.
``fsdp_run.py`` makes those of torch when the tests run, which take their cases from here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
GOLDEN: Final = HERE.parent / "golden"

FORMS: Final = {
    "fp32": "not distributed", "space": "`fully_sharded_model_space`", "full": "`fully_reshardable`",
    "bucket": "`dp_reshardable`",
}  # fmt: skip
WORDS: Final = {
    "tp": "tensor {}", "pp": "pipeline {}", "vp": "virtual pipeline {}", "ep": "expert {}", "dp": "data {}",
    "one": "a single group", "frozen": "a frozen parameter", "rigid": "`elastic_checkpoint` false", "fsdp": "FSDP2 {}",
    "gated": "SwiGLU", "tied": "tied embeddings", "slow": "norms equal in bf16", "rms": "RMSNorm",
}  # fmt: skip
KINDS: Final = {
    "pipeline": "pipeline 2", "tensor": "AutoTP 2", "experts": "expert 2", "hpz": "`zero_hpz_partition_size` 2",
    "staged": "pipeline 2, expert 2", "uneven": "pipeline 2, expert 2 in the last stage",
    "routed": "AutoTP 2, expert 2", "wide": "AutoTP 2, expert 4", "grid": "tensor 2, pipeline 2",
}  # fmt: skip
TORCH: Final = {
    "flattened": ("dcp", 2, "flattened", "FSDP2"),
    "grid": ("dcp", 4, "flattened", "FSDP2 2, tensor 2"),
    "nested": ("dcp", 2, "nested", "FSDP2"),
    "rows": ("dcp", 2, "nested", "FSDP2 along the second axis"),
    "items": ("dcp", 2, "safetensors items", "FSDP2"),
    "zstd": ("dcp", 2, "Zstandard", "FSDP2"),
    "async": ("dcp", 2, "asynchronous, cached plans", "FSDP2"),
    "fsdp1": ("dcp", 2, "sharded", "FSDP1"),
    "hugging": ("dcp_safetensors", 2, "`HuggingFaceStorageWriter`", "FSDP2"),
    "consolidated": ("dcp_safetensors", 2, "the same, consolidated", "FSDP2"),
    "ranks": ("fsdp2_ranks", 2, "a file of each rank", "FSDP2"),
    "replicas": ("fsdp2_ranks", 2, "a file of each rank", "hybrid 2"),
    "cells": ("fsdp2_ranks", 4, "a file of each rank", "FSDP2 2, tensor 2"),
}
"""Case of ``fsdp_run.py`` -> converter, ranks, form, parallelism."""


def cases(framework: str) -> list[str]:
    """The names of a framework's folders."""
    return sorted(path.name.removesuffix(".tar.xz") for path in (GOLDEN / framework / "files").iterdir())


def nemo(case: str) -> tuple[str, ...]:
    return "NeMo 2.4.0, Megatron-Core 0.13.1", *megatron(case)[1:]


def megatron(case: str) -> tuple[str, ...]:
    form, *words = case.split("-")
    found = [re.fullmatch(r"([a-z]+)(\d*)", word) for word in words]
    says = [WORDS[match[1]].format(match[2]) for match in found if match]
    return "Megatron-Core 0.16.1", "megatron", FORMS[form], ", ".join(says), case


def megatron_fsdp(case: str) -> tuple[str, ...]:
    says = [WORDS[match[1]].format(match[2]) for match in re.finditer(r"(tp|dp|gated)(\d*)", case)]
    return "Megatron-FSDP of 0.16.1", "dcp", "`fsdp_dtensor`", ", ".join(says), case


def deepspeed(case: str) -> tuple[str, ...]:
    match = re.fullmatch(r"(\d)-([a-z]+)(\d)", case)
    assert match
    ranks, kind, stage = int(match[1]), match[2], match[3]
    says = KINDS[kind] + (f", data {ranks // 2}" if ranks > 2 and kind in ("pipeline", "tensor", "experts") else "")
    converter = "deepspeed_zero" if stage != "0" else "deepspeed_plain"
    return "DeepSpeed 0.19.8", converter, f"ZeRO {stage}" if stage != "0" else "without ZeRO", says, case


def deeperspeed(case: str) -> tuple[str, ...]:
    found = [re.fullmatch(r"([a-z]+)(\d*)", word) for word in case.split("-")]
    says = [WORDS[match[1]].format(match[2]) for match in found if match]
    return "DeepSpeed 0.3.15", "deepspeed_zero", "ZeRO 1, sub-partitions", ", ".join(says), case


def nanotron(case: str) -> tuple[str, ...]:
    says = [WORDS[match[1]].format(match[2]) for match in re.finditer(r"(tp|pp|dp)(\d)", case)]
    says += ["fp32 masters"] if "masters" in case else []
    return "nanotron 0.4", "nanotron", "ZeRO 1" if "zero" in case else "without ZeRO", ", ".join(says), case


def torchtitan(case: str) -> tuple[str, ...]:
    says = [WORDS[match[1]].format(match[2]) for match in re.finditer(r"(fsdp|tp|pp|ep)(\d)", case)]
    return "torchtitan 0.3.0", "dcp", "flattened", ", ".join(says) + ", 4 ranks", case


def rows() -> Iterator[tuple[str, ...]]:
    yield from map(megatron, cases("megatron"))
    yield from map(nemo, cases("nemo"))
    yield from map(megatron_fsdp, cases("megatron_fsdp"))
    yield from map(deepspeed, cases("deepspeed"))
    yield from map(deeperspeed, cases("deeperspeed"))
    yield from map(nanotron, cases("nanotron"))
    yield from map(torchtitan, cases("torchtitan"))
    for case, (converter, ranks, form, says) in TORCH.items():
        yield "torch 2.13", converter, form, f"{says}, {ranks} ranks", case


def table() -> str:
    """The table, as Markdown."""
    lines = ["| written by | converter | form | parallelism | case |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {w} | `{c}` | {form} | {says} | `{case}` |" for w, c, form, says, case in rows())])


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
