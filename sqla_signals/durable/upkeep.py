"""What operators look at and do: the backlog, dead letters, and an inbox that only grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, delete, exists, func, insert, select, true

from .clock import database_time

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from .tables import Outbox

_AT_ONCE: Final = 500
"""Dead letters put back with one statement, whose parameters every database limits."""


@dataclass(frozen=True)
class DeadLetter:
    """An event that was given up."""

    sequence: int
    id: UUID
    model: str
    subject: str
    kind: str
    receivers: tuple[str, ...]
    """Those that have not done it."""
    attempts: int
    dead_at: datetime
    last_error: str


@dataclass(frozen=True)
class Backlog:
    """What an outbox holds."""

    waiting: int
    """Events that are not handed over yet."""
    failing: int
    """Those of them that have failed before."""
    oldest: timedelta | None
    """The age of the first of them."""
    dead_letters: tuple[DeadLetter, ...]

    def is_late(self, max_age: timedelta) -> bool:
        """Whether the oldest event is older than that, as when no relay is running."""
        return self.oldest is not None and self.oldest > max_age


def backlog(connection: Connection, outbox: Outbox) -> Backlog:
    """Look at the outbox; changes nothing and locks nothing."""
    events = outbox.table.c
    waiting, failing = connection.execute(
        select(func.count(), func.count(events.last_error)).select_from(outbox.table)
    ).one()
    first = connection.execute(
        select(events.occurred_at, database_time()).order_by(events.sequence).limit(1)
    ).first()
    dead = connection.execute(select(outbox.dead_letters).order_by(outbox.dead_letters.c.sequence))
    return Backlog(
        waiting,
        failing,
        _utc(first[1]) - _utc(first[0]) if first is not None else None,
        tuple(
            DeadLetter(
                row.sequence,
                row.id,
                row.aggregate_type,
                row.aggregate_id,
                row.event_type,
                tuple(row.receivers),
                row.attempts,
                _utc(row.dead_at),
                row.last_error,
            )
            for row in dead
        ),
    )


def retry(connection: Connection, outbox: Outbox, sequences: Sequence[int] | None = None) -> int:
    """Put dead letters back into the outbox, to be tried as if for the first time.

    :param sequences: which; ``None`` for all.
    :returns: how many there were. An event that is still in the outbox, for other receivers, stays
        a dead letter until it is not.
    """
    dead, events = outbox.dead_letters, outbox.table
    gone = ~exists().where(events.c.sequence == dead.c.sequence)
    some = (
        select(dead)
        .where(_named(dead.c.sequence, sequences), gone)
        .order_by(dead.c.sequence)
        .limit(_AT_ONCE)
    )
    count = 0
    while rows := connection.execute(some).mappings().all():
        revived = [
            {key: value for key, value in row.items() if key not in ("dead_at", "available_at")}
            | {"attempts": 0}
            for row in rows
        ]
        connection.execute(
            insert(outbox.table).values(available_at=database_time()).inline(), revived
        )
        count += purge(connection, outbox, [row["sequence"] for row in revived])
    return count


def purge(connection: Connection, outbox: Outbox, sequences: Sequence[int] | None = None) -> int:
    """Delete dead letters, for ever.

    :param sequences: which; ``None`` for all.
    :returns: how many there were.
    """
    dead = outbox.dead_letters
    return connection.execute(delete(dead).where(_named(dead.c.sequence, sequences))).rowcount


def purge_inbox(connection: Connection, outbox: Outbox, age: timedelta) -> int:
    """Forget which receivers have done what, where that is longer ago than ``age``.

    A message that comes again after that is run again: keep it longer than any broker might hold a
    message back.

    :returns: how many rows were deleted.
    """
    inbox = outbox.inbox
    past = inbox.c.done_at < database_time(-age.total_seconds())
    return connection.execute(delete(inbox).where(past)).rowcount


def _named(column: Any, sequences: Sequence[int] | None) -> ColumnElement[bool]:
    return true() if sequences is None else column.in_(sequences)


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
