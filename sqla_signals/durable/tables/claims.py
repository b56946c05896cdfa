"""How a relay gets hold of events that no other relay has, one way for each kind of database.

Each event goes through the same steps. Its key is claimed; that somebody begins with it is noted in
``started``, and durable; only then it is read, and handed over; at last both rows are deleted, or
it is put off or given up. So an event that ends the process, or takes longer than the database
leaves a transaction idle, has counted, and nothing else has.

What somebody has begun with and not ended is tried again alone, after what nobody has begun with.

Events are never looked for behind the last one seen: transactions commit in another order than
their rows were numbered, and one that commits late would be passed over.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Integer,
    Select,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError

from ...errors import InstallError, printable
from ...signal import logger
from ..message.envelope import MAX_BYTES, BusyError, MalformedMessageError, Message
from .clock import database_time
from .dead_letters import bury, reason, said
from .raw import as_json, from_json, raw, size
from .tables import MYSQL

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from ..outbox import Outbox

Failures = Mapping[Message, Exception]
Publish = Callable[[Sequence[Message]], Failures]

FIRST_RETRY, LAST_RETRY = 1.0, 3600.0
"""Seconds before a failed event is tried again; twice as long each time."""

MAX_BATCH_BYTES: Final = 16_000_000
"""Events that are handed over together are read up to here, or one if that is larger."""

_MAX_ATTEMPTS: Final = 1_000_000_000
_SUSPECTS: Final = 50


@dataclass(slots=True, eq=False)
class Claim:
    """An event that is ours for now."""

    sequence: int
    attempts: int
    """Those that have failed."""
    started: int
    """Those that have begun and not ended, this one included unless others began with it."""
    lease: Any = None
    """SQLite: until when it is ours, as the row says."""
    failures: Failures = field(default_factory=dict)
    unread: Exception | None = None
    """Why it cannot be read."""
    receivers: Sequence[str] | None = None
    """Those that are left, if that is known."""

    @property
    def attempt(self) -> int:
        """Which attempt this is."""
        return min(max(self.attempts, 0) + max(self.started, 1), _MAX_ATTEMPTS)

    @property
    def has_failed(self) -> bool:
        """Whether it has, as far as anybody knows."""
        return bool(self.failures) or self.unread is not None

    @property
    def why(self) -> str:
        """Why it has failed."""
        return said(self.unread) if self.unread is not None else reason(self.failures)


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
        self._read_one: Select[Any] | None = None

    def work(self, limit: int, publish: Publish, *, together: bool) -> int:
        """Hand over as many events as ``limit``, and one that somebody else did not end.

        :param together: whether they are handed over in one call, and not each by itself.
        :returns: how many were claimed.
        """
        with self._engine.connect() as connection, self._notes(connection) as notes:
            keys, suspects = self._due(connection, limit)
            connection.rollback()
            count = 0
            stuck: set[Any] = set()
            for batch in self._batches(keys, together):
                ours = [key for key, row in batch if row not in stuck]
                claimed = self._handle(connection, notes, ours, publish) if ours else []
                count += len(claimed)
                if self._outbox.ordered:
                    gone = {claim.sequence for claim in claimed if not claim.has_failed}
                    stuck |= {row for key, row in batch if key not in gone}
            if suspects:
                count += len(self._handle(connection, notes, suspects, publish, alone=True))
        return count

    @contextmanager
    def _notes(self, connection: Connection) -> Iterator[Connection]:
        """The connection on which what has begun is noted, where that is another one."""
        yield connection

    def _batches(
        self, keys: Sequence[tuple[int, Any]], together: bool
    ) -> Iterator[list[tuple[int, Any]]]:
        """The keys that are handed over in one call; of an ordered row one at a time."""
        if not together:
            yield from ([key] for key in keys)
            return
        rounds: list[list[tuple[int, Any]]] = []
        seen: dict[Any, int] = {}
        for key, row in keys:
            turn = seen[row] = seen.get(row, -1) + 1 if self._outbox.ordered else 0
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append((key, row))
        yield from rounds

    # -- which -------------------------------------------------------------------------------------

    def _due(self, connection: Connection, limit: int) -> tuple[list[tuple[int, Any]], list[int]]:
        """The keys of what is due, with the rows that they tell of; and of what was not ended."""
        events, started = self._events.c, self._started.c
        begun = select(started.sequence).where(started.sequence == events.sequence)
        due = (
            select(events.sequence)
            .where(events.available_at <= database_time())
            .order_by(events.sequence)
            .limit(limit)
        )
        suspects = connection.scalars(
            select(events.sequence)
            .join(self._started, started.sequence == events.sequence)
            .where(events.available_at <= database_time())
            .order_by(started.attempts, events.sequence)
            .limit(_SUSPECTS)
        ).all()
        due = due.where(~begun.exists())
        if self._outbox.ordered:
            return self._in_order(connection, due), self._first(connection, suspects)
        return [(key, key) for key in connection.scalars(due)], [*suspects]

    def _in_order(self, connection: Connection, due: Select[Any]) -> list[tuple[int, Any]]:
        """Of what is due, that before which nothing of the same row waits for anything else."""
        events = self._events.c
        due = due.add_columns(events.aggregate_type, events.aggregate_id)
        rows: Any = connection.execute(due)
        found = [(key, (model, subject)) for key, model, subject in rows]
        firsts = self._firsts(connection, {row for _, row in found})
        heads = {key for key, row in found if firsts.get(row) == key}
        ready = {row for key, row in found if key in heads}
        if found and not ready:
            # All of these wait for something; what comes behind them must not wait for that.
            same = self._events.alias("earlier")
            earlier = select(same.c.sequence).where(
                same.c.aggregate_type == events.aggregate_type,
                same.c.aggregate_id == events.aggregate_id,
                same.c.sequence < events.sequence,
            )
            if self._engine.dialect.name == "postgresql":
                # Else it makes a join of this, and compares each event of a row with each other.
                earlier = earlier.offset(0)
            rows = connection.execute(due.where(~earlier.exists()))
            return [(key, (model, subject)) for key, model, subject in rows]
        return [(key, row) for key, row in found if row in ready]

    def _firsts(self, connection: Connection, rows: Collection[Any]) -> dict[Any, Any]:
        """The first event of each of these rows, due or not."""
        events = self._events.c
        return {
            row: connection.scalar(
                select(func.min(events.sequence)).where(
                    events.aggregate_type == row[0], events.aggregate_id == row[1]
                )
            )
            for row in rows
        }

    def _first(self, connection: Connection, keys: Sequence[int]) -> list[int]:
        """Those of these keys that are the first event of their row."""
        if not keys:
            return []
        events = self._events.c
        rows = connection.execute(
            select(events.sequence, events.aggregate_type, events.aggregate_id).where(
                events.sequence.in_(keys)
            )
        )
        found = {key: (model, subject) for key, model, subject in rows}
        firsts = self._firsts(connection, {*found.values()})
        return [key for key in keys if key in found and firsts[found[key]] == key]

    # -- one after the other -----------------------------------------------------------------------

    def _handle(
        self,
        connection: Connection,
        notes: Connection,
        keys: Sequence[int],
        publish: Publish,
        *,
        alone: bool = False,
    ) -> list[Claim]:
        """Claim, note, read, hand over and settle events, in one call of ``publish``.

        :param alone: one of them, which somebody else has begun with.
        :returns: those that were claimed.
        """
        claimed = self._claim(connection, notes, keys, alone)
        if not claimed:
            connection.rollback()
            return []
        handled = self._hand_over(connection, notes, claimed, publish)
        try:
            self._settle(connection, handled, claimed)
            connection.commit()
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            connection.rollback()
            # The database had no patience for an idle transaction, or the network was away.
            claimed = self._ours_still(connection, claimed)
            self._settle(connection, [one for one in handled if one in claimed], claimed)
            connection.commit()
        return handled

    def _claim(
        self, connection: Connection, notes: Connection, keys: Sequence[int], alone: bool
    ) -> list[Claim]:
        """Get hold of what nobody else has, and note that it has begun."""
        raise NotImplementedError

    def _ours_still(self, connection: Connection, claimed: Sequence[Claim]) -> list[Claim]:
        """What nobody else has got hold of since the connection was lost."""
        raise NotImplementedError

    def _let_go(self, notes: Connection, claimed: Sequence[Claim]) -> None:
        """Let the next relay have these at once, if that is not so when the transaction ends."""

    def _take_back(self, notes: Connection, claimed: Sequence[Claim]) -> None:
        """Nothing has begun after all: what was noted counts no more."""
        for claim in claimed:
            started = self._started.c
            where = started.sequence == claim.sequence
            if claim.started > 1:
                values = {"attempts": started.attempts - 1}
                notes.execute(update(self._started).where(where).values(values))
            else:
                notes.execute(delete(self._started).where(where))

    def _hand_over(
        self,
        connection: Connection,
        notes: Connection,
        claimed: Sequence[Claim],
        publish: Publish,
    ) -> list[Claim]:
        """Read the events and hand them over; return those that were, or never can be."""
        messages: list[Message] = []
        handled: list[Claim] = []
        room = MAX_BATCH_BYTES
        for claim in claimed:
            if claim.attempt > self._max_attempts:
                self._look_for_those_left(connection, claim)
                handled.append(claim)
                continue
            found, room = self._read(connection, claim, room)
            if found is not None:
                messages += found
                handled.append(claim)
        try:
            failures = publish(messages) if messages else {}
        except SystemExit:
            self._let_go(notes, claimed)  # raised by a receiver, which has begun
            raise
        except BaseException:
            self._take_back(notes, claimed)
            connection.rollback()
            raise
        of_event: dict[int, dict[Message, Exception]] = {}
        for message, error in failures.items():
            of_event.setdefault(message.sequence, {})[message] = error
        for claim in handled:
            claim.failures = of_event.get(claim.sequence, {})
            if claim.failures:
                claim.receivers = [message.receiver for message in claim.failures]
        return handled

    def _read(
        self, connection: Connection, claim: Claim, room: int
    ) -> tuple[list[Message] | None, int]:
        """The messages of an event, and the room that is left; ``None`` if it has to wait."""
        fits = MAX_BYTES if room == MAX_BATCH_BYTES else room
        try:
            row = connection.execute(
                self._reading(connection), {"key": claim.sequence, "fits": fits}
            ).one()
            taken = row.size
            if taken > fits < MAX_BYTES:
                return None, room
            if taken > MAX_BYTES:
                raise MalformedMessageError(
                    f"the event has {taken:,} bytes, and what has more than {MAX_BYTES:,} is not "
                    f"read. Keep large columns out of messages with info=SECRET"
                )
            return self._messages(claim, row._mapping), room - taken
        except MalformedMessageError as error:
            claim.unread = error
        except DBAPIError as error:
            self._check_is_about_row(error)
            claim.unread = error
        return [], room

    def _reading(self, connection: Connection) -> Select[Any]:
        """The statement that reads one event, as far as it is no larger than may be."""
        found = self._read_one
        if found is None:
            columns = self._events.c
            documents = (columns.payload, columns.headers, columns.receivers)
            long = size(connection, *documents)
            shown = [
                case((long <= bindparam("fits", type_=Integer()), one.element)).label(column.name)
                if column in documents
                else one
                for column in self._events.columns
                for one in [raw(connection, column)]
            ]
            where = columns.sequence == bindparam("key")
            statement: Select[Any] = select(*shown, long.label("size"))
            found = self._read_one = statement.where(where)
        return found

    def _check_is_about_row(self, error: DBAPIError) -> None:
        """Raise an error that is not about what SQLite holds, where any bytes may be a text."""
        if self._engine.dialect.name != "sqlite" or error.connection_invalidated:
            raise error

    def _messages(self, claim: Claim, row: Mapping[Any, Any]) -> list[Message]:
        """One for each receiver that has not done it yet."""
        receivers = from_json(row["receivers"])
        if type(receivers) is not list or not receivers or {str} != {*map(type, receivers)}:
            raise MalformedMessageError("the receivers of the event are no list of names")
        occurred_at = row["occurred_at"]
        if isinstance(occurred_at, datetime):
            occurred_at = occurred_at.isoformat()
        if isinstance(occurred_at, str) and "+" not in occurred_at:
            occurred_at += "+00:00"
        data, headers = from_json(row["payload"]), from_json(row["headers"])
        return [
            Message.checked(
                id=str(row["id"]),
                sequence=claim.sequence,
                occurred_at=occurred_at,
                source=self._outbox.source,
                model=row["aggregate_type"],
                subject=row["aggregate_id"],
                kind=row["event_type"],
                data=data,
                receiver=receiver,
                attempt=claim.attempt,
                headers=headers,
                outbox=self._outbox,
            )
            for receiver in dict.fromkeys(receivers)
        ]

    def _look_for_those_left(self, connection: Connection, claim: Claim) -> None:
        """An event is to be given up: for which receivers has nobody noted that it is done?"""
        events, inbox = self._events.c, self._outbox.inbox.c
        where = events.sequence == claim.sequence
        claim.unread = RelayKilledError("each relay that began with this was killed")
        claim.started -= 1
        try:
            row = connection.execute(
                select(raw(connection, events.receivers), events.last_error).where(where)
            ).one()
            done = connection.scalars(
                select(inbox.receiver).where(
                    inbox.event_id == select(events.id).where(where).scalar_subquery()
                )
            ).all()
            names = from_json(row.receivers)
            if type(names) is not list or not names:
                return
            claim.receivers = [name for name in names if name not in done]
        except (MalformedMessageError, TypeError):
            return
        except DBAPIError as error:
            self._check_is_about_row(error)
            return
        if not claim.receivers:
            claim.unread = None

    # -- what becomes of them ----------------------------------------------------------------------

    def _settle(
        self, connection: Connection, handled: Sequence[Claim], claimed: Sequence[Claim]
    ) -> None:
        """Forget what was handed over, put off or give up what was not."""
        gone = []
        for claim in handled:
            if not claim.has_failed:
                gone.append(claim.sequence)
                continue
            attempt = claim.attempt
            errors = claim.failures.values()
            if errors and all(isinstance(error, BusyError) for error in errors):
                attempt -= 1  # does not count
            # What cannot be read will be no other the next time.
            unreadable = isinstance(claim.unread, MalformedMessageError)
            if unreadable or attempt >= self._max_attempts:
                bury(connection, self._outbox, claim.sequence, attempt, claim.why, claim.receivers)
                gone.append(claim.sequence)
            else:
                self._put_off(connection, claim, attempt)
        self._forget(connection, [claim.sequence for claim in claimed], gone)

    def _forget(self, connection: Connection, settled: Sequence[int], gone: Sequence[int]) -> None:
        self._delete(connection, self._started, settled)
        self._delete(connection, self._events, gone)

    def _delete(self, connection: Connection, table: Any, sequences: Sequence[int]) -> None:
        if not sequences:
            return
        sequence = table.c.sequence
        if connection.dialect.name in MYSQL:
            # For several values at once it may read a small table from end to end, and wait for the
            # rows that other relays hold: a deadlock, when all has been published already.
            one = delete(table).where(sequence == bindparam("gone"))
            connection.execute(one, [{"gone": value} for value in sequences])
        else:
            connection.execute(delete(table).where(sequence.in_(sequences)))

    def _put_off(self, connection: Connection, claim: Claim, attempt: int) -> None:
        delay = min(LAST_RETRY, FIRST_RETRY * 2 ** min(max(attempt - 1, 0), 30))
        delay *= random.uniform(0.75, 1.25)
        logger.warning(
            "event %d is tried again in %.1f s: %s", claim.sequence, delay, printable(claim.why)
        )
        values: dict[str, Any] = {"last_error": claim.why, "attempts": attempt}
        if claim.receivers is not None:
            values["receivers"] = as_json(connection, claim.receivers)
        connection.execute(
            update(self._events)
            .where(self._events.c.sequence == claim.sequence)
            .values(available_at=database_time(delay), **values)
        )


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
        self._is_postgresql = engine.dialect.name == "postgresql"

    @contextmanager
    def _notes(self, connection: Connection) -> Iterator[Connection]:
        with self._at_once.connect() as notes:
            yield notes

    def _claim(
        self, connection: Connection, notes: Connection, keys: Sequence[int], alone: bool
    ) -> list[Claim]:
        rows = self._lock(connection, keys, 1 if alone else None)
        counted = int(len(rows) == 1)
        fresh = [sequence for sequence, _, started in rows if started is None]
        if fresh:
            self._begin(notes, fresh, counted)
        for sequence, _, started in rows:
            if started is not None:
                values = {"attempts": started + counted}
                self._change(notes, sequence, values)
        return [
            Claim(sequence, attempts, (started or 0) + counted)
            for sequence, attempts, started in rows
        ]

    def _forget(self, connection: Connection, settled: Sequence[int], gone: Sequence[int]) -> None:
        if not self._is_postgresql or not gone:
            super()._forget(connection, settled, gone)
            return
        events, started = self._events, self._started
        both = delete(events).where(events.c.sequence.in_(gone))
        connection.execute(
            both.add_cte(delete(started).where(started.c.sequence.in_(settled)).cte("ended"))
        )

    def _lock(
        self, connection: Connection, keys: Sequence[int], limit: int | None
    ) -> Sequence[Any]:
        """Key, failed and begun attempts of what nobody else has locked."""
        events, started = self._events.c, self._started.c
        begun = (
            select(started.attempts).where(started.sequence == events.sequence).scalar_subquery()
        )
        columns: list[Any] = [events.sequence, events.attempts, begun]
        if self._is_postgresql:
            # What is lost when the server crashes is done again, which harms nobody; and to wait
            # for its disk takes longer than all the rest.
            columns.append(_no_wait())
        statement = (
            select(*columns)
            .where(events.sequence.in_(keys), events.available_at <= database_time())
            .order_by(events.sequence)
            .limit(limit)
            .with_for_update(of=self._events, skip_locked=True)
        )
        return [tuple(row)[:3] for row in connection.execute(statement)]

    def _begin(self, notes: Connection, sequences: Sequence[int], attempts: int) -> None:
        if not self._is_postgresql:
            rows = [{"sequence": sequence, "attempts": attempts} for sequence in sequences]
            notes.execute(insert(self._started).inline(), rows)
            return
        key = func.unnest(literal([*sequences], ARRAY(BigInteger))).column_valued("key")
        rows_ = select(key, literal(attempts)).where(_no_wait() == "off")
        notes.execute(insert(self._started).from_select(["sequence", "attempts"], rows_).inline())

    def _change(self, notes: Connection, sequence: int, values: Mapping[str, Any]) -> None:
        where = self._started.c.sequence == sequence
        notes.execute(update(self._started).where(where).values(values))

    def _ours_still(self, connection: Connection, claimed: Sequence[Claim]) -> list[Claim]:
        rows = self._lock(connection, [claim.sequence for claim in claimed], None)
        begun = {sequence: started for sequence, _, started in rows}
        return [claim for claim in claimed if begun.get(claim.sequence) == claim.started]


def _no_wait() -> Any:
    """PostgreSQL: the transaction that this is in does not wait for the disk when it commits."""
    return func.set_config("synchronous_commit", "off", literal_column("true"))


class Leases(Claims):
    """SQLite, which has no row locks: the rows are put off for a while, and published meanwhile.

    A lease that has run out, because its relay died or was too slow, is given to the next one.
    """

    seconds: float = 300.0
    """How long a lease lasts: longer than one event takes, or a batch that is handed over."""

    def _claim(
        self, connection: Connection, notes: Connection, keys: Sequence[int], alone: bool
    ) -> list[Claim]:
        events, started = self._events, self._started
        if alone:
            keys = keys[:1]
        # Its first statement is a write, so the transaction has the lock before it reads, as after
        # BEGIN IMMEDIATE; which cannot be emitted, since engines begin in several ways.
        rows = connection.execute(
            update(events)
            .where(events.c.sequence.in_(keys), events.c.available_at <= database_time())
            .values(available_at=database_time(self.seconds))
            .returning(
                events.c.sequence,
                raw(connection, events.c.attempts),
                raw(connection, events.c.available_at),
            )
        ).all()
        ours = [row.sequence for row in rows]
        begun = {
            row.sequence: row.attempts
            for row in connection.execute(select(started).where(started.c.sequence.in_(ours)))
        }
        counted = int(len(rows) == 1)
        self._delete(connection, started, [*begun])
        claimed = []
        for sequence, attempts, lease in sorted(tuple(row) for row in rows):
            count = begun.get(sequence, 0) + counted
            connection.execute(insert(started).values(sequence=sequence, attempts=count))
            known = attempts if isinstance(attempts, int) else 0
            claimed.append(Claim(sequence, known, count, lease))
        connection.commit()
        return claimed

    def _hand_over(
        self,
        connection: Connection,
        notes: Connection,
        claimed: Sequence[Claim],
        publish: Publish,
    ) -> list[Claim]:
        def without_transaction(messages: Sequence[Message]) -> Failures:
            connection.rollback()  # it has read the messages; receivers want to write
            return publish(messages)

        handled = super()._hand_over(connection, notes, claimed, without_transaction)
        connection.rollback()
        return handled

    def _take_back(self, notes: Connection, claimed: Sequence[Claim]) -> None:
        super()._take_back(notes, claimed)
        self._let_go(notes, claimed)

    def _let_go(self, notes: Connection, claimed: Sequence[Claim]) -> None:
        where = self._events.c.sequence.in_([claim.sequence for claim in claimed])
        notes.execute(update(self._events).where(where).values(available_at=database_time()))
        notes.commit()

    def _settle(
        self, connection: Connection, handled: Sequence[Claim], claimed: Sequence[Claim]
    ) -> None:
        claimed = self._ours_still(connection, claimed)
        super()._settle(connection, [one for one in handled if one in claimed], claimed)
        waiting = [one for one in claimed if one not in handled]
        if waiting:
            self._let_go(connection, waiting)

    def _ours_still(self, connection: Connection, claimed: Sequence[Claim]) -> list[Claim]:
        events = self._events.c
        lease = raw(connection, events.available_at)
        # A write, to have the lock before it reads.
        connection.execute(delete(self._started).where(literal_column("0") == 1))
        sequences = [claim.sequence for claim in claimed]
        rows = connection.execute(
            select(events.sequence, lease).where(events.sequence.in_(sequences))
        )
        found = {row[0]: row[1] for row in rows}
        return [claim for claim in claimed if found.get(claim.sequence) == claim.lease]


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


class RelayKilledError(Exception):
    """Stands for the error that a killed relay could not tell."""
