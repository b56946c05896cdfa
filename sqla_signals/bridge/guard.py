"""While a flush receiver runs, its session must not be flushed, committed, rolled back, closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import SessionInFlushError

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

_REMEDY = {
    "flush": "leave it out: what a pre_* receiver changes is part of this flush, what a post_* "
    "receiver changes goes out with the next one",
    "commit": "leave it out: the caller commits",
    "rollback": "raise an exception instead: it reaches the caller, who rolls back",
    "close": "leave it to whoever opened the session",
    "reset": "leave it to whoever opened the session",
    "invalidate": "leave it to whoever opened the session",
    "prepare": "leave it to whoever opened the session",
}


@contextmanager
def guarded(session: Session) -> Iterator[None]:
    """Make the forbidden methods of this one session raise :class:`SessionInFlushError`.

    They are shadowed on the instance, because SQLAlchemy's events come too late: ``commit()``
    inside ``after_flush_postexec`` ends the flush's own subtransaction before any of them.
    """
    shadowed = {name: session.__dict__[name] for name in _REMEDY if name in session.__dict__}
    session.__dict__.update({name: _forbid(name) for name in _REMEDY if hasattr(session, name)})
    try:
        yield
    finally:
        for name in _REMEDY:
            session.__dict__.pop(name, None)
        session.__dict__.update(shadowed)


def _forbid(name: str) -> Callable[..., NoReturn]:
    def forbidden(*args: Any, **kwargs: Any) -> NoReturn:
        error = SessionInFlushError(
            f"Session.{name}() was called inside a flush receiver; the flush is not finished"
        )
        error.add_note(f"Remedy: {_REMEDY[name]}.")
        raise error

    return forbidden
