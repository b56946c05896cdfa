"""Columns as the database holds them, for rows that somebody else may have written.

JSON goes as text that is written and read here. So no serializer of the engine has a say, and a
column that holds nonsense is read without an error.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sqlalchemy import JSON, DateTime, Text, Uuid, cast, func, literal, literal_column, type_coerce
from sqlalchemy.types import NullType

from ..message.envelope import read_json

if TYPE_CHECKING:
    from sqlalchemy import Column, ColumnElement, Connection


def raw(connection: Connection, column: Column[Any]) -> ColumnElement[Any]:
    """Select a column as text, or as the driver reads it, without the functions of its type."""
    if connection.dialect.name != "postgresql":
        return type_coerce(column, NullType()).label(column.name)
    if isinstance(column.type, DateTime):
        utc = func.timezone("UTC", column)
        return func.to_char(utc, 'YYYY-MM-DD"T"HH24:MI:SS.US').label(column.name)
    if isinstance(column.type, JSON | Uuid):
        return cast(column, Text).label(column.name)
    return column.label(column.name)


def bytes_of(connection: Connection, events: Any) -> ColumnElement[Any]:
    """How many bytes of an event are read, besides names."""
    # Of a text SQLite counts characters; octet_length() came with 3.43.
    size = func.length if connection.dialect.name == "sqlite" else func.octet_length
    columns = events.payload, events.headers, events.receivers
    total: ColumnElement[Any] = literal_column("0")
    for column in columns:
        total = total + func.coalesce(size(raw(connection, column)), 0)
    return total


def as_json(connection: Connection, value: Any) -> ColumnElement[Any]:
    """Make a value for a JSON column; one that it would refuse becomes a text in an object."""
    try:
        text = json.dumps(value, allow_nan=connection.dialect.name == "sqlite")
    except (ValueError, RecursionError):
        text = json.dumps({"text": _shown(value)})
    return json_text(connection, text)


def json_text(connection: Connection, text: str) -> ColumnElement[Any]:
    """Make a value for a JSON column of a text that is JSON."""
    found: ColumnElement[Any] = literal(text, Text())
    return cast(found, JSON()) if connection.dialect.name == "postgresql" else found


def from_json(value: Any) -> Any:
    """Read the value of a JSON column.

    :raises MalformedMessageError: it is not JSON.
    """
    return read_json(value) if isinstance(value, str | bytes) else value


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except RecursionError:
        return "too deep to be shown"
