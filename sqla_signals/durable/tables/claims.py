"""How a relay gets hold of events that no other relay has, one way for each kind of database.

A batch goes through these steps, each with a statement or two for all of it: keys are claimed; a
note that they have begun is written into ``started`` and committed; only then the events are read
and handed over; at last the notes are deleted, and each event with them, or it is put off or given
up. So an event that ends the process has counted an attempt.

What has a note that nobody ended is tried again alone, behind what nobody has begun with, and so is
what has one attempt left: then it is known what has ended the process, and no other event is given
up for it.

Events are never looked for behind the last one seen: transactions commit in another order than
their rows were numbered, and one that commits late would be passed over.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    ColumnElement,
    LargeBinary,
    Select,
    bindparam,
    cast,
    delete,
    func,
    insert,
    literal_column,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import DBAPIError

from ...errors import InstallError, printable
from ...signals.signal import logger
from ..message.envelope import BusyError, Message
from .clock import database_time
from .dead_letters import bury, reason, said
from .raw import as_json, raw
from .reading import Claim, bytes_of, read
from .tables import MYSQL

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from ..outbox import Outbox

Failures = Mapping[Message, Exception]
Publish = Callable[[Sequence[Message]], Failures]

FIRST_RETRY, LAST_RETRY = 1.0, 3600.0
"""Seconds before a failed event is tried again; twice as long each time."""

_MAX_NOTES: Final = 500
"""Notes of other relays that are looked at, at once."""


class Claims:
    """Claims events of one outbox, has them handed over, and forgets what was.

    :param max_attempts: after as many an event becomes a dead letter.
    """

    def __init__(self, engine: Engine, outbox: Outbox, max_attempts: int) -> None:
        self._engine = engine
        self._outbox = outbox
        self._events = outbox.table
        self._started = outbox.started
        self._max_attempts = max_attempts

    def work(self, limit: int, publish: Publish) -> int:
        """Hand over as many events as ``limit``, and one that somebody else did not end.

        :returns: how many were claimed.
        """
        started, sequence = self._started.c, self._events.c.sequence
        with self._engine.connect() as connection, self._notes(connection) as notes:
            begun = select(started.sequence).where(started.sequence == sequence)
            keys = self._due(connection, ~begun.exists(), limit)
            count = self._handle(connection, notes, keys, publish)
            left = connection.execute(
                select(started.attempts, started.sequence)
                .join(self._events, sequence == started.sequence)
                .order_by(started.attempts, started.sequence)
                .limit(_MAX_NOTES)
            ).all()
            # What has begun the fewest times comes first, so that a bad event holds up no other.
            for _, same in groupby(left, key=lambda row: row[0]):
                keys = self._due(connection, sequence.in_([row[1] for row in same]), None)
                if alone := self._handle(connection, notes, keys, publish, alone=True):
                    return count + alone
        return count

    @contextmanager
    def _notes(self, connection: Connection) -> Iterator[Connection]:
        """The connection on which what has begun is noted, where that is another one."""
        yield connection

    # -- which -------------------------------------------------------------------------------------

    def _due(
        self, connection: Connection, which: ColumnElement[bool], limit: int | None
    ) -> dict[int, Any]:
        """The keys of what is due, in order, and the row that each tells of where that matters."""
        events = self._events.c
        due = (
            select(events.sequence)
            .where(events.available_at <= database_time(), which)
            .order_by(events.sequence)
            .limit(limit)
        )
        try:
            if not self._outbox.ordered:
                return dict.fromkeys(connection.scalars(due))
            found = self._in_order(connection, due)
            if not found:
                # What is due first waits for something; what is behind that must not wait with it.
                heads = select(func.min(events.sequence))
                heads = heads.group_by(events.aggregate_type, events.aggregate_id)
                found = self._in_order(connection, due.where(events.sequence.in_(heads)))
            return found
        finally:
            connection.rollback()

    def _in_order(self, connection: Connection, due: Select[Any]) -> dict[int, Any]:
        """Of what is due, that before which nothing of the same row waits for anything else."""
        events = self._events.c
        row: list[Any] = [events.aggregate_type, events.aggregate_id]
        if connection.dialect.name == "sqlite":  # any bytes may be a text there
            row = [cast(name, LargeBinary) for name in row]
        found: Any = connection.execute(due.add_columns(*row)).all()
        keys = {key for key, *_ in found}
        if not keys:
            return {}
        rows: Any = connection.execute(
            select(events.sequence, *row)
            .where(tuple_(*row).in_({(model, subject) for _, model, subject in found}))
            .where(events.sequence <= max(keys))
            .order_by(events.sequence)
        )
        ready: dict[int, Any] = {}
        waiting: set[Any] = set()
        for key, *names in rows:
            if key in keys and tuple(names) not in waiting:
                ready[key] = tuple(names)
            else:
                waiting.add(tuple(names))
        return ready

    # -- one batch ---------------------------------------------------------------------------------

    def _handle(
        self,
        connection: Connection,
        notes: Connection,
        keys: Mapping[int, Any],
        publish: Publish,
        *,
        alone: bool = False,
    ) -> int:
        """Claim, note, read, hand over and settle events; return how many were claimed.

        :param alone: one of them, which somebody else has begun with.
        """
        claims = self._claim(connection, notes, keys, alone) if keys else []
        if not claims:
            connection.rollback()
            return 0
        handled: list[Claim] = []
        raised: BaseException | None = None
        try:
            self._hand_over(self._read(connection, claims), publish, handled)
        except BaseException as error:
            raised = error
        # A publisher raises an Exception if it can take nothing; anything else ends the process.
        ended = claims if raised is None or isinstance(raised, Exception) else handled
        try:
            self._settle(connection, claims, handled, ended)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            # The database had no patience for an idle transaction, or the network was away.
            connection.rollback()
            ours = self._ours_still(connection, claims)
            self._settle(connection, ours, handled, [claim for claim in ended if claim in ours])
        if raised is not None:
            raise raised
        return len(claims)

    def _claim(
        self, connection: Connection, notes: Connection, keys: Mapping[int, Any], alone: bool
    ) -> list[Claim]:
        """Get hold of what nobody else has, and note that it has begun."""
        locked = {row[0]: row[1:3] for row in self._lock(connection, [*keys], 1 if alone else None)}
        begun = self._noted(notes, [*locked])
        claims: list[Claim] = []
        stuck: set[Any] = set()
        for key, row in keys.items():
            claim = None
            if key in locked and (row is None or row not in stuck):
                failed, size = locked[key]
                failed = max(failed, 0) if isinstance(failed, int) else 0
                claim = Claim(key, row, size, failed, begun.get(key, 0))
            is_last = claim is not None and claim.attempt >= self._max_attempts
            if claim is None or (claim.begun and not alone) or (is_last and claims):
                stuck.add(row)  # what comes behind it waits for it
                continue
            claims.append(claim)
            if is_last:
                break
        self._let_go(connection, locked.keys() - {claim.sequence for claim in claims})
        if begun and claims and claims[0].begun:
            again = update(self._started).where(self._started.c.sequence == claims[0].sequence)
            notes.execute(again.values(attempts=claims[0].begun + 1))
        elif claims:
            rows = [{"sequence": claim.sequence, "attempts": 1} for claim in claims]
            notes.execute(insert(self._started).values(rows).inline())
        return claims

    def _lock(
        self, connection: Connection, keys: Sequence[int], limit: int | None
    ) -> Sequence[Any]:
        """Get hold of these; return key, failed attempts and size of those that nobody else has."""
        raise NotImplementedError

    def _let_go(self, connection: Connection, keys: Collection[int]) -> None:
        """Let the next relay have these at once, if that is not so when the transaction ends."""

    def _noted(self, connection: Connection, keys: Sequence[int]) -> dict[int, int]:
        started = self._started.c
        if not keys:
            return {}
        noted = select(started.sequence, started.attempts).where(started.sequence.in_(keys))
        rows: Any = connection.execute(noted)
        return {key: attempts for key, attempts in rows}

    def _ours_still(self, connection: Connection, claims: Sequence[Claim]) -> list[Claim]:
        """What nobody else has got hold of since the connection was lost."""
        keys = [claim.sequence for claim in claims]
        locked = {row[0] for row in self._lock(connection, keys, None)}
        noted = self._noted(connection, keys)
        return [
            claim
            for claim in claims
            if claim.sequence in locked and noted.get(claim.sequence) == claim.begun + 1
        ]

    def _hand_over(self, claims: Sequence[Claim], publish: Publish, handled: list[Claim]) -> None:
        """Publish what was read; with ``ordered=True`` one event of each row in a call.

        :param handled: gets those that were handed over, or never can be.
        """
        rounds: list[list[Claim]] = []
        turns: dict[Any, int] = {}
        for claim in claims:
            turn = turns[claim.row] = turns.get(claim.row, -1) + 1 if self._outbox.ordered else 0
            rounds += [[]] if turn == len(rounds) else []
            rounds[turn].append(claim)
        stuck: set[Any] = set()
        for one in rounds:
            ready = [claim for claim in one if claim.row is None or claim.row not in stuck]
            messages = [message for claim in ready for message in claim.messages]
            failures = publish(messages) if messages else {}
            for claim in ready:
                claim.failures |= {key: failures[key] for key in claim.messages if key in failures}
                if not claim.is_done:
                    stuck.add(claim.row)
            handled += ready

    def _read(self, connection: Connection, claims: Sequence[Claim]) -> list[Claim]:
        return read(connection, self._outbox, claims, self._max_attempts)

    # -- what becomes of them ----------------------------------------------------------------------

    def _settle(
        self,
        connection: Connection,
        claims: Sequence[Claim],
        handled: Sequence[Claim],
        ended: Sequence[Claim],
    ) -> None:
        """Forget what was handed over, put off or give up what failed, let go of the rest.

        :param ended: those whose notes are deleted; the others are tried alone.
        """
        ours = self._end(connection, ended)
        gone, waiting = [], []
        for claim in claims:
            if claim not in handled:
                waiting.append(claim)
            elif claim.sequence in ours and (claim.is_done or self._is_given_up(connection, claim)):
                gone.append(claim.sequence)
        self._delete(connection, self._events, gone)
        again = [one for one in waiting if one.begun and one in ended and one.sequence in ours]
        for claim in again:
            values = {"sequence": claim.sequence, "attempts": claim.begun}
            connection.execute(insert(self._started).values(values).inline())
        self._let_go(connection, [claim.sequence for claim in waiting])
        connection.commit()

    def _end(self, connection: Connection, claims: Sequence[Claim]) -> set[int]:
        """Delete their notes; return the keys of those that are ours still."""
        keys = [claim.sequence for claim in claims]
        self._delete(connection, self._started, keys)
        return {*keys}

    def _delete(self, connection: Connection, table: Any, keys: Sequence[int]) -> None:
        if not keys:
            return
        sequence = table.c.sequence
        if connection.dialect.name in MYSQL:
            # For several values at once it may read a small table from end to end, and wait for the
            # rows that other relays hold: a deadlock, when all has been published already.
            one = delete(table).where(sequence == bindparam("gone"))
            connection.execute(one, [{"gone": value} for value in keys])
        else:
            connection.execute(delete(table).where(sequence.in_(keys)))

    def _is_given_up(self, connection: Connection, claim: Claim) -> bool:
        """Make an event a dead letter after its attempts; put it off before."""
        attempt = min(claim.attempt, self._max_attempts)
        errors = claim.failures.values()
        if errors and all(isinstance(error, BusyError) for error in errors):
            attempt -= 1  # does not count
        why = said(claim.unread) if claim.unread is not None else reason(claim.failures)
        names = [message.receiver for message in claim.failures] or None
        # What cannot be read will be no other the next time.
        if claim.unread is not None or attempt >= self._max_attempts:
            bury(connection, self._outbox, claim.sequence, attempt, why, names)
            return True
        delay = min(LAST_RETRY, FIRST_RETRY * 2 ** min(max(attempt - 1, 0), 30))
        delay *= random.uniform(0.75, 1.25)
        logger.warning(
            "event %d is tried again in %.1f s: %s", claim.sequence, delay, printable(why)
        )
        connection.execute(
            update(self._events)
            .where(self._events.c.sequence == claim.sequence)
            .values(
                last_error=why,
                attempts=attempt,
                available_at=database_time(delay),
                receivers=as_json(connection, names),
            )
        )
        return False


class Locks(Claims):
    """PostgreSQL, MariaDB, MySQL: the rows are locked until they are published and deleted.

    What dies lets go of its locks, so nothing has to run out first. What has begun is noted on a
    connection of its own, since the transaction with the locks goes on.
    """

    def __init__(self, engine: Engine, outbox: Outbox, max_attempts: int) -> None:
        # MySQL's default locks the gaps between rows too, and so the end of the table, where the
        # application wants to insert. Under PostgreSQL's stricter ones, SKIP LOCKED raises errors.
        committed = engine.execution_options(isolation_level="READ COMMITTED")
        super().__init__(committed, outbox, max_attempts)
        self._at_once = engine.execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def _notes(self, connection: Connection) -> Iterator[Connection]:
        with self._at_once.connect() as notes:
            yield notes

    def _lock(
        self, connection: Connection, keys: Sequence[int], limit: int | None
    ) -> Sequence[Any]:
        events = self._events.c
        columns: list[Any] = [events.sequence, events.attempts, bytes_of(connection, events)]
        if connection.dialect.name == "postgresql":
            # The end of this transaction need not wait for the disk: what is lost when the server
            # crashes is handed over again, which harms nobody.
            columns.append(func.set_config("synchronous_commit", "off", literal_column("true")))
        statement = (
            select(*columns)
            .where(events.sequence.in_(keys), events.available_at <= database_time())
            .order_by(events.sequence)
            .limit(limit)
            .with_for_update(of=self._events, skip_locked=True)
        )
        return connection.execute(statement).all()


class Leases(Claims):
    """SQLite, which has no row locks: the rows are put off for a while, and published meanwhile.

    A lease that has run out, because its relay died or was too slow, is given to the next one.
    """

    seconds: float = 300.0
    """How long a lease lasts: longer than a batch takes that is handed over."""

    def _claim(
        self, connection: Connection, notes: Connection, keys: Mapping[int, Any], alone: bool
    ) -> list[Claim]:
        claims = super()._claim(connection, notes, keys, alone)
        connection.commit()
        return claims

    def _lock(
        self, connection: Connection, keys: Sequence[int], limit: int | None
    ) -> Sequence[Any]:
        events = self._events.c
        # Its first statement is a write, so the transaction has the lock before it reads, as after
        # BEGIN IMMEDIATE; which cannot be emitted, since engines begin in several ways.
        statement = (
            update(self._events)
            .where(events.sequence.in_(keys[:limit]), events.available_at <= database_time())
            .values(available_at=database_time(self.seconds))
            .returning(
                events.sequence, raw(connection, events.attempts), bytes_of(connection, events)
            )
        )
        return connection.execute(statement).all()

    def _let_go(self, connection: Connection, keys: Collection[int]) -> None:
        if keys:
            where = self._events.c.sequence.in_(keys)
            connection.execute(
                update(self._events).where(where).values(available_at=database_time())
            )

    def _read(self, connection: Connection, claims: Sequence[Claim]) -> list[Claim]:
        found = super()._read(connection, claims)
        connection.rollback()  # receivers want to write
        return found

    def _end(self, connection: Connection, claims: Sequence[Claim]) -> set[int]:
        """Whoever has got hold of an event after its lease has counted another attempt."""
        if not claims:
            return set()
        started = self._started.c
        keys = [claim.sequence for claim in claims]
        ours = started.sequence.in_(keys) & (started.attempts == claims[0].begun + 1)
        return {*connection.scalars(delete(self._started).where(ours).returning(started.sequence))}


def claims_for(engine: Engine, outbox: Outbox, max_attempts: int) -> Claims:
    """The way for the database of this engine.

    :raises InstallError: there is none.
    """
    name = engine.dialect.name
    if name in ("postgresql", *MYSQL):
        return Locks(engine, outbox, max_attempts)
    if name == "sqlite":
        return Leases(engine, outbox, max_attempts)
    raise InstallError(
        f"a relay works on PostgreSQL, MariaDB, MySQL and SQLite, not on {name}. Let change data "
        f"capture read the outbox there"
    )
