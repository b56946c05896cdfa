"""Copies of column values: equal, apart, and without a trace on the original."""

from __future__ import annotations

import collections
import copy
import dataclasses
import threading
import types
import weakref
from collections.abc import Callable
from decimal import Decimal
from enum import Enum
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.mutable import Mutable, MutableDict, MutableList, MutableSet

from sqla_signals.bridge.columns.copies import copies_of, copy_of, have_same_content


@dataclasses.dataclass
class Point:
    """Equal by value, changed in place."""

    x: Any
    y: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """In slots, and not to be set."""

    values: list[int]


class Slotted:
    """In slots."""

    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and self.x == other.x

    __hash__ = None


class Pair(NamedTuple):
    """A tuple of a class of its own."""

    one: Any
    other: Any


class Color(Enum):
    """One of a few."""

    RED = "red"


class Plan:
    """Equal to itself only."""


class Settings(Mutable):
    """Changed in place, and equal to itself only."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        self.changed()


class Tree(Mutable, dict[str, Any]):
    """A dictionary that may know what is around it."""


class Meddling(MutableDict[str, Any]):
    """Tells its own ``__deepcopy__``, as users write it where the usual one goes wrong."""

    def __deepcopy__(self, memo: Any) -> Meddling:
        made = Meddling()
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for key, value in self.items():
            made[key] = copy.deepcopy(value, memo)
        return made


class Model:
    """Copies itself, as pydantic's models do."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and self.values == other.values

    __hash__ = None

    def __deepcopy__(self, memo: Any) -> Model:
        return Model(**copy.deepcopy(self.values, memo))


class Whole(Mutable, dict[str, Any]):
    """Is pickled with all its attributes, and set to them."""

    def __reduce__(self) -> Any:
        return Whole, (), {"state": self.__dict__, "items": dict(self)}

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state["state"])
        dict.update(self, state["items"])


class Unequal:
    """As an array is: comparing gives no answer."""

    def __eq__(self, other: object) -> bool:
        raise ValueError

    __hash__ = None


class Parent:
    """What a mutable value belongs to; stands for the state of an instance."""


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def parts(value: Any) -> set[int]:
    """The containers in a value, by identity."""
    if isinstance(value, dict):
        return {id(value)}.union(*map(parts, value.values()))
    if isinstance(value, list):
        return {id(value)}.union(*map(parts, value))
    return set()


@given(json)
def test_a_copy_of_json_is_equal_and_shares_nothing_that_can_be_changed(value: Any):
    """At any depth."""
    copied = copy_of(value)
    assert copied == value
    assert parts(copied).isdisjoint(parts(value))


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        bytearray(b"ab"),
        (1, [2]),
        Pair(1, [2]),
        Point([1], {"a": 2}),
        Frozen([1]),
        Slotted([1]),
        collections.OrderedDict(a=[1]),
        collections.Counter("aab"),
        collections.deque([1, 2], 3),
        collections.defaultdict(list, a=[1]),
        MutableDict(a=[1]),
        MutableList([{"a": 1}]),
        MutableSet({1}),
        Meddling(a=[1]),
        Whole(a=[1]),
        Model(a=None, b=[None]),
        [Point(MutableDict(a=Point(1)))],
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_copy_is_of_the_same_class_equal_and_another(value: Any):
    """For containers and for values of users' classes."""
    copied = copy_of(value)
    assert type(copied) is type(value)
    assert copied == value
    assert copied is not value


@pytest.mark.parametrize(
    "value",
    [
        1,
        "a",
        Decimal(1),
        Color.RED,
        Plan(),
        Plan,
        len,
        threading.Lock(),
        types.MappingProxyType({"a": 1}),
        (one for one in ()),
        lambda: None,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_compares_by_identity_or_cannot_be_copied_stays_what_it_is(value: Any):
    """Inside of a container, too."""
    assert copy_of(value) is value
    (inside,) = copy_of([value])
    assert inside is value


def test_a_class_that_fails_to_be_copied_keeps_its_value():
    """Whatever it raises, and at whatever depth."""

    class Refusing(Point):
        def __reduce_ex__(self, protocol: Any) -> Any:
            raise RuntimeError

    refusing = Refusing(1)
    copied = copy_of({"a": [refusing], "b": [1]})
    assert copied["a"][0] is refusing
    assert copied["b"] == [1]


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: MutableDict(a=1), lambda value: value.update(b=2)),
        (lambda: MutableList([1]), lambda value: value.append(2)),
        (lambda: MutableSet({1}), lambda value: value.add(2)),
        (lambda: Settings(a=1), lambda value: setattr(value, "b", 2)),
        (lambda: Meddling(a=1), lambda value: value.update(b=2)),
        (lambda: Whole(a=1), lambda value: (value.update(b=2), value.changed())),
    ],
    ids=["dict", "list", "set", "object", "own deepcopy", "own state"],
)
def test_a_copy_of_a_mutable_value_belongs_to_nobody_and_tells_nobody(
    make: Callable[[], Any], change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
):
    """Neither while it is made nor when it is changed; the original has its parents still."""
    told = []
    value, parent = make(), Parent()
    value._parents[parent] = "attribute"
    monkeypatch.setattr(type(value), "changed", lambda self: told.append(dict(self._parents)))
    copied = copy_of(value)
    change(copied)
    assert told
    assert all(parents == {} for parents in told)
    assert dict(copied._parents) == {}
    assert dict(value._parents) == {parent: "attribute"}


def test_a_copy_of_nested_mutable_values_is_linked_to_itself():
    """An inner one tells the outer copy, whichever way it knows it."""
    outer, inner = Tree(), Tree(a=1)
    outer["inner"] = inner
    inner._parents[parent := Parent()] = "of an instance"
    inner.outer, inner.outer_weakly = outer, weakref.ref(outer)
    hashable = Settings()
    hashable.inner = MutableDict()
    hashable.inner._parents[hashable] = "inner"
    copied = copy_of(outer)
    assert copied["inner"].outer is copied
    assert copied["inner"].outer_weakly() is copied
    assert dict(copied["inner"]._parents) == {}
    assert dict(inner._parents) == {parent: "of an instance"}
    copied_hashable = copy_of(hashable)
    assert [*copied_hashable.inner._parents] == [copied_hashable]
    assert isinstance(copied_hashable.inner._parents, WeakKeyDictionary)


def test_a_value_that_is_too_deep_to_be_copied_stays_what_it_is():
    """As one that refuses."""
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert copy_of(value) is value
    while value:  # Python cannot destroy it at once either
        value = value.pop()


def test_a_field_with_the_name_of_the_parents_is_a_field():
    """Of a class that is no ``Mutable``."""

    @dataclasses.dataclass
    class Family:
        _parents: list[str]

    copied = copy_of(value := Family(["a", "b"]))
    assert copied == value
    assert copied is not value


def test_what_is_in_a_value_twice_is_in_its_copy_twice():
    """The same copy, and a value that contains itself contains its copy."""
    shared: list[Any] = [1]
    value = {"a": shared, "b": shared}
    copied = copy_of(value)
    assert copied["a"] is copied["b"]
    shared.append(shared)
    assert (looped := copy_of(shared))[1] is looped


def test_copies_of_values_that_cannot_be_changed_are_the_mapping_itself():
    """Which is most of them."""
    values = {"a": 1, "b": "x", "c": None}
    assert copies_of(values) is values
    assert copies_of({**values, "d": [1]}) == {**values, "d": [1]}


def test_a_copy_of_a_mutable_object_has_the_same_content():
    """Though its class says that they differ."""
    value = Settings(a=1)
    value._parents[parent := Parent()] = "attribute"
    copied = copy_of(value)
    assert parent is not None
    assert copied != value
    assert have_same_content(value, copied)
    copied.a = 2
    assert not have_same_content(value, copied)
    assert not have_same_content(Plan(), Plan())
    assert not have_same_content(Settings(), None)
    assert not have_same_content(Settings(a=Unequal()), Settings(a=Unequal()))
