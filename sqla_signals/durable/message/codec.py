"""The values of one mapped class in messages: its snapshot, its primary key and its changes.

A value that the type of its column cannot write is left out. The database has it: an instance in a
session loads it when it is read, as it loads a column that is secret.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy.schema import Column

from ..._sqlalchemy.mappers import property_count
from ...changes.change import UNSET, Change, NewRow
from ...errors import ReceiverOptionError, SignalsError
from ...receivers.receiver import qualified_name
from .envelope import MalformedMessageError
from .types import Form, form_of, has_form

if TYPE_CHECKING:
    from sqlalchemy import Dialect
    from sqlalchemy.orm import Mapper

    from ...receivers.receiver import Receiver

_SECRET: Final = "sqla_signals.secret"

SECRET: Final[dict[Any, Any]] = {_SECRET: True}
"""Keeps a column out of messages: ``mapped_column(info=SECRET)``.

Beside an ``info`` of your own: ``info={**SECRET, "mine": 1}``.

Its values appear neither in the outbox nor in a message. That it changed does, without the values;
a receiver that reads the attribute loads it from the database.
"""

_CODECS: Final = "sqla_signals.codecs"
"""Kept on the dialect of an engine: one for each mapper."""

_MOST_SHAPES: Final = 1000


class UnserializableError(SignalsError, TypeError):
    """A primary key cannot be written into a durable message; nothing was committed."""


class Codec:
    """Values of one mapped class, on one kind of database.

    :param dialect: that of the engine, whose settings say what a loaded value looks like.
    """

    def __init__(self, mapper: Mapper[Any], dialect: Dialect) -> None:
        self._name = mapper.class_.__name__
        self.dialect: Dialect = dialect
        self.properties: int = property_count(mapper)
        self.model: str = qualified_name(mapper.class_)
        self.primary_key: tuple[str, ...] = _primary_key(mapper)
        columns = _columns(mapper)
        self.keys: frozenset[str] = frozenset(columns)
        """The column attributes of the class, also those that are not in messages."""
        self._secret = _secret(mapper)
        forms = {
            key: form_of(column.type, dialect)
            for key, column in columns.items()
            if key not in self._secret
        }
        self._forms: dict[str, Form] = {key: form for key, form in forms.items() if form}
        self.tells_primary_key: bool = self._forms.keys() >= {*self.primary_key}
        """Whether messages may name a row, of a class that has no durable receivers itself."""
        self._shapes: dict[Any, list[tuple[str, Callable[[Any], Any] | None]]] = {}

    # -- writing -----------------------------------------------------------------------------------

    def encode(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Turn column values into JSON; return ``values`` itself if nothing has to be turned."""
        # Rows have few shapes: which attributes there are, and the types of their values.
        shape = (*values, *map(type, values.values()))
        turns = self._shapes.get(shape)
        if turns is None:
            turns = self._turns(values)
            if len(self._shapes) < _MOST_SHAPES:
                self._shapes[shape] = turns
        if not turns:
            return values
        encoded = dict(values)
        for key, turn in turns:
            try:
                if turn is not None:
                    encoded[key] = turn(encoded[key])
                    continue
            except Exception:
                pass  # whatever the type of an application raises; the column may take it
            del encoded[key]
        return encoded

    def _turns(self, values: Mapping[str, Any]) -> list[tuple[str, Callable[[Any], Any] | None]]:
        """The functions for values of these types; ``None`` where a value is left out."""
        return [
            (key, None if form is None else form.encode)
            for key, value in values.items()
            if (form := self._forms.get(key)) is None or type(value) not in form.plain
        ]

    def encode_key(self, values: Sequence[Any]) -> list[Any]:
        """Turn a primary key into JSON.

        :raises UnserializableError: the type of a column cannot write its value.
        """
        named = dict(zip(self.primary_key, values, strict=True))
        encoded = self.encode(named)
        for name in named.keys() - encoded.keys():
            raise UnserializableError(
                f"the primary key {self._name}.{name} holds {named[name]!r}, which its column's "
                f"type cannot write into a durable message, and without it no message can name "
                f"the row. Give the column a TypeDecorator that turns its values into text"
            )
        return list(encoded.values())

    def encode_changes(
        self,
        changes: Mapping[str, Change],
        values: Mapping[str, Any],
        snapshot: Mapping[str, Any],
    ) -> dict[str, dict[str, Any]]:
        """Turn changes into JSON; values that are unknown or cannot be written are left out.

        :param values: those of a created row; a change to the same value is left out.
        :param snapshot: ``values`` as JSON.
        """
        if snapshot is not values:
            values = {key: value for key, value in values.items() if key in snapshot}
        if isinstance(changes, NewRow):
            changes = changes.other_than(values)
        encoded: dict[str, dict[str, Any]] = {}
        for key, (old, new) in changes.items():
            if key in values and new is values[key]:
                continue
            found: dict[str, Any] = {}
            for name, value in (("old", old), ("new", new)):
                if value is not UNSET:
                    one = self.encode({key: value})
                    if key in one:
                        found[name] = one[key]
            # What can be changed in place was copied, and is not the same.
            if key not in values or found != {"new": snapshot.get(key, UNSET)}:
                encoded[key] = found
        return encoded

    # -- reading -----------------------------------------------------------------------------------

    def decode(self, key: str, value: Any) -> Any:
        """Turn JSON into the value of an attribute.

        :raises MalformedMessageError: the column does not write such a value.
        """
        form = self._forms.get(key)
        if form is None:
            raise MalformedMessageError(
                f"the message has a value for {self._name}.{key}, which no message holds"
            )
        try:
            return form.decode(value)
        except Exception as error:
            raise MalformedMessageError(
                f"the message has a value for {self._name}.{key} that its column does not write: "
                f"{error!r:.200}. If the type of the column has changed since, let the relay empty "
                f"the outbox before such a migration"
            ) from error

    def decode_all(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Turn JSON into column values, without columns that are gone or secret by now.

        :raises MalformedMessageError: a column does not write such a value.
        """
        known = self.keys - self._secret
        return {key: self.decode(key, value) for key, value in values.items() if key in known}

    def decode_key(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Turn JSON into a primary key.

        :raises MalformedMessageError: the class has no such key.
        """
        names = self.primary_key
        if len(names) != len(values):
            raise MalformedMessageError(
                f"the message names a {self._name} by {len(values)} values, and its primary key is "
                f"({', '.join(names)}) in this process. If that has changed since, let the relay "
                f"empty the outbox before such a migration"
            )
        return tuple(map(self.decode, names, values))

    def decode_changes(self, encoded: Mapping[str, Mapping[str, Any]]) -> dict[str, Change]:
        """Turn JSON into changes, without those of columns that are gone by now.

        :raises MalformedMessageError: a column does not write such a value.
        """
        changes = {}
        for key, found in encoded.items():
            if key in self._secret:
                changes[key] = Change(UNSET, UNSET)  # whatever somebody has written there
            elif key in self.keys:
                old, new = (
                    self.decode(key, found[name]) if name in found else UNSET
                    for name in ("old", "new")
                )
                changes[key] = Change(old, new)
        return changes

    def is_mutable(self, key: str) -> bool:
        """Whether values of an attribute can be changed in place."""
        return self._forms[key].mutable


def _columns(mapper: Mapper[Any]) -> dict[str, Column[Any]]:
    return {
        prop.key: prop.columns[0]
        for prop in mapper.column_attrs
        if isinstance(prop.columns[0], Column)
    }


def _primary_key(mapper: Mapper[Any]) -> tuple[str, ...]:
    return tuple(mapper.get_property_by_column(column).key for column in mapper.primary_key)


def _secret(mapper: Mapper[Any]) -> frozenset[str]:
    return frozenset(
        prop.key
        for prop in mapper.column_attrs
        if any(isinstance(column, Column) and column.info.get(_SECRET) for column in prop.columns)
    )


def check_columns(mapper: Mapper[Any], receiver: Receiver) -> None:
    """Raise :class:`ReceiverOptionError` for a column that fits into no message."""
    secret = _secret(mapper)
    name = mapper.class_.__name__
    for key, column in _columns(mapper).items():
        if key not in secret and not has_form(column.type):
            raise ReceiverOptionError(
                f"receiver {receiver} is durable, but {name}.{key} has the type {column.type!r}, "
                f"which no message can hold as text: a pickle, a range, or one that puts SQL "
                f"around its values. Keep it out of messages: "
                f"mapped_column(..., info=sqla_signals.durable.SECRET)"
            )
    for key in secret.intersection(_primary_key(mapper)):
        raise ReceiverOptionError(
            f"receiver {receiver} is durable, but {name}.{key} is secret and part of the primary "
            f"key, without which no message can name the row"
        )


def codec_of(mapper: Mapper[Any], dialect: Dialect) -> Codec:
    """The :class:`Codec` of a mapper, made once, and anew when a column was mapped since."""
    codecs: WeakKeyDictionary[Mapper[Any], Codec]
    codecs = dialect.__dict__.setdefault(_CODECS, WeakKeyDictionary())
    found = codecs.get(mapper)
    if found is None or found.properties != property_count(mapper):
        found = codecs[mapper] = Codec(mapper, dialect)
    return found
