"""A LoRA run that moves between PEFT, flax nnx and mlx-lm: real models, real optimizers, real files of each.

The same Llama of two layers stands in every framework. The first 20 steps are taken in one, its file is converted by
name and axes, another framework loads it with its own loader, and both take the next 20 steps on the same gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import pytest

from lora_state_format.format import reading
from lora_state_format.model.states import OptimizerState, Slot, walk
from lora_state_format.operations.conversion import convert

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

HIDDEN, INNER, HEADS, RANK, STEPS = 32, 48, 4, 4, 20
SIZES: Final = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""Module -> outputs and inputs."""
SHAPES: Final = {
    f"base_model.model.model.layers.{layer}.{module}.lora_{factor}.default.weight": shape
    for layer in range(2)
    for module, (out, into) in SIZES.items()
    for factor, shape in (("A", (RANK, into)), ("B", (out, RANK)))
}
"""PEFT's name of every trained parameter, and its shape there."""
Arrays = Mapping[str, "np.ndarray[Any, Any]"]

OPTIMIZERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "adam": {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8},
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
    "sgd": {"lr": 1e-2, "momentum": 0.9},
    "lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1},
}


@cache
def values(seed: int) -> Arrays:
    """One array for each parameter: gradients of a step, or weights."""
    generator = np.random.default_rng(seed)
    return {name: (generator.normal(size=shape) * 0.1).astype(np.float32) for name, shape in SHAPES.items()}


class Run(Protocol):
    """A model and its optimizer in a framework; arrays go in and out under PEFT's names, with PEFT's axes."""

    def weights(self) -> Arrays: ...
    def set_weights(self, weights: Arrays) -> None: ...
    def step(self, gradients: Arrays) -> None: ...
    def save(self, path: Path) -> None: ...
    def load(self, path: Path) -> None: ...


class Peft:
    """PEFT on transformers' Llama, with a torch optimizer; its file is ``torch.save(optimizer.state_dict())``."""

    def __init__(self, rule: str) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=64, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2,
            num_attention_heads=HEADS, num_key_value_heads=HEADS // 2,
        )  # fmt: skip
        modules = [name.partition(".")[2] for name in SIZES]
        self.model = get_peft_model(
            LlamaForCausalLM(config), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules)
        )
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        assert {name: tuple(p.shape) for name, p in self.trained.items()} == SHAPES
        options = dict(OPTIMIZERS[rule])
        if rule == "lion":
            import bitsandbytes

            make = bitsandbytes.optim.Lion32bit
        else:
            make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[rule]
        self.optimizer: Any = make(self.trained.values(), **options)

    def weights(self) -> Arrays:
        return {name: p.detach().numpy().copy() for name, p in self.trained.items()}

    def set_weights(self, weights: Arrays) -> None:
        import torch

        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(torch.from_numpy(weights[name].copy()))

    def step(self, gradients: Arrays) -> None:
        import torch

        for name, p in self.trained.items():
            p.grad = torch.from_numpy(gradients[name].copy())
        self.optimizer.step()

    def save(self, path: Path) -> None:
        import torch

        torch.save(self.optimizer.state_dict(), path)
        path.with_suffix(".names").write_text("\n".join(self.trained))

    def load(self, path: Path) -> None:
        from lora_state_format.torch import load_optimizer

        load_optimizer(self.optimizer, self.model, path, options={"lr": "current"})


class Nnx:
    """nnx.LoRA around the layers of an nnx model, with optax; its file is ``to_bytes`` of the optimizer's pure dict."""

    def __init__(self, rule: str) -> None:
        import optax
        from flax import nnx

        class Node(nnx.Module):  # type: ignore[misc]
            pass

        rngs, model = nnx.Rngs(0), Node()
        model.model = Node()
        model.model.layers = nnx.List([])
        for _ in range(2):
            layer = Node()
            layer.self_attn, layer.mlp = Node(), Node()
            for name, (out, into) in SIZES.items():
                block, _, module = name.partition(".")
                base = nnx.Linear(into, out, use_bias=False, rngs=rngs)
                setattr(getattr(layer, block), module, nnx.LoRA(into, RANK, out, base_module=base, rngs=rngs))
            model.model.layers.append(layer)
        options = OPTIMIZERS[rule]
        b1, b2 = options.get("betas", (0, 0))
        tx = {
            "adam": lambda: optax.adam(options["lr"], b1, b2),
            "adamw": lambda: optax.adamw(options["lr"], b1, b2, weight_decay=options["weight_decay"]),
            "sgd": lambda: optax.sgd(options["lr"], options["momentum"]),
            "lion": lambda: optax.lion(options["lr"], b1, b2, weight_decay=options["weight_decay"]),
        }[rule]()
        self.model, self.optimizer = model, nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    def _tree(self, arrays: Arrays) -> Any:
        """Arrays under PEFT's names as the tree of the model's parameters."""
        import jax.numpy as jnp
        from flax import nnx

        state = nnx.state(self.model, nnx.LoRAParam)
        pure: Any = nnx.to_pure_dict(state)
        for name, array in arrays.items():
            _, _, _, _, layer, block, module, factor, _, _ = name.split(".")
            leaf = {"lora_A": "lora_a", "lora_B": "lora_b"}[factor]
            assert pure["model"]["layers"][int(layer)][block][module][leaf].shape == array.T.shape
            pure["model"]["layers"][int(layer)][block][module][leaf] = jnp.asarray(array.T)
        nnx.replace_by_pure_dict(state, pure)
        return state

    def weights(self) -> Arrays:
        from flax import nnx

        pure: Any = nnx.to_pure_dict(nnx.state(self.model, nnx.LoRAParam))
        found = {}
        for name in SHAPES:
            _, _, _, _, layer, block, module, factor, _, _ = name.split(".")
            leaf = pure["model"]["layers"][int(layer)][block][module][factor.lower()]
            found[name] = np.asarray(leaf).T
        return found

    def set_weights(self, weights: Arrays) -> None:
        from flax import nnx

        nnx.update(self.model, self._tree(weights))

    def step(self, gradients: Arrays) -> None:
        self.optimizer.update(self.model, self._tree(gradients))

    def save(self, path: Path) -> None:
        from flax import nnx
        from flax.serialization import to_bytes

        path.write_bytes(to_bytes(nnx.to_pure_dict(nnx.state(self.optimizer))))

    def load(self, path: Path) -> None:
        import jax
        from flax import nnx
        from flax.serialization import from_bytes

        state = nnx.state(self.optimizer)
        restored = from_bytes(nnx.to_pure_dict(state), path.read_bytes())
        nnx.replace_by_pure_dict(state, jax.tree.map(jax.numpy.asarray, restored))
        nnx.update(self.optimizer, state)


class Mlx:
    """mlx-lm's Llama and its LoRA layers, with an MLX optimizer; its file is ``tree_flatten(optimizer.state)``."""

    def __init__(self, rule: str) -> None:
        import mlx.optimizers
        from mlx_lm.models import llama
        from mlx_lm.tuner.utils import linear_to_lora_layers

        self.model = llama.Model(
            llama.ModelArgs(
                model_type="llama", hidden_size=HIDDEN, num_hidden_layers=2, intermediate_size=INNER,
                num_attention_heads=HEADS, num_key_value_heads=HEADS // 2, rms_norm_eps=1e-5, vocab_size=64,
            )
        )  # fmt: skip
        self.model.freeze()
        linear_to_lora_layers(self.model, 2, {"rank": RANK, "scale": 1.0, "dropout": 0.0, "keys": list(SIZES)})
        options = {"learning_rate" if key == "lr" else key: value for key, value in OPTIMIZERS[rule].items()}
        if rule in ("adam", "adamw"):
            options["bias_correction"] = True
        kind = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "lion": "Lion"}[rule]
        self.optimizer = getattr(mlx.optimizers, kind)(**options)
        self.optimizer.init(self.model.trainable_parameters())

    def _tree(self, arrays: Arrays) -> Any:
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        flat = []
        for name, array in arrays.items():
            key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            path, _, factor = key.rpartition(".")
            flat.append((f"{path}.{factor.lower()}", mx.array(np.ascontiguousarray(array.T))))
        return tree_unflatten(flat)

    def weights(self) -> Arrays:
        from mlx.utils import tree_flatten

        flat = dict(tree_flatten(self.model.trainable_parameters()))
        found = {}
        for name in SHAPES:
            key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            path, _, factor = key.rpartition(".")
            found[name] = np.array(flat[f"{path}.{factor.lower()}"]).T
        return found

    def set_weights(self, weights: Arrays) -> None:
        self.model.update(self._tree(weights))

    def step(self, gradients: Arrays) -> None:
        import mlx.core as mx

        self.optimizer.update(self.model, self._tree(gradients))
        mx.eval(self.model.parameters(), self.optimizer.state)

    def save(self, path: Path) -> None:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        mx.save_safetensors(str(path), dict(tree_flatten(self.optimizer.state)))

    def load(self, path: Path) -> None:
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        self.optimizer.state = tree_unflatten(list(mx.load(str(path)).items()))


FRAMEWORKS: Final[Mapping[str, type[Any]]] = {"peft": Peft, "nnx": Nnx, "mlx": Mlx}
FORMATS: Final = {
    "peft": ("torch_optimizer", "optimizer.pt"),
    "nnx": ("flax_msgpack", "opt_state.msgpack"),
    "mlx": ("mlx", "optimizer_state.safetensors"),
}
MAPS: Final = {"nnx": "flax_nnx", "mlx": "mlx_lm"}
CLASSES: Final = {
    "adam": "torch.optim.adam.Adam",
    "adamw": "torch.optim.adamw.AdamW",
    "sgd": "torch.optim.sgd.SGD",
    "lion": "bitsandbytes.optim.lion.Lion32bit",
}


NESTED: Final = "__bnb_optimizer_quant_state__"


def converted(framework: str, rule: str, file: Path, target: Path) -> Path:
    """A framework's file as named state. What the file does not say is said here."""
    options: dict[str, Any] = {}
    if framework != "peft":
        options = {"map": MAPS[framework], **OPTIMIZERS[rule]}
        if framework == "mlx":
            options |= {"bias_correction": True} if rule in ("adam", "adamw") else {}
    convert(
        file,
        target,
        names=file.with_suffix(".names") if framework == "peft" else None,
        optimizer=CLASSES[rule],
        options=options,
    )
    return target


def written(framework: str, rule: str, named: Path, target: Path) -> Path:
    """Named state as a file for a framework. What is around the moments of optax comes from a fresh optimizer."""
    options: dict[str, Any] = {"map": MAPS[framework], "step": STEPS} if framework in MAPS else {}
    base = None
    if framework == "nnx":
        base = target.with_name("fresh.msgpack")
        Nnx(rule).save(base)
    convert(named, target, target_format=FORMATS[framework][0], options=options, base=base)
    return target


def data(state: OptimizerState) -> dict[tuple[str, str], Any]:
    """Every slot's bytes, by name and slot."""
    return {
        (name, path[-1]): bytes(leaf.tensor.bytes()) if isinstance(leaf, Slot) else leaf
        for name, parameter in state.items()
        for path, leaf in walk(parameter.state or {})
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By framework and rule: the file after 20 steps, the weights then, and the weights after 20 more."""

    @cache
    def train(framework: str, rule: str) -> tuple[Path, Arrays, Arrays]:
        run: Run = FRAMEWORKS[framework](rule)
        run.set_weights(values(0))
        for step in range(STEPS):
            run.step(values(1 + step))
        path = tmp_path_factory.mktemp(f"{framework}-{rule}") / FORMATS[framework][1]
        run.save(path)
        middle = run.weights()
        for step in range(STEPS, 2 * STEPS):
            run.step(values(1 + step))
        return path, middle, run.weights()

    return train


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize(("start", "end"), [(a, b) for a in FRAMEWORKS for b in FRAMEWORKS if a != b])
def test_a_run_moves_and_comes_back(tmp_path: Path, source: Any, start: str, end: str, rule: str) -> None:
    file, middle, last = source(start, rule)
    named = converted(start, rule, file, tmp_path / "named.safetensors")
    moved = named if end == "peft" else written(end, rule, named, tmp_path / FORMATS[end][1])

    run: Run = FRAMEWORKS[end](rule)
    run.set_weights(middle)
    run.load(moved)
    returned = tmp_path / "returned"
    returned.mkdir()
    run.save(returned / FORMATS[end][1])
    back = converted(end, rule, returned / FORMATS[end][1], tmp_path / "back.safetensors")

    # The state that the other framework holds is the same, bit for bit; and the first one's own file comes back.
    with reading.open_state(named) as first, reading.open_state(back) as second:
        assert list(first) == list(SHAPES)
        assert list(second) == list(SHAPES)
        assert data(first) == data(second)
        assert len(data(first)) == len(SHAPES) * {"adam": 3, "adamw": 3, "sgd": 1, "lion": 2}[rule]
    assert_same_file(start, file, written(start, rule, back, tmp_path / f"again-{FORMATS[start][1]}"))

    for step in range(STEPS, 2 * STEPS):
        run.step(values(1 + step))
    for name, array in run.weights().items():
        moved_by = np.abs(last[name] - middle[name]).max()
        assert moved_by > 1e-3
        assert np.abs(array - last[name]).max() <= 1e-5 * np.abs(last[name]).max(), name


def assert_same_file(framework: str, one: Path, other: Path) -> None:
    if framework == "nnx":
        assert one.read_bytes() == other.read_bytes()
    elif framework == "mlx":
        import mlx.core as mx

        first, second = mx.load(str(one)), mx.load(str(other))
        assert first.keys() == second.keys()
        for key in first:
            assert first[key].dtype == second[key].dtype
            assert np.array(first[key]).tobytes() == np.array(second[key]).tobytes(), key
    else:
        import torch

        first, second = torch.load(one), torch.load(other)
        assert first["state"].keys() == second["state"].keys()
        for identity, slots in first["state"].items():
            # bitsandbytes puts its tensors into a dict of their own when it makes a state dict
            flat = {**slots, **slots.get(NESTED, {})}
            flat.pop(NESTED, None)
            assert flat.keys() == second["state"][identity].keys()
            for slot, value in flat.items():
                again = second["state"][identity][slot]
                assert torch.equal(value, again) if isinstance(value, torch.Tensor) else value == again
        (group,) = second["param_groups"]
        for option, value in group.items():
            assert first["param_groups"][0][option] == pytest.approx(value, rel=1e-7), option
