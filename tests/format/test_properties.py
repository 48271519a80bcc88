"""Any state at all: written, read, compared, sharded, merged, renamed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Final

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_state_format.errors import StateFormatError
from lora_state_format.format import envelope, reading, writing
from lora_state_format.format.manifest import fits
from lora_state_format.io.safetensors import read_header
from lora_state_format.model.dtypes import BITS
from lora_state_format.model.sources import File, Memory
from lora_state_format.model.states import Group, Naming, Optimizer, OptimizerState, Parameter, Role, Scalar, Slot
from lora_state_format.model.tensors import Digest, contiguous
from lora_state_format.operations.diff import diff

DTYPES: Final = sorted(BITS)
TEXT: Final = st.text(max_size=8) | st.sampled_from(["a/b", "$", "__metadata__", "\0\n\x1b", "é\u0301🜚", "..", "a.b"])
NAMES: Final = TEXT.filter(lambda name: name != "" and not name.startswith("$"))
INTEGERS: Final = (
    st.integers() | st.integers(-(10**40), 10**40) | st.sampled_from([2**53 - 1, 2**53, -(2**53), 10**999])
)
FLOATS: Final = st.floats() | st.sampled_from([-0.0, 5e-324, 1e16, 1e21, 1e-7, math.inf, -math.inf])
assert settings.default is not None
EXAMPLES: Final = settings.default.max_examples
FEW: Final = settings(
    max_examples=EXAMPLES // 4,  # whole states take long to make
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True, scope="module")
def _without_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


def scalars() -> st.SearchStrategy[Scalar]:
    whole = [dtype for dtype in DTYPES if BITS[dtype] >= 8]
    return st.sampled_from(whole).flatmap(
        lambda dtype: st.binary(min_size=BITS[dtype] // 8, max_size=BITS[dtype] // 8).map(lambda b: Scalar(dtype, b))
    )


KEYS: Final = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=2).map(tuple),
    max_leaves=3,
)
LEAVES: Final = st.none() | st.booleans() | INTEGERS | FLOATS | TEXT | st.binary(max_size=5) | scalars()


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(TEXT, inner, max_size=3)
            | st.dictionaries(KEYS, inner, max_size=3)
        ),
        max_leaves=8,
    )


def mappings() -> st.SearchStrategy[Any]:
    return st.dictionaries(TEXT, trees(LEAVES), max_size=3)


def slot_trees(parameter: tuple[int, ...]) -> st.SearchStrategy[Any]:
    own = slots(parameter)
    return st.dictionaries(TEXT, own | own | trees(LEAVES | own), max_size=4)


SHAPES: Final = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def slots(draw: st.DrawFn, parameter: tuple[int, ...]) -> Slot:
    """A tensor of any dtype, in the parameter's shape or another one, with a role that allows it."""
    shape = draw(st.just(parameter) | SHAPES) or (1,)
    dtype = draw(st.sampled_from([dtype for dtype in DTYPES if math.prod(shape) * BITS[dtype] % 8 == 0]))
    role = draw(st.sampled_from([role for role in Role if fits(role, shape, parameter)]))
    size = math.prod(shape) * BITS[dtype] // 8
    data = draw(st.binary(min_size=size, max_size=size))
    return Slot(contiguous(dtype, shape, Memory(data)), role)


def digests() -> st.SearchStrategy[Digest]:
    return st.builds(
        Digest, st.just("xxh3-128"), st.sampled_from(DTYPES), st.text("0123456789abcdef", min_size=32, max_size=32)
    )


@st.composite
def parameters(draw: st.DrawFn, name: str, tied: tuple[str, ...]) -> Parameter:
    shape = draw(SHAPES)
    return Parameter(
        name=name,
        shape=shape,
        state=draw(st.none() | slot_trees(shape) | slot_trees(shape)),
        dtype=draw(st.none() | st.sampled_from(DTYPES)),
        adapter=draw(st.none() | TEXT),
        tied=tied,
        foreign_names=draw(st.dictionaries(TEXT, TEXT, max_size=2)),
        weights=draw(st.none() | digests()),
        original_id=draw(st.none() | st.integers(0, 2**70) | TEXT),
    )


@st.composite
def states(draw: st.DrawFn) -> OptimizerState:
    names = draw(st.lists(NAMES, unique=True, max_size=6))
    count = draw(st.integers(0, len(names)))
    found = [
        draw(parameters(name, tuple(names[count + k :: count])))  # the rest of the names are tied ones
        for k, name in enumerate(names[:count])
    ]
    optimizers = draw(st.lists(st.builds(Optimizer, st.none() | TEXT, st.none() | TEXT), min_size=1, max_size=3))
    owners = sorted(draw(st.lists(st.integers(0, len(optimizers) - 1), max_size=4)))
    left, groups = count, []
    for owner in owners:
        size = draw(st.integers(0, left))
        left -= size
        options = draw(st.dictionaries(TEXT, trees(LEAVES), max_size=3))
        groups.append(Group(owner, tuple(options.items()), size, draw(st.none() | TEXT)))
    extensions = draw(st.dictionaries(TEXT, mappings(), max_size=2))
    return OptimizerState(
        optimizers=tuple(optimizers),
        groups=tuple(groups),
        parameters=tuple(found),
        naming=Naming(draw(TEXT), draw(st.none() | TEXT), draw(mappings())),
        globals=draw(slot_trees((2,))),
        origin=draw(mappings()),
        extra=draw(mappings()),
        extensions={name: {**extension, "must_understand": False} for name, extension in extensions.items()},
        global_step=draw(st.none() | st.integers(0, 2**53 - 1)),
    )


def written(state: OptimizerState) -> bytes:
    with TemporaryDirectory() as folder:
        writing.write(state, Path(folder) / "a")
        return (Path(folder) / "a").read_bytes()


@FEW
@given(state=states())
def test_any_state_comes_back(state: OptimizerState, plain_states: ModuleType, spec_reader: ModuleType) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        writing.write(state, path)
        with reading.open_state(path) as found:
            assert plain_states.of_state(found) == plain_states.of_state(state)
            assert [p.weights for p in found.parameters] == [p.weights for p in state.parameters]
            assert written(found) == path.read_bytes()
        assert plain_states.of_other(spec_reader.read(path), spec_reader) == plain_states.of_state(state)
        assert reading.verify(path).ok
        with safetensors.safe_open(path, framework="numpy") as opened, File(path) as file:
            tensors = read_header(file).tensors
            assert {key: opened.get_slice(key).get_shape() for key in opened.keys()} == {  # noqa: SIM118
                key: list(tensor.shape) for key, tensor in tensors.items()
            }


@FEW
@given(state=states(), limit=st.integers(0, 60))
def test_any_state_in_shards(
    state: OptimizerState, limit: int, plain_states: ModuleType, spec_reader: ModuleType
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        writing.write(state, path, max_shard_size=limit)
        with reading.open_state(path) as found:
            assert plain_states.of_state(found) == plain_states.of_state(state)
            assert written(found) == written(state)
        assert plain_states.of_other(spec_reader.read(path), spec_reader) == plain_states.of_state(state)
        assert reading.verify(path).ok


def shuffled(value: Any) -> Any:
    """An equal value whose mappings were filled in another order."""
    if isinstance(value, Mapping):
        return {key: shuffled(item) for key, item in reversed([*value.items()])}
    if type(value) in (list, tuple):
        return type(value)(map(shuffled, value))
    return value


@FEW
@given(states())
def test_equal_states_have_equal_bytes(state: OptimizerState) -> None:
    again = replace(
        state,
        groups=tuple(
            replace(g, options=tuple((key, shuffled(value)) for key, value in g.options)) for g in state.groups
        ),
        parameters=tuple(
            replace(p, state=shuffled(p.state), foreign_names=dict(reversed([*p.foreign_names.items()])))
            for p in state.parameters
        ),
        naming=replace(state.naming, details=shuffled(state.naming.details)),
        **{name: shuffled(getattr(state, name)) for name in ("globals", "origin", "extra", "extensions")},
    )
    assert written(again) == written(state)


@st.composite
def changed(draw: st.DrawFn, state: OptimizerState) -> OptimizerState:
    """The state with one thing drawn anew."""
    other = draw(states())
    part = draw(
        st.sampled_from(["parameters", "naming", "globals", "origin", "extra", "extensions", "global_step", "option"])
    )
    if part == "parameters" and state.parameters:
        index = draw(st.integers(0, len(state.parameters) - 1))
        old = state.parameters[index]
        new = draw(parameters(old.name, old.tied))
        return replace(state, parameters=(*state.parameters[:index], new, *state.parameters[index + 1 :]))
    if part == "option" and state.groups:
        first = replace(state.groups[0], options=(("lr", draw(trees(LEAVES))),))
        return replace(state, groups=(first, *state.groups[1:]))
    return replace(state, **{part: getattr(other, part)}) if hasattr(state, part) and part != "parameters" else state


@FEW
@given(data=st.data())
def test_bytes_are_equal_exactly_where_states_are(data: st.DataObject, plain_states: ModuleType) -> None:
    state = data.draw(states())
    other = data.draw(changed(state))
    equal = (plain_states.of_state(state), [p.weights for p in state.parameters]) == (
        plain_states.of_state(other),
        [p.weights for p in other.parameters],
    )
    assert (written(state) == written(other)) is equal
    # What ``diff`` overlooks: names' and state's origins, and digests of weights that only one of the two has.
    pairs = list(zip(state.parameters, other.parameters, strict=True))
    one, two = (
        tuple(
            replace(pair[k], weights=pair[k].weights if pair[0].weights and pair[1].weights else None) for pair in pairs
        )
        for k in (0, 1)
    )
    other = replace(other, naming=state.naming, origin=state.origin)
    same = written(replace(state, parameters=one)) == written(replace(other, parameters=two))
    assert bool(diff(state, other)) is not same


@FEW
@given(states(), st.data())
def test_renaming_there_and_back(state: OptimizerState, data: st.DataObject) -> None:
    names = [p.name for p in state.parameters]
    new = data.draw(
        st.lists(NAMES.map(lambda name: name + "!new"), min_size=len(names), max_size=len(names), unique=True)
    )

    def renamed(state: OptimizerState, names: list[str]) -> OptimizerState:
        pairs = zip(state.parameters, names, strict=True)
        return replace(state, parameters=tuple(replace(p, name=name) for p, name in pairs))

    with TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        writing.write(renamed(state, new), path)
        with reading.open_state(path) as found:
            assert written(renamed(found, names)) == written(state)


@settings(max_examples=3 * EXAMPLES)
@given(st.binary(max_size=200), st.integers(0, 3000), st.booleans())
def test_only_declared_errors_escape(noise: bytes, position: int, sealed: bool) -> None:
    """Noise over a file; with its digest made right, so that it gets as far as the manifest."""
    raw = bytearray((Path(__file__).parents[2] / "spec/vectors/valid/several-groups.safetensors").read_bytes())
    position %= len(raw)
    raw[position : position + len(noise)] = noise[: len(raw) - position]
    if sealed and raw[8:58] == envelope.PREFIX:
        end = 8 + int.from_bytes(raw[:8], "little")
        raw[58:90] = envelope.header_digest(bytes(raw[:end])).encode()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(raw)
        with suppress(StateFormatError):
            reading.verify(path)
