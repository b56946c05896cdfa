"""While a receiver runs, its session must not be flushed, committed, rolled back, closed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy.orm import Session, SessionTransaction

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

    from sqlalchemy.orm import InstanceState

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

Method = Callable[..., Any]

_ENDING: Final[Mapping[str, str]] = {
    "commit": _COMMIT,
    "prepare": _COMMIT,
    "rollback": _ROLLBACK,
    "close": _CLOSE,
    "reset": _CLOSE,
    "invalidate": _CLOSE,
}
_BEGINNING: Final[Mapping[str, str]] = {"begin": _STATEMENTS, "begin_nested": _STATEMENTS}
_OF_TRANSACTION: Final[Mapping[str, str]] = {
    "commit": _COMMIT,
    "rollback": _ROLLBACK,
    "close": _CLOSE,
}


def _refusing(owner: type, during: str, remedies: Mapping[str, str]) -> dict[str, Method]:
    """Functions that raise, in place of those methods that the owner has."""

    def refusing(name: str) -> Method:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise _error(
                f"{owner.__name__}.{name}() was called by a receiver of {during}, which is not "
                f"over",
                remedies[name],
            )

        return refuse

    return {name: refusing(name) for name in remedies if hasattr(owner, name)}


class Guard(NamedTuple):
    """What must not be called while a receiver runs; made once, because small flushes are many."""

    of_session: Mapping[str, Method]
    of_transaction: Mapping[str, Method]
    savepoints: bool = False
    """Whether :func:`_begin` lets savepoints be begun."""


IN_STATEMENT: Final = Guard(
    _refusing(Session, "a statement", _ENDING),
    _refusing(SessionTransaction, "a statement", _OF_TRANSACTION),
)
"""In a receiver of a statement about many rows."""
IN_DURABLE: Final = Guard(
    _refusing(Session, "a durable event", dict.fromkeys(_ENDING, _COMMITTED)),
    _refusing(SessionTransaction, "a durable event", dict.fromkeys(_OF_TRANSACTION, _COMMITTED)),
)
"""In a durable receiver, whose session a worker commits."""
_IN_FLUSH: Final = Guard(
    _refusing(Session, "a flush", {"flush": _FLUSH, **_ENDING}),
    _refusing(SessionTransaction, "a flush", _OF_TRANSACTION),
)
IN_POST: Final = _IN_FLUSH._replace(savepoints=True)
"""In a ``post_*`` receiver of a flush."""
IN_PRE: Final = _IN_FLUSH._replace(
    of_session={**_IN_FLUSH.of_session, **_refusing(Session, "a flush", _BEGINNING)}
)
"""In a ``pre_*`` receiver: rolled back, a savepoint would expunge what is to be flushed."""


class guarded:
    """Make the forbidden methods raise :class:`SessionInFlushError`, for this one session.

    They are shadowed on the instances, because SQLAlchemy's events come too late: ``commit()``
    inside ``after_flush_postexec`` ends the flush's own subtransaction before any of them.

    :param guard: what is forbidden.
    """

    __slots__ = ("_guard", "_session", "_shadowed")

    def __init__(self, session: Session, guard: Guard) -> None:
        self._session = session
        self._guard = guard
        self._shadowed: list[tuple[dict[str, Any], dict[str, Any], Iterable[str]]] = []

    def __enter__(self) -> None:
        session, guard = self._session, self._guard
        methods = dict(guard.of_session)
        if "flush" in methods:
            methods["flush"] = partial(_flush, session, methods["flush"])
        if guard.savepoints:
            methods["begin"] = _begin(session, session.begin)
        self._shadow(session, methods)
        root, savepoint = session.get_transaction(), session.get_nested_transaction()
        if root is not None:
            self._shadow(root, guard.of_transaction)
        if savepoint is not None and savepoint is not root:
            self._shadow(savepoint, guard.of_transaction)

    def _shadow(self, owner: Any, methods: Mapping[str, Method]) -> None:
        own: dict[str, Any] = owner.__dict__
        # An outer block's, or the application's; they come back after this one.
        before = {name: own[name] for name in own.keys() & methods.keys()}
        self._shadowed.append((own, before, methods))
        own.update(methods)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for own, before, methods in self._shadowed:
            for name in methods:
                if name in own:
                    del own[name]
            if before:
                own.update(before)


def _flush(session: Session, refuse: Method, *args: Any, **kwargs: Any) -> None:
    """``Session.flush()`` in a flush, called by a receiver or by an autoflush of SQLAlchemy's."""
    if not keep_flushing(session):  # else by a query after bulk_save_objects() and the like
        refuse()


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
