"""``records.dataclass`` does what ``dataclasses.dataclass`` does, of all that this package uses."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, field
from functools import cached_property
from typing import Any

import pytest

from lora_state_format import records


@records.dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: int = 2
    rest: list[int] = field(default_factory=list)


@records.dataclass(frozen=True)
class Open:
    x: int
    hidden: int = field(default=5, repr=False)

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError("x is negative")

    @cached_property
    def double(self) -> int:
        return 2 * self.x


@records.dataclass(frozen=True)
class Names:
    """Fields with the names of what a class's functions are made of."""

    own: int
    cls: int = 2
    missing: list[int] = field(default_factory=list)
    default_own: list[int] = field(default_factory=list)
    values: int = 3


@records.dataclass(slots=True)
class Counter:
    n: int = 0


@records.dataclass(frozen=True, eq=False, repr=False)
class Plain:
    x: int

    def __repr__(self) -> str:
        return "plain"


@records.dataclass(frozen=True, slots=True, repr=False)
class Table(Mapping[str, int]):
    rows: Mapping[str, int]

    def __getitem__(self, key: str) -> int:
        return self.rows[key]

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def test_fields_are_arguments_with_their_defaults() -> None:
    assert (Point(1).x, Point(1).y, Point(1).rest) == (1, 2, [])
    assert Point(1).rest is not Point(1).rest
    assert Point(x=1, rest=[3], y=4) == Point(1, 4, [3])
    assert list(inspect.signature(Point).parameters) == ["x", "y", "rest"]
    with pytest.raises(TypeError, match=r"Point\.__init__\(\) missing 1 required positional argument: 'x'"):
        Point()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        Point(1, z=2)  # type: ignore[call-arg]


def test_a_field_may_have_any_name() -> None:
    assert vars(Names(1)) == {"own": 1, "cls": 2, "missing": [], "default_own": [], "values": 3}


@pytest.mark.parametrize("record", [Point(1), Open(1)])
def test_a_frozen_one_does_not_change(record: Any) -> None:
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'x'"):
        record.x = 3
    with pytest.raises(FrozenInstanceError, match="cannot delete field 'x'"):
        del record.x
    assert record.x == 1


def test_the_others_do() -> None:
    counter = Counter()
    counter.n += 1
    assert (counter, repr(counter)) == (Counter(1), "Counter(n=1)")
    with pytest.raises(TypeError, match="unhashable type"):
        hash(counter)


def test_slots_are_slots() -> None:
    for record in (Point(1), Counter(), Table({})):
        assert not hasattr(record, "__dict__")
    assert Open(3).double == 6


def test_equal_by_type_and_values() -> None:
    assert Point(1, rest=[1]) != Point(1)
    assert Open(1) != Open(1, 6)
    assert Point(1) != dataclasses.make_dataclass("Point", ["x", "y", "rest"])(1, 2, [])
    assert {Open(1): "a"}[Open(1)] == "a"
    assert Plain(1) != Plain(1)
    assert Table({"a": 1}) == Table({"a": 1}) != {"a": 1}


def test_shown_with_the_values_of_its_fields() -> None:
    assert repr(Point(1)) == "Point(x=1, y=2, rest=[])"
    assert repr(Open(1)) == "Open(x=1)"
    assert repr(Plain(1)) == "plain"


def test_what_a_class_checks_of_itself_is_checked() -> None:
    with pytest.raises(ValueError, match="x is negative"):
        Open(-1)


@pytest.mark.parametrize("record", [Point(1, 5, [6]), Open(2), Counter(3), Table({"a": 1})])
def test_copied_pickled_and_replaced(record: Any) -> None:
    assert pickle.loads(pickle.dumps(record)) == record
    assert copy.deepcopy(record) == copy.copy(record) == dataclasses.replace(record) == record


def test_replaced_in_part() -> None:
    assert dataclasses.replace(Point(1, 5), x=2) == Point(2, 5)
