"""A mixture of experts under LoRA has so many parameters that a header alone outgrows what readers take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Final

from lora_state_format.format import envelope, reading, writing
from lora_state_format.model.sources import File

BENCH: Final = Path(__file__).with_name("bench.py")
COUNT: Final = 142_000


def test_a_state_is_split_where_its_header_grows_too_large(
    tmp_path: Path, load_module: Callable[[Path], ModuleType]
) -> None:
    state = load_module(BENCH).many(COUNT)
    path = tmp_path / "optimizer.safetensors"
    written = writing.write(state, path)

    shards = [Path(name) for name in written.files if name.endswith(".safetensors")]
    sizes = []
    for shard in shards:
        with File(shard) as file:
            sizes.append(int.from_bytes(file.read(0, 8), "little"))
    assert len(shards) > 1
    assert max(sizes) <= 25_000_000, "huggingface_hub reads no larger header"
    assert sum(sizes) / COUNT <= 75_000_000 / 100_000

    opened = reading.open_state(path)  # the path that was asked for, of which no file was made
    assert not path.exists()
    assert list(opened) == list(state)
    for number in (0, COUNT // 2, COUNT - 1):
        name = state.parameters[number].name
        assert opened[name]["exp_avg"].bytes() == bytes(64)
        assert opened.parameters[number].weights == state.parameters[number].weights
    index = json.loads((tmp_path / f"{path.name}{envelope.INDEX_SUFFIX}").read_bytes())
    assert len(index["weight_map"]) == 2 * COUNT
