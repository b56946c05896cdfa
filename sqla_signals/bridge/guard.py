"""While a flush receiver runs, its session must not be flushed, committed, rolled back, closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from .._sqlalchemy import keep_flushing
from ..errors import SessionInFlushError

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

_FLUSH: Final = (
    "leave it out: what a pre_* receiver changes is part of this flush, what a post_* receiver "
    "changes goes out with the next one"
)
_COMMIT: Final = 'leave it out, the caller commits; for work after the commit use on="commit"'
_ROLLBACK: Final = "raise an exception instead: it reaches the caller, who rolls back"
_CLOSE: Final = "leave it to whoever opened the session"
_SAVEPOINT: Final = "for SQL of your own that may fail, use session.connection().begin_nested()"

_OF_SESSION: Final = {
    "flush": _FLUSH,
    "commit": _COMMIT,
    "prepare": _COMMIT,
    "rollback": _ROLLBACK,
    "close": _CLOSE,
    "reset": _CLOSE,
    "invalidate": _CLOSE,
}
GUARDED_BEFORE: Final = {"begin_nested": _SAVEPOINT}
"""Also forbidden in ``pre_*``: rolled back, the savepoint would expunge what is to be flushed."""
_OF_SESSION_IN_BULK: Final = {name: why for name, why in _OF_SESSION.items() if name != "flush"}
_IN_FLUSH: Final = "was called inside a flush receiver; the flush is not finished"
_BULK: Final = "was called inside a receiver of a statement; its caller is not finished"
_OF_TRANSACTION: Final = {"commit": _COMMIT, "rollback": _ROLLBACK, "close": _CLOSE}


@contextmanager
def guarded(session: Session, more: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Make the forbidden methods raise :class:`SessionInFlushError`, for this one session.

    They are shadowed on the instances, because SQLAlchemy's events come too late: ``commit()``
    inside ``after_flush_postexec`` ends the flush's own subtransaction before any of them.
    """
    with ExitStack() as stack:
        stack.enter_context(_shadowed(session, "Session", {**_OF_SESSION, **more}))
        for transaction in {session.get_transaction(), session.get_nested_transaction()} - {None}:
            stack.enter_context(_shadowed(transaction, "SessionTransaction", _OF_TRANSACTION))
        yield


@contextmanager
def guarded_bulk(session: Session) -> Iterator[None]:
    """The same around a statement about many rows, where a flush does no harm."""
    with ExitStack() as stack:
        stack.enter_context(_shadowed(session, "Session", _OF_SESSION_IN_BULK, _BULK))
        for transaction in {session.get_transaction(), session.get_nested_transaction()} - {None}:
            stack.enter_context(
                _shadowed(transaction, "SessionTransaction", _OF_TRANSACTION, _BULK)
            )
        yield


@contextmanager
def _shadowed(
    owner: Any, kind: str, remedies: dict[str, str], where: str = _IN_FLUSH
) -> Iterator[None]:
    own: dict[str, Any] = owner.__dict__
    before = {name: own[name] for name in remedies if name in own}
    own.update(
        {
            name: _forbidden(f"{kind}.{name}() {where}", remedy, owner if name == "flush" else None)
            for name, remedy in remedies.items()
            if hasattr(owner, name)
        }
    )
    try:
        yield
    finally:
        for name in remedies:
            own.pop(name, None)
        own.update(before)


def _forbidden(call: str, remedy: str, flushing: Session | None) -> Callable[..., None]:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        if flushing is not None and keep_flushing(flushing):
            return  # a query after bulk_save_objects() and the like: it would autoflush
        error = SessionInFlushError(call)
        error.add_note(f"Remedy: {remedy}.")
        raise error

    return forbidden
