"""From net effects to rows of the outbox: one INSERT for a whole transaction."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import Text, bindparam, func, insert, select, type_coerce

from .._sqlalchemy.instances import state_of
from .._sqlalchemy.transactions import is_autocommit
from ..changes.effects import CREATED, DELETED
from ..errors import AutocommitError
from .lines import COLUMNS, Row, as_json, insert_lines
from .message.codec import Codec, codec_of
from .message.envelope import SCHEMA
from .tables.clock import database_time
from .tables.tables import MYSQL

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect
    from sqlalchemy.orm import Mapper

    from ..bridge.transaction.durable import Events
    from .tables.tables import OutboxTables

Headers = Callable[["OutboxTables", int], Mapping[str, str]]

header_sources: Final[list[Headers]] = []
"""Called for each transaction with the number of its events; what they return goes with these."""

_MAX_SUBJECT: Final = 255


def insert_events(outbox: OutboxTables, connection: Connection, events: Events) -> None:
    """Insert the events.

    :raises UnserializableError: a primary key does not fit into a message.
    :raises AutocommitError: there is no transaction; flushes were refused before that.
    """
    if is_autocommit(connection):
        raise AutocommitError(
            f"{outbox!r}: what this session has written with isolation_level='AUTOCOMMIT' on "
            f"{connection.engine!r} is committed already, without the {len(events)} events for its "
            f"durable receivers. Give it an engine with transactions"
        )
    headers: dict[str, str] = {}
    for source in header_sources:
        headers.update(source(outbox, len(events)))
    rows = _rows(events, connection.dialect)
    ids = new_ids(len(events))
    if connection.dialect.name == "postgresql":
        insert_lines(outbox, connection, rows, ids, headers)
        if outbox.notify:
            connection.execute(select(func.pg_notify(outbox.channel, "")))
        return
    now: Any = database_time()
    if connection.dialect.name in MYSQL:
        # Its drivers send many rows at once only where every value is a parameter.
        now = connection.scalar(select(now))
    # Written here, since the engine may have a serializer for JSON of its own. inline(): nobody
    # reads the sequence, so no RETURNING.
    texts = {
        name: type_coerce(bindparam(name), Text()) for name in ("payload", "receivers", "headers")
    }
    statement = insert(outbox.table).values(occurred_at=now, available_at=now, **texts).inline()
    more = {"headers": as_json(headers), "attempts": 0}
    parameters = [
        {"id": UUID(new_id), **dict(zip(COLUMNS, row, strict=True)), **more}
        for new_id, row in zip(ids, rows, strict=True)
    ]
    for row in parameters:
        row |= {"payload": as_json(row["payload"]), "receivers": as_json(row["receivers"])}
    connection.execute(statement, parameters)


def _rows(events: Events, dialect: Dialect) -> Iterator[Row]:
    codecs: dict[Mapper[Any], Codec] = {}
    for effect, values, receivers in events:
        mapper = state_of(effect.instance).manager.mapper
        codec = codecs.get(mapper)
        if codec is None:
            codec = codecs[mapper] = codec_of(mapper, dialect)
        deleted = effect.kind is DELETED
        identity: Any = effect.was if deleted else effect.row
        snapshot = codec.encode(values)
        key = codec.encode_key(identity[1])
        payload: dict[str, Any] = {"schema": SCHEMA, "key": key, "snapshot": snapshot}
        # What is as usual is left out.
        if deleted:
            if effect.origin is not None:
                payload["origin"] = _reference(effect.origin, dialect)
        else:
            known = values if effect.kind is CREATED else {}
            if changes := codec.encode_changes(effect.changes, known, snapshot):
                payload["changes"] = changes
            if effect.along:
                payload["along"] = sorted(effect.along)
            if effect.raw:
                payload["raw"] = True
        yield codec.model, subject(key), effect.kind.value, payload, receivers


def _reference(instance: Any, dialect: Dialect) -> dict[str, Any]:
    """Name the row of another instance."""
    state = state_of(instance)
    codec = codec_of(state.manager.mapper, dialect)
    assert state.key is not None
    key = codec.encode_key(state.key[1]) if codec.tells_primary_key else None
    return {"model": codec.model, "key": key}


def subject(key: list[Any]) -> str:
    """A primary key as text: its value, or a JSON array of several."""
    text = str(key[0]) if len(key) == 1 else json.dumps(key, separators=(",", ":"))
    return text[:_MAX_SUBJECT]


def new_ids(count: int) -> list[str]:
    """Version 7 UUIDs in hexadecimal, one after the other.

    They are in the order of time, so that new rows come at the end of an index.
    """
    milliseconds = time.time_ns() // 1_000_000 & 0xFFFFFFFFFFFF
    # A counter behind a random beginning, with room for it below.
    random = int.from_bytes(os.urandom(10))
    first = milliseconds << 80 | 0x7 << 76 | random >> 68 << 64 | 0x2 << 62 | random & (1 << 61) - 1
    return [f"{first + number:032x}" for number in range(count)]
