"""From net effects to rows of the outbox: one INSERT for a whole transaction."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import insert, select, text

from .._sqlalchemy import state_of
from ..net import CREATED, DELETED
from .clock import database_time
from .encoding import Types, codec_of, encode_changes
from .message import SCHEMA
from .naming import model_name

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Mapper

    from ..bridge.owed import Owed
    from ..net import Effect
    from .tables import Outbox

Headers = Callable[[], Mapping[str, str]]

header_sources: Final[list[Headers]] = []
"""Called for each transaction; what they return travels with its messages."""

_MAX_SUBJECT: Final = 255


def insert_events(outbox: Outbox, connection: Connection, events: Sequence[Owed]) -> None:
    """Insert the events.

    :raises UnserializableError: something does not fit into a message.
    """
    headers = {key: value for source in header_sources for key, value in source().items()}
    now: Any = database_time()
    if connection.dialect.name in ("mysql", "mariadb"):
        # Its drivers send many rows at once only where every value is a parameter.
        now = connection.scalar(select(now))
    rows = [
        {
            "id": new_id(),
            **_event(event.effect, event.values),
            "headers": headers,
            "receivers": event.receivers,
            "attempts": 0,
        }
        for event in events
    ]
    # inline(): nobody reads the sequence, so no RETURNING.
    statement = insert(outbox.table).values(occurred_at=now, available_at=now).inline()
    connection.execute(statement, rows)
    if outbox.notify and connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_notify(:channel, '')"), {"channel": outbox.channel})


def _event(effect: Effect, known: Mapping[str, Any]) -> dict[str, Any]:
    mapper = state_of(effect.instance).manager.mapper
    codec = codec_of(mapper)
    types = Types(codec)
    created, deleted = effect.kind is CREATED, effect.kind is DELETED
    values = {k: v for k, v in known.items() if k not in codec.secret}
    identity = effect.was if deleted else effect.row
    payload: dict[str, Any] = {
        "schema": SCHEMA,
        "key": _key(mapper, types, identity),
        "snapshot": {key: types.encode(key, value) for key, value in values.items()},
    }
    if identity[2] is not None:  # type: ignore[index]
        payload["shard"] = identity[2]  # type: ignore[index]
    if deleted:
        if effect.origin is not None:
            payload["origin"] = _reference(effect.origin)
    else:
        payload["changes"] = encode_changes(types, effect.changes, values, created)
        payload["raw"] = effect.raw
        if not created:
            payload["along"] = sorted(effect.along)
    payload["types"] = types.known
    return {
        "aggregate_type": model_name(mapper.class_),
        "aggregate_id": subject(payload["key"]),
        "event_type": effect.kind.value,
        "payload": payload,
    }


def _key(mapper: Mapper[Any], types: Types, identity: Any) -> list[Any]:
    return [
        types.encode(mapper.get_property_by_column(column).key, value, ".key")
        for column, value in zip(mapper.primary_key, identity[1], strict=True)
    ]


def _reference(instance: Any) -> dict[str, Any]:
    """Names another row."""
    state = state_of(instance)
    mapper = state.manager.mapper
    types = Types(codec_of(mapper))
    key = _key(mapper, types, state.key)
    return {"model": model_name(mapper.class_), "key": key, "types": types.known}


def subject(key: list[Any]) -> str:
    """A primary key as text: its value, or a JSON array of several."""
    text = str(key[0]) if len(key) == 1 else json.dumps(key, separators=(",", ":"))
    return text[:_MAX_SUBJECT]


def new_id() -> UUID:
    """A version 7 UUID: in the order of time, so that new rows come at the end of an index."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10))
    value = (milliseconds & 0xFFFFFFFFFFFF) << 80 | random
    return UUID(int=value & ~(0xF << 76 | 0x3 << 62) | 0x7 << 76 | 0x2 << 62)
