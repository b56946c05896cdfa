"""How a relay gets hold of events that no other relay has, and what it does with them.

A batch goes through these steps, each with a statement or two for all of it: events are claimed; a
note that they have begun is written into ``started`` and committed; only then the events are read
and handed over; at last the notes are deleted, and each event with them, or it is put off or given
up. So an event that ends the process has counted an attempt.

An event whose note nobody has deleted is tried again alone, after those without a note, and so is
an event with one attempt left: then it is known which event has ended the process, and no other is
given up for it.

Events are never looked for behind the last one seen: transactions commit in another order than
their rows were numbered, and one that commits late would be passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, islice, zip_longest
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    LargeBinary,
    Select,
    bindparam,
    cast,
    delete,
    func,
    insert,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import DBAPIError

from ..message.envelope import Message
from .clock import database_time
from .failures import given_up
from .reading import Claim, read
from .tables import MYSQL

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Insert, Table

    from ..outbox import Outbox

Failures = Mapping[Message, Exception]
Publish = Callable[[Sequence[Message]], Failures]

_MAX_NOTES: Final = 10_000
"""Notes that are looked at, at once."""


class Claims:
    """Claims events of one outbox, has them handed over, and forgets those that were.

    :param max_attempts: after as many an event becomes a dead letter.
    """

    def __init__(self, engine: Engine, outbox: Outbox, max_attempts: int) -> None:
        self._engine = engine
        self._outbox = outbox
        self._events = outbox.table
        self._started = outbox.started
        self._max_attempts = max_attempts

    def work(self, limit: int, publish: Publish) -> int:
        """Hand over as many events as ``limit``, and one that another relay has begun with.

        :returns: how many were claimed.
        """
        with self._connections() as (connection, notes):
            begun = self._noted(connection)
            due = self._due(connection, limit, without=begun)
            count = self._handle(connection, notes, due, publish)
            alone: dict[Any, int] = {}
            for key, row in self._due(connection, only=[*begun]).items() if begun else ():
                alone.setdefault(row, key)  # later events of this row wait for it
            # An event that has begun the fewest times comes first, so a bad one holds up no other.
            keys = sorted(alone.values(), key=begun.__getitem__)
            for _, same in groupby(keys, key=begun.__getitem__):
                one = {key: key for key in same}
                if done := self._handle(connection, notes, one, publish, alone=True):
                    return count + done
        return count

    @contextmanager
    def _connections(self) -> Iterator[tuple[Connection, Connection]]:
        """The connection that holds events, and the one on which notes are committed."""
        with self._engine.connect() as connection:
            yield connection, connection

    # -- which events are due ----------------------------------------------------------------------

    def _due(
        self,
        connection: Connection,
        limit: int | None = None,
        *,
        without: Collection[int] = (),
        only: Sequence[int] | None = None,
    ) -> dict[int, Any]:
        """The keys of the events that are due, in order, with the row that each is about.

        Without ``ordered=True`` no event waits for another, so each has a row of its own.
        """
        events = self._events.c
        due = select(events.sequence).where(events.available_at <= database_time())
        due = due.order_by(events.sequence)
        if only is not None:
            due = due.where(events.sequence.in_(only))
        if limit is not None:
            # Not by NOT EXISTS: without fresh statistics, which a queue seldom has, PostgreSQL
            # expects nearly no row of that, and sorts the whole table for each batch.
            due = due.limit(limit + len(without))
        if self._outbox.ordered:
            found = self._in_order(connection, due, without)
        else:
            found = {key: key for key in connection.scalars(due) if key not in without}
        return dict(islice(found.items(), limit))

    def _in_order(
        self, connection: Connection, due: Select[Any], without: Collection[int]
    ) -> dict[int, Any]:
        """Those of the due events that no earlier event of the same row keeps waiting."""
        events = self._events.c
        found = self._ready(connection, due, without)
        if not found:
            # All of these wait for earlier ones; events of other rows must not wait with them.
            heads = select(func.min(events.sequence))
            heads = heads.group_by(events.aggregate_type, events.aggregate_id)
            found = self._ready(connection, due.where(events.sequence.in_(heads)), without)
        return found

    def _ready(
        self, connection: Connection, due: Select[Any], without: Collection[int]
    ) -> dict[int, Any]:
        events = self._events.c
        row: list[Any] = [events.aggregate_type, events.aggregate_id]
        if connection.dialect.name == "sqlite":  # any bytes may be a text there
            row = [cast(name, LargeBinary) for name in row]
        found: Any = connection.execute(due.add_columns(*row)).all()
        keys = {key for key, *_ in found if key not in without}
        if not keys:
            return {}
        rows: Any = connection.execute(
            select(events.sequence, *row)
            .where(tuple_(*row).in_({(model, subject) for _, model, subject in found}))
            .where(events.sequence <= max(keys))
            .order_by(events.sequence)
        )
        ready: dict[int, Any] = {}
        stuck: set[Any] = set()
        for key, *names in rows:
            if key in keys and tuple(names) not in stuck:
                ready[key] = tuple(names)
            else:
                stuck.add(tuple(names))
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

        :param alone: one of them, which another relay has begun with.
        """
        claims = self._claim(connection, notes, keys, alone) if keys else []
        if not claims:
            connection.rollback()
            return 0
        raised: BaseException | None = None
        try:
            self._hand_over(self._read(connection, claims), publish)
        except BaseException as error:
            raised = error
        # A publisher raises an Exception if it can take nothing; anything else ends the process,
        # and what was not handed over keeps its note.
        ends = raised is not None and not isinstance(raised, Exception)
        try:
            self._settle(connection, claims, ends)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            # The database had no patience for an idle transaction, or the network was away.
            connection.rollback()
            self._settle(connection, self._ours_still(connection, claims), ends)
        if raised is not None:
            raise raised
        return len(claims)

    def _claim(
        self, connection: Connection, notes: Connection, keys: Mapping[int, Any], alone: bool
    ) -> list[Claim]:
        """Get hold of events, and note that they have begun; leave out those that must wait."""
        found = self._lock(connection, [*keys], 1 if alone else None)
        if not found:
            return []
        locked = {claim.sequence: claim for claim in found}
        for key, begun in self._noted(notes, [*locked]).items():
            locked[key].begun = begun
        claims: list[Claim] = []
        stuck: set[Any] = set()
        for key, row in keys.items():
            claim = locked.get(key)
            if (
                claim is None
                or row in stuck
                or (claim.begun and not alone)
                or (claims and claim.attempt >= self._max_attempts)
            ):
                stuck.add(row)  # later events of this row wait for it
                continue
            claim.row = row
            claims.append(claim)
            if claim.attempt >= self._max_attempts:
                break
        self._let_go(connection, locked.keys() - {claim.sequence for claim in claims})
        if claims and claims[0].begun:
            again = update(self._started).where(self._started.c.sequence == claims[0].sequence)
            notes.execute(again.values(attempts=claims[0].begun + 1))
        elif claims:
            notes.execute(self._notes({claim.sequence: 1 for claim in claims}))
        notes.commit()
        return claims

    def _lock(
        self, connection: Connection, keys: Sequence[int], limit: int | None
    ) -> Sequence[Claim]:
        """Get hold of events, without those that another relay has."""
        raise NotImplementedError

    def _let_go(self, connection: Connection, keys: Collection[int]) -> None:
        """Let other relays have events at once, where the transaction does not do so at its end."""

    def _noted(self, connection: Connection, keys: Sequence[int] | None = None) -> dict[int, int]:
        """The notes of all events, or of these: how often each has begun."""
        started = self._started.c
        noted = select(started.sequence, started.attempts).limit(_MAX_NOTES)
        if keys is not None:
            noted = noted.where(started.sequence.in_(keys))
        return {key: attempts for key, attempts in connection.execute(noted).all()}

    def _notes(self, attempts: Mapping[int, int]) -> Insert:
        rows = [{"sequence": key, "attempts": count} for key, count in attempts.items()]
        return insert(self._started).values(rows).inline()

    def _ours_still(self, connection: Connection, claims: Sequence[Claim]) -> list[Claim]:
        """Get hold of events again after a lost connection, without those that others have now."""
        keys = [claim.sequence for claim in claims]
        locked = {claim.sequence for claim in self._lock(connection, keys, None)}
        noted = self._noted(connection, keys)
        return [
            claim
            for claim in claims
            if claim.sequence in locked and noted.get(claim.sequence) == claim.begun + 1
        ]

    def _hand_over(self, claims: Sequence[Claim], publish: Publish) -> None:
        """Publish events; with ``ordered=True`` one event of each row in a call."""
        rows: dict[Any, list[Claim]] = {}
        for claim in claims:
            rows.setdefault(claim.row, []).append(claim)
        stuck: set[Any] = set()
        for turn in zip_longest(*rows.values()):
            ready = [claim for claim in turn if claim is not None and claim.row not in stuck]
            messages = [message for claim in ready for message in claim.messages]
            failures = publish(messages) if messages else {}
            for claim in ready:
                claim.handled = True
                claim.failures |= {key: failures[key] for key in claim.messages if key in failures}
                if not claim.is_done:
                    stuck.add(claim.row)

    def _read(self, connection: Connection, claims: Sequence[Claim]) -> list[Claim]:
        return read(connection, self._outbox, claims, self._max_attempts)

    # -- what becomes of them ----------------------------------------------------------------------

    def _settle(self, connection: Connection, claims: Sequence[Claim], ends: bool) -> None:
        """Delete the events that are done, put off or give up the failed ones, release the rest.

        :param ends: the process ends, so events that were not handed over keep their notes.
        """
        noted = [claim for claim in claims if claim.handled or not ends]
        ours = self._end(connection, noted)
        lost = {claim.sequence for claim in noted} - ours
        gone, waiting = [], []
        for claim in claims:
            if claim.sequence in lost:
                continue
            if not claim.handled:
                waiting.append(claim)
            elif claim.is_done or given_up(connection, self._outbox, claim, self._max_attempts):
                gone.append(claim.sequence)
        self._delete(connection, self._events, gone)
        if again := {one.sequence: one.begun for one in waiting if one.begun and not ends}:
            connection.execute(self._notes(again))  # without this attempt
        self._let_go(connection, [claim.sequence for claim in waiting])
        connection.commit()

    def _end(self, connection: Connection, claims: Sequence[Claim]) -> set[int]:
        """Delete the notes of events; return the keys of those events that are ours still."""
        keys = [claim.sequence for claim in claims]
        self._delete(connection, self._started, keys)
        return {*keys}

    def _delete(self, connection: Connection, table: Table, keys: Sequence[int]) -> None:
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
