"""Where each statement is committed at once, no event can be written together with its row.

So a flush of rows with durable receivers is refused on an AUTOCOMMIT connection, before its first
statement. What SQLAlchemy does not know of, a driver's own autocommit, is not noticed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from ..._sqlalchemy.transactions import is_autocommit
from ...errors import AutocommitError
from ...signals.builtin import post_delete, post_save
from ..calling.calls import Calls, is_sharded
from .flush import states_in_flush
from .foresight import Foresight

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import InstanceState, Mapper, Session

    State = InstanceState[Any]

_CONNECTIONS: Final = "sqla_signals.autocommit"
"""Kept on the root transaction: the connections that are in it by name only."""


def begun(session: Session, connection: Connection) -> None:
    """``after_begin``: the transaction has got a connection, maybe in the middle of a flush."""
    if is_autocommit(connection):
        root = session.get_transaction()
        assert root is not None
        root.__dict__.setdefault(_CONNECTIONS, []).append(connection)
        _refuse(session, [connection], states_in_flush(session))


def flushing(session: Session, objects: Iterable[object] | None) -> None:
    """``before_flush``: of a session whose connections may be there already."""
    root = session.get_transaction()
    connections = root.__dict__.get(_CONNECTIONS) if root is not None else None
    if connections and (post_save.table.durable or post_delete.table.durable):
        rows = Foresight(session, objects)
        derived = [row.state for row in rows.derived()]
        states = [*rows.inserts, *rows.updates, *rows.deletes, *derived]
        _refuse(session, connections, states)


def _refuse(session: Session, connections: list[Connection], states: Iterable[State]) -> None:
    if not (post_save.table.durable or post_delete.table.durable):
        return
    calls = Calls(session)
    asked: set[Mapper[Any]] = set()
    for state in states:
        mapper = state.manager.mapper
        if mapper in asked:
            continue
        # With horizontal sharding each row has its own bind.
        if not is_sharded(session):
            asked.add(mapper)
        receivers = [
            (signal, receiver)
            for signal in (post_save, post_delete)
            for receiver in signal.table.lookup(mapper.class_, "durable")
        ]
        if not receivers:
            continue
        engine = calls[mapper].using(state.obj()).engine
        if any(connection.engine is engine for connection in connections):
            signal, receiver = receivers[0]
            raise AutocommitError(
                f"{signal.name}: receiver {receiver} is durable, but this session writes "
                f"{mapper.class_.__name__} with isolation_level='AUTOCOMMIT' on {engine!r}, which "
                f"commits each statement at once: a row could be there without its event. The "
                f"flush has written nothing. Give sessions that write it an engine with "
                f"transactions, and keep AUTOCOMMIT to those that do not"
            )
