"""Files of ``flax.serialization``: genuine ones of flax and optax, and hostile ones of nobody."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from lora_state_format import registry
from lora_state_format.converters import flax_msgpack
from lora_state_format.errors import (
    ConversionError,
    FileError,
    OptionError,
    StateFormatError,
    TargetExistsError,
    UnrepresentableError,
)
from lora_state_format.foreign import flax, optax_nodes
from lora_state_format.foreign.optax import CHAINS, LAYOUTS
from lora_state_format.format import reading, writing
from lora_state_format.model.sources import File, Memory
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Role, Scalar, Slot
from lora_state_format.model.tensors import Tensor, contiguous


def read(path: Path, **options: Any) -> OptimizerState:
    state = registry.read(path, "flax_msgpack", options).state
    assert isinstance(state, OptimizerState)
    return state


# --- files made by hand -------------------------------------------------------------------------------------------


def ndarray(array: np.ndarray[Any, Any]) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))


def payload(*parts: Any) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb(parts))


COUNT = ndarray(np.array(3, np.int32))
MOMENT = ndarray(np.arange(6, dtype=np.float32).reshape(2, 3))


def adam(mu: Any = MOMENT, **more: Any) -> dict[str, Any]:
    return {"0": {"count": COUNT, "mu": {"w": mu}, "nu": {"w": MOMENT}}, "1": {}, **more}


def written(path: Path, tree: Any) -> Path:
    path.write_bytes(tree if isinstance(tree, bytes) else msgpack.packb(tree))
    return path


def test_it_is_found_by_its_first_key(tmp_path: Path) -> None:
    path = written(tmp_path / "any.name", adam())
    converter, match = registry.detect(path)
    assert converter.NAME == "flax_msgpack"
    assert match.reason == "msgpack whose first key, '0', is one of an optimizer's state as flax writes it"
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "opt_state.msgpack")
    assert registry.detect(tmp_path / "folder")[0].NAME == "flax_msgpack"
    for other in (b"", b"\x80", msgpack.packb({"params": {}}), msgpack.packb([1, 2]), b"PK\3\4"):
        assert flax_msgpack.detect(written(tmp_path / "other", other)) is None


BAD: dict[str, tuple[Any, str]] = {
    "nothing": (b"", "ends 1 bytes before the end of what it announces, at byte 0"),
    "no map": (7, "is not a map of msgpack, as flax writes it"),
    "cut": (msgpack.packb(adam())[:-3], "ends 1 bytes before the end of what it announces, at byte 121"),
    "cut array": (msgpack.packb({"0": MOMENT})[:-3], "ends 3 bytes before the end of an array, at byte 20"),
    "more behind": (msgpack.packb(adam()) + b"\0", "goes on for 1 bytes behind its map"),
    "a key twice": (b"\x82\xa10\x80\xa10\x80", "the key '0' twice in a map, at byte 6"),
    "a key of bytes": (b"\x81\xc4\x010\x80", "a bin as a key in a map, at byte 3"),
    "a key of a number": (b"\x81\xff\x80", "the key -1 in a map, at byte 2"),
    "a key of nothing": (b"\x81\xc0\x80", "the key None in a map, at byte 2"),
    "a long key": ({"k" * 5000: 1}, "a text of 5000 bytes, beyond 4096, at byte 4"),
    "no utf-8": (b"\x81\xa2\xff\xff\x80", "a text that is not UTF-8, at byte 4"),
    "a code of nothing": (b"\x81\xa10\xc1", "0xc1, which msgpack does not use, at byte 4"),
    "a list": ({"0": [1]}, "a list at byte 4, where flax writes maps and arrays"),
    "another ext": ({"0": msgpack.ExtType(9, b"x")}, "an ext of type 9 at byte 5, where flax writes arrays"),
    "a timestamp": ({"0": msgpack.Timestamp(1)}, "an ext of type -1 at byte 5, where flax writes arrays"),
    "a complex number": ({"0": msgpack.ExtType(2, b"x")}, "a complex number at byte 5, where flax writes arrays"),
    "half an array": ({"0": payload([2], "float32")}, "an array that does not begin with its shape, at byte 8"),
    "no shape": ({"0": payload(2, "float32", b"")}, "an array that does not begin with its shape, at byte 8"),
    "33 axes": (
        {"0": payload([1] * 33, "float32", b"1234")},
        "an array that does not begin with its shape, at byte 10",
    ),
    "less than none": (
        {"0": payload([-1], "float32", b"1234")},
        "an array with a dimension that is not a natural number, at byte 9",
    ),
    "a float": (
        {"0": payload([1.0], "float32", b"1234")},
        "an array with a dimension that is not a natural number, at byte 17",
    ),
    "objects": (
        {"0": payload([1], "object", b"1234")},
        "an array of type 'object' at byte 15: safetensors has no such type",
    ),
    "int4": ({"0": payload([4], "int4", b"1234")}, "an array of type 'int4' at byte 14: safetensors has no such type"),
    "too few bytes": (
        {"0": payload([2], "float32", b"1234")},
        "an array of type float32 and shape [2] with 4 bytes in an ext of 17, at byte 19",
    ),
    "beyond all": (
        {"0": payload([2**63, 2**63, 2**63], "float32", b"")},
        (
            "an array of type float32 and shape [9223372036854775808, 9223372036854775808, 9223372036854775808] with 0 "
            "bytes in an ext of 39, at byte 45"
        ),
    ),
    "more than it says": (
        {"0": msgpack.ExtType(1, msgpack.packb(([1], "float32", b"1234")) + b"0")},
        "an array of type float32 and shape [1] with 4 bytes in an ext of 18, at byte 19",
    ),
    "no chunks": (
        {flax.CHUNKED: True, "shape": {"0": 0}, "chunks": {}},
        "an array in chunks that are not flat, or not of one type, at byte 46",
    ),
    "false chunks": (
        {flax.CHUNKED: False, "shape": {}, "chunks": {}},
        "an array in chunks with other members than shape and chunks, at byte 43",
    ),
    "a chunk that is missing": (
        {flax.CHUNKED: True, "shape": {"0": 4}, "chunks": {"1": MOMENT}},
        "an array in chunks without a plain list of them, or of its dimensions, at byte 89",
    ),
    "a chunk with axes": (
        {flax.CHUNKED: True, "shape": {"0": 6}, "chunks": {"0": MOMENT}},
        "an array in chunks that are not flat, or not of one type, at byte 89",
    ),
    "a chunk too small": (
        {flax.CHUNKED: True, "shape": {"0": 6}, "chunks": {"0": ndarray(np.zeros(5, np.float32))}},
        "an array of shape [6] in chunks of [5] elements, at byte 84",
    ),
    "a chunk too deep": (
        {flax.CHUNKED: True, "shape": {"0": -6}, "chunks": {"0": ndarray(np.zeros(5, np.float32))}},
        "an array in chunks with a dimension that is not a natural number, at byte 84",
    ),
    "deep": (b"\x81\xa10" * 70, "nested deeper than 64 levels, at byte 195"),
    "half a pair": (b"\x92\x91\xa1a", "ends 1 bytes before the end of what it announces, at byte 4"),
    "a stream of others": (
        msgpack.packb((["a"], msgpack.packb(1))) + b"\x91\x01",
        "an entry of the stream that is not a pair of a path and a value, at byte 8",
    ),
    "a value that is longer": (
        b"\x92\x91\xa1a\xc4\x02\x01",
        "a value that is not as long as it says, at byte 7",
    ),
    "a path twice": (msgpack.packb((["a"], msgpack.packb(1))) * 2, "the path a twice, at byte 14"),
    "a path through a leaf": (
        msgpack.packb((["a"], msgpack.packb(1))) + msgpack.packb((["a", "b"], msgpack.packb(1))),
        "a path through 'a', which is not a map, at byte 16",
    ),
    "a path of numbers": (msgpack.packb(([1], msgpack.packb(1))), "a path with a key that is not text, at byte 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_hostile_bytes_are_refused(tmp_path: Path, case: str) -> None:
    tree, message = BAD[case]
    path = written(tmp_path / "bad.msgpack", tree)
    with pytest.raises(FileError) as caught, File(path) as file:
        flax.load(file)
    assert str(caught.value) == f"{path}: {message}"


ODD: dict[str, tuple[Any, str]] = {
    "no state": ({"0": {}, "1": {}}, "holds no parameter's state: its optimizer keeps none, or it is not of optax"),
    "a native number": (
        {"0": {"count": 3, "mu": {"w": MOMENT}}},
        "0/count is a int, where an int32 was expected",
    ),
    "a wide count": (
        {"0": {"count": ndarray(np.array(3)), "mu": {"w": MOMENT}}},
        "0/count is a scalar of type I64, where an int32 was expected",
    ),
    "text for a moment": (adam("text"), "0/mu/w is a str, where a tree of the parameters' arrays was expected"),
    "one vector": (
        {"0": {"trace": MOMENT}},
        "0/trace is an array of type F32 and shape [2, 3], where a tree of the parameters' arrays was expected",
    ),
    "other parameters": (
        {"0": {"count": COUNT, "mu": {"w": MOMENT}, "nu": {"v": MOMENT}}},
        "0/nu is of other parameters than mu",
    ),
    "another shape": (
        adam(ndarray(np.zeros(2, np.float32))),
        "'w' has slots of other shapes: exp_avg [2], exp_avg_sq [2, 3]",
    ),
    "an array around": (
        {"0": MOMENT},
        "0 is an array of type F32 and shape [2, 3], where a state of optax was expected",
    ),
    "an array for a number": (
        {"count": MOMENT, "hyperparams": {}, "hyperparams_states": {}, "inner_state": adam()},
        "count is an array of type F32 and shape [2, 3], where one number was expected",
    ),
    "what nobody knows": (adam() | {"1": {"ema": {}}}, "1 holds ema: not a known state of optax"),
    "half accumulated": (
        {"mini_step": COUNT, "gradient_step": COUNT, "inner_opt_state": adam(), "acc_grads": {}, "skip_state": {}},
        ("mini_step is 3: gradients are half accumulated, which no other framework keeps with the state; save it after "
        "an update"),
    ),
    "eps inside": (
        {
            "count": COUNT,
            "hyperparams": {"eps_root": ndarray(np.array(1, np.float32))},
            "hyperparams_states": {},
            "inner_state": adam(),
        },
        "eps_root is 1.0: torch adds nothing inside the root",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_trees_that_are_not_understood_are_refused(tmp_path: Path, case: str) -> None:
    tree, message = ODD[case]
    path = written(tmp_path / "opt_state.msgpack", tree)
    with pytest.raises(FileError) as caught:
        read(path, optimizer="adam")
    assert str(caught.value) == f"{path}: {message}"


def test_what_the_caller_has_to_say(tmp_path: Path) -> None:
    path = written(tmp_path / "opt_state.msgpack", adam())
    for options, message in (
        (
            {},
            (
                f"{path}: 0 holds count, mu, nu, and the file does not name its optimizer; it fits adam, adamw, "
                "adamax; pass the right one as optimizer="
            ),
        ),
        (
            {"optimizer": "sgd"},
            f"{path}: 0 holds count, mu, nu, which is not the state of sgd; it fits adam, adamw, adamax",
        ),
        (
            {"optimizer": "nadam"},
            (
                "'nadam' does not convert between frameworks: torch keeps a product of momenta (mu_product) that "
                "others recompute"
            ),
        ),
        (
            {"optimizer": "torch.optim.LBFGS"},
            (
                "'torch.optim.LBFGS' is not a rule that converts between frameworks; those that do: adam, adamw, "
                "adam_uncorrected, adamw_uncorrected, adamax, sgd, lion, adagrad, adadelta, rmsprop, adafactor"
            ),
        ),
        ({"optimizer": "adam", "betas": ["x"]}, "betas=['x'] must be a number or a sequence of numbers"),
        ({"optimizer": "adam", "momentum": 0.9}, "adam has no option 'momentum'; it has: lr, betas, eps, weight_decay"),
    ):
        with pytest.raises(OptionError) as caught:
            read(path, **options)
        assert str(caught.value) == message
    rms = written(tmp_path / "rms.msgpack", {"0": {"nu": {"w": MOMENT}}})
    with pytest.raises(OptionError) as caught:
        read(rms, optimizer="rmsprop")
    assert str(caught.value) == (
        f"{rms}: torch.optim.rmsprop.RMSprop counts its steps, and the file does not; pass the number as "
        "options={'step': ...}"
    )
    with pytest.raises(OptionError, match=r"^step='x' must be a whole number, 0 or more$"):
        read(rms, optimizer="rmsprop", step="x")
    assert read(rms, optimizer="rmsprop", step=7)["w"]["step"] == Scalar("F32", np.float32(7).tobytes())


def test_what_is_said_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "opt_state.msgpack", adam())
    state = read(path, optimizer="adamw", betas=[0.9, 0.95], lr=1e-4)
    assert state.optimizers[0].class_path == "torch.optim.adamw.AdamW"
    assert state.groups[0].options == (("lr", 1e-4), ("betas", (0.9, 0.95)))
    assert (state.global_step, state["w"]["step"].item()) == (3, 3.0)


def test_a_state_that_took_no_step_is_none(tmp_path: Path) -> None:
    none = ndarray(np.zeros((2, 3), np.float16))
    tree = {"0": {"count": ndarray(np.array(0, np.int32)), "mu": {"w": none}, "nu": {"w": none}}, "1": {}}
    path = written(tmp_path / "opt_state.msgpack", tree)
    state = read(path, optimizer="adam")
    assert state["w"].state is None
    flax_msgpack.write(state, tmp_path / "back", base=None, force=False, options={})
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    tree["0"]["mu"]["w"] = ndarray(np.ones((2, 3), np.float16))
    assert read(written(path, tree), optimizer="adam")["w"].state is not None


def test_every_dtype_and_key(tmp_path: Path) -> None:
    """Names with dots and slashes, positions in lists, chunks, and every type that flax and safetensors both have."""
    widths = {name: np.dtype(name).itemsize for name in flax.DTYPES if hasattr(np, name)}
    widths |= {"bool": 1, "bfloat16": 2, **{name: 1 for name in flax.DTYPES if name.startswith("float8")}}
    assert widths.keys() == flax.DTYPES.keys()
    tree: dict[str, Any] = {
        "a.b/~c": {name: payload([3], name, bytes(range(3 * width))) for name, width in widths.items()}
    }
    tree["l"] = {str(index): MOMENT for index in range(11)}
    path = written(tmp_path / "opt_state.msgpack", {"0": {"trace": tree}, "1": {}})
    state = read(path, optimizer="sgd")
    assert list(state)[-11:] == [f"l.{index}" for index in range(11)]
    writing.write(state, tmp_path / "state.safetensors")
    with reading.open_state(tmp_path / "state.safetensors") as named:
        flax_msgpack.write(named, tmp_path / "back", base=None, force=False, options={})
    back = msgpack.unpackb((tmp_path / "back").read_bytes(), ext_hook=lambda code, data: (code, data))
    assert back == msgpack.unpackb(path.read_bytes(), ext_hook=lambda code, data: (code, data))


def test_sizes_of_every_kind_are_announced_as_msgpack_does(tmp_path: Path) -> None:
    sizes = [0, 1, 5, 60, 63, 64, 250, 16_000, 70_000]
    tree = {f"{'k' * (size % 300)}{size}": ndarray(np.zeros(size, np.float32)) for size in sizes}
    tree |= {f"more{n}": ndarray(np.array(n)) for n in range(20)}
    path = written(tmp_path / "any", {"0": {"trace": tree}})
    with File(path) as file:
        assert b"".join(map(bytes, flax.packed(flax.load(file)))) == path.read_bytes()


def test_no_second_copy_of_an_array(tmp_path: Path) -> None:
    size = 1 << 26
    path = written(tmp_path / "opt_state.msgpack", {"0": {"trace": {"w": ndarray(np.ones(size // 4, np.float32))}}})
    tracemalloc.start()
    state = read(path, optimizer="sgd")
    writing.write(state, tmp_path / "state.safetensors")
    flax_msgpack.write(state, tmp_path / "back", base=None, force=False, options={})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "back").stat().st_size > size
    assert peak < size // 16


def test_bombs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many nodes in few bytes, and sizes that nothing stands behind."""
    monkeypatch.setattr(flax, "MAX_NODES", 50_000)
    items = b"".join(msgpack.packb(str(n)) + b"\x80" for n in range(60_000))
    bombs = {
        b"\xdf" + (60_000).to_bytes(4, "big") + items: "more than 50000 nodes, at byte 338894",
        b"\xdf\xff\xff\xff\xff\xa10\x80": "ends 1 bytes before the end of what it announces, at byte 8",
        b"\x81\xa10\xdb\xff\xff\xff\xff": "a text of 4294967295 bytes, beyond 4096, at byte 8",
    }
    for bomb, message in bombs.items():
        path = written(tmp_path / "bomb", bomb)
        tracemalloc.start()
        with pytest.raises(FileError) as caught, File(path) as file:
            flax.load(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert str(caught.value) == f"{path}: {message}"
        assert peak < 1 << 25


def test_fuzzed_files_raise_what_is_declared(tmp_path: Path) -> None:
    generator = random.Random(7)
    whole = {flax.CHUNKED: True, "shape": {"0": 6}, "chunks": {"0": ndarray(np.zeros(6, np.float32))}}
    seeds = [
        msgpack.packb(adam(whole, **{"2": {"count": COUNT}})),
        msgpack.packb({"step": COUNT, "opt_state": adam()}),
        msgpack.packb({"step": 3, "params": {"w": MOMENT}, "opt_state": adam()}),
        b"".join(
            msgpack.packb(pair)
            for pair in ((["0", "count"], msgpack.packb(COUNT)), (["0", "mu", "w"], msgpack.packb(MOMENT)))
        ),
    ]
    path = tmp_path / "fuzzed"
    raised = 0
    for _ in range(1500):
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(len(data))
            edit = generator.random()
            if edit < 0.6:
                data[at] = generator.randrange(256)
            elif edit < 0.8:
                del data[at : at + generator.randint(1, 8)]
            else:
                data[at:at] = generator.choice((b"\x80", b"\xff\xff\xff\xff", b"\xc7", b"\xa10", b"\x93", b"\xdf"))
            data = data or bytearray(b"\x80")
        path.write_bytes(data)
        flax_msgpack.detect(path)
        try:
            read(path, optimizer="adam").close()
        except StateFormatError:
            raised += 1
    assert raised > 1000


def state_of(*parameters: Parameter, **changes: Any) -> OptimizerState:
    state = OptimizerState(
        (Optimizer("torch.optim.adam.Adam"),), (Group(0, (), len(parameters)),), parameters, Naming("model")
    )
    return replace(state, **changes)


def test_what_optax_has_no_place_for(tmp_path: Path) -> None:
    tensor = Slot(contiguous("F32", (2,), Memory(bytes(8))), Role.PARAM)

    def moments(step: Any, **more: Any) -> Mapping[str, Any]:
        return {"step": step, "exp_avg": tensor, "exp_avg_sq": tensor, **more}

    one = Parameter("a", (2,), moments(Scalar("F32", np.float32(3).tobytes())))
    cases: list[tuple[OptimizerState, type[Exception], str]] = [
        (
            state_of(one, Parameter("b", (2,), moments(4))),
            UnrepresentableError,
            "'a' took 3 steps and 'b' took 4, where the target counts them once for all",
        ),
        (
            state_of(one, Parameter("b", (2,), None, "F32")),
            UnrepresentableError,
            "'a' took 3 steps and 'b' took 0, where the target counts them once for all",
        ),
        (
            state_of(Parameter("a", (2,), moments(Scalar("F32", np.float32("nan").tobytes())))),
            UnrepresentableError,
            "'a' took nan steps, which is not a whole number of steps",
        ),
        (
            state_of(Parameter("b", (2,), None)),
            UnrepresentableError,
            "'b' never took a step, and nothing says the type of its state",
        ),
        (
            state_of(Parameter("a", (2,), moments(3, max_exp_avg_sq=tensor))),
            UnrepresentableError,
            "'a' has a slot 'max_exp_avg_sq', which the target has no place for",
        ),
        (
            state_of(Parameter("a", (2,), {"step": 3, "exp_avg": tensor})),
            UnrepresentableError,
            "'a' has no tensor 'exp_avg_sq', which optax keeps",
        ),
        (
            state_of(one, groups=(Group(0, (("amsgrad", True),), 1),)),
            UnrepresentableError,
            (
                "amsgrad=True does not convert between frameworks: torch keeps the maximum of the raw second "
                "moments, others that of the bias-corrected ones"
            ),
        ),
        (
            state_of(one, groups=(Group(0, (("dampening", 0.1),), 1),)),
            UnrepresentableError,
            "SGD with dampening does not convert: no other framework has it",
        ),
        (
            state_of(one, groups=(Group(0, (), 0),)),
            UnrepresentableError,
            "'a' is in no group: the target has no place for its state",
        ),
        (
            state_of(one, optimizers=(Optimizer("torch.optim.nadam.NAdam"),)),
            UnrepresentableError,
            (
                "'torch.optim.nadam.NAdam' does not convert between frameworks: torch keeps a product of momenta "
                "(mu_product) that others recompute"
            ),
        ),
        (
            state_of(one, optimizers=(Optimizer(None),)),
            OptionError,
            "the state does not name its optimizer's class; pass it as optimizer=",
        ),
        (
            state_of(one, optimizers=(Optimizer("torch.optim.adam.Adam"), Optimizer("torch.optim.sgd.SGD"))),
            UnrepresentableError,
            "2 kinds of optimizer in one state, where the target has one",
        ),
        (
            state_of(
                Parameter("a", (2,), {"exp_avg": tensor}), optimizers=(Optimizer("lion_pytorch.lion_pytorch.Lion"),)
            ),
            UnrepresentableError,
            "the state does not say how many steps were taken; pass the number as options={'step': ...}",
        ),
    ]
    for state, kind, message in cases:
        with pytest.raises(kind) as caught:
            flax_msgpack.write(state, tmp_path / "never", base=None, force=False, options={"map": "none"})
        assert str(caught.value) == message
    base = written(tmp_path / "base", adam())
    with pytest.raises(ConversionError) as caught:
        flax_msgpack.write(state_of(one), tmp_path / "never", base=base, force=False, options={"map": "none"})
    assert str(caught.value) == "only the state has a parameter 'a': the base is of another model"
    with pytest.raises(TargetExistsError) as exists:
        flax_msgpack.write(state_of(one), base, base=None, force=False, options={"map": "none"})
    assert str(exists.value) == f"{base} exists; pass force=True to replace it"
    assert not (tmp_path / "never").exists()


# --- files made by flax -------------------------------------------------------------------------------------------

Make = Callable[..., Any]
SHAPES = {"b": (4, 6), "a": {"k": (3,), "s": ()}, "layers_10": (2, 2), "layers_9": (2, 2)}


def optimizers() -> dict[str, tuple[str, Make]]:
    """Each with the rule that it is."""
    import optax

    return {
        "adam": ("adam", optax.adam),
        "adamw": ("adamw", optax.adamw),
        "schedule": ("adamw", lambda lr: optax.adamw(optax.linear_schedule(lr, 0.0, 10))),
        "bf16 mu": ("adamw", lambda lr: optax.adamw(lr, mu_dtype="bfloat16")),
        "sgd": ("sgd", lambda lr: optax.sgd(lr, momentum=0.9)),
        "sgd with decay": ("sgd", lambda lr: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(lr, momentum=0.9))),
        "lion": ("lion", optax.lion),
        "adagrad": ("adagrad", optax.adagrad),
        "adadelta": ("adadelta", optax.adadelta),
        "rmsprop": ("rmsprop", optax.rmsprop),
        "centered": ("rmsprop", lambda lr: optax.rmsprop(lr, centered=True)),
        "adamax": ("adamax", optax.adamax),
        "adafactor": ("adafactor", lambda lr: optax.adafactor(lr, min_dim_size_to_factor=4)),
        "chain": ("adamw", lambda lr: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr))),
        "inject": ("adamw", lambda lr: optax.inject_hyperparams(optax.adamw)(lr)),
        "inject sgd": ("sgd", lambda lr: optax.inject_hyperparams(optax.sgd)(lr, momentum=0.9)),
        "inject rmsprop": ("rmsprop", lambda lr: optax.inject_hyperparams(optax.rmsprop)(lr, decay=0.5)),
        "multi steps": ("adam", lambda lr: optax.MultiSteps(optax.adam(lr), 2)),
        "apply if finite": ("adam", lambda lr: optax.apply_if_finite(optax.adam(lr), 3)),
        "masked": ("adam", lambda lr: optax.masked(optax.adam(lr), {**dict.fromkeys(SHAPES, True), "a": False})),
        "multi transform": (
            "adam",
            lambda lr: optax.multi_transform(
                {"x": optax.adam(lr), "y": optax.adam(lr, b1=0.5), "z": optax.set_to_zero()},
                {**dict.fromkeys(SHAPES, "x"), "a": "z", "layers_9": "y"},
            ),
        ),
    }


OPTAX = [
    "adam", "adamw", "schedule", "bf16 mu", "sgd", "sgd with decay", "lion",
    "adagrad", "adadelta", "rmsprop", "centered", "adamax", "adafactor", "chain",
    "inject", "inject sgd", "inject rmsprop", "multi steps", "apply if finite", "masked", "multi transform",
]  # fmt: skip


def trained(make: Make, steps: int = 4) -> tuple[Any, Any, Any]:
    """The optimizer, the parameters and the state after some steps."""
    import jax
    import jax.numpy as jnp
    import optax

    def values(seed: int) -> Any:
        generator = np.random.default_rng(seed)
        return jax.tree.map(
            lambda shape: jnp.asarray(generator.normal(size=shape), jnp.float32),
            SHAPES,
            is_leaf=lambda x: type(x) is tuple,
        )

    tx, params = make(1e-2), values(0)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(values(step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return tx, params, state


@pytest.mark.frameworks
@pytest.mark.parametrize("name", OPTAX)
def test_it_holds_what_flax_reads_and_comes_back_byte_for_byte(tmp_path: Path, name: str) -> None:
    from flax.serialization import from_bytes, msgpack_restore, to_bytes
    from flax.training.train_state import TrainState

    assert list(optimizers()) == OPTAX
    rule, make = optimizers()[name]
    tx, params, state = trained(make)
    path = tmp_path / "opt_state.msgpack"
    path.write_bytes(to_bytes(state))
    (tmp_path / "flax_model.msgpack").write_bytes(to_bytes(params))
    assert registry.detect(tmp_path)[0].NAME == "flax_msgpack"

    ours = read(path, optimizer=rule, step=4)
    fields = {field for layout in LAYOUTS if layout.rule != "adafactor" for field in layout.fields}
    found: dict[tuple[str, str], np.ndarray[Any, Any]] = {}
    for keys, leaf in optax_nodes.leaves(msgpack_restore(path.read_bytes())):
        field = next((key for key in keys if key in fields), None)
        if field and isinstance(leaf, np.ndarray):
            found[field, ".".join(keys[keys.index(field) + 1 :])] = leaf
    if name.startswith("inject"):
        kept = {"inject sgd": ("momentum", 0.9), "inject rmsprop": ("alpha", 0.5)}.get(name, ("eps", 1e-8))
        assert dict(ours.groups[0].options)[kept[0]] == pytest.approx(kept[1])
        assert dict(ours.groups[0].options)["lr"] == float(np.float32(1e-2))
    layout = next(x for x in LAYOUTS if x.rule == rule and set(x.fields) >= {field for field, _ in found})
    for (field, parameter), array in found.items():
        value = ours[parameter][layout.fields[field]]
        data = bytes(value.data if isinstance(value, Scalar) else value.bytes())
        assert data == array.tobytes()
        assert (value.shape if isinstance(value, Tensor) else ()) == array.shape
    assert found or name == "adafactor"

    writing.write(ours, tmp_path / "state.safetensors")
    with reading.open_state(tmp_path / "state.safetensors") as named:
        flax_msgpack.write(named, tmp_path / "back", base=None, force=False, options={})
        # A fresh state of the same optimizer says all that is around the moments; so does a TrainState.
        (tmp_path / "fresh").write_bytes(to_bytes(tx.init(params)))
        flax_msgpack.write(named, tmp_path / "filled", base=tmp_path / "fresh", force=False, options={})
        train_state = TrainState.create(apply_fn=None, params=params, tx=tx)
        (tmp_path / "fresh").write_bytes(to_bytes(train_state))
        flax_msgpack.write(named, tmp_path / "train_state", base=tmp_path / "fresh", force=False, options={})
    if name not in ("multi steps", "apply if finite"):  # fields of theirs come back in another order
        assert (tmp_path / "back").read_bytes() == path.read_bytes()
    for back, target in (("back", tx.init(params)), ("filled", tx.init(params)), ("train_state", train_state)):
        restored = from_bytes(target, (tmp_path / back).read_bytes())
        assert_trees_equal(getattr(restored, "opt_state", restored), state, void="acc_grads")


def assert_trees_equal(one: Any, other: Any, void: str) -> None:
    from flax.serialization import to_state_dict

    first, second = (dict(optax_nodes.leaves(to_state_dict(tree))) for tree in (one, other))
    assert first.keys() == second.keys()
    for keys, leaf in first.items():
        if void not in keys and not isinstance(leaf, dict):
            assert np.asarray(leaf).tobytes() == np.asarray(second[keys]).tobytes(), keys
            assert np.asarray(leaf).dtype == np.asarray(second[keys]).dtype


@pytest.mark.frameworks
def test_refused_optimizers(tmp_path: Path) -> None:
    import optax
    from flax.serialization import to_bytes

    path = tmp_path / "opt_state.msgpack"
    for make, message in (
        (optax.amsgrad, "0 is the state of amsgrad, which does not convert: "),
        (optax.contrib.muon, "inner_states/muon/inner_state/0 is the state of muon, which does not convert: "),
        (optax.contrib.prodigy, "the root is the state of prodigy, which does not convert: "),
        (optax.contrib.schedule_free_adamw, "the root is the state of schedule_free, which does not convert: "),
        (lambda lr: optax.rmsprop(lr, momentum=0.9), "0 and 2 both hold state of 'a.k': a rule of two parts "),
        (lambda lr: optax.flatten(optax.adam(lr)), "0/mu is an array of type F32 and shape [36], where a tree of the "),
        (lambda lr: optax.chain(optax.ema(0.9), optax.sgd(lr)), "0 holds count, ema: not a known state of optax"),
        (optax.sgd, "holds no parameter's state: its optimizer keeps none, or it is not of optax"),
    ):
        path.write_bytes(to_bytes(trained(make)[2]))
        with pytest.raises(FileError) as caught:
            read(path, optimizer="adam")
        assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.frameworks
def test_the_chains_are_those_of_optax() -> None:
    import optax
    from flax.serialization import to_state_dict

    for rule, chain in CHAINS.items():
        make = {"sgd": lambda lr: optax.sgd(lr, momentum=0.9)}.get(rule, getattr(optax, rule))
        states = to_state_dict(make(1e-3).init({"w": np.zeros(2, np.float32)}))
        assert "".join("N" if states[str(n)] else "-" for n in range(len(states))) == chain
        fields = [field for state in states.values() for field in state if field != "count"]
        assert any(list(layout.fields) == fields for layout in LAYOUTS if layout.rule == rule)


@pytest.mark.frameworks
def test_factors_of_adafactor_are_named_by_the_parameters_shape(tmp_path: Path) -> None:
    import jax.numpy as jnp
    import optax
    from flax.serialization import to_bytes
    from flax.training.train_state import TrainState

    tx = optax.adafactor(1e-2, min_dim_size_to_factor=2)
    shapes: list[tuple[int, int]] = [(3, 5), (5, 3), (4, 4)]
    for shape in shapes:
        gradient = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
        state = TrainState.create(apply_fn=None, params={"w": gradient}, tx=tx).apply_gradients(grads={"w": gradient})
        path = tmp_path / "state.msgpack"
        path.write_bytes(to_bytes(state))
        ours = read(path, optimizer="adafactor")
        # After one step the decay is 0: rows and columns are those of the squared gradient.
        squared = np.asarray(gradient) ** 2 + 1e-30
        np.testing.assert_allclose(ours["w"]["exp_avg_sq_row"].numpy(), squared.mean(1), rtol=1e-6)
        np.testing.assert_allclose(ours["w"]["exp_avg_sq_col"].numpy(), squared.mean(0), rtol=1e-6)
        flax_msgpack.write(ours, tmp_path / "back", base=path, force=True, options={})
        assert (tmp_path / "back").read_bytes() == path.read_bytes()
        alone = tmp_path / "opt_state.msgpack"
        alone.write_bytes(to_bytes(state.opt_state))
        if shape[0] != shape[1]:
            with pytest.raises(OptionError) as caught:
                read(alone, optimizer="adafactor")
            small, large = sorted(shape)
            assert str(caught.value) == (
                f"{alone}: 'w' has factors of {small} and {large} elements, which do not tell its axes apart; "
                "convert a file that has the parameters too (a TrainState)"
            )


@pytest.mark.frameworks
def test_arrays_above_the_limit_come_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import flax.serialization

    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 32)
    monkeypatch.setattr("lora_state_format.foreign.flax.MAX_PLAIN", 32)
    _, _, state = trained(optimizers()["adam"][1])
    path = tmp_path / "opt_state.msgpack"
    path.write_bytes(flax.serialization.to_bytes(state))
    assert path.read_bytes().count(b"__msgpack_chunked_array__") == 2
    ours = read(path, optimizer="adam")
    assert ours["b"]["exp_avg"].bytes() == np.asarray(state[0].mu["b"]).tobytes()
    flax_msgpack.write(ours, tmp_path / "back", base=None, force=False, options={})
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


@pytest.mark.frameworks
def test_an_nnx_optimizer(tmp_path: Path) -> None:
    import jax
    import optax
    from flax import nnx
    from flax.serialization import to_bytes

    class Model(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs) for _ in range(11)])

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.LoRAParam)
    gradient = jax.tree.map(lambda x: x + 0.5, nnx.state(model, nnx.LoRAParam))
    for _ in range(3):
        optimizer.update(model, gradient)
    path = tmp_path / "optimizer.msgpack"
    pure = nnx.to_pure_dict(nnx.state(optimizer))
    path.write_bytes(to_bytes(pure))
    assert registry.detect(path)[0].NAME == "flax_msgpack"
    ours = read(path, optimizer="adamw")
    assert list(ours)[:3] == ["layers.0.lora.lora_a", "layers.0.lora.lora_b", "layers.1.lora.lora_a"]
    moments = pure["opt_state"][0]
    for name, parameter in ours.items():
        _, index, _, factor = name.split(".")
        for slot, field in (("exp_avg", "mu"), ("exp_avg_sq", "nu")):
            assert parameter[slot].bytes() == np.asarray(moments[field]["layers"][int(index)]["lora"][factor]).tobytes()
    flax_msgpack.write(ours, tmp_path / "back", base=None, force=False, options={})
    assert (tmp_path / "back").read_bytes() == path.read_bytes()

    # Under PEFT's names, and back by the map that it was read with.
    named = read(path, optimizer="adamw", map="flax_nnx_linear")
    assert list(named)[-1] == "base_model.model.layers.10.lora_B.default.weight"
    moment = named["base_model.model.layers.10.lora_B.default.weight"]["exp_avg"]
    assert np.array_equal(moment.numpy(), np.asarray(moments["mu"]["layers"][10]["lora"]["lora_b"]).T)
    flax_msgpack.write(named, tmp_path / "again", base=None, force=False, options={})
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.frameworks
def test_a_stream_of_easylm(tmp_path: Path) -> None:
    """EasyLM's writer flattens a TrainState and packs pairs of a path and ``to_bytes`` of the leaf."""
    from flax.serialization import to_bytes, to_state_dict
    from flax.training.train_state import TrainState
    from flax.traverse_util import flatten_dict

    tx, params, state = trained(optimizers()["chain"][1])
    train_state = TrainState(step=4, apply_fn=None, params=params, tx=tx, opt_state=state)
    path = tmp_path / "streaming_train_state_4"
    with path.open("wb") as file:
        for keys, leaf in flatten_dict(to_state_dict(train_state)).items():
            file.write(msgpack.packb((keys, to_bytes(leaf))))
    converter, _match = registry.detect(path)
    assert converter.NAME == "flax_msgpack"
    checkpoint = registry.read(path, "flax_msgpack", {"optimizer": "adamw"})
    ours = checkpoint.state
    assert isinstance(ours, OptimizerState)
    assert ours["b"]["exp_avg"].bytes() == np.asarray(state[1][0].mu["b"]).tobytes()
    assert checkpoint.weights["b"].bytes() == np.asarray(params["b"]).tobytes()
    assert ours["a.s"]["step"].item() == 4
