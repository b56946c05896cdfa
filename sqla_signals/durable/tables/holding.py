"""How events are held while they are handed over: what each kind of database has for that."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, literal_column, select, update

from ...errors import InstallError
from .claims import Claims
from .clock import database_time
from .raw import bytes_of, raw
from .reading import Claim
from .tables import MYSQL

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from ..outbox import Outbox


class Locks(Claims):
    """PostgreSQL, MariaDB, MySQL: the rows are locked until they are published and deleted.

    A relay that dies lets go of its locks, so nobody has to wait for the end of a lease. Notes are
    committed on a connection of their own, since the transaction with the locks goes on.
    """

    def __init__(self, engine: Engine, outbox: Outbox, max_attempts: int) -> None:
        # MySQL's default locks the gaps between rows too, and so the end of the table, where the
        # application wants to insert. Under PostgreSQL's stricter ones, SKIP LOCKED raises errors.
        committed = engine.execution_options(isolation_level="READ COMMITTED")
        super().__init__(committed, outbox, max_attempts)
        self._at_once = engine.execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def _connections(self) -> Iterator[tuple[Connection, Connection]]:
        with self._engine.connect() as connection, self._at_once.connect() as notes:
            yield connection, notes

    def _lock(
        self, connection: Connection, keys: Sequence[int], limit: int | None
    ) -> Sequence[Claim]:
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
        return [Claim.of(*row[:3]) for row in connection.execute(statement)]


class Leases(Claims):
    """SQLite, which has no row locks: the rows are put off for a while, and published meanwhile.

    A lease that has run out, because its relay died or was too slow, is given to the next one.
    """

    seconds: float = 300.0
    """How long a lease lasts: longer than a batch takes that is handed over."""

    def _lock(
        self, connection: Connection, keys: Sequence[int], limit: int | None
    ) -> Sequence[Claim]:
        events = self._events.c
        # The next transaction begins with a write, so it has the lock before it reads,
        # as after BEGIN IMMEDIATE; which cannot be emitted, since engines begin in several ways.
        connection.rollback()
        statement = (
            update(self._events)
            .where(events.sequence.in_(keys[:limit]), events.available_at <= database_time())
            .values(available_at=database_time(self.seconds))
            .returning(
                events.sequence, raw(connection, events.attempts), bytes_of(connection, events)
            )
        )
        return [Claim.of(*row) for row in connection.execute(statement)]

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
        """Only notes that say what we have written: another relay would have counted an attempt."""
        if not claims:
            return set()
        started = self._started.c
        keys = [claim.sequence for claim in claims]
        ours = started.sequence.in_(keys) & (started.attempts == claims[0].begun + 1)
        return {*connection.scalars(delete(self._started).where(ours).returning(started.sequence))}


def claims_for(engine: Engine, outbox: Outbox, max_attempts: int) -> Claims:
    """The class that suits the database of this engine.

    :raises InstallError: a relay does not work on such a database.
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
