"""Column values as JSON and back, without losing their types.

A message holds plain JSON values, so that anybody can read them, and beside them the types of
those that JSON does not know: ``{"total": "12.50"}`` and ``{"total": "decimal"}``. What is no
value of Python's own goes through the type of its column, as if to the database, and arrives as
what the database would give back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy.schema import Column

from ..changes import UNSET, Change, NewRow
from ..errors import ReceiverOptionError, SignalsError
from ..receivers import Receiver
from .message import MalformedMessageError
from .naming import model_name
from .values import (
    PLAIN,
    bound_value,
    decode_value,
    encode_as_base,
    encode_value,
    is_pickle,
    loaded_value,
)

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper
    from sqlalchemy.types import TypeEngine

_SECRET: Final = "sqla_signals.secret"

SECRET: Final[dict[Any, Any]] = {_SECRET: True}
"""Keeps a column out of messages: ``mapped_column(info=SECRET)``.

Beside an ``info`` of your own: ``info={**SECRET, "mine": 1}``.

Its values appear neither in the outbox nor in a message. That it changed does, without the values;
a receiver that reads the attribute loads it from the database.
"""


class UnserializableError(SignalsError, TypeError):
    """A column holds what cannot be written into a message; nothing was committed."""


_COLUMN: Final = "column"
"""The tag, or the first part of it, of what went through the type of its column."""


class Types:
    """The types of the values in one message; collected when writing, asked when reading.

    :param known: attribute name to type, as in the snapshot; ``"name.old"`` and the like where a
        value elsewhere is of another.
    """

    __slots__ = ("codec", "known")

    def __init__(self, codec: Codec, known: dict[str, str] | None = None) -> None:
        self.codec: Codec = codec
        self.known: dict[str, str] = {} if known is None else known

    def encode_snapshot(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The column values of a row as JSON, without secret ones; ``values`` if they are that.

        :raises UnserializableError: it cannot be done.
        """
        secret, encode = self.codec.secret, self.codec.encode
        if not secret and PLAIN.issuperset(map(type, values.values())):
            return values
        encoded = {}
        for key, value in values.items():
            if key in secret:
                continue
            if type(value) not in PLAIN:
                tag, value = encode(key, value)
                if tag:
                    self.known[key] = tag
            encoded[key] = value
        return encoded

    def encode_key(self, values: Sequence[Any]) -> list[Any]:
        """The primary key as JSON, once the snapshot is encoded.

        :raises UnserializableError: it cannot be done.
        """
        if not self.known and PLAIN.issuperset(map(type, values)):
            return [*values]
        return [
            self.encode(name, value, ".key")
            for name, value in zip(self.codec.primary_key, values, strict=True)
        ]

    def encode(self, key: str, value: Any, where: str) -> Any:
        """One more value of an attribute, once the snapshot is encoded.

        :param where: ``".old"`` or ``".new"`` in the changes, ``".key"`` in the primary key.
        :raises UnserializableError: it cannot be done.
        """
        if value is None:
            return None
        tag, encoded = self.codec.encode(key, value)
        if tag != self.known.get(key, ""):
            self.known[key + where] = tag
        return encoded

    def decode(self, key: str, value: Any, where: str = "") -> Any:
        """What was encoded."""
        if value is None:
            return None
        tag = self.known.get(key + where)
        return self.codec.decode(key, value, self.known.get(key, "") if tag is None else tag)


class Codec:
    """Values of one mapped class."""

    def __init__(self, mapper: Mapper[Any]) -> None:
        self._name = mapper.class_.__name__
        self.model: str = model_name(mapper.class_)
        self.primary_key: tuple[str, ...] = tuple(
            mapper.get_property_by_column(column).key for column in mapper.primary_key
        )
        self._types: dict[str, TypeEngine[Any]] = {}
        secret = set()
        pickled = set()
        for prop in mapper.column_attrs:
            column = prop.columns[0]
            if isinstance(column, Column):
                self._types[prop.key] = column.type
                if is_pickle(column.type):
                    pickled.add(prop.key)
                if any(isinstance(c, Column) and c.info.get(_SECRET) for c in prop.columns):
                    secret.add(prop.key)
        self.secret: frozenset[str] = frozenset(secret)
        self.pickled: frozenset[str] = frozenset(pickled)

    def encode(self, key: str, value: Any) -> tuple[str, Any]:
        """The tag of the type, empty for JSON's own, and the value as JSON."""
        return encode_value(value) or self._encode_by_column(key, value)

    def _encode_by_column(self, key: str, value: Any) -> tuple[str, Any]:
        try:
            bound = bound_value(self._types[key], value)
        except Exception as error:
            raise self._unserializable(key, value) from error
        found = encode_value(bound) or encode_as_base(bound)
        if found is None:
            raise self._unserializable(key, value)
        tag, encoded = found
        return f"{_COLUMN}/{tag}" if tag else _COLUMN, encoded

    def decode(self, key: str, value: Any, tag: str) -> Any:
        """The value that was encoded.

        :raises MalformedMessageError: it could not have been.
        """
        if key in self.pickled:
            raise MalformedMessageError(
                f"the message has a value for {self._name}.{key}, which is a pickle: nobody writes "
                f"that, and whoever did may not have it loaded"
            )
        by_column, _, inner = tag.rpartition("/")
        if inner != _COLUMN:
            value = decode_value(value, inner)
        if by_column or inner == _COLUMN:
            return loaded_value(self._types[key], value)
        return value

    def _unserializable(self, key: str, value: Any) -> UnserializableError:
        return UnserializableError(
            f"{self._name}.{key} holds a {type(value).__module__}.{type(value).__qualname__}, "
            f"which cannot be written into a durable message. Keep the column out of messages "
            f"with mapped_column(info=sqla_signals.durable.SECRET), or give it a TypeDecorator "
            f"that turns it into text"
        )


def check_columns(mapper: Mapper[Any], receiver: Receiver) -> None:
    """Raise :class:`ReceiverOptionError` for what never fits into a message.

    That is a pickled column, and a secret one in the primary key.
    """
    codec = codec_of(mapper)
    for key in sorted(codec.pickled - codec.secret):
        raise ReceiverOptionError(
            f"receiver {receiver} is durable, but {mapper.class_.__name__}.{key} is a "
            f"pickle, and messages never hold one. Keep it out of them: "
            f"mapped_column(..., info=sqla_signals.durable.SECRET)"
        )
    for key in codec.primary_key:
        if key in codec.secret:
            raise ReceiverOptionError(
                f"receiver {receiver} is durable, but {mapper.class_.__name__}.{key} is secret "
                f"and part of the primary key, without which no message can name the row"
            )


_codecs: WeakKeyDictionary[Mapper[Any], Codec] = WeakKeyDictionary()


def codec_of(mapper: Mapper[Any]) -> Codec:
    """The :class:`Codec` of a mapper, made once."""
    found = _codecs.get(mapper)
    if found is None:
        found = _codecs[mapper] = Codec(mapper)
    return found


def encode_changes(
    types: Types,
    changes: Mapping[str, Change],
    known: Mapping[str, Any],
    snapshot: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """The changes as JSON. A value that is not known is left out.

    :param known: the values of a created row; what is as there is left out altogether.
    :param snapshot: the same as JSON.
    """
    secret = types.codec.secret
    if known and secret:
        known = {key: value for key, value in known.items() if key not in secret}
    if isinstance(changes, NewRow):
        changes = changes.other_than(known)
    encoded: dict[str, dict[str, Any]] = {}
    for key, (old, new) in changes.items():
        if key in known and new is known[key]:
            continue
        found = {}
        if key not in secret:
            if old is not UNSET:
                found["old"] = types.encode(key, old, ".old")
            if new is not UNSET:
                found["new"] = types.encode(key, new, ".new")
            # What can be changed in place was copied, and is not the same.
            if key in known and key + ".new" not in types.known and _is_in(snapshot, key, found):
                continue
        encoded[key] = found
    return encoded


def _is_in(snapshot: Mapping[str, Any], key: str, found: Mapping[str, Any]) -> bool:
    value, new = snapshot[key], found.get("new", UNSET)
    return type(value) is type(new) and bool(value == new)


def decode_changes(
    types: Types,
    encoded: Mapping[str, Mapping[str, Any]],
    snapshot: Mapping[str, Any],
    created: bool,
) -> dict[str, Change]:
    """What :func:`encode_changes` was given."""
    changes = {key: Change(UNSET, value) for key, value in snapshot.items()} if created else {}
    for key, found in encoded.items():
        if key in types.codec.secret:
            found = {}  # whatever somebody has written there
        old = types.decode(key, found["old"], ".old") if "old" in found else UNSET
        new = types.decode(key, found["new"], ".new") if "new" in found else UNSET
        changes[key] = Change(old, new)
    return changes
