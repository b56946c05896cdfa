"""Which transaction a change belongs to, and when that transaction ends.

A frame is kept for each root transaction and savepoint in which something happened; what a flush
opens in between, a subtransaction, is none of our business. ``after_commit`` tells that the
transaction whose turn it is was committed or released, ``after_transaction_end`` that it is over:
a frame that was not committed by then was rolled back, or closed, which is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.orm import Session

from .. import mapping
from .._sqlalchemy import contains_state, state_of
from ..errors import SignalsError
from ..net import Frame
from . import delivery
from .calls import UNBEGUN

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
    from sqlalchemy.orm import SessionTransaction, scoped_session

    AnySession = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]

_FRAME: Final = "sqla_signals.frame"
"""Kept on the transaction, to live as long: a callback may refer to the session, and so to it."""


class _Frame(Frame):
    """A frame that notices when nobody ends its transaction."""

    __slots__ = ("is_open",)

    def __init__(self) -> None:
        super().__init__()
        self.is_open: bool = False
        """Whether its transaction has begun and not ended."""

    def __del__(self) -> None:
        if self.is_open and not self.committed and self:
            delivery.forgotten(self)


def frame_of(session: Session) -> Frame:
    """The frame of the transaction or savepoint that the session is in, made if there is none."""
    transaction = innermost(session)
    if transaction is None:
        frame: Frame = session.info.setdefault(UNBEGUN, _Frame())
        return frame
    return _frame(transaction)


def _frame(transaction: SessionTransaction) -> _Frame:
    frame = _find_frame(transaction)
    return frame if frame is not None else _opened(transaction, _Frame())


def _find_frame(transaction: SessionTransaction) -> _Frame | None:
    """The frame of a transaction, if it has one; a root takes over one that waited for it."""
    frame: _Frame | None = transaction.__dict__.get(_FRAME)
    if frame is None and transaction.parent is None and UNBEGUN in transaction.session.info:
        frame = _opened(transaction, transaction.session.info.pop(UNBEGUN))
    return frame


def _opened(transaction: SessionTransaction, frame: _Frame) -> _Frame:
    frame.is_open = True
    transaction.__dict__[_FRAME] = frame
    return frame


def innermost(session: Session) -> SessionTransaction | None:
    """The savepoint that the session is in, or else its root transaction."""
    return session.get_nested_transaction() or session.get_transaction()


def _outwards(transaction: SessionTransaction | None) -> Iterator[SessionTransaction]:
    """The transaction and those around it, without subtransactions; the root comes last."""
    while transaction is not None:
        if transaction.nested or transaction.parent is None:
            yield transaction
        transaction = transaction.parent


def committed(session: Session) -> None:
    """``after_commit``: the current root was committed, or the current savepoint released."""
    transaction = innermost(session)
    if transaction is None:
        return
    frame = _find_frame(transaction)
    if frame is not None:
        frame.committed = True
        if not transaction.nested:
            # The instances still hold what was committed; right after this they are expired.
            delivery.keep_values(session, frame)


def ended(
    session: Session,
    transaction: SessionTransaction,
    factory_for: Callable[[Session], Callable[[], Any] | None],
) -> None:
    """``after_transaction_end``: hand the frame on.

    A released savepoint's is merged into the one around it, that of a committed root is delivered,
    and what was undone is told as undone.
    """
    if transaction.parent is not None and not transaction.nested:
        return
    frame = _find_frame(transaction)
    if frame is not None:
        del transaction.__dict__[_FRAME]
        frame.is_open = False
    if frame is not None and frame.committed:
        if transaction.nested:
            _frame(next(_outwards(transaction.parent))).merge(frame)
        elif frame:
            delivery.committed(session, frame, factory_for)
        return
    if transaction.nested:
        _note_undone_savepoint(session, transaction, frame)
    if frame:
        delivery.rolled_back(session, frame)


def _note_undone_savepoint(
    session: Session, savepoint: SessionTransaction, undone: Frame | None
) -> None:
    """Tell the frames around a savepoint that it may have been rolled back."""
    effects = () if undone is None else undone.effects
    states = [state_of(effect.instance) for effect in effects]
    missed = {state for state in states if state.key and not contains_state(session, state)}
    for transaction in _outwards(savepoint.parent):
        frame = _frame(transaction) if missed else _find_frame(transaction)
        if frame is not None:
            frame.savepoint_undone = True
            frame.missed |= missed


def net_frame(session: Session) -> Frame:
    """What the root transaction comes to, should it and its open savepoints be committed now."""
    found = [_find_frame(transaction) for transaction in _outwards(innermost(session))]
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
    ends in ``close()`` without ``commit()``. Before a transaction has begun, it waits for the next
    one. Take what ``fn`` needs from the instances beforehand (``key = order.id``): when it is
    called they are expired, and at the end of ``with session.begin():`` cannot be loaded again.

    :raises SignalsError: no installation listens to the session.
    """
    frame_of(_checked(session, fn)).on_commit.append(fn)


def on_rollback(session: AnySession, fn: Callable[[], Any]) -> None:
    """Call ``fn`` once the work of the session is undone.

    That is when the savepoint it was called in, or the whole transaction, is rolled back, also by
    ``close()`` without ``commit()``. Otherwise like :func:`on_commit`.
    """
    frame_of(_checked(session, fn)).on_rollback.append(fn)


def _checked(session: Any, fn: Any) -> Session:
    if hasattr(session, "registry"):  # a scoped_session or an async_scoped_session
        session = session()
    sync: Any = getattr(session, "sync_session", session)
    if not isinstance(sync, Session):
        raise SignalsError(
            f"on_commit() and on_rollback() are about the transaction of a session, which "
            f"{session!r} is not: give a Session or an AsyncSession"
        )
    if not callable(fn):
        raise SignalsError(f"on_commit() and on_rollback() take a function, not {fn!r}")
    if not any(one.closeness(sync) for one in mapping.installations):
        raise SignalsError(
            f"on_commit() and on_rollback() would never call {fn!r}: sqla_signals is not installed "
            f"for {sync!r}. Add sqla_signals.install() where the application starts."
        )
    return sync
