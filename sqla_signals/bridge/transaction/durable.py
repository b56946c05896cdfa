"""The events of durable receivers, written into the outbox before their transaction commits.

``before_commit`` is the last moment at which SQL is part of the transaction. It comes before
commit's own flushes, so the session is flushed until clean first; then the net effects are what
commit receivers are going to see. Where a ``before_commit`` listener behind ours changes something,
the events of the flush that follows are written with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..._sqlalchemy.instances import state_of
from ..._sqlalchemy.transactions import (
    connections_of,
    fail_transaction,
    is_autocommit,
    is_committing,
)
from ..._sqlalchemy.unit_of_work import is_clean
from ...changes.effects import Effect, Frame
from ...errors import AutocommitError, InstallError
from ...receivers.mapped import outbox_of
from ...signals.builtin import post_delete, post_save
from ...signals.signal import logger
from ..calling.audience import Audiences
from ..calling.calls import Calls, is_sharded
from ..columns.by_mapper import ColumnsByMapper
from ..delivery import delivery
from . import frames as transactions

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import InstanceState, Mapper, Session

    from ...receivers.receiver import Receiver

    State = InstanceState[Any]

MAX_FLUSHES: Final = 100
"""After as many in one commit, ``SessionTransaction._prepare_impl`` (orm/session.py) gives up."""

_WRITTEN: Final = "sqla_signals.events_written"
"""Kept on the root transaction once its events are in the outbox."""

Event = tuple[Effect, Mapping[str, Any], tuple[str, ...]]
"""An event for the outbox: what happened, the column values of the row, the names of receivers."""


class Events:
    """The events of a transaction for one outbox, in order.

    Each is made when it is its turn, and gone after that: ten thousand of them kept would make the
    garbage collector look at everything once more.
    """

    def __init__(self, session: Session, frame: Frame) -> None:
        self._session = session
        self._frame = frame
        self._effects: list[Effect] = []
        self._receivers: list[tuple[str, ...]] = []

    def add(self, effect: Effect, receivers: tuple[str, ...]) -> None:
        """Add the event of an effect, for those receivers."""
        self._effects.append(effect)
        self._receivers.append(receivers)

    def __len__(self) -> int:
        return len(self._effects)

    def __iter__(self) -> Iterator[Event]:
        session, frame, columns = self._session, self._frame, ColumnsByMapper()
        for effect, receivers in zip(self._effects, self._receivers, strict=True):
            yield effect, delivery.known_values(session, frame, effect, columns), receivers


def refuse_autocommit(
    session: Session,
    states: Callable[[], Iterable[State]],
    connection: Connection | None = None,
) -> None:
    """Refuse to write rows of durable receivers where each statement is committed at once.

    No event could be written together with its row. The own autocommit of a driver, about which
    SQLAlchemy does not know, is not noticed.

    :param states: tells what the session is going to write.
    :param connection: the one that it is going to write to, if that is known; else any of those
        that its transaction has.
    :raises AutocommitError: it is going to write such a row to one of the connections.
    """
    if not (post_save.table.durable or post_delete.table.durable):
        return
    connections = connections_of(session) if connection is None else [connection]
    engines = {one.engine for one in connections if is_autocommit(one)}
    if not engines:
        return
    calls = Calls(session)
    for state in states():
        mapper = state.manager.mapper
        for signal in (post_save, post_delete):
            receivers = signal.table.lookup(mapper.class_, "durable")
            if receivers and (engine := calls[mapper].using(state.obj()).engine) in engines:
                raise AutocommitError(
                    f"{signal.name}: receiver {receivers[0]} is durable, but this session writes "
                    f"{mapper.class_.__name__} with isolation_level='AUTOCOMMIT' on {engine!r}, "
                    f"which commits each statement at once: a row could be there without its "
                    f"event. The flush has written nothing. Give sessions that write it an engine "
                    f"with transactions, and keep AUTOCOMMIT to those that do not"
                )


def committing(session: Session) -> None:
    """``before_commit``: of the root transaction, or of a savepoint."""
    if not (post_save.table.durable or post_delete.table.durable):
        return
    root = session.get_transaction()
    if root is None or _WRITTEN in root.__dict__ or not is_committing(root):
        return
    for _ in range(MAX_FLUSHES):
        if is_clean(session):
            break
        session.flush()
    root.__dict__[_WRITTEN] = True
    try:
        frame = transactions.net_frame(session)
        _write(session, frame, frame.effects)
    except BaseException:
        # As commit's own flush does that fails: else a second commit() would keep the rows alone.
        del root.__dict__[_WRITTEN]
        fail_transaction(session)
        raise


def flushed(session: Session, effects: Iterable[Effect]) -> None:
    """A flush wrote rows; if that was too late for :func:`committing`, they are written now."""
    root = session.get_transaction()
    if root is not None and _WRITTEN in root.__dict__:
        _write(session, transactions.net_frame(session), effects)


def left(session: Session, frame: Frame, connections: Iterable[Connection]) -> None:
    """A session was closed without a word in transactions that are not its own.

    Its events are left there as its rows are.
    """
    if not (post_save.table.durable or post_delete.table.durable):
        return
    for connection in connections:
        binds = connection, connection.engine
        effects = [effect for effect in frame.effects if effect.source.using in binds]
        if connection.in_transaction():
            _write(session, frame, effects, connection)
        elif effects:
            logger.error(
                "A session was closed after the transaction that it had joined on its Connection "
                "had ended, so the events of durable receivers could not be written with its rows. "
                "Call commit(), rollback() or close() of the session first."
            )


def _write(
    session: Session, frame: Frame, effects: Iterable[Effect], connection: Connection | None = None
) -> None:
    """One statement for each outbox and bind, which is one in all but unusual applications."""
    events: dict[tuple[Any, Any], Events] = {}
    outboxes: dict[Mapper[Any], Any] = {}
    audiences = Audiences()
    named: Sequence[Receiver] = ()
    names: tuple[str, ...] = ()
    for effect in effects:
        receivers = delivery.receivers_for(effect, "durable", audiences)
        if not receivers:
            continue
        mapper = state_of(effect.instance).manager.mapper
        outbox = outboxes.get(mapper)
        if outbox is None:
            if is_sharded(session):
                raise InstallError(
                    f"receiver {receivers[0]} is durable, and {mapper.class_.__name__} was written "
                    f"with {type(session).__name__}, with which durable delivery does not work: a "
                    f"message would have to say in which shard its receiver works. Nothing was "
                    f"committed. Use on='commit' there, or sessions on one shard each"
                )
            outbox = outboxes[mapper] = outbox_of(mapper, receivers[0])
        if receivers is not named:
            named, names = receivers, tuple(receiver.name for receiver in receivers)
        there = outbox, effect.source.using
        if there not in events:
            events[there] = Events(session, frame)
        events[there].add(effect, names)
    for (outbox, using), found in events.items():
        outbox.write(connection or session.connection(bind_arguments={"bind": using}), found)
