"""Orbax checkpoints that Orbax wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_state_format import registry
from lora_state_format.converters import orbax
from lora_state_format.errors import FileError, OptionError, RefusedError, UnknownFormatError
from lora_state_format.format import reading, writing
from lora_state_format.model.states import OptimizerState
from lora_state_format.model.tensors import Tensor

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

SHAPES = {"b": (4, 6), "a": {"k": (3,), "s": ()}}


def read(path: Path, **options: Any) -> OptimizerState:
    state = registry.read(path, "orbax", {"optimizer": "adamw", **options}).state
    assert isinstance(state, OptimizerState)
    return state


def trained(dtype: str = "float32") -> tuple[Any, Any]:
    """Parameters, and the state of a chain with AdamW after 3 steps."""
    import jax
    import optax

    def values(seed: int) -> Any:
        generator = np.random.default_rng(seed)
        return jax.tree.map(
            lambda shape: jax.numpy.asarray(generator.normal(size=shape), dtype),
            SHAPES,
            is_leaf=lambda x: type(x) is tuple,
        )

    tx, params = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), values(0)
    state = tx.init(params)
    for step in range(3):
        _, state = jax.jit(tx.update)(values(step + 1), state, params)
    return params, state


def assert_holds(ours: OptimizerState, moments: Any) -> None:
    import jax

    for slot, tree in (("exp_avg", moments.mu), ("exp_avg_sq", moments.nu)):
        for keys, array in jax.tree_util.tree_leaves_with_path(tree):
            value = ours[".".join(str(getattr(key, "key", key)) for key in keys)][slot]
            data = bytes(value.bytes()) if isinstance(value, Tensor) else value.data
            assert data == np.asarray(array).tobytes()
    assert ours["b"]["step"].item() == 3


@pytest.mark.parametrize("form", ["plain", "files", "zarr3", "bf16"])
def test_it_holds_what_was_saved(tmp_path: Path, form: str) -> None:
    import orbax.checkpoint as ocp

    options: dict[str, Any] = {"files": {"use_ocdbt": False}, "zarr3": {"use_zarr3": True}}.get(form, {})
    _, state = trained("bfloat16" if form == "bf16" else "float32")
    ocp.PyTreeCheckpointer(**options).save(tmp_path / "state", state)
    converter, match = registry.detect(tmp_path / "state")
    assert converter.NAME == "orbax"
    assert match.reason == "_METADATA of Orbax, which lists an optimizer's state"
    ours = read(tmp_path / "state")
    assert_holds(ours, state[1][0])
    assert ours["b"]["exp_avg"].dtype == ("BF16" if form == "bf16" else "F32")
    writing.write(ours, tmp_path / "state.safetensors")
    with reading.open_state(tmp_path / "state.safetensors") as named:
        assert_holds(named, state[1][0])


def test_a_train_state_and_a_step_of_a_manager(tmp_path: Path) -> None:
    import jax
    import orbax.checkpoint as ocp

    params, state = trained()
    whole = {"step": jax.numpy.int32(3), "params": params, "opt_state": state}
    ocp.PyTreeCheckpointer().save(tmp_path / "whole", whole)
    checkpoint = registry.read(tmp_path / "whole", "orbax", {"optimizer": "adamw"})
    assert isinstance(checkpoint.state, OptimizerState)
    assert_holds(checkpoint.state, state[1][0])
    assert checkpoint.weights["b"].bytes() == np.asarray(params["b"]).tobytes()
    with ocp.CheckpointManager(tmp_path / "manager") as manager:
        items = {"model_params": ocp.args.StandardSave(params), "optimizer_state": ocp.args.StandardSave(state)}
        manager.save(3, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
    converter, match = registry.detect(tmp_path / "manager" / "3")
    assert (converter.NAME, match.path.name) == ("orbax", "optimizer_state")
    assert_holds(read(tmp_path / "manager" / "3"), state[1][0])


def test_an_nnx_optimizer_as_tunix_saves_it(tmp_path: Path) -> None:
    import jax
    import optax
    import orbax.checkpoint as ocp
    from flax import nnx

    model = nnx.LoRALinear(4, 6, lora_rank=2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.inject_hyperparams(optax.adamw)(1e-2), wrt=nnx.LoRAParam)
    for _ in range(3):
        optimizer.update(model, jax.tree.map(lambda weight: weight + 0.5, nnx.state(model, nnx.LoRAParam)))
    with ocp.CheckpointManager(tmp_path) as manager:
        state = nnx.state(optimizer, nnx.optimizer.OptState)
        manager.save(3, args=ocp.args.Composite(optimizer_state=ocp.args.StandardSave(state)))
        manager.wait_until_finished()
    ours = read(tmp_path / "3")
    pure: Any = nnx.to_pure_dict(state)
    moments = pure["opt_state"]["inner_state"][0]
    assert set(ours) == {"lora.lora_a", "lora.lora_b"}
    for name, parameter in ours.items():
        assert parameter["exp_avg"].bytes() == np.asarray(moments["mu"]["lora"][name[5:]]).tobytes()
    assert dict(ours.groups[0].options)["lr"] == float(np.float32(1e-2))
    assert dict(read(tmp_path / "3", lr=1e-2).groups[0].options)["lr"] == 1e-2, "float32 holds it rounded"
    with pytest.raises(OptionError) as caught:
        read(tmp_path / "3", lr=1.0)
    assert str(caught.value) == f"{tmp_path / '3' / 'optimizer_state'} holds lr={float(np.float32(1e-2))!r}, not 1.0"


def test_what_is_missing(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    _, state = trained()
    path = tmp_path / "state"
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(path, state)
    (path / "1.0.mu.b" / ".zarray").unlink()
    with pytest.raises(FileError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: has no array '1.0.mu.b': NOT_FOUND: ")
    metadata = json.loads((path / "_METADATA").read_text())
    metadata["tree_metadata"]["('1', '0', 'mu', 'b')"]["value_metadata"]["value_type"] = "string"
    (path / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(RefusedError) as refused:
        read(path)
    assert str(refused.value) == f"{path}: '1/0/mu/b' is a string, where numbers were expected"
    (path / "_METADATA").write_text("{}")
    assert orbax.detect(path) is None
    with pytest.raises(UnknownFormatError) as empty:
        read(path)
    assert str(empty.value) == f"{path}: not recognised as 'orbax': expected {orbax.DESCRIPTION}"


def test_neither_jax_nor_orbax_is_imported(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(tmp_path / "state", trained()[1])
    code = (
        "import sys\nfrom lora_state_format import cli\n"
        "assert cli.run(['convert', sys.argv[1], sys.argv[2], '--optimizer', 'adamw']) == 0\n"
        "assert not {'jax', 'orbax', 'torch', 'flax'} & set(sys.modules)\n"
    )
    paths = (tmp_path / "state", tmp_path / "named.safetensors")
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, timeout=120)
