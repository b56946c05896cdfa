"""One call after the end of a transaction, with a session, transaction and instance of its own."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from math import nan
from typing import TYPE_CHECKING, Any, Final

from .._sqlalchemy import (
    async_session_like,
    attached_copy,
    detached_copy,
    own_copies,
    session_like,
    slots_of,
    state_of,
    take_back,
    unused_copy,
)
from ..net import DELETED, NOTHING, Effect, Executed
from ..receivers import Receiver
from ..signal import logger
from ..signals import post_bulk
from .calls import UNBEGUN, Calls
from .effect_calls import call_for, failed

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

_COUNTS_REFERENCES: Final = sys.implementation.name == "cpython"


class OwnSessions:
    """Makes the session of its own that each call gets.

    :param like: the session that did the work.
    :param front: the ``AsyncSession`` in front of it, if there is one.
    :param factory: makes the sessions instead.
    """

    def __init__(
        self, like: Session, front: AsyncSession | None, factory: Callable[[], Any] | None
    ) -> None:
        self._factory = factory
        self._async_session = front
        self._unused = session_like(like) if factory is None else None
        self._spare: Calls | None = None
        """Those of a session that was used for nothing, and that nobody knows any more."""
        self._as_new: dict[str, Any] = {}
        self._front_as_new: dict[str, Any] = {}
        self._references: float = nan
        """How many references to the session there are when nobody knows it."""

    def call(self, receiver: Receiver, effect: Effect | Executed) -> None:
        """Call one receiver in a transaction that is committed if it returns."""
        session: Session | None = None
        instance = None
        is_spare = False
        try:
            calls, self._spare = self._spare or self._open(), None
            session = calls.session
            if isinstance(effect, Executed):
                self._references = _references(calls)
                calls.call(post_bulk, receiver, effect.sender, **effect.arguments)
            else:
                mapper = state_of(effect.instance).manager.mapper
                is_known = mapper in calls
                model = calls[mapper]
                if not is_known:
                    # Before there is an instance: who hears of its loading may keep the session.
                    self._references = _references(calls)
                values = effect.values or NOTHING
                if model.columns.mutable:
                    # A receiver may change it in place; the next one must not see that.
                    values = own_copies(values)
                if effect.kind is DELETED:
                    instance = detached_copy(mapper, effect.was, values)
                else:
                    instance = attached_copy(session, mapper, effect.row, values)
                call_for(effect, model, receiver, instance)
            if not self._is_as_new(calls):
                if _has_begun(session):
                    session.commit()
            elif _references(calls) == self._references and take_back(session, instance):
                # The receiver may have kept the one that was there.
                session.__dict__["info"] = {**self._as_new["info"]}
                self._spare, is_spare = calls, True
        except Exception as error:
            if session is not None and _has_begun(session):
                try:
                    session.rollback()
                except Exception:
                    logger.exception("rolling back after the failure of receiver %s", receiver)
            failed(effect, receiver, instance, error, "commit")
        finally:
            # A factory's session may hold what it was made with. Ours is left open only by what
            # passes through, such as KeyboardInterrupt.
            if (
                not is_spare
                and session is not None
                and (self._factory is not None or session.in_transaction())
            ):
                _close(session)

    def _open(self) -> Calls:
        if self._unused is not None:
            sync = unused_copy(self._unused)
            # What was added to listeners of its own cannot be seen, nor what is in slots.
            hides = "dispatch" in sync.__dict__ or slots_of(type(sync))
            # Dictionaries, such as ``info``, may be changed in place.
            self._as_new = {
                key: {**value} if type(value) is dict else value
                for key, value in ({} if hides else sync.__dict__).items()
            }
            if self._async_session is None:
                return Calls(sync)
            front = async_session_like(self._async_session, sync)
            self._front_as_new = {} if slots_of(type(front)) else front.__dict__.copy()
            return Calls(sync, front)
        assert self._factory is not None
        made = self._factory()
        sync = getattr(made, "sync_session", made)
        return Calls(sync, made if made is not sync else None)

    def _is_as_new(self, calls: Calls) -> bool:
        """Whether a session shows no trace of the call; then the next one may get it too.

        A session costs more than all the rest of a call, and most receivers need none.
        """
        session, front = calls.session, calls.async_session
        try:
            return session.__dict__ == self._as_new and (
                front is None or front.__dict__ == self._front_as_new
            )
        except Exception:  # what a receiver has put there cannot be compared
            return False


def _references(calls: Calls) -> float:
    """How many know a session or its instances; after a call more if the receiver has kept it."""
    if not _COUNTS_REFERENCES:
        return nan  # nobody knows: equal to nothing
    session, front = calls.session, calls.async_session
    count = sys.getrefcount(session) + weakref.getweakrefcount(session)
    count += sys.getrefcount(session.identity_map)
    if front is not None:
        count += sys.getrefcount(front) + weakref.getweakrefcount(front)
    return count


def _has_begun(session: Session) -> bool:
    """Whether there is anything to commit or to roll back."""
    if UNBEGUN in session.info and not session.in_transaction():
        session.begin()  # for the callbacks, which are work as well
    return session.in_transaction()


def _close(session: Session) -> None:
    try:
        session.close()
    except BaseException:
        # Cancelled again while rolling back: let the pool throw the connection away.
        session.invalidate()
        raise
