"""The tables of durable delivery, in the user's own metadata.

The *outbox* holds what was committed and is not handed over yet, *started* what a relay has begun
with and not ended, the *inbox* which receiver has done which event, *dead letters* what was given
up. Alembic's autogenerate creates and migrates them like any other table.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    Uuid,
    bindparam,
    insert,
)
from sqlalchemy.dialects import mysql

from ...receivers.receiver import MAX_NAME
from .clock import database_time

if TYPE_CHECKING:
    from sqlalchemy import Insert
    from sqlalchemy.types import TypeEngine

MYSQL: Final = ("mysql", "mariadb")
_LONGEST_CHANNEL: Final = 63
"""Bytes of a name in PostgreSQL."""


class OutboxTables:
    """The tables, added to a metadata, and how they are used."""

    def __init__(
        self,
        metadata: MetaData,
        *,
        prefix: str,
        schema: str | None,
        source: str,
        notify: bool,
        ordered: bool,
    ) -> None:
        self.metadata: MetaData = metadata
        self.source: str = source
        """The ``source`` of the messages."""
        self.notify: bool = notify
        """Whether writing an event wakes the relay."""
        self.ordered: bool = ordered
        """Whether the events of one row are published one after the other."""
        self.options: tuple[object, ...] = (prefix, schema, source, notify, ordered)
        name = f"{prefix}_{{}}"
        self.table: Table = Table(
            name.format("outbox"), metadata, *_event_columns(), **_options(schema)
        )
        if ordered:
            columns = self.table.c
            Index(
                name.format("outbox_in_order"),
                columns.aggregate_type,
                columns.aggregate_id,
                columns.sequence,
            )
        self.started: Table = Table(
            name.format("started"),
            metadata,
            Column("sequence", _number(), primary_key=True, autoincrement=False),
            Column("attempts", Integer(), nullable=False),
            schema=schema,
        )
        self.inbox: Table = Table(
            name.format("inbox"),
            metadata,
            Column("event_id", Uuid(), primary_key=True),
            Column("receiver", _name(), primary_key=True),
            Column("done_at", _timestamp(), nullable=False),
            schema=schema,
        )
        self.dead_letters: Table = Table(
            name.format("dead_letters"),
            metadata,
            *_event_columns(),
            Column("dead_at", _timestamp(), nullable=False),
            **_options(schema),
        )
        self.note_done: Insert = insert(self.inbox).values(
            event_id=bindparam("event_id"),
            receiver=bindparam("receiver"),
            done_at=database_time(),
        )
        """Made once, because each message needs it."""
        self.insert_lines: Insert | None = None
        """The quickest INSERT of events on PostgreSQL, when it was needed for the first time."""

    @property
    def channel(self) -> str:
        """The channel of PostgreSQL's ``NOTIFY``."""
        name = self.table.fullname.replace(".", "_")
        if len(name.encode()) > _LONGEST_CHANNEL:
            name = f"sqla_signals_{sha256(name.encode()).hexdigest()[:40]}"
        return name

    def __repr__(self) -> str:
        return f"<Outbox {self.table.fullname}>"


def _options(schema: str | None) -> dict[str, Any]:
    # A number that was used for a deleted row is not used again: the sequence only rises.
    return {"schema": schema, "sqlite_autoincrement": True}


def _number() -> TypeEngine[Any]:
    return BigInteger().with_variant(Integer(), "sqlite")


def _event_columns() -> list[Column[Any]]:
    return [
        Column("sequence", _number(), primary_key=True, autoincrement=True),
        Column("id", Uuid(), nullable=False),
        Column("aggregate_type", String(255), nullable=False),
        Column("aggregate_id", String(255), nullable=False),
        Column("event_type", String(16), nullable=False),
        Column("occurred_at", _timestamp(), nullable=False),
        Column("payload", JSON(), nullable=False),
        Column("headers", JSON(), nullable=False),
        Column("receivers", JSON(), nullable=False),
        Column("attempts", Integer(), nullable=False),
        Column("available_at", _timestamp(), nullable=False),
        Column("last_error", Text(), nullable=True),
    ]


def _name() -> TypeEngine[Any]:
    # Else "shop.Confirm" has done what "shop.confirm" did.
    return String(MAX_NAME).with_variant(String(MAX_NAME, collation="utf8mb4_bin"), *MYSQL)


def _timestamp() -> TypeEngine[Any]:
    return DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *MYSQL)
