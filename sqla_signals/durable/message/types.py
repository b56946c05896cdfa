"""What a message holds for the value of a column: plain JSON, as the type of the column writes it.

The type of a column decides both ways, and nothing in a message does. A type decorator is asked as
it is asked by the database's dialect; below it one of the forms here writes and reads the value. A
reading form accepts what its writing form can have written, and raises an error for all else.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from ipaddress import ip_address, ip_interface, ip_network
from math import isfinite
from operator import index
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import types
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.dialects.postgresql.ranges import AbstractRange
from sqlalchemy.sql.elements import Null

from ..._sqlalchemy.types import (
    BinaryType,
    IntervalType,
    has_sql_expression,
    json_functions,
    loads_addresses,
)

if TYPE_CHECKING:
    from sqlalchemy import Dialect
    from sqlalchemy.types import TypeEngine

Turn = Callable[[Any], Any]


class Form(NamedTuple):
    """How the values of a column are written as JSON, and read."""

    encode: Turn
    """Raises an error for a value that it cannot write."""
    decode: Turn
    """Raises an error for what it has not written."""
    plain: frozenset[type] = frozenset({type(None)})
    """Values of these types are their own JSON."""
    mutable: bool = False
    """Whether what it reads can be changed in place."""


def form_of(kind: TypeEngine[Any], dialect: Dialect) -> Form | None:
    """The form of a column type; ``None`` if its values cannot be in a message."""
    is_set = isinstance(kind, mysql.SET) and not kind.retrieve_as_bitwise
    if has_sql_expression(kind) and not is_set:
        return None  # the database holds something else than the type writes
    try:
        impl: Any = kind.dialect_impl(dialect)
    except Exception:  # a type that is for other databases only
        return None
    for base, make in _FORMS:
        if isinstance(impl, base):
            if make is not None and _is_overridden(impl):
                break
            return make(impl, dialect) if callable(make) else make
    if isinstance(impl, types.TypeDecorator) and not _is_overridden(impl):
        return _decorated(impl, dialect)
    if _is_overridden(impl):
        return _processed(impl, dialect)
    return Form(_plain, _plain, _PLAIN)


_DIALECTS: Final = (postgresql.dialect, mysql.dialect, sqlite.dialect)


def has_form(kind: TypeEngine[Any]) -> bool:
    """Whether a column type has a form on one of the databases that a relay works on."""
    return any(form_of(kind, dialect()) is not None for dialect in _DIALECTS)


def _is_overridden(impl: Any) -> bool:
    """Whether an application's own class turns values into those of the driver."""
    for cls in type(impl).__mro__:
        if "bind_processor" in cls.__dict__ or "result_processor" in cls.__dict__:
            return not cls.__module__.startswith("sqlalchemy.")
    return False


# -- what SQLAlchemy's types write -----------------------------------------------------------------


def _checked(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"not a {kind.__name__}")
    return value


def _nullable(encode: Turn, decode: Turn, *plain: type, mutable: bool = False) -> Form:
    """A form that leaves ``None`` as it is."""

    def write(value: Any) -> Any:
        return None if value is None else encode(value)

    def read(value: Any) -> Any:
        return None if value is None else decode(value)

    return Form(write, read, frozenset({type(None), *plain}), mutable)


def _read_text(read: Callable[[str], Any], longest: int) -> Turn:
    """Read a string; a longer one is refused before it costs anything."""

    def decode(value: Any) -> Any:
        if len(_checked(str, value)) > longest:
            raise ValueError(f"longer than {longest} characters")
        return read(value)

    return decode


_PLAIN: Final = frozenset({type(None), bool, int, str})


def _plain(value: Any) -> Any:
    """A value of a type that says nothing about its values: JSON's own values only."""
    if type(value) in _PLAIN or (type(value) is float and isfinite(value)):
        return value
    raise TypeError("not a plain value")


def _write_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return str.__str__(value)


_TEXT: Final = _nullable(_write_text, partial(_checked, str), str)


def _write_bool(value: Any) -> bool:
    if value not in (0, 1):
        raise ValueError("neither true nor false")
    return bool(value)


def _read_int(value: Any) -> int:
    if not -(2**63) <= _checked(int, value) < 2**64:
        raise ValueError("not an integer of a database")
    return int(value)


_LONGEST_NUMBER: Final = 150_000
"""PostgreSQL's NUMERIC has at most 131,072 digits before the point and 16,383 behind it."""


def _read_decimal(text: str) -> Decimal:
    found = Decimal(text)
    if found.is_finite() and abs(found.adjusted()) > _LONGEST_NUMBER:
        raise ValueError("not a number of a database")
    return found


def _write_decimal(value: Any) -> str:
    return str(value if isinstance(value, Decimal) else Decimal(str(value)))


def _write_float(value: Any) -> float | str:
    found = float(value)
    return found if isfinite(found) else str(found)


def _read_float(value: Any) -> float:
    if value in ("nan", "inf", "-inf"):
        return float(value)
    found = float(_checked(float, value))
    if not isfinite(found):
        raise ValueError("not a number of JSON")
    return found


def _number(impl: Any, dialect: Dialect) -> Form:
    if impl.asdecimal:
        return _nullable(_write_decimal, _read_text(_read_decimal, _LONGEST_NUMBER))
    return _nullable(_write_float, _read_float)


_LONGEST_MOMENT: Final = 64


def _read_moment(read: Callable[[str], Any]) -> Turn:
    return _read_text(read, _LONGEST_MOMENT)


def _write_day(value: date) -> str:
    return date(value.year, value.month, value.day).isoformat()


_MICROSECOND: Final = timedelta(microseconds=1)


def _write_span(value: Any) -> int:
    if not isinstance(value, timedelta):
        raise TypeError("not a timedelta")
    return value // _MICROSECOND


def _write_uuid(value: Any) -> str:
    return str(value if isinstance(value, UUID) else UUID(value))


def _uuid(impl: Any, dialect: Dialect) -> Form:
    if not impl.as_uuid:
        return _TEXT
    return _nullable(_write_uuid, _read_moment(UUID))


def _write_bytes(value: Any) -> str:
    return b64encode(memoryview(value)).decode("ascii")


_MARGIN: Final = 32


def _document(impl: Any, dialect: Dialect) -> Form:
    write, read = json_functions(dialect)

    def encode(value: Any) -> Any:
        if value is types.JSON.NULL or isinstance(value, Null):
            return None
        # Not the value itself: what the engine's own functions make of it is what is stored. It is
        # read so much deeper, since in the message it is somewhat deeper than in the column.
        found = json.loads("[" * _MARGIN + write(value) + "]" * _MARGIN)
        for _ in range(_MARGIN):
            (found,) = found
        return found

    return _nullable(encode, lambda value: read(json.dumps(value)), mutable=True)


def _read_bytes(value: Any) -> bytes:
    return b64decode(_checked(str, value), validate=True)


def _write_texts(value: Any) -> dict[str, str | None]:
    return _read_texts(dict(value))


def _read_texts(value: Any) -> dict[str, str | None]:
    if not all(one is None or type(one) is str for one in _checked(dict, value).values()):
        raise TypeError("not texts by name")
    return dict(value)


def _address(impl: Any, dialect: Dialect) -> Form:
    def read(text: str) -> Any:
        if isinstance(impl, postgresql.CIDR):
            found: Any = ip_network(text)
        else:
            found = ip_interface(text)
            if found.network.prefixlen == found.max_prefixlen:
                found = ip_address(found.ip)
        return found if loads_addresses(dialect) else str(found)

    return _nullable(str, _read_moment(read))


_DEEPEST: Final = 6
"""Dimensions of an array of PostgreSQL."""


def _array(impl: Any, dialect: Dialect) -> Form | None:
    item = form_of(impl.item_type, dialect)
    if item is None:
        return None
    deepest = impl.dimensions or _DEEPEST

    def each(turn: Turn, values: Any, make: Callable[[Iterable[Any]], Any], depth: int) -> Any:
        if depth > deepest or not isinstance(values, list | tuple):
            raise TypeError("not a list of so many dimensions")
        nested = depth < deepest
        return make(
            each(turn, value, make, depth + 1)
            if nested and isinstance(value, list | tuple)
            else turn(value)
            for value in values
        )

    return _nullable(
        lambda value: each(item.encode, value, list, 1),
        lambda value: each(item.decode, value, tuple if impl.as_tuple else list, 1),
        mutable=True,
    )


# -- what an application's own types write ---------------------------------------------------------


def _decorated(impl: Any, dialect: Dialect) -> Form | None:
    """A type decorator, around the form of what it decorates."""
    inner = form_of(impl.impl_instance, dialect)
    if inner is None:
        return None
    cls, base = type(impl), types.TypeDecorator
    writes = cls.process_bind_param is not base.process_bind_param
    reads = cls.process_result_value is not base.process_result_value
    if not writes and not reads:
        return inner

    def encode(value: Any) -> Any:
        return inner.encode(impl.process_bind_param(value, dialect) if writes else value)

    def decode(value: Any) -> Any:
        found = inner.decode(value)
        return impl.process_result_value(found, dialect) if reads else found

    return Form(encode, decode, frozenset() if writes else inner.plain, mutable=True)


def _processed(impl: Any, dialect: Dialect) -> Form:
    """A type with functions of its own for what the driver takes, where that is plain."""
    bind, result = impl.bind_processor(dialect), impl.result_processor(dialect, None)
    return _nullable(
        lambda value: _plain(bind(value) if bind else value),
        lambda value: result(_plain(value)) if result else _plain(value),
        mutable=True,
    )


def _named(impl: Any, dialect: Dialect) -> Form:
    """An enum or a set of MySQL, whose type knows the names of its values."""
    found = _processed(impl, dialect)
    return Form(
        lambda value: None if value is None else _write_text(found.encode(value)),
        lambda value: None if value is None else found.decode(_checked(str, value)),
        mutable=found.mutable,
    )


_FORMS: Final[tuple[tuple[Any, Form | Callable[[Any, Dialect], Form | None] | None], ...]] = (
    (types.PickleType, None),
    (AbstractRange, None),
    (types.Enum, _named),
    (mysql.SET, _named),
    (types.String, _TEXT),
    (types.Boolean, _nullable(_write_bool, partial(_checked, bool), bool)),
    (types.Integer, _nullable(lambda value: _read_int(int(index(value))), _read_int, int)),
    ((types.Numeric, types.Float), _number),
    (types.DateTime, _nullable(datetime.isoformat, _read_moment(datetime.fromisoformat))),
    (types.Date, _nullable(_write_day, _read_moment(date.fromisoformat))),
    (types.Time, _nullable(time.isoformat, _read_moment(time.fromisoformat))),
    (IntervalType, _nullable(_write_span, lambda value: _checked(int, value) * _MICROSECOND)),
    (types.Uuid, _uuid),
    (BinaryType, _nullable(_write_bytes, _read_bytes)),
    (types.JSON, _document),
    (types.ARRAY, _array),
    (postgresql.HSTORE, _nullable(_write_texts, _read_texts, mutable=True)),
    ((postgresql.INET, postgresql.CIDR), _address),
    ((postgresql.MACADDR, postgresql.MACADDR8), _TEXT),
)
"""By the class of the type; the first one that fits."""
