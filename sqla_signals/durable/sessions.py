"""Where relays and workers get their sessions from, and the loop on which asynchronous ones run."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util import greenlet_spawn

from .. import mapping
from ..errors import InstallError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

T = TypeVar("T")


class Sessions:
    """Makes sessions, and runs what uses them where that is possible.

    :param source: a ``sessionmaker``, an ``async_sessionmaker``, an ``Engine``, an ``AsyncEngine``,
        a ``scoped_session``, or any function that returns a ``Session`` or an ``AsyncSession``.
        ``None``: the ``session_factory`` that was given to :func:`sqla_signals.install`.
    :raises InstallError: ``source`` makes no sessions.
    """

    def __init__(self, source: Any = None) -> None:
        self._factory = _factory(source)
        made = self._factory()
        sync = getattr(made, "sync_session", made)
        if not isinstance(sync, Session):
            raise InstallError(f"{source!r} makes no Session and no AsyncSession, but {made!r}")
        self.is_async: bool = made is not sync
        """Whether they are ``AsyncSession``s."""

    def make(self) -> tuple[Session, AsyncSession | None]:
        """A new session, and the ``AsyncSession`` in front of it if there is one."""
        made = self._factory()
        sync = getattr(made, "sync_session", made)
        return sync, made if self.is_async else None

    def run(self, fn: Callable[[], T]) -> T:
        """Call ``fn``, which may use the sessions; asynchronous ones on a loop of their own."""
        return _loop().run(fn) if self.is_async else fn()


def _factory(source: Any) -> Callable[[], Any]:
    if source is None:
        factories = {one.session_factory for one in mapping.installations if one.session_factory}
        if len(factories) == 1:
            found: Callable[[], Any] = factories.pop()
            return found
        raise InstallError(
            "where should a relay or a worker get its sessions from? Give it a sessionmaker, an "
            "async_sessionmaker or an engine, or call sqla_signals.install(session_factory=...) "
            "before, once"
        )
    if isinstance(source, scoped_session):
        return _factory(source.session_factory)
    if isinstance(source, Engine):
        return sessionmaker(source, expire_on_commit=False)
    extension: Any = sys.modules.get("sqlalchemy.ext.asyncio")
    if extension is not None:
        if isinstance(source, extension.async_scoped_session):
            return _factory(source.session_factory)
        if isinstance(source, extension.AsyncEngine):
            maker: Callable[[], Any] = extension.async_sessionmaker(source, expire_on_commit=False)
            return maker
    if isinstance(getattr(source, "session", None), scoped_session):  # Flask-SQLAlchemy's db
        return _factory(source.session)
    if not callable(source):
        raise InstallError(
            f"{source!r} makes no sessions. Give a sessionmaker, an async_sessionmaker, an "
            f"engine, or a function that returns a session"
        )
    made: Callable[[], Any] = source
    return made


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="sqla_signals", daemon=True
        )
        self._thread.start()

    def run(self, fn: Callable[[], T]) -> T:
        if threading.current_thread() is self._thread:  # called by what we run
            return fn()
        future = asyncio.run_coroutine_threadsafe(greenlet_spawn(fn), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


_running: _Loop | None = None
_lock = threading.Lock()


def _loop() -> _Loop:
    """The one loop of this process: the connections of a pool belong to the loop that made them."""
    global _running
    with _lock:
        if _running is None or _running.pid != os.getpid():  # forked: the thread stayed behind
            _running = _Loop()
        return _running
