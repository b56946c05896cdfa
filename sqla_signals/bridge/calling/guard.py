"""While a receiver runs, its session must not be flushed, committed, rolled back, closed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from ..._sqlalchemy.instances import PASSIVE_NO_INITIALIZE, has_pending_mutations
from ..._sqlalchemy.unit_of_work import (
    deleted_states,
    keep_flushing,
    modified_states,
    pending_states,
)
from ...errors import SessionInFlushError

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy.orm import InstanceState, Session, SessionTransaction

    State = InstanceState[Any]

_FLUSH: Final = (
    "leave it out: what a pre_* receiver changes is part of this flush, what a post_* receiver "
    "changes goes out with the next one"
)
_COMMIT: Final = 'leave it out, the caller commits; for work after the commit use on="commit"'
_ROLLBACK: Final = "raise an exception instead: it reaches the caller, who rolls back"
_CLOSE: Final = "leave it to whoever opened the session"
_STATEMENTS: Final = "for SQL of your own that may fail, use session.connection().begin_nested()"
_NOT_FLUSHED: Final = (
    "write with statements inside of the savepoint, session.execute(insert(...)), where the row "
    "may be there already with on_conflict_do_nothing(); or leave the savepoint out: what is added "
    "or changed goes out with the next flush"
)

_COMMITTED: Final = (
    "leave it out: the session is committed when the receiver returns, together with the note that "
    "the event is done, and rolled back when the receiver raises an exception. Work of its own can "
    "have a session of its own"
)

IN_STATEMENT: Final[Mapping[str, str]] = {
    "commit": _COMMIT,
    "prepare": _COMMIT,
    "rollback": _ROLLBACK,
    "close": _CLOSE,
    "reset": _CLOSE,
    "invalidate": _CLOSE,
}
"""What is forbidden in a receiver of a statement about many rows, with the remedies."""
IN_DURABLE: Final[Mapping[str, str]] = dict.fromkeys(IN_STATEMENT, _COMMITTED)
"""The same in durable receivers, whose session a worker commits."""
IN_POST: Final[Mapping[str, str]] = {"flush": _FLUSH, **IN_STATEMENT}
"""The same in ``post_*`` receivers of a flush."""
IN_PRE: Final[Mapping[str, str]] = {**IN_POST, "begin": _STATEMENTS, "begin_nested": _STATEMENTS}
"""The same in ``pre_*``: rolled back, a savepoint would expunge what is to be flushed."""
_OF_TRANSACTION: Final = ("commit", "rollback", "close")


class guarded:
    """Make the forbidden methods raise :class:`SessionInFlushError`, for this one session.

    They are shadowed on the instances, because SQLAlchemy's events come too late: ``commit()``
    inside ``after_flush_postexec`` ends the flush's own subtransaction before any of them.

    :param forbidden: the methods of the session, with what to do instead.
    """

    __slots__ = ("_forbidden", "_session", "_shadowed")

    def __init__(self, session: Session, forbidden: Mapping[str, str]) -> None:
        self._session = session
        self._forbidden = forbidden
        self._shadowed: list[tuple[dict[str, Any], Mapping[str, Any]]] = []

    def __enter__(self) -> None:
        session, forbidden = self._session, self._forbidden
        during = "a flush"
        if forbidden is IN_STATEMENT:
            during = "a statement"
        elif forbidden is IN_DURABLE:
            during = "a durable event"
        methods: dict[str, Callable[..., Any]] = {
            name: _forbidden(f"Session.{name}()", during, remedy, session)
            for name, remedy in forbidden.items()
            if hasattr(session, name)
        }
        if forbidden is IN_POST:
            methods["begin"] = _begin(session, session.begin)
        self._shadow(session, methods)
        for transaction in {session.get_transaction(), session.get_nested_transaction()} - {None}:
            self._shadow(
                transaction,
                {
                    name: _forbidden(f"SessionTransaction.{name}()", during, forbidden[name])
                    for name in _OF_TRANSACTION
                },
            )

    def _shadow(self, owner: Any, methods: Mapping[str, Any]) -> None:
        own: dict[str, Any] = owner.__dict__
        self._shadowed.append((own, {name: own.get(name) for name in methods}))
        own.update(methods)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for own, before in self._shadowed:
            for name, method in before.items():
                if method is None:
                    own.pop(name, None)
                else:
                    own[name] = method


def _forbidden(
    call: str, during: str, remedy: str, session: Session | None = None
) -> Callable[..., None]:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        if session is not None and call == "Session.flush()" and keep_flushing(session):
            return  # a query after bulk_save_objects() and the like: it would autoflush
        raise _error(f"{call} was called by a receiver of {during}, which is not over", remedy)

    return forbidden


def _error(message: str, remedy: str) -> SessionInFlushError:
    error = SessionInFlushError(message)
    error.add_note(f"Remedy: {remedy}.")
    return error


def _begin(
    session: Session, begin: Callable[..., SessionTransaction]
) -> Callable[..., SessionTransaction]:
    """``Session.begin()`` for ``post_*`` receivers: their savepoints hold statements only.

    Nothing flushes before such a savepoint begins, nor before it ends (``_take_snapshot`` and
    ``_prepare_impl`` of orm/session.py): the session is flushing already.
    """

    def begin_savepoint(*args: Any, **kwargs: Any) -> SessionTransaction:
        before = _unflushed(session)
        savepoint = begin(*args, **kwargs)
        commit, rollback = savepoint.commit, savepoint.rollback

        def release(*args: Any, **kwargs: Any) -> None:
            del savepoint.__dict__["commit"], savepoint.__dict__["rollback"]
            if any(before.get(state) != changes for state, changes in _unflushed(session).items()):
                raise _error(
                    "a savepoint that a post_* receiver has begun ends with changes that are not "
                    "flushed, and so not part of it",
                    _NOT_FLUSHED,
                )
            commit(*args, **kwargs)

        def undo(*args: Any, **kwargs: Any) -> None:
            del savepoint.__dict__["commit"], savepoint.__dict__["rollback"]
            rollback(*args, **kwargs)
            if before:
                raise _error(
                    "the rollback of a savepoint that a post_* receiver has begun has thrown away "
                    "changes from before it, which were not flushed",
                    _STATEMENTS,
                )

        savepoint.__dict__.update(commit=release, rollback=undo)
        return savepoint

    return begin_savepoint


def _unflushed(session: Session) -> dict[State, tuple[Any, ...]]:
    """What the next flush has to write: how each state was changed, by attribute and otherwise."""
    pending, deleted = pending_states(session), deleted_states(session)
    changes = {
        state: (state in pending, state in deleted, has_pending_mutations(state), *_changed(state))
        for state in (*pending, *deleted, *modified_states(session))
    }
    return {state: how for state, how in changes.items() if any(how)}


def _changed(state: State) -> list[str]:
    return [
        key
        for key in state.committed_state
        if state.get_history(key, PASSIVE_NO_INITIALIZE).has_changes()
    ]
