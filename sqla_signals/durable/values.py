"""Values as JSON and back: Python's own, and what a column type makes of others.

A value is encoded as JSON behind a tag for its type, which is empty for what JSON has itself.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from copy import deepcopy
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import ARRAY, PickleType, TypeDecorator

from .._sqlalchemy import PlainDialect

if TYPE_CHECKING:
    from sqlalchemy.types import TypeEngine

PLAIN: Final = frozenset({type(None), bool, int, str})
_MICROSECOND: Final = timedelta(microseconds=1)
_LARGE: Final = 1e16
"""Floats from here on PostgreSQL's JSONB writes as integers; nor has JSON infinity and NaN."""


def _base64(value: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(value).decode("ascii")


_ENCODERS: Final[dict[type, tuple[str, Callable[[Any], Any]]]] = {
    Decimal: ("decimal", str),
    datetime: ("datetime", datetime.isoformat),
    date: ("date", date.isoformat),
    time: ("time", time.isoformat),
    timedelta: ("microseconds", lambda value: value // _MICROSECOND),
    UUID: ("uuid", str),
    bytes: ("base64", _base64),
    bytearray: ("base64", _base64),
    memoryview: ("base64", _base64),
}
_DECODERS: Final[dict[str, Callable[[Any], Any]]] = {
    "decimal": Decimal,
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "microseconds": lambda value: value * _MICROSECOND,
    "uuid": UUID,
    "base64": base64.b64decode,
    "float": float,
}
_LIST: Final = "list"
_dialect: Final = PlainDialect()


def bound_value(kind: TypeEngine[Any], value: Any) -> Any:
    """What a column type makes of a value for the database."""
    if value is None:
        return None
    if isinstance(kind, ARRAY):
        return [
            bound_value(kind if isinstance(v, list | tuple) else kind.item_type, v) for v in value
        ]
    process = kind.dialect_impl(_dialect).bind_processor(_dialect)
    return value if process is None else process(value)


def loaded_value(kind: TypeEngine[Any], value: Any) -> Any:
    """What a column type makes of a value from the database."""
    if value is None:
        return None
    if isinstance(kind, ARRAY):
        items = [loaded_value(kind if isinstance(v, list) else kind.item_type, v) for v in value]
        return tuple(items) if kind.as_tuple else items
    process = kind.dialect_impl(_dialect).result_processor(_dialect, None)
    return value if process is None else process(value)


def is_pickle(kind: TypeEngine[Any]) -> bool:
    """Whether a column type makes a pickle of a value, behind whatever decorates it."""
    if isinstance(kind, ARRAY):
        return is_pickle(kind.item_type)
    if isinstance(kind, TypeDecorator) and not isinstance(kind, PickleType):
        return is_pickle(kind.impl_instance)
    return isinstance(kind, PickleType)


def encode_value(value: Any) -> tuple[str, Any] | None:
    """A value of Python's own as JSON, behind the tag of its type; else ``None``."""
    kind = type(value)
    if kind in PLAIN:
        return "", value
    if kind is float:
        return ("", value) if abs(value) < _LARGE else ("float", repr(value))
    if kind in _ENCODERS:
        tag, encode = _ENCODERS[kind]
        return tag, encode(value)
    if isinstance(value, dict | list) and _is_json(value):
        return "", value
    return _encode_list(value) if isinstance(value, list) else None


def _encode_list(values: list[Any]) -> tuple[str, Any] | None:
    """The same for an ``ARRAY`` of values of one type."""
    tags: set[str] = set()
    items = []
    for value in values:
        found = encode_value(value)
        if found is None:
            return None
        if value is not None:
            tags.add(found[0])
        items.append(found[1])
    return (f"{_LIST}:{tags.pop()}", items) if len(tags) == 1 else None


def encode_as_base(value: Any) -> tuple[str, Any] | None:
    """The same for what is more than that: an enum that is a ``str`` too, say."""
    for base, simple in _SIMPLE.items():
        if isinstance(value, base):
            return encode_value(simple(value))
    for base, (tag, encode) in _ENCODERS.items():
        if isinstance(value, base):
            return tag, encode(value)
    return None


_SIMPLE: Final[dict[type, Callable[[Any], Any]]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
}


def decode_value(value: Any, tag: str) -> Any:
    """What :func:`encode_value` was given."""
    if not tag:
        # The message may be run for another receiver too, or written down again.
        return deepcopy(value) if isinstance(value, dict | list) else value
    kind, _, of = tag.partition(":")
    if kind == _LIST:
        return [None if one is None else decode_value(one, of) for one in value]
    return _DECODERS[kind](value)


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and _is_json(one) for key, one in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return type(value) in PLAIN or (type(value) is float and abs(value) < _LARGE)
