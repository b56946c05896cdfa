"""Which transaction a change belongs to, and when that transaction ends.

A frame is kept for each root transaction and savepoint in which something happened; what a flush
opens in between, a subtransaction, is none of our business. ``after_commit`` tells that a
transaction was committed or released, ``after_transaction_end`` that it is over: a frame that was
not committed by then was rolled back, or closed, which is the same where the session controls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.orm import Session

from ..._sqlalchemy.instances import contains_state, state_of
from ..._sqlalchemy.sessions import is_scoped, plain_session
from ..._sqlalchemy.transactions import (
    current_transaction,
    has_joined,
    is_committed,
    is_rolled_back,
    schema_maps,
)
from ...changes.effects import Frame
from ...errors import SignalsError
from ...receivers.installations import installations
from ..delivery import delivery

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
    from sqlalchemy.orm import SessionTransaction, scoped_session

    from ..delivery.session import SessionSource

    AnySession = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]

_FRAME: Final = "sqla_signals.frame"
"""Kept on the transaction, to live as long: a callback may refer to the session, and so to it."""
_JOINED: Final = "sqla_signals.joined"
"""Kept on the root transaction: the connections whose own transaction it joined."""
_SCHEMAS: Final = "sqla_signals.schemas"
"""Kept on a committed root: the ``schema_translate_map`` of its connections, by engine."""


def frame_of(session: Session) -> Frame:
    """The frame of the transaction or savepoint that the session is in, made if there is none."""
    transaction = innermost(session)
    return _frame(transaction if transaction is not None else session.begin())


def _frame(transaction: SessionTransaction) -> Frame:
    frame = _find_frame(transaction)
    if frame is None:
        frame = transaction.__dict__[_FRAME] = Frame()
    return frame


def _find_frame(transaction: SessionTransaction) -> Frame | None:
    frame: Frame | None = transaction.__dict__.get(_FRAME)
    return frame


def innermost(session: Session) -> SessionTransaction | None:
    """The savepoint that the session is in, or else its root transaction."""
    return next(_outwards(current_transaction(session)), None)


def _outwards(transaction: SessionTransaction | None) -> Iterator[SessionTransaction]:
    """The transaction and those around it, without subtransactions; the root comes last."""
    while transaction is not None:
        if transaction.nested or transaction.parent is None:
            yield transaction
        transaction = transaction.parent


def begun(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """``after_begin``: the transaction has got a connection."""
    if not transaction.nested and has_joined(transaction, connection):
        transaction.__dict__.setdefault(_JOINED, []).append(connection)


def committed(session: Session) -> None:
    """``after_commit``: a root was committed, or a savepoint released."""
    # Not always the innermost: a listener may begin a savepoint whenever one ends, and so between
    # the release of the last one and the commit of the root.
    for transaction in _outwards(current_transaction(session)):
        if is_committed(transaction):
            frame: Frame | None = transaction.__dict__.get(_FRAME)
            if frame is not None:
                frame.committed = True
                if not transaction.nested:
                    # The instances hold what was committed; right after this they are expired.
                    delivery.keep_values(session, frame)
                    transaction.__dict__[_SCHEMAS] = schema_maps(transaction)
            return


def rolled_back(session: Session) -> None:
    """``after_rollback``: a root or a savepoint was rolled back, with what it has joined."""
    for transaction in _outwards(current_transaction(session)):
        if is_rolled_back(transaction):
            transaction.__dict__.pop(_JOINED, None)


def ended(
    session: Session,
    transaction: SessionTransaction,
    source_for: Callable[[Session], SessionSource],
    write_events: Callable[[Session, Frame, Sequence[Connection]], None],
) -> None:
    """``after_transaction_end`` of a root or a savepoint: hand the frame on.

    A released savepoint's is merged into the one around it, that of a committed root is delivered,
    and what was undone is told as undone.

    :param write_events: writes the durable events of what the session has left to the owners of
        the transactions that it had joined on these connections.
    """
    frame: Frame | None = transaction.__dict__.pop(_FRAME, None)
    if transaction.nested and (frame is None or not frame.committed):
        _note_undone_savepoint(session, transaction, frame)
    if not frame:
        return
    if frame.committed:
        if transaction.nested:
            _frame(next(_outwards(transaction.parent))).merge(frame)
        else:
            delivery.committed(session, frame, source_for, transaction.__dict__[_SCHEMAS])
        return
    joined: Sequence[Connection] = transaction.__dict__.get(_JOINED, ())
    if joined:
        # Closed without a commit or a rollback, which leaves those transactions as they are.
        frame.is_closed = True
        write_events(session, frame, joined)
        frame = frame.without(joined)
    if frame:
        delivery.rolled_back(session, frame)


def _note_undone_savepoint(
    session: Session, savepoint: SessionTransaction, undone: Frame | None
) -> None:
    """Note which instances a savepoint that was rolled back has left as they were."""
    states = [state_of(effect.instance) for effect in (undone.effects if undone else ())]
    # SQLAlchemy restores what the session holds: SessionTransaction._restore_snapshot().
    stale = {state for state in states if state.key and not contains_state(session, state)}
    if stale:
        for transaction in _outwards(savepoint.parent):
            _frame(transaction).stale |= stale


def net_frame(session: Session) -> Frame:
    """What the root transaction comes to, should it and its open savepoints be committed now."""
    found = [_find_frame(one) for one in _outwards(current_transaction(session))]
    frames = [frame for frame in found if frame is not None]
    if len(frames) == 1:
        return frames[0]
    net = Frame()
    for frame in reversed(frames):
        net.take_over(frame)
    return net


def on_commit(session: AnySession, fn: Callable[[], Any]) -> None:
    """Call ``fn`` once the work of the session is committed.

    :param session: a session that an installation listens to.
    :param fn: called without arguments, in the order of registration, after the ``on="commit"``
        receivers; an ``async def`` is awaited behind an ``AsyncSession``. An exception is logged
        and does not reach the caller of ``commit()``.

    Called inside a savepoint, it is forgotten when that is rolled back, and when the transaction
    ends in ``rollback()`` or ``close()``. Outside of a transaction it begins one, as any work in a
    session does. Inside of another callback, after the transaction, it is called in the same
    delivery, after the others. Take what ``fn`` needs from the instances beforehand
    (``key = order.id``): when it is called they are expired, and at the end of
    ``with session.begin():`` cannot be loaded again.

    :raises SignalsError: no installation listens to the session, or it has ``autobegin=False`` and
        is in no transaction.
    """
    session = _checked(session, fn)
    if not delivery.follows(session, fn):
        _begun_frame(session, fn).on_commit.append(fn)


def on_rollback(session: AnySession, fn: Callable[[], Any]) -> None:
    """Call ``fn`` once the work of the session is undone.

    That is when the savepoint it was called in, or the whole transaction, is rolled back, also by
    ``close()`` without ``commit()``. Otherwise like :func:`on_commit`.
    """
    _begun_frame(_checked(session, fn), fn).on_rollback.append(fn)


def _begun_frame(session: Session, fn: Callable[[], Any]) -> Frame:
    if not session.autobegin and not session.in_transaction():
        raise SignalsError(
            f"on_commit() and on_rollback() wait for the end of a transaction, but {session!r} is "
            f"in none, and has autobegin=False. Call session.begin() before you give {fn!r}"
        )
    return frame_of(session)


def _checked(session: Any, fn: Any) -> Session:
    sync = plain_session(session() if is_scoped(session) else session)
    if not isinstance(sync, Session):
        raise SignalsError(
            f"on_commit() and on_rollback() are about the transaction of a session, which "
            f"{session!r} is not: give a Session or an AsyncSession"
        )
    if not callable(fn):
        raise SignalsError(f"on_commit() and on_rollback() take a function, not {fn!r}")
    if not any(one.closeness(sync) for one in installations):
        raise SignalsError(
            f"on_commit() and on_rollback() would never call {fn!r}: sqla_signals is not installed "
            f"for {sync!r}. Add sqla_signals.install() where the application starts."
        )
    return sync
