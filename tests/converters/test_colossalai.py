"""ColossalAI's sharded optimizer, which its Booster wrote on two ranks (``tests/golden/colossalai``)."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_state_format import registry
from lora_state_format.errors import FileError, RefusedError
from lora_state_format.operations.conversion import convert, read

pytestmark = pytest.mark.filterwarnings("ignore")

GOLDEN = Path(__file__).parents[1] / "golden" / "colossalai" / "files" / "ddp.tar.xz"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoint, with ``modeling`` and ``optimizer`` in it; what the optimizer held lies next to it."""
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "ddp"


def test_the_state_is_what_the_optimizer_held(folder: Path, assert_holds: Any, tmp_path: Path) -> None:
    live = torch.load(tmp_path / "ddp.live.pt")
    assert len(list((folder / "optimizer").glob("pytorch_optim-*.bin"))) == 3
    for path in (folder, folder / "optimizer", folder / "optimizer" / "pytorch_optim.bin.index.json"):
        converter, match = registry.detect(path)
        assert (converter.NAME, match.reason) == ("colossalai", "pytorch_optim.bin.index.json of ColossalAI")
    report = convert(folder, tmp_path / "optimizer.safetensors")
    assert (report.groups, report.paired, report.naming.source) == ((2, 3), 5, "checkpoint")
    with read(tmp_path / "optimizer.safetensors") as state:
        assert_holds(state, live["state"])
        assert [[p.name for p in members] for members in state.members()] == live["groups"]
        assert [dict(group.options)["weight_decay"] for group in state.groups] == [0.1, 0.0]
    with read(tmp_path / "ddp.whole.bin", names=[n for group in live["groups"] for n in group]) as state:
        assert_holds(state, live["state"])  # what it writes without shard=True


def test_a_shard_is_missing_or_another_ones(folder: Path) -> None:
    second = folder / "optimizer" / "pytorch_optim-00002.bin"
    kept = second.read_bytes()
    second.write_bytes((folder / "optimizer" / "pytorch_optim-00001.bin").read_bytes())
    with pytest.raises(FileError) as another:
        registry.read(folder)
    assert str(another.value) == (
        f"{second}: holds the ids 0, where pytorch_optim.bin.index.json says 1: a shard of another save"
    )
    second.unlink()
    with pytest.raises(FileError) as missing:
        registry.read(folder)
    assert str(missing.value) == f"{second}: missing: the index of the optimizer's shards names it"
    second.write_bytes(kept)
    groups = folder / "optimizer" / "pytorch_optim_group.bin"
    torch.save({}, groups)
    with pytest.raises(FileError) as wrong:
        registry.read(folder)
    assert str(wrong.value) == f"{groups}: holds no list of groups"


def test_weights_that_cannot_be_read_are_skipped_with_words(folder: Path) -> None:
    shard = folder / "modeling" / "pytorch_model-00001.bin"
    shard.write_bytes(b"")
    checkpoint = registry.read(folder)
    assert checkpoint.candidates == ()
    assert len(checkpoint.skipped) == 1
    assert checkpoint.skipped[0].startswith(f"{shard}: ")
    assert checkpoint.skipped[0].endswith("; it was skipped")


def test_an_asynchronous_save_is_refused(tmp_path: Path) -> None:
    """Laid out from ``colossalai/utils/safetensors.py``: its writer needs TensorNVMe."""
    index = tmp_path / "optimizer.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"param_groups": "pytorch_optim_group.bin"}, "weight_map": {}}))
    assert registry.detect(tmp_path)[0].NAME == "colossalai"
    with pytest.raises(RefusedError) as error:
        registry.read(tmp_path)
    assert str(error.value) == (
        f"{index}: an asynchronous save, in whose safetensors all that is no tensor is a pickle: load it where it was "
        "written, and save it with use_async=False"
    )
