"""The session that commit receivers get: one for a delivery, empty again after each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from .. import mapping
from .._sqlalchemy import (
    async_session_like,
    attached_copy,
    carry_over,
    detached_copy,
    empty,
    session_like,
    state_of,
)
from ..copies import copies_of
from ..errors import InstallError
from ..net import DELETED, NOTHING, Effect, Executed
from ..receivers import Receiver
from ..signal import logger
from ..signals import post_bulk
from .calls import Calls
from .effect_calls import call_for, failed

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session, SessionTransaction

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
        if self._factory is not None:
            made = self._factory()
            sync: Session = getattr(made, "sync_session", made)
            if sync is self.like or sync.identity_map or sync.new:
                raise InstallError(
                    f"session_factory={self._factory!r} gave a session that the application is "
                    f"working with, so a receiver's work would be done there. Give a factory that "
                    f"makes a new session with each call, such as a sessionmaker"
                )
        elif self._maker is not None:
            made = self._maker()
            sync = getattr(made, "sync_session", made)
            carry_over(self.like, sync)
        else:
            made = sync = session_like(self.like, self.front)
            if self.front is not None:
                made = async_session_like(self.front, self.like, sync)
        if self._factory is None:
            for installation in mapping.installations:
                installation.follow(self.like, sync)
        return sync, None if made is sync else made


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
    for engine, schema_map in schemas.items():
        # A factory may have another engine for the same database.
        if engine is connection.engine or engine.url == connection.engine.url:
            connection.execution_options(schema_translate_map=schema_map)
            return
