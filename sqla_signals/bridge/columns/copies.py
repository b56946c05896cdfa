"""Copies of column values that can be changed in place.

A value that a receiver gets must not change when its original does, nor the other way round. A copy
touches nothing of the original: no flag, no link to an instance, no parent.
"""

from __future__ import annotations

import copyreg
import weakref
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from ..._sqlalchemy.instances import MUTABLE_PARENTS, is_mapped_instance, is_mutable

IMMUTABLE: Final = frozenset(
    {
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        Decimal,
        date,
        datetime,
        time,
        timedelta,
        UUID,
    }
)
"""The usual types of column values: neither SQL nor to be changed in place, so asked no more."""


def copy_of(value: Any) -> Any:
    """A copy of a column value, or the value itself where a copy would not be the same value.

    Containers and mutable values are copied with what is in them. A value whose class compares by
    identity stays what it is, and so does a value that Python cannot copy.
    """
    if type(value) in IMMUTABLE:
        return value
    try:
        return _Copies().of(value)
    except Exception:  # a value of a thousand levels, or one that answers no question
        return value


def copies_of(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same column values, each as :func:`copy_of` gives it."""
    exotic = [key for key, value in values.items() if type(value) not in IMMUTABLE]
    return {**values, **{key: copy_of(values[key]) for key in exotic}} if exotic else values


def have_same_content(one: Any, other: Any) -> bool:
    """Whether two mutable values are the same although their class compares by identity.

    A value and its copy are.
    """
    if type(one) is not type(other) or not is_mutable(one) or _compares_by_value(type(one)):
        return False
    try:
        return bool(_content(one) == _content(other))
    except Exception:  # what is in it cannot be compared, as arrays
        return False


def _content(value: Any) -> dict[str, Any]:
    return {key: one for key, one in vars(value).items() if key != MUTABLE_PARENTS}


def _compares_by_value(cls: type) -> bool:
    equal: Any = cls.__eq__
    return equal is not object.__eq__


def _is_copied(value: Any) -> bool:
    is_value = is_mutable(value) or _compares_by_value(type(value))
    return is_value and not is_mapped_instance(value)


class _Copies(dict[int, tuple[Any, Any]]):
    """The copies of one value and of what is in it: originals and copies, by ``id`` of the former.

    The originals are held, because an ``id`` is another object's once its owner is gone.
    """

    def of(self, value: Any) -> Any:
        cls = type(value)
        if cls in IMMUTABLE:
            return value
        if id(value) in self:
            return self[id(value)][1]
        if cls is dict:
            copy: Any = self._noted(value, {})
            copy.update((key, self.of(one)) for key, one in value.items())
        elif cls is list:
            copy = self._noted(value, [])
            copy.extend(map(self.of, value))
        elif cls is tuple:
            copy = tuple(map(self.of, value))
        elif cls is set or cls is bytearray:
            copy = cls(value)
        elif cls is weakref.WeakKeyDictionary:
            # The parents of a mutable value. Containers around it may be among them; instances are
            # the original's alone.
            pairs = [(self[id(one)][1], key) for one, key in value.items() if id(one) in self]
            copy = weakref.WeakKeyDictionary(pairs)
        elif cls is weakref.ref:
            # A value in a container may refer to it: that of the copy refers to the copy.
            target = value()
            copy = weakref.ref(self[id(target)][1]) if id(target) in self else value
        elif _is_copied(value):
            try:
                copy = self._rebuilt(value)
            except Exception:  # the class does not allow it
                copy = self._noted(value, value)
        else:
            copy = value
        return copy

    def _noted(self, value: Any, copy: Any) -> Any:
        self[id(value)] = value, copy
        return copy

    def _rebuilt(self, value: Any) -> Any:
        """A copy by the protocol of ``pickle``, as ``copy.deepcopy`` makes one."""
        parents = vars(value).get(MUTABLE_PARENTS) if is_mutable(value) else None
        if hasattr(type(value), "__deepcopy__"):
            # A memo with what to put in the place of the parents.
            return value.__deepcopy__({id(parents): weakref.WeakKeyDictionary()} if parents else {})
        reduce = copyreg.dispatch_table.get(type(value))
        reduced: Any = value.__reduce_ex__(4) if reduce is None else reduce(value)
        if isinstance(reduced, str):  # the name of something global
            return value
        parts: tuple[Any, ...] = (*reduced, None, None, None)
        make, arguments, state, items, pairs = parts[:5]
        copy = self._noted(value, make(*map(self.of, arguments)))
        self._set_state(copy, state)
        self._fill(copy, items or (), pairs or ())
        if parents and (links := self.of(parents)):
            getattr(copy, MUTABLE_PARENTS).update(links)
        return copy

    def _set_state(self, copy: Any, state: Any) -> None:
        if state is None:
            return
        if hasattr(copy, "__setstate__"):
            copy.__setstate__(self.of(state))
            return
        attributes, slots = state if isinstance(state, tuple) else (state, None)
        for name, one in (attributes or {}).items():
            vars(copy)[name] = self.of(one)
        for name, one in (slots or {}).items():
            object.__setattr__(copy, name, self.of(one))

    def _fill(self, copy: Any, items: Iterable[Any], pairs: Iterable[Any]) -> None:
        for one in items:
            copy.append(self.of(one))
        for key, one in pairs:
            copy[key] = self.of(one)
