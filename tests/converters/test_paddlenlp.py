"""Unified checkpoints: the state of real Paddle optimizers, laid out as PaddleNLP's source lays it out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_state_format import registry
from lora_state_format.converters import paddlenlp
from lora_state_format.errors import FileError, OptionError, RefusedError, TargetExistsError, UnrepresentableError
from lora_state_format.format import reading
from lora_state_format.io import safetensors
from lora_state_format.model.sources import File
from lora_state_format.model.states import OptimizerState, Scalar, Slot
from lora_state_format.operations.conversion import convert

Arrays = Mapping[str, "np.ndarray[Any, Any]"]
BETAS = (0.9, 0.999)


def power(beta: float, steps: int) -> np.ndarray[Any, Any]:
    """As Paddle multiplies it."""
    result = np.float32(beta)
    for _ in range(steps):
        result = np.float32(result * np.float32(beta))
    return np.array([result])


def adam(steps: int = 3, betas: tuple[float, float] = BETAS) -> dict[str, Any]:
    moment = np.arange(6, dtype=np.float32).reshape(2, 3) + 1
    return {
        "q.lora_A/moment1_0": moment,
        "q.lora_A/moment2_0": moment,
        "q.lora_A/beta1_pow_acc_0": power(betas[0], steps),
        "q.lora_A/beta2_pow_acc_0": power(betas[1], steps),
    }


def checkpoint(
    folder: Path,
    tensors: Arrays,
    *,
    step: int | None = None,
    shards: int = 1,
    masters: Arrays | None = None,
    **index: Any,
) -> Path:
    """A checkpoint folder, its tensors dealt to shards."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)

    def write(kind: str, arrays: Arrays) -> None:
        keys = list(arrays)
        places: dict[str, str] = {}
        for number in range(shards):
            name = f"{kind}-{number + 1:05}-of-{shards:05}.safetensors"
            save_file({key: arrays[key] for key in keys[number::shards]}, folder / name, {"format": "np"})
            places |= dict.fromkeys(keys[number::shards], name)
        size = sum(array.nbytes for array in arrays.values())
        members = {"metadata": {"total_size": size}, "weight_map": places, "master_weights": bool(masters), **index}
        (folder / f"{kind}.safetensors.index.json").write_text(json.dumps(members))

    write("optimizer", tensors)
    if masters:
        write("master_weights", masters)
        write("peft_model", masters)
    if step is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def read(path: Path, **options: Any) -> OptimizerState:
    state = registry.read(path, "paddlenlp", {"optimizer": "adamw", **options}).state
    assert isinstance(state, OptimizerState)
    return state


def test_it_is_found_by_its_index(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint-3", adam())
    for path in (folder, folder / "optimizer.safetensors.index.json"):
        converter, match = registry.detect(path)
        assert converter.NAME == "paddlenlp"
        assert match.reason == "optimizer.safetensors.index.json with a member 'master_weights'"
    (folder / "optimizer.safetensors.index.json").write_text("{}")
    assert paddlenlp.detect(folder) is None


def test_steps_and_betas_come_from_the_powers(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a", adam(300), step=300)
    state = read(folder)
    assert state["q.lora_A"]["step"] == Scalar("F32", np.float32(300).tobytes())
    assert dict(state.groups[0].options)["betas"] == BETAS
    assert state.global_step == 300
    # After 5,000 steps 0.9 has vanished; the other power still says which step it is.
    folder = checkpoint(tmp_path / "b", adam(5000), step=5000)
    assert "betas" not in dict(read(folder).groups[0].options)
    assert dict(read(folder, betas=[0.9, 0.999]).groups[0].options)["betas"] == BETAS
    folder = checkpoint(tmp_path / "c", adam(5000))
    assert read(folder, betas=[0.9, 0.999]).global_step == 5000
    assert read(folder, step=5000).global_step == 5000
    # Each parameter has powers of its own.
    other = {key.replace("q.", "k."): value for key, value in adam(7).items()}
    state = read(checkpoint(tmp_path / "d", {**adam(3), **other}), betas=[0.9, 0.999])
    assert (state["q.lora_A"]["step"].item(), state["k.lora_A"]["step"].item(), state.global_step) == (3, 7, None)


def test_steps_that_disagree(tmp_path: Path) -> None:
    where = f"{tmp_path / 'a' / paddlenlp.INDEX}: 'q.lora_A'"
    powers = [float(power(0.9, 3)[0]), float(power(0.999, 3)[0])]
    folder = checkpoint(tmp_path / "a", adam(3), step=4)
    for options, kind, message in (
        (
            {},
            FileError,
            (
                f"{where} has the powers {powers}, which are not those of betas (0.919166, 0.9992) after 4 steps: the "
                "files are of different steps, or the betas were different ones; in that case "
                "pass options={'betas': ...}"
            ),
        ),
        (
            {"betas": [0.9, 0.999]},
            FileError,
            (
                f"{where} has the powers {powers}, which are not those of betas (0.9, 0.999) after 4 steps: the files "
                "are of different steps, or the betas were different ones; in that case "
                "pass options={'betas': ...}"
            ),
        ),
    ):
        with pytest.raises(kind) as caught:
            read(folder, **options)
        assert str(caught.value) == message
    (folder / "trainer_state.json").unlink()
    with pytest.raises(OptionError) as unknown:
        read(folder)
    assert str(unknown.value) == (
        f"{where}: neither the number of steps nor the betas are known; pass one of them, as in options={{'step': ...}}"
    )
    for value in (-0.5, float("nan"), 2.0):
        odd = {**adam(3), "q.lora_A/beta1_pow_acc_0": np.array([value], np.float32)}
        with pytest.raises(
            FileError, match=r"after 3 steps, which are not powers of betas in \[0, 1\), or exceed 1,000,000 steps$"
        ):
            read(checkpoint(tmp_path / "odd", odd, step=3))
    with pytest.raises(
        FileError, match=r" after 1000001 steps, which are not powers of betas in \[0, 1\), or exceed 1,000,000 steps$"
    ):
        read(checkpoint(tmp_path / "odd", adam(3), step=1_000_001))
    with pytest.raises(FileError) as none:
        read(folder, betas=[0.9, 0.9])
    assert str(none.value) == (
        f"{where} has the powers {powers}, which are not those of betas (0.9, 0.9) after any number of steps"
    )


def test_what_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    index = folder / paddlenlp.INDEX
    extra = {"q.lora_A/moment2_max_0": np.zeros((2, 3), np.float32)}
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (
            adam(),
            {"ckpt_quant_stage": "O1"},
            RefusedError,
            "compressed (ckpt_quant_stage O1): its moments were rounded to a few bits",
        ),
        (
            adam(),
            {"weight_map": None},
            RefusedError,
            "has no weight_map: written with ignore_merge_optimizer, each rank's part by itself; save a merged one",
        ),
        (
            adam(),
            {"weight_map": {"w/moment1_0": "../x"}},
            RefusedError,
            "names '../x', which is not the name of a file in its folder",
        ),
        (
            adam(),
            {"weight_map": {"w/moment1_0": "optimizer-00001-of-00001.safetensors"}},
            FileError,
            "says that 'w/moment1_0' is in optimizer-00001-of-00001.safetensors, and it is not",
        ),
        (adam(), {"weight_map": {}}, FileError, "holds no parameter's state"),
        (
            {**adam(), **extra},
            {},
            OptionError,
            (
                "'q.lora_A' holds moment1_0, moment2_0, moment2_max_0, which is not the state of adamw; it fits no "
                "rule that converts"
            ),
        ),
        (
            {**adam(), "q.lora_A/moment2_0": np.zeros(2, np.float32)},
            {},
            FileError,
            "'q.lora_A' has slots of other shapes: exp_avg [2, 3], exp_avg_sq [2]",
        ),
    ]
    for tensors, members, kind, message in cases:
        with pytest.raises(kind) as caught:
            read(checkpoint(folder, tensors, step=3, **members))
        assert str(caught.value) == f"{index}: {message}"


def test_masters_and_shards_come_and_go(tmp_path: Path) -> None:
    other = {key.replace("q.", "k."): value for key, value in adam(3).items()}
    masters = {"q.lora_A": np.full((2, 3), 7, np.float32), "k.lora_A": np.full((2, 3), 8, np.float32)}
    folder = checkpoint(tmp_path / "a", {**adam(3), **other}, step=3, shards=2, masters=masters)
    assert "master_param" not in (read(folder)["q.lora_A"].state or {})
    weights = registry.read(folder, "paddlenlp", {"optimizer": "adamw", "map": "paddlenlp"}).weights
    assert np.array_equal(weights["base_model.model.q.lora_A.weight"].numpy(), masters["q.lora_A"].T)
    state = read(folder, masters=True)
    assert np.array_equal(state["k.lora_A"]["master_param"].numpy(), masters["k.lora_A"])
    paddlenlp.write(state, tmp_path / "b", base=None, force=False, options={})
    assert tensors_of(tmp_path / "b") == tensors_of(folder)
    assert tensors_of(tmp_path / "b", "master_weights") == tensors_of(folder, "master_weights")
    assert json.loads((tmp_path / "b" / "trainer_state.json").read_text()) == {"global_step": 3}
    with pytest.raises(TargetExistsError):
        paddlenlp.write(state, tmp_path / "b", base=None, force=False, options={})
    paddlenlp.write(state, tmp_path / "b", base=None, force=True, options={})


def tensors_of(folder: Path, kind: str = "optimizer") -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob(f"{kind}-*.safetensors")):
        with File(path) as file:
            for key, tensor in safetensors.read_header(file).tensors.items():
                found[key] = (tensor.dtype, tensor.shape, bytes(tensor.bytes()))
    return found


def test_a_parameter_that_took_no_step(tmp_path: Path) -> None:
    none = {
        **adam(0),
        "q.lora_A/moment1_0": np.zeros((2, 3), np.float32),
        "q.lora_A/moment2_0": np.zeros((2, 3), np.float32),
    }
    folder = checkpoint(tmp_path / "a", none, step=0)
    state = read(folder)
    assert state["q.lora_A"].state is None
    paddlenlp.write(state, tmp_path / "b", base=None, force=False, options={})
    assert tensors_of(tmp_path / "b") == tensors_of(folder)


def test_what_the_layout_has_no_place_for(tmp_path: Path) -> None:
    state = read(checkpoint(tmp_path / "a", adam(5000), step=5000))
    with pytest.raises(UnrepresentableError) as caught:
        paddlenlp.write(state, tmp_path / "b", base=None, force=False, options={})
    assert str(caught.value) == (
        "PaddleNLP keeps powers of one pair of betas, and the groups have no betas, or different ones; pass the two "
        "numbers as options={'betas': ...}"
    )
    with pytest.raises(OptionError, match=r"^betas=0\.9 is not two numbers from 0 to 1$"):
        read(tmp_path / "a", betas=0.9)
    (tmp_path / "a" / "trainer_state.json").write_text('{"global_step": "x"}')
    with pytest.raises(FileError) as step:
        read(tmp_path / "a")
    assert str(step.value) == f"{tmp_path / 'a' / 'trainer_state.json'}: 'global_step' is a str, where int is expected"
    with pytest.raises(OptionError) as refused:
        paddlenlp.write(state, tmp_path / "b", base=tmp_path / "a", force=False, options={})
    assert str(refused.value) == f"paddlenlp writes a whole folder and takes nothing from another ({tmp_path / 'a'})"
    paddlenlp.write(state, tmp_path / "b", base=None, force=False, options={"betas": [0.9, 0.999]})
    assert tensors_of(tmp_path / "b") == tensors_of(tmp_path / "a")


# --- Paddle itself ------------------------------------------------------------------------------------------------

SIZES = {"layers.0.q_proj": (6, 4), "layers.1.q_proj": (6, 4)}
RANK = 2


class Paddle:
    """Factors of LoRA as PaddleNLP has them, [in, r] and [r, out], and one of Paddle's optimizers."""

    def __init__(self, make: Any, weights: Arrays | None = None) -> None:
        import paddle

        self.parameters = {}
        for name, (into, out) in SIZES.items():
            for factor, shape in (("lora_A", [into, RANK]), ("lora_B", [RANK, out])):
                self.parameters[f"{name}.{factor}"] = paddle.create_parameter(shape, "float32")
        for name, parameter in self.parameters.items():
            parameter.set_value(values(0)[name].copy() if weights is None else weights[name].copy())
        self.optimizer = make(list(self.parameters.values()))

    def steps(self, start: int, count: int = 20) -> Arrays:
        import paddle

        for step in range(start, start + count):
            for name, parameter in self.parameters.items():
                (parameter * paddle.to_tensor(values(1 + step)[name])).sum().backward()
            self.optimizer.step()
            self.optimizer.clear_grad()
        return {name: parameter.numpy() for name, parameter in self.parameters.items()}

    def state(self) -> dict[str, Any]:
        """As a unified checkpoint names it: the parameter's own name, a slash, the accumulator."""
        found = {}
        for key, tensor in self.optimizer.state_dict().items():
            for name, parameter in self.parameters.items():
                if key.startswith(f"{parameter.name}_"):
                    found[f"{name}/{key.removeprefix(f'{parameter.name}_')}"] = tensor.numpy()
        return found

    def load(self, tensors: Mapping[str, Any]) -> None:
        import paddle

        self.steps(0, 1)  # which makes the accumulators
        state = self.optimizer.state_dict()
        for name, parameter in self.parameters.items():
            for key, (_, shape, data) in tensors.items():
                if key.startswith(f"{name}/"):
                    array = np.frombuffer(data, np.float32).reshape(shape)
                    state[f"{parameter.name}_{key.rpartition('/')[2]}"] = paddle.to_tensor(array)
        self.optimizer.set_state_dict(state)


def values(seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    shapes = [(f"{name}.{factor}", size) for name, (a, b) in SIZES.items() for factor, size in zip(
        ("lora_A", "lora_B"), ((a, RANK), (RANK, b)), strict=True)]  # fmt: skip
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes}


def optimizers(rule: str) -> tuple[Any, Any]:
    """Of Paddle and of torch."""
    import paddle
    import torch

    return {
        "adam": (
            lambda p: paddle.optimizer.Adam(1e-3, 0.9, 0.99, parameters=p),
            lambda p: torch.optim.Adam(p, 1e-3, (0.9, 0.99)),
        ),
        "adamw": (
            lambda p: paddle.optimizer.AdamW(1e-3, 0.9, 0.99, weight_decay=0.1, parameters=p),
            lambda p: torch.optim.AdamW(p, 1e-3, (0.9, 0.99), weight_decay=0.1),
        ),
        "sgd": (
            lambda p: paddle.optimizer.Momentum(1e-2, 0.9, parameters=p),
            lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
        ),
    }[rule]


class Torch:
    """The same parameters under PEFT's names, with PEFT's axes."""

    def __init__(self, make: Any, weights: Arrays) -> None:
        import torch

        self.keys = {name: f"base_model.model.{name}.default.weight" for name in weights}
        self.model = torch.nn.Module()
        for name, array in weights.items():
            *path, leaf = self.keys[name].split(".")
            module = self.model
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, torch.nn.Parameter(torch.from_numpy(array.T.copy())))
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make(self.parameters.values())

    def steps(self, start: int) -> Arrays:
        import torch

        for step in range(start, start + 20):
            for name, key in self.keys.items():
                self.parameters[key].grad = torch.from_numpy(values(1 + step)[name].T.copy())
            self.optimizer.step()
        return {name: self.parameters[key].detach().numpy().T.copy() for name, key in self.keys.items()}


@pytest.fixture
def quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.frameworks
@pytest.mark.parametrize("rule", ["adam", "adamw", "sgd"])
def test_a_run_moves_to_torch_and_back(tmp_path: Path, quiet: None, rule: str) -> None:
    from lora_state_format.torch import load_optimizer, save_optimizer

    paddle_make, torch_make = optimizers(rule)
    theirs = Paddle(paddle_make)
    middle = theirs.steps(0)
    folder = checkpoint(tmp_path / "checkpoint-20", theirs.state(), step=20)
    options = {"optimizer": rule, "map": "paddlenlp"}
    convert(folder, tmp_path / "named.safetensors", options=options)
    with reading.open_state(tmp_path / "named.safetensors") as named:
        for key, array in theirs.state().items():
            name, _, accumulator = key.rpartition("/")
            slots = {"moment1_0": "exp_avg", "moment2_0": "exp_avg_sq", "velocity_0": "momentum_buffer"}
            parameter = named[f"base_model.model.{name}.default.weight"]
            if accumulator in slots:
                assert parameter[slots[accumulator]].bytes() == np.ascontiguousarray(array.T).tobytes()
            else:
                assert parameter["step"].item() == 20
        assert all(len(p.state or {}) == (1 if rule == "sgd" else 3) for p in named.values())
        assert all(isinstance(s, (Slot, Scalar)) for p in named.values() for s in (p.state or {}).values())

    ours = Torch(torch_make, middle)
    load_optimizer(ours.optimizer, ours.model, tmp_path / "named.safetensors")
    save_optimizer(ours.optimizer, ours.model, tmp_path / "again.safetensors")
    convert(tmp_path / "again.safetensors", tmp_path / "back", target_format="paddlenlp", options={"map": "paddlenlp"})
    assert tensors_of(tmp_path / "back") == tensors_of(folder)
    assert_close(ours.steps(20), theirs.steps(20))

    back = Paddle(paddle_make)
    back.load(tensors_of(tmp_path / "back"))
    for name, parameter in back.parameters.items():
        parameter.set_value(middle[name].copy())
    assert_close(back.steps(20), {name: parameter.numpy() for name, parameter in theirs.parameters.items()}, 0.0)


def assert_close(one: Arrays, other: Arrays, bound: float = 1e-5) -> None:
    for name, array in one.items():
        assert np.abs(array - other[name]).max() <= bound * np.abs(other[name]).max(), name
