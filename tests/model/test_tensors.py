"""Tensors as byte ranges against NumPy, and what the central types promise."""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_state_format.errors import ConversionError, FileError
from lora_state_format.model import tensors
from lora_state_format.model.dtypes import BITS, item_size
from lora_state_format.model.sources import Memory
from lora_state_format.model.states import (
    Group,
    Naming,
    Optimizer,
    OptimizerState,
    Parameter,
    PositionalState,
    Role,
    Scalar,
    Slot,
    Value,
    walk,
)
from lora_state_format.model.tensors import Box, Digest, Flat, Piece, Tensor, contiguous, is_tiling

Array = np.ndarray[Any, Any]

TYPES = {"U8": np.uint8, "I16": np.int16, "F32": np.float32, "F64": np.float64, "C64": np.complex64}
SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)


def array_of(shape: tuple[int, ...], dtype: str) -> Array:
    """Distinct elements, as far as the dtype has them."""
    return np.arange(np.prod(shape, dtype=int), dtype=np.int64).reshape(shape).astype(TYPES[dtype])


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """Consecutive ranges that cover 0 to ``size``, some of them empty."""
    inner = draw(st.lists(st.integers(0, size), max_size=3))
    edges = [0, *sorted(inner), size]
    return list(pairwise(edges))


def stored(array: Array, draw: st.DrawFn) -> tuple[Memory, int, tuple[int, ...] | None]:
    """An array in a buffer: at an offset, its axes in any order, with gaps between rows; and its strides there."""
    padding = draw(st.integers(0, 3))
    axes = draw(st.permutations(range(array.ndim)))
    gap = draw(st.integers(0, 2)) if array.ndim and draw(st.booleans()) else 0
    moved = array.transpose(axes)
    if gap and moved.ndim:
        wide = np.zeros((*moved.shape[:-1], moved.shape[-1] + gap), array.dtype)
        wide[..., : moved.shape[-1]] = moved
        view = wide[..., : moved.shape[-1]]
    else:
        view = np.ascontiguousarray(moved).reshape(moved.shape)
        wide = view
    strides = [0] * array.ndim
    for place, axis in enumerate(axes):
        strides[axis] = view.strides[place] // array.itemsize
    data = b"\xee" * padding + wide.tobytes() + b"\xee" * 3
    natural = list(axes) == sorted(axes) and not gap
    return Memory(data), padding, None if natural and draw(st.booleans()) else tuple(strides)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, Tensor]:
    """An array, and the same as a tensor of pieces: whole, flat ranges, or a grid of boxes, in any order."""
    shape, dtype = draw(SHAPES), draw(st.sampled_from(sorted(TYPES)))
    array = array_of(shape, dtype)
    pieces: list[Piece] = []
    match draw(st.sampled_from(["whole", "flat", "grid"])):
        case "whole":
            source, offset, strides = stored(array, draw)
            pieces.append(Piece(source, offset, Box((0,) * len(shape), shape), strides))
        case "flat":
            for start, stop in draw(cuts(array.size)):
                source = Memory(b".." + array.reshape(-1)[start:stop].tobytes())
                pieces.append(Piece(source, 2, Flat(start, stop - start)))
        case "grid":
            boxes: list[tuple[tuple[int, int], ...]] = [()]
            for size in shape:
                ranges = draw(cuts(size))
                boxes = [(*box, edge) for box in boxes for edge in ranges]
            for box in boxes:
                part = array[tuple(slice(*edge) for edge in box)]
                source, offset, strides = stored(part, draw)
                pieces.append(Piece(source, offset, Box(tuple(a for a, _ in box), part.shape), strides))
    return array, Tensor(dtype, shape, tuple(draw(st.permutations(pieces))))


@given(cases())
def test_a_tensor_has_the_bytes_of_its_pieces(case: tuple[Array, Tensor]) -> None:
    array, tensor = case
    assert tensor.bytes() == array.tobytes()
    assert (tensor.count, tensor.size) == (array.size, array.nbytes)
    found = tensor.numpy()
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)


@given(cases(), st.data())
def test_any_range_of_bytes(case: tuple[Array, Tensor], data: st.DataObject) -> None:
    array, tensor = case
    start = data.draw(st.integers(0, tensor.size))
    size = data.draw(st.integers(0, tensor.size - start))
    out = bytearray(size)
    tensor.readinto(start, memoryview(out))
    assert out == array.tobytes()[start : start + size]
    view = tensor.view(start, size)
    assert view is None or view == out


@given(cases(), st.integers(1, 40))
def test_chunks_of_any_size(case: tuple[Array, Tensor], size: int) -> None:
    array, tensor = case
    chunks = [bytes(chunk) for chunk in tensor.chunks(memoryview(bytearray(size)))]
    assert b"".join(chunks) == array.tobytes()
    assert all(0 < len(chunk) <= size for chunk in chunks)
    assert b"".join(map(bytes, tensor.chunks())) == array.tobytes()


@given(cases(), st.data())
def test_permuting_and_cutting(case: tuple[Array, Tensor], data: st.DataObject) -> None:
    array, tensor = case
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            axes = data.draw(st.permutations(range(array.ndim)))
            array, tensor = array.transpose(axes), tensor.permute(axes)
        else:
            edges = [data.draw(st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted)) for n in array.shape]
            array = array[tuple(slice(*edge) for edge in edges)]
            tensor = tensor.part([a for a, _ in edges], [b - a for a, b in edges])
    assert tensor.shape == array.shape
    assert tensor.bytes() == array.tobytes()


@given(cases(), st.data())
def test_reading_slices(case: tuple[Array, Tensor], data: st.DataObject) -> None:
    array, tensor = case
    bound = st.none() | st.integers(-8, 8)
    slices = [slice(data.draw(bound), data.draw(bound)) for _ in array.shape]
    assert tensor.read(slices) == array[tuple(slices)].tobytes()


@given(cases())
def test_runs_are_the_bytes_in_order(case: tuple[Array, Tensor]) -> None:
    array, tensor = case
    if tensor.runs is not None:
        parts = []
        for run in tensor.runs:
            out = bytearray(run.size)
            run.source.readinto(run.offset, memoryview(out))
            parts.append(bytes(out))
        assert b"".join(parts) == array.tobytes()
        assert all(parts)


def test_runs_are_found_where_elements_lie_in_order() -> None:
    memory = Memory(bytes(64))
    rows = [Piece(memory, 0, Box((n, 0), (1, 4))) for n in (1, 0)]
    assert [run.size for run in Tensor("F32", (2, 4), tuple(rows)).runs or ()] == [16, 16]
    halves = [Piece(memory, 0, Box((0, n), (1, 2)), (9, 1)) for n in (0, 2)]
    assert [run.size for run in Tensor("F32", (1, 4), tuple(halves)).runs or ()] == [8, 8]
    assert contiguous("F32", (1, 4), memory).permute((1, 0)).runs is not None
    assert contiguous("F32", (2, 4), memory).permute((1, 0)).runs is None
    assert contiguous("F32", (0, 4), memory).runs == ()


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([Flat(0, 3)], "pieces with 3 elements for a tensor of shape [2, 2]"),
        ([Flat(0, 2), Flat(0, 2)], "pieces of a tensor of shape [2, 2] that do not meet at element 2"),
        ([Flat(-1, 4)], "a piece of 4 elements from -1 on"),
        ([Box((0, 0), (2, 2)), Box((0, 0), (1, 1))], "pieces with 5 elements for a tensor of shape [2, 2]"),
        (
            [Box((0, 1), (2, 2))],
            "Box(start=(0, 1), shape=(2, 2)) with strides None in a tensor of shape [2, 2]",
        ),
        ([Box((0,), (4,))], "Box(start=(0,), shape=(4,)) with strides None in a tensor of shape [2, 2]"),
        (
            [Box((0, 0), (2, 1)), Box((0, 0), (2, 1))],
            "2 boxes that do not make up a tensor of shape [2, 2]",
        ),
        ([Box((0, 0), (2, 1)), Flat(0, 2)], "boxes and flat pieces in one tensor of shape [2, 2]"),
    ],
)
def test_pieces_that_do_not_make_a_tensor(pieces: list[Box | Flat], message: str) -> None:
    tensor = Tensor("F32", (2, 2), tuple(Piece(Memory(bytes(64)), 0, where) for where in pieces))
    with pytest.raises(FileError) as caught:
        tensor.bytes()
    assert str(caught.value) == message


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(box.start, box.shape, strict=True))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes in it: cut and cut again, so that they are no grid, perhaps with one in place of another."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    boxes = [Box((0,) * len(shape), shape)]
    for axis in draw(st.lists(st.integers(0, len(shape) - 1), max_size=6)) if shape else ():
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        at = draw(st.integers(0, box.shape[axis]))
        for start, size in ((0, at), (at, box.shape[axis] - at)):
            moved = (*box.start[:axis], box.start[axis] + start, *box.start[axis + 1 :])
            boxes.append(Box(moved, (*box.shape[:axis], size, *box.shape[axis + 1 :])))
    if draw(st.booleans()):
        boxes[draw(st.integers(0, len(boxes) - 1))] = draw(st.sampled_from(boxes))
    return shape, boxes


@given(layouts())
def test_boxes_make_up_a_tensor_or_they_do_not(layout: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = layout
    covered = np.zeros(shape, dtype=int)
    for box in boxes:
        covered[slices(box)] += 1
    assert is_tiling(boxes, shape) == bool((covered == 1).all())


PINWHEEL = [Box((0, 0), (1, 2)), Box((0, 2), (2, 1)), Box((2, 1), (1, 2)), Box((1, 0), (2, 1)), Box((1, 1), (1, 1))]
"""No straight cut goes through it."""


def test_a_tensor_that_no_cut_goes_through() -> None:
    array = np.arange(9, dtype=np.int16).reshape(3, 3)
    pieces = tuple(Piece(Memory(array[slices(box)].tobytes()), 0, box) for box in PINWHEEL)
    assert Tensor("I16", (3, 3), pieces).bytes() == array.tobytes()
    assert not is_tiling(PINWHEEL[1:], (3, 3))


def test_boxes_beyond_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    cube = [Box(start, (1,) * 5) for start in product((0, 1), repeat=5)]
    assert not is_tiling(cube, (2,) * 5)
    assert is_tiling([Box((*box.start, 0), (*box.shape, 9)) for box in cube[::2]], (2, 2, 2, 2, 1, 9))
    monkeypatch.setattr(tensors, "MAX_CORNERS", 16)
    row = [Box((n,), (1,)) for n in range(9)]
    assert not is_tiling(row, (9,))
    assert is_tiling(row[:-1], (8,))


@pytest.mark.parametrize(("rows", "columns"), [(1, 5_000), (100, 100)])
def test_thousands_of_pieces(rows: int, columns: int) -> None:
    """What is compared grows with the pieces that a chunk meets, not with all pieces, let alone with their pairs."""
    shape = (10 * rows, columns)
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    boxes = [Box((10 * row, column), (10, 1)) for row in range(rows) for column in range(columns)]
    pieces = tuple(Piece(Memory(array[slices(box)].tobytes()), 0, box) for box in boxes)
    start = time.process_time()
    chunks = Tensor("F32", shape, pieces).chunks(memoryview(bytearray(4 * columns)))
    assert b"".join(map(bytes, chunks)) == array.tobytes()
    assert time.process_time() - start < 5


def test_strides_that_are_not_a_layout() -> None:
    tensor = Tensor("F32", (2, 2), (Piece(Memory(bytes(64)), 8, Box((0, 0), (2, 2)), (-2, 1)),))
    with pytest.raises(FileError) as caught:
        tensor.bytes()
    assert str(caught.value) == ("Box(start=(0, 0), shape=(2, 2)) with strides (-2, 1) in a tensor of shape [2, 2]")


def test_a_repeated_row() -> None:
    """A stride of zero, as ``expand`` makes it."""
    row = np.arange(5, dtype=np.float32)
    tensor = Tensor("F32", (3, 5), (Piece(Memory(row.tobytes()), 0, Box((0, 0), (3, 5)), (0, 1)),))
    np.testing.assert_array_equal(tensor.numpy(), np.stack([row] * 3))


def test_gathering_more_than_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "GATHER_SPAN", 256)
    array = np.arange(24 * 50, dtype=np.int16).reshape(24, 50)
    tensor = contiguous("I16", (24, 50), Memory(array.tobytes())).permute((1, 0))
    assert tensor.bytes() == array.T.tobytes()


def test_types_smaller_than_a_byte_are_taken_whole() -> None:
    tensor = contiguous("F4", (2, 4), Memory(b"abcd"))
    assert (tensor.size, item_size("F4"), bytes(tensor.bytes())) == (4, 1, b"abcd")
    assert tensor.permute((0, 1)).bytes() == tensor.part((0, 0), (2, 4)).bytes() == b"abcd"
    message = "elements of F4 are smaller than a byte: such a tensor is taken whole"
    cuts: list[Callable[[], Tensor]] = [lambda: tensor.permute((1, 0)), lambda: tensor.part((0, 0), (1, 4))]
    for cut in cuts:
        with pytest.raises(TypeError) as caught:
            cut()
        assert str(caught.value) == message
    halves = Tensor("F4", (6,), tuple(Piece(Memory(b"abc"), 0, Flat(start, 3)) for start in (0, 3)))
    with pytest.raises(FileError) as refused:
        halves.bytes()
    assert str(refused.value) == "a piece of 3 elements of F4, which are not whole bytes"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.permute((0,)), "axes (0,) of a tensor with 2"),
        (lambda t: t.permute((0, 0)), "axes (0, 0) of a tensor with 2"),
        (lambda t: t.part((0,), (1,)), "a box of 1 axes in a tensor of 2"),
        (lambda t: t.part((0, 2), (2, 2)), "box (2, 2) at (0, 2) of a tensor of shape (2, 3)"),
        (
            lambda t: t.read([slice(0, 2, 2), slice(None)]),
            "(slice(0, 2, 2), slice(None, None, None)): a slice of a tensor has no step",
        ),
        (lambda t: t.readinto(20, memoryview(bytearray(8))), "bytes 20 to 28 of a tensor that has 24"),
    ],
)
def test_what_a_tensor_does_not_have(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call(contiguous("F32", (2, 3), Memory(bytes(24))))
    assert str(caught.value) == message


def test_numpy_has_no_bfloat16() -> None:
    with pytest.raises(TypeError) as caught:
        contiguous("BF16", (1,), Memory(bytes(2))).numpy()
    assert str(caught.value) == "NumPy has no BF16; use .bytes(), or .torch()"


def test_numpy_gives_an_array_of_its_own() -> None:
    memory = Memory(bytes(8))
    array = contiguous("F32", (2,), memory).numpy()
    array += 1
    assert contiguous("F32", (2,), memory).bytes() == bytes(8)
    assert contiguous("F32", (0, 3), memory).numpy().shape == (0, 3)
    assert contiguous("F32", (), memory).numpy().shape == ()


# --- values and states --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "code", "value"),
    [
        ("BOOL", "?", True), ("U8", "B", 200), ("I8", "b", -3), ("U16", "H", 65535), ("I16", "h", -2), ("U32", "I", 7),
        ("I32", "i", -7), ("U64", "Q", 2**64 - 1), ("I64", "q", -(2**63)), ("F16", "e", 0.5), ("F32", "f", 0.25),
        ("F64", "d", 0.1), ("C64", "2f", 1 + 2j), ("BF16", "", 1.5),
    ],
)  # fmt: skip
def test_scalars_as_numbers(dtype: str, code: str, value: Any) -> None:
    parts = (value.real, value.imag) if isinstance(value, complex) else (value,)
    data = struct.pack("<f", value)[2:] if dtype == "BF16" else struct.pack("<" + code, *parts)
    assert Scalar(dtype, data).item() == value
    assert type(Scalar(dtype, data).item()) is type(value)


def test_scalars_without_a_number() -> None:
    with pytest.raises(TypeError) as caught:
        Scalar("F8_E4M3", b"\x01").item()
    assert str(caught.value) == "a scalar of type F8_E4M3 has no Python number"


def test_walking_a_tree() -> None:
    tree: Value = {"a": {"b": [1, (2,)]}, "c": {}, "d": None}
    assert list(walk(tree)) == [(("a", "b", 0), 1), (("a", "b", 1, 0), 2), (("d",), None)]


def named(*parameters: Parameter) -> OptimizerState:
    groups = (Group(0, (), 1), Group(0, (), 0), Group(0, (), max(len(parameters) - 2, 0)))
    return OptimizerState((Optimizer(),), groups, parameters, Naming("model"))


def test_a_state_is_a_mapping_by_name() -> None:
    tensor = contiguous("F32", (2,), Memory(bytes(8)))
    a = Parameter("a", (2,), {"m": Slot(tensor), "step": 3}, foreign_names={"peft": "x", "mlx": "y"})
    b, c = Parameter("b", (2,), None, foreign_names={"peft": "z"}), Parameter("c", (2,), {}, foreign_names={"mlx": "z"})
    state = named(a, b, c)
    assert (list(state), len(state), "a" in state, "nothing" in state) == (["a", "b", "c"], 3, True, False)
    assert state["a"]["m"] is tensor
    assert state["a"]["step"] == 3
    assert state["x"] is state["y"] is a
    assert [[p.name for p in group] for group in state.members()] == [["a"], [], ["b"]]
    assert state.carried == (c,)
    for missing in ("z", "q"):
        with pytest.raises(KeyError):
            state[missing]
    for parameter, slot in ((a, "q"), (b, "m")):
        with pytest.raises(KeyError):
            parameter[slot]
    assert state != named(a, b, c)


def test_a_name_twice() -> None:
    with pytest.raises(ConversionError) as caught:
        named(Parameter("a", (1,), None), Parameter("b", (1,), None), Parameter("a", (1,), None))
    assert str(caught.value) == "parameter 'a' occurs twice"


def positional(ids: tuple[int | str, ...]) -> PositionalState:
    slot = Slot(contiguous("F32", (2,), Memory(bytes(8))), Role.PARAM)
    return PositionalState((Optimizer(),), (Group(0, (), 2),), ids, {ids[0]: {"step": 1, "m": slot}})


def test_naming_positions() -> None:
    parameters = [Parameter("a", (2,), None), Parameter("b", (3,), None)]
    state = positional((0, 1)).named(parameters, Naming("names"))
    assert [(p.name, p.state is None, p.original_id) for p in state.parameters] == [
        ("a", False, None),
        ("b", True, None),
    ]
    state = positional((7, "x")).named(parameters, Naming("names"))
    assert [p.original_id for p in state.parameters] == [7, "x"]
    assert positional((0, 1)).sizes() == [2]
    assert positional((0, 1)).shapes() == [(2,), None]


def test_names_that_do_not_fit_positions() -> None:
    with pytest.raises(ConversionError) as caught:
        positional((0, 1)).named([Parameter("a", (2,), None)], Naming("names"))
    assert str(caught.value) == "1 names for 2 parameters"
    with pytest.raises(ConversionError) as caught:
        positional((5, 1)).named([Parameter("a", (3,), None), Parameter("b", (2,), None)], Naming("names"))
    assert str(caught.value) == (
        "parameter 'a' has shape [3], but id 5, which would become its state, has m of shape [2]"
    )


def test_digests_compare_by_value() -> None:
    assert Digest("xxh3-128", "F32", "00") == Digest("xxh3-128", "F32", "00")


def test_every_dtype_has_a_size() -> None:
    assert {dtype for dtype in BITS if BITS[dtype] % 8} == {"F4", "F6_E2M3", "F6_E3M2"}
    assert {item_size(dtype) for dtype in BITS} == {1, 2, 4, 8}
