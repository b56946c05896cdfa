"""``pre_migrate`` and ``post_migrate``: the signals of a run of Alembic's migrations.

A run is what ``context.run_migrations()`` does for one connection. Alembic asks for the steps after
it has read the version table, and tells of each one while that step's transaction is still open;
these two moments are where the signals are sent, so that the receivers' work is committed with the
migrations'.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from sqlalchemy import MetaData
from sqlalchemy.orm import Session

from .bridge.calling.calls import Calls
from .errors import SignalsError
from .receivers.blocks import block
from .receivers.dispatch import audible, unawaitable
from .signals.builtin import post_migrate, pre_migrate

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext, MigrationInfo
    from sqlalchemy import Connection

    from .receivers.receiver import Receiver
    from .signals.signal import Signal

__all__ = ["migration_signals"]

_SYNCHRONOUS: Final = (
    "an env.py with a synchronous engine, which cannot await. Make the receiver a plain function, "
    "or start from Alembic's template 'async'"
)


class Context(Protocol):
    """``alembic.context``, or an ``EnvironmentContext``."""

    def get_context(self) -> MigrationContext:
        """The ``MigrationContext`` that ``configure()`` has made."""
        ...


@block
def migration_signals(context: Context) -> Iterator[None]:
    """Send ``pre_migrate`` and ``post_migrate`` for the ``run_migrations()`` inside the block.

    :param context: what ``env.py`` imports as ``from alembic import context``, configured with the
        connection. Where there are several, each has a block of its own.

    Nothing is sent when there is nothing to migrate, by commands that only look (``current``,
    ``check``, ``revision --autogenerate``), and in offline mode (``--sql``).
    """
    migrations = context.get_context()
    if migrations.as_sql:
        yield
        return
    run = _Run(migrations)
    steps, callbacks = migrations._migrations_fn, migrations.on_version_apply_callbacks
    migrations._migrations_fn = run.begin
    migrations.on_version_apply_callbacks = (*callbacks, run.version_applied)
    try:
        yield
    finally:
        migrations._migrations_fn, migrations.on_version_apply_callbacks = steps, callbacks


class _Run:
    """One run: its steps, and how many of them are still to come."""

    def __init__(self, migrations: MigrationContext) -> None:
        self._steps = migrations._migrations_fn
        self._metadata = _metadata_list(migrations.opts.get("target_metadata"))
        self._plan: tuple[MigrationInfo, ...] = ()
        self._to_come = 0

    def begin(self, heads: tuple[str, ...], migrations: MigrationContext) -> Iterable[Any]:
        """Alembic asks which steps to take; nothing has been done yet."""
        assert self._steps is not None
        steps = list(self._steps(heads, migrations))
        self._plan = tuple(step.info for step in steps)
        self._to_come = len(steps)
        if steps:
            self._send(pre_migrate, migrations, frozenset(heads))
        return steps

    def version_applied(self, *, ctx: MigrationContext, heads: set[str], **_: Any) -> None:
        """``on_version_apply``: a step was taken, and is not committed yet."""
        self._to_come -= 1
        if not self._to_come:
            self._send(post_migrate, ctx, frozenset(heads))

    def _send(self, signal: Signal, migrations: MigrationContext, heads: frozenset[str]) -> None:
        receivers = self._receivers(signal)
        connection = migrations.connection
        if not receivers or connection is None:
            return
        if not connection.in_transaction():
            connection.begin()  # for the step to go on with; a session would commit its own
        transaction = connection.get_nested_transaction() or connection.get_transaction()
        assert transaction is not None
        calls = _open_session(connection)
        try:
            for receiver, sender in receivers:
                if receiver.is_async and calls.async_session is None:
                    raise unawaitable(signal, receiver, sender, _SYNCHRONOUS)
                calls.call(
                    signal,
                    receiver,
                    sender,
                    connection=connection,
                    plan=self._plan,
                    direction=_direction(self._plan),
                    heads=heads,
                    using=connection.engine,
                )
                if not transaction.is_active:
                    raise SignalsError(
                        f"{signal.name}: receiver {receiver} has ended the transaction of the "
                        f"migration. Leave that to Alembic; to undo the migration, raise an "
                        f"exception instead of calling rollback()."
                    )
            calls.session.commit()
        finally:
            calls.session.close()

    def _receivers(self, signal: Signal) -> list[tuple[Receiver, MetaData | None]]:
        """Each receiver once, however many of the ``MetaData`` it is for, in their order."""
        found: dict[Any, tuple[Receiver, MetaData | None]] = {}
        for metadata in self._metadata:
            for receiver in audible(signal, metadata, signal.table.lookup(metadata)):
                found.setdefault(receiver.fn_id, (receiver, metadata))
        return sorted(found.values(), key=lambda call: call[0].serial)


def _metadata_list(target: MetaData | Sequence[MetaData] | None) -> list[MetaData | None]:
    if target is None or isinstance(target, MetaData):
        return [target]
    return list(target) or [None]


def _direction(plan: Sequence[MigrationInfo]) -> str:
    if any(step.is_stamp for step in plan):
        return "stamp"
    return "upgrade" if plan[0].is_upgrade else "downgrade"


def _open_session(connection: Connection) -> Calls:
    """A session whose ``commit()`` leaves it to Alembic to commit the transaction it is in.

    Not by a savepoint: the driver of SQLite would commit on releasing one, before any DML.
    """
    if not connection.dialect.is_async:
        return Calls(Session(connection, join_transaction_mode="rollback_only"))
    from sqlalchemy.ext.asyncio import AsyncSession

    front = AsyncSession(join_transaction_mode="rollback_only")
    front.sync_session.bind = connection
    return Calls(front.sync_session, front)
