"""Column types: what they make of values without a database."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.sql import sqltypes

if TYPE_CHECKING:
    from sqlalchemy import Dialect
    from sqlalchemy.types import TypeEngine


BinaryType: Final[type[Any]] = sqltypes._Binary
"""The base of all types for bytes."""
IntervalType: Final[type[Any]] = sqltypes._AbstractInterval
"""The base of all types for a ``timedelta``, emulated or not."""


class PlainDialect(DefaultDialect):
    """The dialect of no database: with it, column types convert values without a driver."""

    supports_native_decimal = True  # otherwise numbers become floats and lose digits
    _json_serializer = None  # in 2.0 only the dialects of databases have these two
    _json_deserializer = None


def has_sql_expression(kind: TypeEngine[Any]) -> bool:
    """Whether a type puts SQL around its values, in statements that write or read them."""
    return bool(kind._has_bind_expression or kind._has_column_expression)


def json_functions(dialect: Dialect) -> tuple[Callable[[Any], str], Callable[[str], Any]]:
    """The functions by which an engine writes and reads a JSON column."""
    write = getattr(dialect, "_json_serializer", None)
    read = getattr(dialect, "_json_deserializer", None)
    return write or json.dumps, read or json.loads


def loads_addresses(dialect: Dialect) -> bool:
    """Whether the driver loads an INET as an object of :mod:`ipaddress`, and not as a string."""
    return dialect.driver != "psycopg2" and getattr(dialect, "_native_inet_types", 0) is not False
