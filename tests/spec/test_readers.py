"""Readers for those without torch: NumPy, and the recipes of docs/readers.md for JAX and MLX."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_state_format.errors import DigestError, MissingDependencyError
from lora_state_format.format import reading, writing
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
    walk,
)
from lora_state_format.model.tensors import contiguous
from lora_state_format.numpy import array, load

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "readers.md").read_text(encoding="utf-8")
VALID = sorted((ROOT / "spec" / "vectors" / "valid").glob("*.safetensors"))
INVALID = sorted((ROOT / "spec" / "vectors" / "invalid").glob("*.json"))
NAMES = [
    f"base_model.model.layers.{layer}.q_proj.lora_{factor}.default.weight" for layer in range(2) for factor in "AB"
]


def recipe(language: str, heading: str) -> str:
    """The block of a language under a heading."""
    section = DOCUMENT.partition(f"\n## {heading}")[2].partition("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found
    return found[1]


def values(seed: int) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=(2, 6) if "lora_A" in name else (4, 2)).astype(np.float32) for name in NAMES}


def named(path: Path) -> OptimizerState:
    """An Adam state of step 7 in a file."""
    first, second = values(1), values(2)
    parameters = tuple(
        Parameter(
            name,
            first[name].shape,
            {
                "step": Scalar("F32", np.float32(7).tobytes()),
                "exp_avg": Slot(contiguous("F32", first[name].shape, Memory(first[name].tobytes())), Role.PARAM),
                "exp_avg_sq": Slot(contiguous("F32", first[name].shape, Memory(second[name].tobytes())), Role.PARAM),
            },
        )
        for name in NAMES
    )
    state = OptimizerState(
        (Optimizer("torch.optim.adam.Adam"),), (Group(0, (("lr", 0.1),), len(NAMES)),), parameters, Naming("model")
    )
    writing.write(state, path)
    return state


# --- NumPy --------------------------------------------------------------------------------------------------------


def test_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    named(tmp_path / "optimizer.safetensors")
    slots = load(tmp_path / "optimizer.safetensors")
    assert list(slots) == NAMES
    for name, state in slots.items():
        assert state is not None
        assert state["step"] == np.float32(7)
        assert state["step"].dtype == np.float32
        assert np.array_equal(state["exp_avg"], values(1)[name])
        state["exp_avg"][:] = 0  # its own, to be written to
    monkeypatch.chdir(tmp_path)
    exec(recipe("python", "NumPy"), {})
    assert f"{NAMES[0]} 7.0 (2, 6)\n" in capsys.readouterr().out


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_numpy_holds_what_the_file_holds(path: Path) -> None:
    try:
        found = load(path)
    except MissingDependencyError:
        with pytest.raises(ImportError):
            import ml_dtypes  # noqa: F401
        return
    with reading.open_state(path) as state:
        assert list(found) == list(state)
        for name, parameter in state.items():
            ours = found[name]
            assert (ours is None) == (parameter.state is None)
            for (_, mine), (_, theirs) in zip(walk_arrays(ours), walk(parameter.state or {}), strict=True):
                if isinstance(theirs, (Slot, Scalar)):
                    data = theirs.tensor.bytes() if isinstance(theirs, Slot) else theirs.data
                    assert mine.tobytes() == bytes(data)
                    assert mine.shape == (theirs.tensor.shape if isinstance(theirs, Slot) else ())
                else:
                    assert mine is theirs or mine == theirs


def walk_arrays(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        return [item for key, inner in value.items() for item in walk_arrays(inner, (*path, key))]
    if isinstance(value, (list, tuple)):
        return [item for key, inner in enumerate(value) for item in walk_arrays(inner, (*path, key))]
    return [] if value is None and not path else [(path, value)]


def test_numpy_compares_digests(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.safetensors"
    named(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: '{NAMES[-1]}': exp_avg_sq does not match its digest [R21]"
    assert len(load(path, verify=False)) == 4


def test_numpy_without_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "ml_dtypes":
            raise ImportError("No module named 'ml_dtypes'", name=name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError) as caught:
        array(Scalar("BF16", b"\0\0"))
    assert str(caught.value) == "NumPy has no bfloat16: pip install ml_dtypes"


# --- JAX and MLX --------------------------------------------------------------------------------------------------


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_the_recipe_in_jax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jax
    import optax

    named(tmp_path / "optimizer.safetensors")
    monkeypatch.chdir(tmp_path)
    leaf = jax.numpy.zeros
    params = {"layers": [{"q_proj": {"lora_a": leaf((6, 2)), "lora_b": leaf((2, 4))}} for _ in range(2)]}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 10)))
    space: dict[str, Any] = {"tx": tx, "params": params}
    exec(recipe("python", "JAX"), space)
    moments = space["opt_state"][1][0]
    assert int(moments.count) == 7
    assert moments.count.dtype == jax.numpy.int32
    assert int(space["opt_state"][1][2].count) == 7  # the schedule's
    for seed, tree in ((1, moments.mu), (2, moments.nu)):
        for name, expected in values(seed).items():
            _, _, _, layer, _, factor, _, _ = name.split(".")
            found = tree["layers"][int(layer)]["q_proj"][factor.lower()]
            assert np.asarray(found).tobytes() == np.ascontiguousarray(expected.T).tobytes()
    updates, _ = jax.jit(tx.update)(params, space["opt_state"], params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.frameworks
def test_the_recipe_in_mlx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx
    import mlx.optimizers
    from mlx.utils import tree_flatten

    named(tmp_path / "optimizer.safetensors")
    monkeypatch.chdir(tmp_path)
    params = {"layers": [{"q_proj": {"lora_a": mx.zeros((6, 2)), "lora_b": mx.zeros((2, 4))}} for _ in range(2)]}
    optimizer = mlx.optimizers.Adam(1e-3, bias_correction=True)
    optimizer.init(params)
    exec(recipe("python", "MLX"), {"optimizer": optimizer})
    flat = dict(tree_flatten(optimizer.state))
    assert int(flat["step"]) == 7
    assert np.array(flat["learning_rate"]) == np.float32(1e-3)
    for seed, field in ((1, "m"), (2, "v")):
        for name, expected in values(seed).items():
            path = name.removeprefix("base_model.model.").removesuffix(".default.weight").replace("lora_A", "lora_a")
            found = np.array(flat[f"{path.replace('lora_B', 'lora_b')}.{field}"])
            assert found.tobytes() == np.ascontiguousarray(expected.T).tobytes()
    optimizer.apply_gradients(params, params)
    mx.eval(optimizer.state)
    assert int(optimizer.step) == 8
