"""Every rule that converts: 20 steps in torch, its state moved, 20 more steps on the same gradients; and the other way.

The moments are the same numbers on both sides; that the next steps agree shows that they are used in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from lora_state_format.operations.conversion import convert

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

SHAPES: Final = {"wide": (8, 16), "tall": (16, 8), "bias": (5,)}
STEPS: Final = 20
Arrays = Mapping[str, "np.ndarray[Any, Any]"]


@cache
def values(seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


class Torch:
    def __init__(self, make: Callable[[Any], Any], weights: Arrays) -> None:
        import torch

        self.model = torch.nn.ParameterDict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
        self.optimizer = make(self.model.values())

    def steps(self, start: int) -> Arrays:
        import torch

        for step in range(start, start + STEPS):
            for name, parameter in self.model.items():
                parameter.grad = torch.from_numpy(values(1 + step)[name].copy())
            self.optimizer.step()
        return {name: parameter.detach().numpy().copy() for name, parameter in self.model.items()}

    def save(self, path: Path) -> None:
        from lora_state_format.torch import save_optimizer

        save_optimizer(self.optimizer, self.model, path)

    def load(self, path: Path) -> None:
        from lora_state_format.torch import load_optimizer

        load_optimizer(self.optimizer, self.model, path, options={"lr": "current"})


class Optax:
    def __init__(self, make: Callable[[], Any], weights: Arrays) -> None:
        import jax

        self.tx, self.params = make(), {name: jax.numpy.asarray(array) for name, array in weights.items()}
        self.state = self.tx.init(self.params)

    def steps(self, start: int) -> Arrays:
        import jax
        import optax

        update = jax.jit(self.tx.update)
        for step in range(start, start + STEPS):
            updates, self.state = update(dict(values(1 + step)), self.state, self.params)
            self.params = optax.apply_updates(self.params, updates)
        return {name: np.asarray(array) for name, array in self.params.items()}

    def save(self, path: Path) -> None:
        """A TrainState, as it has the shapes that name Adafactor's factors."""
        from flax.serialization import to_bytes

        path.write_bytes(to_bytes({"step": 0, "params": self.params, "opt_state": self.state}))

    def load(self, path: Path) -> None:
        from flax.serialization import from_bytes

        self.state = from_bytes({"step": 0, "params": self.params, "opt_state": self.state}, path.read_bytes())[
            "opt_state"
        ]


class Mlx:
    def __init__(self, make: Callable[[], Any], weights: Arrays) -> None:
        import mlx.core as mx

        self.optimizer, self.params = make(), {name: mx.array(array) for name, array in weights.items()}
        self.optimizer.init(self.params)

    def steps(self, start: int) -> Arrays:
        import mlx.core as mx

        for step in range(start, start + STEPS):
            gradients = {name: mx.array(array) for name, array in values(1 + step).items()}
            self.params = self.optimizer.apply_gradients(gradients, self.params)
            mx.eval(self.params, self.optimizer.state)
        return {name: np.array(array) for name, array in self.params.items()}

    def save(self, path: Path) -> None:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        mx.save_safetensors(str(path), dict(tree_flatten(self.optimizer.state)))

    def load(self, path: Path) -> None:
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        self.optimizer.state = tree_unflatten(list(mx.load(str(path)).items()))


FORMATS: Final[Mapping[str, tuple[str, Any, str]]] = {
    "optax": ("flax_msgpack", Optax, "state.msgpack"),
    "mlx": ("mlx", Mlx, "optimizer.safetensors"),
}


def torch_optimizers() -> dict[str, Callable[[Any], Any]]:
    import torch.optim
    from transformers.optimization import Adafactor

    betas: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}
    return {
        "adam": lambda p: torch.optim.Adam(p, **betas, weight_decay=0.0),
        "adamw": lambda p: torch.optim.AdamW(p, **betas, weight_decay=0.1),
        "adamax": lambda p: torch.optim.Adamax(p, **betas),
        "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
        "nesterov": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True),
        "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, eps=1e-10),
        "adadelta": lambda p: torch.optim.Adadelta(p, 1e-1, rho=0.9, eps=1e-6),
        "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, alpha=0.99, eps=1e-8),
        "centered": lambda p: torch.optim.RMSprop(p, 1e-3, alpha=0.99, eps=1e-8, centered=True),
        "adafactor": lambda p: Adafactor(p, 1e-3, scale_parameter=False, relative_step=False, warmup_init=False),
    }


def optax_optimizers() -> dict[str, Callable[[], Any]]:
    import optax

    return {
        "adam": lambda: optax.adam(1e-3, 0.9, 0.99),
        "adamw": lambda: optax.adamw(1e-3, 0.9, 0.99, weight_decay=0.1),
        "adamax": lambda: optax.adamax(1e-3, 0.9, 0.99),
        "sgd": lambda: optax.sgd(1e-2, 0.9),
        "nesterov": lambda: optax.sgd(1e-2, 0.9, nesterov=True),
        "adagrad": lambda: optax.adagrad(1e-2, 0.0, eps=1e-10),
        "adadelta": lambda: optax.adadelta(1e-1, rho=0.9, eps=1e-6),
        "rmsprop": lambda: optax.rmsprop(1e-3, decay=0.99, eps=1e-8, eps_in_sqrt=False),
        "centered": lambda: optax.rmsprop(1e-3, decay=0.99, eps=1e-8, eps_in_sqrt=False, centered=True),
        "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=2, multiply_by_parameter_scale=False),
    }


def mlx_optimizers() -> dict[str, Callable[[], Any]]:
    import mlx.optimizers as optimizers

    return {
        "adam": lambda: optimizers.Adam(1e-3, (0.9, 0.99), bias_correction=True),
        "adamw": lambda: optimizers.AdamW(1e-3, (0.9, 0.99), weight_decay=0.1, bias_correction=True),
        "sgd": lambda: optimizers.SGD(1e-2, 0.9),
        "nesterov": lambda: optimizers.SGD(1e-2, 0.9, nesterov=True),
        "adagrad": lambda: optimizers.Adagrad(1e-2, eps=1e-10),
        "adadelta": lambda: optimizers.AdaDelta(1e-1, rho=0.9, eps=1e-6),
        "rmsprop": lambda: optimizers.RMSprop(1e-3, alpha=0.99, eps=1e-8),
        "adafactor": lambda: optimizers.Adafactor(1e-3, scale_parameter=False, relative_step=False),
    }


RULES: Final = {"nesterov": "sgd", "centered": "rmsprop"}
"""Variants of a rule."""

CASES: Final = [
    *(("optax", rule) for rule in (
        "adam", "adamw", "adamax", "sgd", "nesterov", "adagrad", "adadelta", "rmsprop", "centered", "adafactor",
    )),
    *(("mlx", rule) for rule in (
        "adam", "adamw", "sgd", "nesterov", "adagrad", "adadelta", "rmsprop", "adafactor",
    )),
]  # fmt: skip


def makers(framework: str) -> dict[str, Callable[[], Any]]:
    return {"optax": optax_optimizers, "mlx": mlx_optimizers}[framework]()


@pytest.mark.parametrize(("framework", "variant"), CASES)
def test_from_torch(tmp_path: Path, framework: str, variant: str) -> None:
    name, kind, file = FORMATS[framework]
    ours = Torch(torch_optimizers()[variant], values(0))
    middle = ours.steps(0)
    ours.save(tmp_path / "named.safetensors")
    other = kind(makers(framework)[variant], middle)
    other.save(tmp_path / "base")
    base = tmp_path / "base" if framework == "optax" else None
    options = {"step": STEPS, "map": "none"}
    convert(tmp_path / "named.safetensors", tmp_path / file, target_format=name, base=base, options=options)
    other.load(tmp_path / file)
    assert_close(other.steps(STEPS), ours.steps(STEPS), middle)


@pytest.mark.parametrize(("framework", "variant"), CASES)
def test_to_torch(tmp_path: Path, framework: str, variant: str) -> None:
    name, kind, file = FORMATS[framework]
    other = kind(makers(framework)[variant], values(0))
    middle = other.steps(0)
    other.save(tmp_path / file)
    options: dict[str, Any] = {"optimizer": RULES.get(variant, variant)}
    options |= {"bias_correction": True} if framework == "mlx" and variant in ("adam", "adamw") else {}
    options |= {"step": STEPS} if framework == "optax" else {}
    convert(tmp_path / file, tmp_path / "named.safetensors", source_format=name, options=options)
    ours = Torch(torch_optimizers()[variant], middle)
    ours.load(tmp_path / "named.safetensors")
    assert_close(ours.steps(STEPS), other.steps(STEPS), middle)


def assert_close(one: Arrays, other: Arrays, before: Arrays) -> None:
    for name, array in one.items():
        assert np.abs(array - before[name]).max() > 1e-3
        assert np.abs(array - other[name]).max() <= 1e-5 * np.abs(other[name]).max(), name


def test_the_default_of_mlx_is_another_rule(tmp_path: Path) -> None:
    """Moments that are not corrected are the same numbers; steps that do not correct them are not."""
    import mlx.optimizers

    other = Mlx(lambda: mlx.optimizers.AdamW(1e-3, (0.9, 0.99), weight_decay=0.1), values(0))
    middle = other.steps(0)
    other.save(tmp_path / "optimizer.safetensors")
    options = {"optimizer": "adamw", "bias_correction": True}  # which is not so
    convert(tmp_path / "optimizer.safetensors", tmp_path / "named.safetensors", options=options)
    ours = Torch(torch_optimizers()["adamw"], middle)
    ours.load(tmp_path / "named.safetensors")
    with pytest.raises(AssertionError):
        assert_close(ours.steps(STEPS), other.steps(STEPS), middle)
