"""What ``install`` takes: all the things that make sessions, and the class of these."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from sqlalchemy.orm import Session, sessionmaker

from .._sqlalchemy.sessions import maker_behind
from ..errors import InstallError


class Target(NamedTuple):
    """Whose work signals are sent for."""

    sessions: Any
    """The ``Session`` class, or the one session, whose events to listen to."""
    async_class: type | None = None
    """The class of the ``AsyncSession`` that must be in front, where others share the class."""
    maker: Callable[[], Any] | None = None
    """Makes more of these sessions, if that is what was given."""


def session_target(target: Any) -> Target:
    """Whose work ``install(target)`` is about.

    :raises InstallError: it makes no sessions.
    """
    maker = maker_behind(target)
    found = _of_sync(maker) or _of_async(maker)
    if found is None:
        raise InstallError(
            f"install({target!r}): not something that makes sessions. Give a Session class, a "
            f"sessionmaker, a scoped_session, an AsyncSession class, an async_sessionmaker, a "
            f"Flask-SQLAlchemy db, or nothing for every session."
        )
    return found


def _of_sync(target: Any) -> Target | None:
    if isinstance(target, sessionmaker):
        return Target(target.class_, maker=target)
    if isinstance(target, Session) or (isinstance(target, type) and issubclass(target, Session)):
        return Target(target)
    return None


def _of_async(target: Any) -> Target | None:
    asyncio: Any = sys.modules.get("sqlalchemy.ext.asyncio")
    if asyncio is None:
        return None
    if isinstance(target, asyncio.async_sessionmaker):
        if "_made_by" not in target.class_.__dict__:
            # A class of its own, as a sessionmaker gives itself, to know its sessions by.
            own = (target.class_,)
            target.class_ = type(target.class_.__name__, own, {"_made_by": "sqla_signals"})
        sync: Any = target.kw.get("sync_session_class") or target.class_.sync_session_class
        return Target(session_target(sync).sessions, target.class_, target)
    if isinstance(target, asyncio.AsyncSession):
        return Target(target.sync_session)
    if isinstance(target, type) and issubclass(target, asyncio.AsyncSession):
        sync = target.sync_session_class  # type: ignore[attr-defined]
        return Target(sync, target)
    return None
