"""The columns that identify rows: when two keys are the same, and how a query asks for many keys.

Keys are compared as the database gets them, because what a column type makes of a value may be
equal to nothing, or not hashable.

A query cannot bind any number of keys one by one. PostgreSQL takes 65,535 parameters, SQLite 32,766
by default, and PostgreSQL compares a list of tuples in a recursion as deep as the list is long.
There, many keys travel as one array for each column, or as one JSON document. The drivers for
MariaDB write parameters into the statement themselves and know no such limit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import eq
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy import ARRAY, String, and_, bindparam, column, false, func, or_, select, tuple_
from sqlalchemy.types import TypeDecorator

from ..._sqlalchemy.types import PlainDialect

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect
    from sqlalchemy.sql import ColumnElement, Select

Key = tuple[Any, ...]
T = TypeVar("T")

_PLAIN: Final = PlainDialect()

MAX_PARAMETERS: Final = 500
"""More than these are not bound one by one, where the database knows another way."""


class KeyColumns:
    """Columns whose values identify a row.

    :param columns: for their types.
    """

    def __init__(self, columns: Iterable[Any], dialect: Dialect) -> None:
        self._types = [column.type for column in columns]
        self._dialect = dialect
        # No database's dialect, whose driver may wrap values in objects that are equal to nothing.
        self._processors = _bind_processors(self._types, _PLAIN)
        self._is_plain = not any(self._processors)
        implementations = [one.dialect_impl(dialect) for one in self._types]
        self._holds_arrays = any(
            isinstance(one.impl if isinstance(one, TypeDecorator) else one, ARRAY)
            for one in implementations
        )
        self._wraps = any(
            self._wrapped(place, bindparam(None, type_=one)) is not None
            for place, one in enumerate(self._types)
        )

    def __len__(self) -> int:
        return len(self._types)

    def identity(self, key: Key) -> Hashable:
        """What is equal for two keys that are the same for the database."""
        values = key if self._is_plain else self._bound(key)
        try:
            hash(values)
        except TypeError:
            return repr(values)
        return values

    def found(
        self, keys: Iterable[Key], search: Callable[[list[Key]], Mapping[Hashable, T]]
    ) -> dict[Hashable, T]:
        """What a search finds for the keys, by the identity of each key as it was given.

        :param search: finds things, by the identity of the key that the database has.
        """
        given = {self.identity(key): key for key in keys}
        found = dict(search(list(given.values())))
        if found.keys() <= given.keys():
            return found
        # The database takes more for equal than Python does: a collation, a padded CHAR.
        return {
            identity: one
            for identity, key in given.items()
            for one in ([found[identity]] if identity in found else search([key]).values())
        }

    def _bound(self, key: Key) -> Key:
        return tuple(map(_processed, self._processors, key))

    def among(self, expressions: Sequence[Any], keys: Iterable[Key]) -> ColumnElement[bool]:
        """Whether the expressions, one for each column, are one of the keys.

        NULL is equal to None here.
        """
        groups: dict[tuple[int, ...], list[Key]] = {}
        for key in keys:
            bound = key if self._is_plain else self._bound(key)
            places = tuple(i for i, value in enumerate(bound) if value is not None)
            groups.setdefault(places, []).append(key)
        return or_(false(), *(self._alike(expressions, *group) for group in groups.items()))

    def _alike(
        self, expressions: Sequence[Any], places: tuple[int, ...], keys: list[Key]
    ) -> ColumnElement[bool]:
        """Whether they are one of these keys, which have NULL in all but the given places."""
        nulls = [one.is_(None) for i, one in enumerate(expressions) if i not in places]
        values = [self._among([expressions[i] for i in places], places, keys)] if places else []
        return and_(*nulls, *values)

    def _among(
        self, expressions: list[Any], places: tuple[int, ...], keys: list[Key]
    ) -> ColumnElement[bool]:
        found = None
        if len(keys) * len(places) > MAX_PARAMETERS:
            if self._dialect.name == "postgresql" and not self._holds_arrays:
                found = self._unnested(places, keys)
            elif self._dialect.name == "sqlite":
                found, expressions = self._from_json(expressions, places, keys)
        values = [tuple(key[place] for place in places) for key in keys]
        types = [self._types[place] for place in places]
        if len(places) == 1:
            only: ColumnElement[Any] = expressions[0]
            # Of the column's type: SQLAlchemy 2.0.36 sends text to an INET as a VARCHAR.
            one_by_one = bindparam(
                None, [value for (value,) in values], types[0], unique=True, expanding=True
            )
            return only.in_(one_by_one if found is None else found)
        if found is None and (self._wraps or self._holds_arrays):
            # The values of a tuple get neither what their type puts around them, nor a cast.
            bound = (
                [bindparam(None, *pair, unique=True) for pair in zip(value, types, strict=True)]
                for value in values
            )
            return or_(*(and_(*map(eq, expressions, value)) for value in bound))
        return tuple_(*expressions).in_(values if found is None else found)

    def _unnested(self, places: tuple[int, ...], keys: list[Key]) -> Any:
        arrays = [
            bindparam(None, [key[i] for key in keys], ARRAY(self._types[i]), unique=True)
            for i in places
        ]
        names = [f"key_{i}" for i in places]
        # The columns have no type, whose SQL for a result would be wrapped around them.
        rows = func.unnest(*arrays).table_valued(*map(column, names)).render_derived()
        return self._selected(places, [rows.c[name] for name in names])

    def _from_json(
        self, expressions: list[Any], places: tuple[int, ...], keys: list[Key]
    ) -> tuple[Select[Any] | None, list[Any]]:
        processors = _bind_processors(self._types, self._dialect)
        rows = [
            [_json_value(_processed(processors[place], key[place])) for place in places]
            for key in keys
        ]
        try:
            document = json.dumps(rows, allow_nan=False)
        except (TypeError, ValueError):
            return None, expressions
        binary = [isinstance(value, _Hex) for value in rows[0]]
        each = func.json_each(bindparam(None, document, String, unique=True)).table_valued("value")
        values = [func.json_extract(each.c.value, f"$[{i}]") for i in range(len(places))]
        compared = [
            func.hex(one) if is_binary else one
            for one, is_binary in zip(expressions, binary, strict=True)
        ]
        return self._selected(places, values), compared

    def _selected(self, places: tuple[int, ...], values: list[Any]) -> Any:
        wrapped = [self._wrapped(i, value) for i, value in zip(places, values, strict=True)]
        return select(
            *(value if one is None else one for one, value in zip(wrapped, values, strict=True))
        )

    def _wrapped(self, place: int, value: Any) -> Any:
        """The SQL that the column's type puts around a parameter; ``None`` if it puts none."""
        return self._types[place].dialect_impl(self._dialect).bind_expression(value)


def _bind_processors(types: Iterable[Any], dialect: Dialect) -> list[Any]:
    return [one.dialect_impl(dialect).bind_processor(dialect) for one in types]


class _Hex(str):
    """A binary value, which JSON does not know."""


def _json_value(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return _Hex(bytes(value).hex().upper())
    return value


def _processed(process: Callable[[Any], Any] | None, value: Any) -> Any:
    if process is None:
        return value
    try:
        return process(value)
    except Exception:
        return value  # the statement has the error to raise that SQLAlchemy makes of it
