"""How a relay gets hold of events that no other relay has, one way for each kind of database.

Events are never looked for behind the last one seen: transactions commit in another order than
their rows were numbered, and one that commits late would be passed over.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Row, Select, bindparam, delete, select, update

from ..errors import InstallError
from ..signal import logger
from .clock import database_time
from .dead_letters import bury, reason
from .message import BusyError, Message
from .tables import MYSQL, Outbox

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine


Failures = Mapping[Message, Exception]
Publish = Callable[[Sequence[Message]], Failures]

FIRST_RETRY, LAST_RETRY = 1.0, 3600.0
"""Seconds before a failed event is tried again; twice as long each time."""


class Claimed(NamedTuple):
    """One event that is ours for now."""

    row: Row[Any]
    attempt: int
    """1 for the first."""

    def messages(self, source: str) -> list[Message]:
        """One for each receiver that has not done it yet."""
        row = self.row
        occurred_at = row.occurred_at
        if occurred_at.tzinfo is None:
            occurred_at = occurred_at.replace(tzinfo=UTC)
        occurred_at = occurred_at.astimezone(UTC)
        return [
            Message(
                id=row.id,
                sequence=row.sequence,
                occurred_at=occurred_at,
                source=source,
                model=row.aggregate_type,
                subject=row.aggregate_id,
                kind=row.event_type,
                data=row.payload,
                receiver=receiver,
                attempt=self.attempt,
                headers=row.headers,
            )
            for receiver in row.receivers
        ]


class Claims:
    """Claims events of one outbox, has them published, and forgets what was.

    :param max_attempts: after as many an event becomes a dead letter.
    """

    def __init__(self, engine: Engine, outbox: Outbox, max_attempts: int) -> None:
        self._engine = engine
        self._outbox = outbox
        self._events = outbox.table
        self._max_attempts = max_attempts

    def work(self, limit: int, publish: Publish) -> int:
        """Publish as many events as ``limit``, at most; return how many were claimed."""
        raise NotImplementedError

    def _due(self, limit: int) -> Select[Any]:
        events = self._events
        due = select(events).where(events.c.available_at <= database_time())
        if self._outbox.ordered:
            # Only the first one of each row. Until it is deleted, which is when it was published,
            # everybody sees it, locked or not; so nobody takes the second one.
            same = events.alias("earlier")
            earlier = select(same.c.sequence).where(
                same.c.aggregate_type == events.c.aggregate_type,
                same.c.aggregate_id == events.c.aggregate_id,
                same.c.sequence < events.c.sequence,
            )
            if self._engine.dialect.name == "postgresql":
                # Else it makes a join of this, and compares each event of a row with each other.
                earlier = earlier.offset(0)
            due = due.where(~earlier.exists())
        return due.order_by(events.c.sequence).limit(limit)

    def _publish(self, claimed: list[Claimed], publish: Publish) -> dict[int, Failures]:
        """Publish; return the failures of each event that had any."""
        messages = [one for event in claimed for one in event.messages(self._outbox.source)]
        failures = publish(messages) if messages else {}
        of_event: dict[int, dict[Message, Exception]] = {}
        for message, error in failures.items():
            of_event.setdefault(message.sequence, {})[message] = error
        return dict(of_event)

    def _settle(
        self, connection: Connection, claimed: list[Claimed], failures: Mapping[int, Failures]
    ) -> None:
        """Forget what was published, put back or give up what was not."""
        gone = [event.row.sequence for event in claimed]
        for event in claimed:
            failed = failures.get(event.row.sequence)
            if not failed:
                continue
            receivers = [message.receiver for message in failed]
            why = reason(failed)
            if all(isinstance(error, BusyError) for error in failed.values()):
                event = event._replace(attempt=event.attempt - 1)  # does not count
            if event.attempt >= self._max_attempts:
                self._bury(connection, event, receivers, why)
            else:
                gone.remove(event.row.sequence)
                self._put_back(connection, event, receivers, why)
        if gone:
            self._forget(connection, gone)

    def _forget(self, connection: Connection, sequences: list[int]) -> None:
        sequence = self._events.c.sequence
        if connection.dialect.name in MYSQL:
            # For several values at once it may read a small table from end to end, and wait for the
            # rows that other relays hold: a deadlock, when all has been published already.
            one = delete(self._events).where(sequence == bindparam("gone"))
            connection.execute(one, [{"gone": value} for value in sequences])
        else:
            connection.execute(delete(self._events).where(sequence.in_(sequences)))

    def _put_back(
        self, connection: Connection, event: Claimed, receivers: list[str], reason: str
    ) -> None:
        delay = min(LAST_RETRY, FIRST_RETRY * 2 ** (event.attempt - 1)) * random.uniform(0.75, 1.25)
        logger.warning(
            "event %s, %s %s %s, is tried again in %.1f s: %s",
            event.row.id,
            event.row.aggregate_type,
            event.row.aggregate_id,
            event.row.event_type,
            delay,
            reason,
        )
        connection.execute(
            update(self._events)
            .where(self._events.c.sequence == event.row.sequence)
            .values(
                receivers=receivers,
                attempts=event.attempt,
                available_at=database_time(delay),
                last_error=reason,
            )
        )

    def _bury(
        self, connection: Connection, event: Claimed, receivers: list[str], reason: str
    ) -> None:
        values = {
            **event.row._mapping,
            "receivers": receivers,
            "attempts": event.attempt,
            "last_error": reason,
        }
        bury(connection, self._outbox, values)


class Locks(Claims):
    """PostgreSQL, MariaDB, MySQL: the rows are locked until they are published and deleted.

    What dies lets go of its locks, so nothing has to run out first.
    """

    def __init__(self, engine: Engine, outbox: Outbox, max_attempts: int) -> None:
        super().__init__(engine, outbox, max_attempts)
        # MySQL's default locks the gaps between rows too, and so the end of the table, where the
        # application wants to insert. Under PostgreSQL's stricter ones, SKIP LOCKED raises errors.
        self._engine = engine.execution_options(isolation_level="READ COMMITTED")

    def work(self, limit: int, publish: Publish) -> int:
        """Publish as many events as ``limit``, at most; return how many were claimed."""
        with self._engine.begin() as connection:
            rows = connection.execute(
                self._due(limit).with_for_update(of=self._events, skip_locked=True)
            ).all()
            claimed = [Claimed(row, row.attempts + 1) for row in rows]
            if claimed:
                self._settle(connection, claimed, self._publish(claimed, publish))
        return len(claimed)


class Leases(Claims):
    """SQLite, which has no row locks: the rows are put off for a while, and published meanwhile.

    A lease that has run out, because its relay died or was too slow, is given to the next one.
    """

    seconds: float = 300.0
    """How long a lease lasts: longer than a batch takes."""

    def work(self, limit: int, publish: Publish) -> int:
        """Publish as many events as ``limit``, at most; return how many were claimed."""
        claimed = self._lease(limit)
        if not claimed:
            return 0
        # A process that dies never says that it failed, so the attempt counts from the beginning.
        hopeless = [event for event in claimed if event.attempt > self._max_attempts]
        hopeful = [event for event in claimed if event.attempt <= self._max_attempts]
        try:
            failures = self._publish(hopeful, publish)
        except BaseException:
            self._release(claimed)
            raise
        with self._engine.begin() as connection:
            self._settle(connection, hopeful, failures)
            for event in hopeless:
                reason = event.row.last_error or "the relay died each time it published this"
                self._bury(connection, event, event.row.receivers, reason)
            if hopeless:
                self._forget(connection, [event.row.sequence for event in hopeless])
        return len(claimed)

    def _lease(self, limit: int) -> list[Claimed]:
        events = self._events
        due = self._due(limit).with_only_columns(events.c.sequence)
        # Its first statement is a write, so the transaction has the lock before it reads, as after
        # BEGIN IMMEDIATE; which cannot be emitted, since engines begin in several ways.
        with self._engine.begin() as connection:
            rows = connection.execute(
                update(events)
                .where(events.c.sequence.in_(due))
                .values(attempts=events.c.attempts + 1, available_at=database_time(self.seconds))
                .returning(events)
            ).all()
        # In the order in which SQLite came across them, otherwise.
        return [Claimed(row, row.attempts) for row in sorted(rows, key=lambda row: row.sequence)]

    def _release(self, claimed: list[Claimed]) -> None:
        events = self._events
        ours = events.c.sequence.in_([event.row.sequence for event in claimed])
        with self._engine.begin() as connection:
            connection.execute(
                update(events)
                .where(ours)
                .values(attempts=events.c.attempts - 1, available_at=database_time())
            )


def claims_for(engine: Engine, outbox: Outbox, max_attempts: int) -> Claims:
    """The way for the database of this engine.

    :raises InstallError: there is none.
    """
    name = engine.dialect.name
    if name in ("postgresql", "mysql", "mariadb"):
        return Locks(engine, outbox, max_attempts)
    if name == "sqlite":
        return Leases(engine, outbox, max_attempts)
    raise InstallError(
        f"a relay works on PostgreSQL, MariaDB, MySQL and SQLite, not on {name}. Let change data "
        f"capture read the outbox there"
    )
