"""``install``: which sessions are listened to, and what each of their events does."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session, SessionTransaction, UOWTransaction

from ._sqlalchemy.events import is_listener, listen_to, listen_to_class, unlisten, unlisten_to_class
from ._sqlalchemy.instances import are_instances
from ._sqlalchemy.sessions import all_sessions, is_scoped
from .bridge import instances
from .bridge.calling.calls import async_session_of
from .bridge.delivery.session import SessionSource
from .bridge.flush import listening as mapper_events
from .bridge.flush.flush import Flush, anybody_listens, states_in_flush, states_to_flush
from .bridge.statements import statement as statements
from .bridge.statements.statement import POLICIES, Policy
from .bridge.targets import Target, session_target
from .bridge.transaction import durable
from .bridge.transaction import frames as transactions
from .errors import InstallError
from .receivers import dispatch
from .receivers.installations import installations, model_signals
from .receivers.observing import observers, tell
from .receivers.receiver import qualified_name

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Result
    from sqlalchemy.orm import ORMExecuteState


_lock = threading.RLock()
_serials = itertools.count()
_leaving: list[Installation] = []
"""Removed while a flush was under way, which needs their listeners until it ends."""


def _let_go() -> None:
    """Take the listeners of removed installations off, unless a flush is under way."""
    with _lock:
        while _leaving and not Flush.any_is_under_way():
            _leaving.pop()._unlisten()


class Installation:
    """What :func:`install` returns; :meth:`remove` undoes it."""

    def __init__(
        self,
        target: Target,
        whose: str,
        session_factory: Callable[[], Any] | None,
        policy: Policy,
    ) -> None:
        self._removed = False
        self._whose = whose
        self.policy: Policy = policy
        self.serial: int = next(_serials)
        self._target = target.sessions
        self._async_class = target.async_class
        self.maker: Callable[[], Any] | None = target.maker
        self.session_factory: Callable[[], Any] | None = session_factory
        self._listeners: list[tuple[str, Callable[..., Any]]] = [
            ("before_flush", self._before_flush),
            ("after_flush", self._after_flush),
            ("after_flush_postexec", self._after_flush_postexec),
            ("after_begin", self._after_begin),
            ("before_commit", self._before_commit),
            ("after_commit", self._after_commit),
            ("after_rollback", self._after_rollback),
            ("after_transaction_end", self._after_transaction_end),
        ]
        for listener in self._listeners:
            self._listen(*listener)
        mapper_events.start_listening()
        instances.start_listening()
        installations.add(self)
        for signal in model_signals:
            if signal.receivers:
                self.listen_for(signal)

    def listen_for(self, signal: dispatch.AnySignal) -> None:
        """Listen to statements from when there is a receiver that may have to do with them.

        Not before: that costs something for each ORM statement of the sessions, for a SELECT too.
        """
        if signal not in statements.SIGNALS:
            return
        listener = ("do_orm_execute", self._do_orm_execute)
        with _lock:
            if not self._removed and listener not in self._listeners:
                self._listeners.append(listener)
                self._listen(*listener)

    def remove(self) -> None:
        """Stop listening to these sessions. May be called twice.

        A flush that is under way, in another thread or because a receiver calls this, ends as it
        began; the last listener goes when it is over.
        """
        with _lock:
            if self._removed:
                return
            self._removed = True
            installations.discard(self)
            _leaving.append(self)
        _let_go()

    def _listen(self, name: str, listener: Callable[..., Any]) -> None:
        if isinstance(self._target, type):
            listen_to_class(self._target, name, listener)
        else:
            listen_to(self._target, name, listener, first=False)

    def _unlisten(self) -> None:
        for name, listener in self._listeners:
            if isinstance(self._target, type):
                unlisten_to_class(self._target, name, listener)
            else:
                for session in all_sessions():  # also those like it that commit receivers get
                    unlisten(session, name, listener)
        if not installations:
            mapper_events.stop_listening()
            instances.stop_listening()

    def _before_flush(
        self, session: Session, context: UOWTransaction, objects: Iterable[object] | None
    ) -> None:
        if Flush.of_context(context) is not None or not self._is_mine(session):
            return
        if observers:
            tell("before_flush", session, context)
        if not anybody_listens():
            return
        if not are_instances(objects):  # the flush is going to fail of that
            return
        flush = Flush(session, context, objects)
        if self._removed:  # by another thread, which has not seen that this flush begins
            flush.give_up(context)
            return
        mapper_events.listen_where_needed()
        try:
            flush.announcement.send()
        except BaseException:
            flush.is_over = True
            _let_go()
            raise
        durable.refuse_autocommit(session, lambda: states_to_flush(session, objects))
        # A pre_* receiver may have connected one of a model that had none.
        mapper_events.listen_where_needed()
        for mapper in flush.announcement.updated_mappers:
            mapper_events.stay_last(mapper)

    def _after_flush(self, session: Session, context: UOWTransaction) -> None:
        flush = Flush.of_context(context)
        if flush is not None:
            flush.after_flush(context)
        if observers and self._is_mine(session):
            tell("after_flush", session, context)

    def _after_flush_postexec(self, session: Session, context: UOWTransaction) -> None:
        flush = Flush.of_context(context)
        if flush is not None:
            flush.after_flush_postexec()
            flush.is_over = True
            if _leaving:
                _let_go()
        if observers and self._is_mine(session):
            tell("after_flush_postexec", session, context)

    def _after_begin(
        self, session: Session, transaction: SessionTransaction, connection: Connection
    ) -> None:
        if self._is_mine(session):
            durable.refuse_autocommit(session, lambda: states_in_flush(session), connection)
            transactions.begun(session, transaction, connection)

    def _before_commit(self, session: Session) -> None:
        if self._is_mine(session):
            if observers:
                tell("before_commit", session)
            durable.committing(session)

    def _after_commit(self, session: Session) -> None:
        if self._is_mine(session):
            transactions.committed(session)
            if observers:
                tell("after_commit", session)

    def _after_rollback(self, session: Session) -> None:
        if self._is_mine(session):
            transactions.rolled_back(session)

    def _after_transaction_end(self, session: Session, transaction: SessionTransaction) -> None:
        # The subtransaction of a flush, which is rolled back if the flush fails.
        of_flush = transaction.parent is not None and not transaction.nested
        if _leaving:
            if of_flush:
                Flush.ended(session)
            _let_go()
        if (observers or not of_flush) and self._is_mine(session):
            if observers:
                tell("after_transaction_end", session, transaction)
            if not of_flush:
                transactions.ended(session, transaction, session_source, durable.left)

    def _do_orm_execute(self, context: ORMExecuteState) -> Result[Any] | None:
        if not context.statement.is_dml or not self._is_mine(context.session):
            return None
        return statements.do_orm_execute(context, policy_for)

    def follow(self, session: Session, new: Session) -> None:
        """Listen to the session of receivers as to the one session that this is for."""
        if not isinstance(self._target, type) and self.closeness(session):
            for name, listener in self._listeners:
                listen_to(new, name, listener, first=False)

    @property
    def makes_sessions(self) -> bool:
        """Whether it says how the session of commit receivers is made."""
        return self.session_factory is not None or self.maker is not None

    def closeness(self, session: Session) -> float:
        """How specifically this installation is for a session; 0 if it is not."""
        if not isinstance(self._target, type):
            listens = is_listener(session, "after_commit", self._after_commit)
            return math.inf if listens else 0
        if not isinstance(session, self._target) or not self._is_mine(session):
            return 0
        classes = [cls for cls in (self._target, self._async_class) if cls is not None]
        return sum(len(cls.__mro__) for cls in classes)

    def _is_mine(self, session: Session) -> bool:
        if self._removed:
            return False
        return self._async_class is None or isinstance(async_session_of(session), self._async_class)

    def __str__(self) -> str:
        """Whose work it sends signals for."""
        return self._whose

    def __repr__(self) -> str:
        state = ", removed" if self._removed else ""
        return f"<Installation on {self._target!r}{state}>"


def install(
    target: Any = None,
    *,
    session_factory: Callable[[], Any] | None = None,
    bulk: Policy = "warn",
) -> Installation:
    """Send signals for the work of sessions.

    :param target: whose work. ``None``: every ``Session`` in the process, also behind an
        ``AsyncSession``. Else one of: a ``Session`` class or instance, a ``sessionmaker``, a
        ``scoped_session``, an ``AsyncSession`` class or instance, an ``async_sessionmaker``, an
        ``async_scoped_session``, a Flask-SQLAlchemy ``db``.
    :param session_factory: makes the ``Session`` or ``AsyncSession`` that ``on="commit"`` receivers
        get, one for each delivery. By default ``target`` makes it, if it is a factory; else it is
        of the same class as the session that did the work, and has its attributes. Either way it
        is on the same binds, and ``info`` is the same.
    :param bulk: what to do about an ORM ``insert()``, ``update()`` or ``delete()`` of a class that
        has receivers of rows, which it bypasses, and none of ``pre_bulk`` or ``post_bulk``:
        ``"warn"`` with a :class:`BulkBypassWarning`, ``"ignore"`` it, or ``"raise"``
        :class:`BulkBypassError`. Where installations overlap, the closest one decides.
    :returns: the :class:`Installation`, whose ``remove()`` undoes it.
    :raises InstallError: ``target`` makes no sessions, or ``session_factory`` no new ones.

    Sessions that exist already are included, but for those of an ``async_sessionmaker``.
    Installing for the same sessions twice, or for all and for some, never sends a signal twice;
    each installation is removed on its own.
    """
    if session_factory is not None and not callable(session_factory):
        raise InstallError(f"session_factory={session_factory!r} cannot be called")
    if is_scoped(session_factory):
        raise InstallError(
            f"session_factory={session_factory!r} gives the session that the application is "
            f"working with, so a receiver's work would be done there. Give what makes its "
            f"sessions: session_factory=....session_factory"
        )
    if bulk not in POLICIES:
        raise InstallError(f"bulk={bulk!r} is not one of {', '.join(map(repr, POLICIES))}")
    _let_go()
    if target is None:
        target = Session
    return Installation(session_target(target), _whose(target), session_factory, bulk)


def _whose(target: Any) -> str:
    """How the sessions that were given to :func:`install` are named."""
    if target is Session:
        return "every Session"
    if isinstance(target, type):
        return qualified_name(target)
    return f"a {type(target).__name__}"


def policy_for(session: Session) -> Policy:
    """The ``bulk`` policy of the installation that is closest to the session."""
    closest = max(installations, key=lambda one: (one.closeness(session), one.serial), default=None)
    return closest.policy if closest is not None else "ignore"


def session_source(session: Session) -> SessionSource:
    """Where commit receivers get their session from, by the closest installation that says it."""
    closest_last = sorted(
        (one for one in installations if one.makes_sessions and one.closeness(session)),
        key=lambda one: one.closeness(session),
    )
    factories = [one.session_factory for one in closest_last if one.session_factory is not None]
    makers = [one.maker for one in closest_last if one.maker is not None]
    return SessionSource(
        session,
        async_session_of(session),
        factories[-1] if factories else None,
        makers[-1] if makers else None,
    )
