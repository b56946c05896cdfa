"""How a relay waits for more to do: for a while, or until PostgreSQL says that there is some."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from ..signals.signal import logger

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from .outbox import Outbox


class Polling:
    """Lets the relay wait until its next poll is due, or it is stopped."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping

    def wait(self, seconds: float) -> None:
        """Return after so many seconds, or when the relay is stopped."""
        self._stopping.wait(seconds)

    def end(self) -> None:
        """Give back what was needed for waiting, which is nothing here."""


class Listening(Polling):
    """Ends the waiting at a ``NOTIFY`` of the outbox, for which it has a connection of its own."""

    def __init__(self, stopping: threading.Event, engine: Engine, channel: str) -> None:
        super().__init__(stopping)
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._channel = channel
        self._connection: Connection | None = None
        self._failing = False

    def wait(self, seconds: float) -> None:
        """Return after so many seconds, or when something was written."""
        try:
            driver = self._listen()
            for _ in driver.notifies(timeout=seconds, stop_after=1):
                break
            self._failing = False
        except Exception:
            if not self._failing:
                logger.warning(
                    "listening on %s failed; polling until it works", self._channel, exc_info=True
                )
            self._failing = True
            self.end()
            super().wait(seconds)

    def _listen(self) -> Any:
        if self._connection is None:
            self._connection = self._engine.connect()
            quote = self._engine.dialect.identifier_preparer.quote_identifier
            self._connection.exec_driver_sql(f"LISTEN {quote(self._channel)}")
        return self._connection.connection.driver_connection

    def end(self) -> None:
        """Close the connection, which must not go back to the pool: it would go on listening."""
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None


def waiting_for(outbox: Outbox, engine: Engine, stopping: threading.Event) -> Polling:
    """Listening, where the outbox notifies and the driver can wait for that, as psycopg can."""
    if outbox.notify and engine.dialect.name == "postgresql":
        if engine.dialect.driver == "psycopg" and not engine.dialect.is_async:
            return Listening(stopping, engine, outbox.channel)
        logger.warning(
            "%r notifies, but a relay listens with psycopg and plain sessions only; polling", outbox
        )
    return Polling(stopping)
