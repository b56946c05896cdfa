"""``raw``: mark what a session writes as loaded from a fixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from ..._sqlalchemy.sessions import is_scoped, plain_session
from ...errors import InstallError
from .calls import RAW

if TYPE_CHECKING:
    from types import TracebackType


class raw:
    """Mark what a session writes inside the block as ``raw=True``, for loading fixtures.

    :param session: a ``Session``, for ``with``; or an ``AsyncSession``, for ``async with``.

    What is pending at the end of the block is flushed there, so that it is raw as well; not after
    an exception. Blocks may nest.
    """

    def __init__(self, session: Any) -> None:
        self._session = session() if is_scoped(session) else session
        self._sync: Session = plain_session(self._session)
        if not isinstance(self._sync, Session):
            raise InstallError(f"raw({session!r}): give a Session or an AsyncSession")

    def _enter(self) -> None:
        self._sync.info[RAW] = self._sync.info.get(RAW, 0) + 1

    def _exit(self) -> None:
        self._sync.info[RAW] -= 1
        if not self._sync.info[RAW]:
            del self._sync.info[RAW]

    def __enter__(self) -> None:
        if self._session is not self._sync:
            raise InstallError(f"raw({self._session!r}): with an AsyncSession, use 'async with'")
        self._enter()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc is None:
                self._sync.flush()
        finally:
            self._exit()

    async def __aenter__(self) -> None:
        if self._session is self._sync:
            raise InstallError(f"raw({self._session!r}): with a plain Session, use 'with'")
        self._enter()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc is None:
                await self._session.flush()
        finally:
            self._exit()
