"""Transactions of a session: which one it is in, and what is happening to it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState


def current_transaction(session: Session) -> SessionTransaction | None:
    """The innermost transaction of the session: a root, a savepoint, or a subtransaction.

    ``get_nested_transaction()`` does not do: when a root was committed with a savepoint open, it
    still returns that savepoint.
    """
    return session._transaction


def is_committing(transaction: SessionTransaction) -> bool:
    """Whether this transaction is being committed: in ``before_commit``, and its own flushes.

    The event names the session only, and is sent for a root transaction and a savepoint alike.
    """
    return transaction._current_fn is not None


def is_committed(transaction: SessionTransaction) -> bool:
    """In ``after_commit``: whether it is this transaction that was committed."""
    return transaction._state is SessionTransactionState.COMMITTED


def is_rolled_back(transaction: SessionTransaction) -> bool:
    """In ``after_rollback``: whether it is this transaction that was rolled back."""
    return transaction._state is SessionTransactionState.DEACTIVE


def has_joined(transaction: SessionTransaction, connection: Connection) -> bool:
    """In ``after_begin``: whether somebody else has begun the transaction of the connection.

    The session does not commit such a transaction, and closing the session does not end it.
    """
    _, _, should_commit, _ = transaction._connections[connection]
    return not should_commit


def is_autocommit(connection: Connection) -> bool:
    """Whether the isolation level given to SQLAlchemy for a connection is AUTOCOMMIT."""
    return connection._is_autocommit_isolation()


def schema_maps(transaction: SessionTransaction) -> dict[Engine, Any]:
    """In ``after_commit``: the ``schema_translate_map`` of each connection that has one."""
    found = {}
    for connection, *_ in transaction._connections.values():
        schema_map = connection.get_execution_options().get("schema_translate_map")
        if schema_map:
            found[connection.engine] = schema_map
    return found


def fail_transaction(session: Session) -> None:
    """Roll back to the innermost savepoint, or everything, as a flush does that fails.

    To be called while an exception is handled. The session refuses to work until its user has
    rolled back as well, so that the rest is not committed by mistake.
    """
    session._autobegin_t()._begin().rollback(_capture_exception=True)


def connections_of(session: Session) -> list[Connection]:
    """The connections of the transaction that a session is in."""
    root: Any = session.get_transaction()
    return [] if root is None else [connection for connection, *_ in root._connections.values()]
