"""From net effects to rows of the outbox: one INSERT for a whole transaction."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import func, insert, select

from .._sqlalchemy import is_autocommit, state_of
from ..errors import AutocommitError
from ..net import CREATED, DELETED
from .clock import database_time
from .encoding import Types, codec_of, encode_changes
from .lines import COLUMNS, insert_lines
from .message import SCHEMA

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Mapper

    from ..bridge.owed import Events, Owed
    from .tables import Outbox

Headers = Callable[["Outbox", int], Mapping[str, str]]

header_sources: Final[list[Headers]] = []
"""Called for each transaction with the number of its events; what they return goes with these."""

_MAX_SUBJECT: Final = 255


def insert_events(outbox: Outbox, connection: Connection, events: Events) -> None:
    """Insert the events.

    :raises UnserializableError: something does not fit into a message.
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
    types = _TypesByMapper()
    rows = (_event(event, types) for event in events)
    ids = new_ids(len(events))
    if connection.dialect.name == "postgresql":
        insert_lines(outbox, connection, rows, ids, headers)
        if outbox.notify:
            connection.execute(select(func.pg_notify(outbox.channel, "")))
        return
    now: Any = database_time()
    if connection.dialect.name in ("mysql", "mariadb"):
        # Its drivers send many rows at once only where every value is a parameter.
        now = connection.scalar(select(now))
    more = {"headers": headers, "attempts": 0}
    # inline(): nobody reads the sequence, so no RETURNING.
    statement = insert(outbox.table).values(occurred_at=now, available_at=now).inline()
    parameters = [
        {"id": UUID(new_id), **dict(zip(COLUMNS, row, strict=True)), **more}
        for new_id, row in zip(ids, rows, strict=True)
    ]
    connection.execute(statement, parameters)


Row = tuple[str, str, str, dict[str, Any], tuple[str, ...]]
"""The values of :data:`~.lines.COLUMNS`."""


class _TypesByMapper(dict["Mapper[Any]", Types]):
    """Nothing is known of any type yet: one for all rows, until it is used up."""

    def __missing__(self, mapper: Mapper[Any]) -> Types:
        self[mapper] = found = Types(codec_of(mapper))
        return found


def _event(event: Owed, unused: _TypesByMapper) -> Row:
    effect, values, receivers = event
    mapper = state_of(effect.instance).manager.mapper
    types = unused[mapper]
    deleted = effect.kind is DELETED
    identity: Any = effect.was if deleted else effect.row
    snapshot = types.encode_snapshot(values)
    key = types.encode_key(identity[1])
    payload: dict[str, Any] = {"schema": SCHEMA, "key": key, "snapshot": snapshot}
    # What is as usual is left out.
    if identity[2] is not None:
        payload["shard"] = identity[2]
    if deleted:
        if effect.origin is not None:
            payload["origin"] = _reference(effect.origin)
    else:
        known = values if effect.kind is CREATED else {}
        changes = encode_changes(types, effect.changes, known, snapshot)
        if changes:
            payload["changes"] = changes
        if effect.along:
            payload["along"] = sorted(effect.along)
        if effect.raw:
            payload["raw"] = True
    if types.known:
        payload["types"] = types.known
        del unused[mapper]
    return types.codec.model, subject(key), effect.kind.value, payload, receivers


def _reference(instance: Any) -> dict[str, Any]:
    """Names another row, of which nobody has checked yet that its primary key may be told."""
    state = state_of(instance)
    codec = codec_of(state.manager.mapper)
    if not codec.secret.isdisjoint(codec.primary_key):
        return {"model": codec.model, "key": None}
    types = Types(codec)
    assert state.key is not None
    key = types.encode_key(state.key[1])
    return {"model": codec.model, "key": key, "types": types.known}


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
