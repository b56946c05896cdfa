"""For operators: the backlog, dead letters, and an inbox that only grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, delete, func, insert, literal, select, true

from ..message.envelope import MalformedMessageError
from .clock import database_time
from .raw import from_json, raw

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ..outbox import Outbox

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
    """The state of an outbox."""

    waiting: int
    """Events that are not handed over yet."""
    failing: int
    """Those of them that have failed before."""
    oldest: timedelta | None
    """The age of the first of them."""
    dead: int
    """How many dead letters there are."""
    dead_letters: tuple[DeadLetter, ...]
    """Those that are listed."""

    def is_late(self, max_age: timedelta) -> bool:
        """Whether the oldest event is older than that, as when no relay is running."""
        return self.oldest is not None and self.oldest > max_age


def backlog(connection: Connection, outbox: Outbox, limit: int | None = None) -> Backlog:
    """Look at the outbox without changing or locking anything.

    :param limit: how many dead letters to list, the oldest first; ``None`` for all.
    """
    events, dead = outbox.table.c, outbox.dead_letters.c
    waiting, failing = connection.execute(
        select(func.count(), func.count(events.last_error)).select_from(outbox.table)
    ).one()
    first = connection.execute(
        select(events.occurred_at, database_time()).order_by(events.sequence).limit(1)
    ).first()
    count = connection.scalar(select(func.count()).select_from(outbox.dead_letters)) or 0
    # Not the payloads, which are large and not shown.
    what = dead.sequence, dead.id, dead.aggregate_type, dead.aggregate_id, dead.event_type
    error = func.coalesce(dead.last_error, "").label("error")
    became = raw(connection, dead.receivers), dead.attempts, dead.dead_at, error
    letters: Any = connection.execute(
        select(*what, *became).order_by(dead.sequence).limit(limit)
    ).all()
    return Backlog(
        waiting,
        failing,
        _utc(first[1]) - _utc(first[0]) if first is not None else None,
        count,
        tuple(
            DeadLetter(
                row.sequence,
                row.id,
                row.aggregate_type,
                row.aggregate_id,
                row.event_type,
                _names(row.receivers),
                row.attempts,
                _utc(row.dead_at),
                row.error,
            )
            for row in letters
        ),
    )


def _names(receivers: Any) -> tuple[str, ...]:
    try:
        found = from_json(receivers)
    except MalformedMessageError:
        return (str(receivers),)
    return tuple(map(str, found)) if isinstance(found, list) else (str(found),)


def retry(connection: Connection, outbox: Outbox, sequences: Sequence[int] | None = None) -> int:
    """Put dead letters back into the outbox, as new events there, to be tried for the first time.

    :param sequences: which; ``None`` for all.
    :returns: how many there were.
    """
    dead = outbox.dead_letters
    if sequences is None:
        sequences = connection.scalars(select(dead.c.sequence).order_by(dead.c.sequence)).all()
    count = 0
    for begin in range(0, len(sequences), _AT_ONCE):
        some = sequences[begin : begin + _AT_ONCE]
        kept = {
            column.name: dead.c[column.name]
            for column in outbox.table.columns
            if column.name not in ("sequence", "attempts", "available_at")
        }
        values = {**kept, "attempts": literal(0), "available_at": database_time()}
        # From one table into the other: nothing of it is read here, or written anew.
        back = select(*values.values()).where(dead.c.sequence.in_(some)).order_by(dead.c.sequence)
        connection.execute(insert(outbox.table).from_select([*values], back).inline())
        count += purge(connection, outbox, some)
    return count


def purge(connection: Connection, outbox: Outbox, sequences: Sequence[int] | None = None) -> int:
    """Delete dead letters, for ever.

    :param sequences: which; ``None`` for all.
    :returns: how many there were.
    """
    dead = outbox.dead_letters
    return connection.execute(delete(dead).where(_named(dead.c.sequence, sequences))).rowcount


def purge_inbox(connection: Connection, outbox: Outbox, age: timedelta) -> int:
    """Delete rows of the inbox that are older than ``age``.

    A message that comes again after that is run again, so keep them longer than any broker might
    hold a message back.

    :returns: how many rows were deleted.
    """
    inbox = outbox.inbox
    past = inbox.c.done_at < database_time(-age.total_seconds())
    return connection.execute(delete(inbox).where(past)).rowcount


def _named(column: Any, sequences: Sequence[int] | None) -> ColumnElement[bool]:
    return true() if sequences is None else column.in_(sequences)


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
