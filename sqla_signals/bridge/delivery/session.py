"""The session that commit receivers get: one for a delivery, empty again after each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from ..._sqlalchemy.instances import attached_copy, detached_copy, state_of
from ..._sqlalchemy.sessions import (
    adopt,
    async_session_like,
    empty,
    for_receivers,
    plain_session,
    session_like,
    session_serial,
)
from ...changes.effects import DELETED, NOTHING, Effect, Executed
from ...errors import InstallError
from ...receivers.installations import installations
from ...receivers.receiver import Receiver
from ...signals.builtin import post_bulk
from ...signals.signal import logger
from ..calling.calls import Calls
from ..columns.copies import copies_of
from .effect_calls import call_for, failed

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import SessionTransaction

SchemaMaps = Mapping["Engine", Any]
"""The ``schema_translate_map`` of the connections of a transaction, where they had one."""


class SessionSource:
    """Where the session of a delivery comes from.

    :param like: the session that did the work.
    :param front: the ``AsyncSession`` in front of it, if there is one.
    :param factory: the ``session_factory=`` of the installation.
    :param maker: the factory that was given to ``install`` and has made ``like``.
    """

    def __init__(
        self,
        like: Session,
        front: AsyncSession | None,
        factory: Callable[[], Any] | None,
        maker: Callable[[], Any] | None,
    ) -> None:
        self.like: Session = like
        self.front: AsyncSession | None = front
        self._factory = factory
        self._maker = maker

    def open(self) -> tuple[Session, AsyncSession | None]:
        """A new session, and the ``AsyncSession`` in front of it.

        :raises InstallError: there is none that is not the application's own.
        """
        made = None
        if self._factory is not None:
            made = self._made_by(self._factory)
            sync: Session = plain_session(made)
        elif self._maker is not None:
            made = self._maker()
            sync = plain_session(made)
            adopt(self.like, sync)
        else:
            sync = session_like(self.like, self.front)
        for_receivers(sync)
        if self._factory is None:
            for installation in installations:
                installation.follow(self.like, sync)
            if self.front is not None and made in (None, sync):
                made = async_session_like(self.front, self.like, sync)
        return sync, None if made in (None, sync) else made

    @staticmethod
    def _made_by(factory: Callable[[], Any]) -> Any:
        serial = session_serial()
        made = factory()
        sync = plain_session(made)
        if not isinstance(sync, Session):
            raise InstallError(
                f"session_factory={factory!r} gave {made!r}, which is neither a Session nor an "
                f"AsyncSession"
            )
        if sync.hash_key < serial:
            raise InstallError(
                f"session_factory={factory!r} gave a session that was there before, such as the "
                f"one that the application is working with, so a receiver's work would be done "
                f"there. Give a factory that makes a new session with each call, such as a "
                f"sessionmaker"
            )
        return made


class DeliverySession:
    """Calls the commit receivers of one transaction, each in a transaction of its own.

    :param schemas: which schemas a connection of the session translates.
    """

    def __init__(self, source: SessionSource, schemas: SchemaMaps) -> None:
        self._source = source
        self._schemas = schemas
        self._calls: Calls | None = None

    def call(self, receiver: Receiver, effect: Effect | Executed) -> None:
        """Call one receiver in a transaction that is committed if it returns."""
        instance = None
        try:
            calls = self._calls = self._calls or self._open()
            if isinstance(effect, Executed):
                calls.call(post_bulk, receiver, effect.sender, **effect.arguments)
            else:
                mapper = state_of(effect.instance).manager.mapper
                model = calls[mapper]
                values = effect.values or NOTHING
                if model.columns.mutable:
                    # A receiver may change it in place; the next one must not see that.
                    values = copies_of(values)
                if effect.kind is DELETED:
                    instance = detached_copy(mapper, effect.was, values)
                else:
                    instance = attached_copy(calls.session, mapper, effect.row, values)
                call_for(effect, model, receiver, instance)
            if calls.session.in_transaction():
                calls.session.commit()
        except Exception as error:
            self._roll_back(receiver)
            failed(effect, receiver, instance, error, "commit")
        except BaseException:  # such as KeyboardInterrupt, which ends the delivery
            self.close()
            raise
        if self._calls is not None:
            empty(self._calls.session, instance)

    def close(self) -> None:
        """Give back what the session holds. A call after this gets a new one."""
        calls, self._calls = self._calls, None
        if calls is None:
            return
        try:
            calls.session.close()
        except BaseException:
            # Cancelled again while rolling back: let the pool throw the connection away.
            calls.session.invalidate()
            raise

    def _open(self) -> Calls:
        session, front = self._source.open()
        if self._schemas:
            event.listen(session, "after_begin", partial(_translate, self._schemas))
        return Calls(session, front)

    def _roll_back(self, receiver: Receiver) -> None:
        if self._calls is not None and self._calls.session.in_transaction():
            try:
                self._calls.session.rollback()
            except Exception:
                logger.exception("rolling back after the failure of receiver %s", receiver)
                self._calls.session.invalidate()


def _translate(
    schemas: SchemaMaps, session: Session, transaction: SessionTransaction, connection: Connection
) -> None:
    """Let a connection translate schemas as the one of the transaction before did."""
    if transaction.nested:
        return
    schema_map = schemas.get(connection.engine)
    if schema_map is None:  # a factory may have another engine for the same database
        same = [one for engine, one in schemas.items() if engine.url == connection.engine.url]
        schema_map = same[0] if len(same) == 1 else None
    if schema_map is not None:
        connection.execution_options(schema_translate_map=schema_map)
