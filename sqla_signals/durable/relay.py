"""The relay: takes events out of the outbox and hands them to a publisher, until told to stop.

Several relays may work on one outbox, in threads, processes or machines.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Final

from sqlalchemy import Engine

from ..errors import ReceiverOptionError
from ..signals.signal import logger
from .outbox import Outbox, the_outbox
from .publishers import LocalPublisher, Publisher
from .sessions import Sessions, keep_to_one_loop
from .tables.holding import claims_for
from .waiting import Polling, waiting_for
from .worker import Worker

SHORTEST_POLL: Final = 0.05
LONGEST_POLL: Final = 1.0
LONGEST_PAUSE: Final = 30.0
"""Seconds between attempts while the database or the broker is down."""


_inside: ContextVar[Relay | None] = ContextVar("sqla_signals_relay", default=None)
"""The relay whose batch we are part of, also on the loop and in ``asyncio.to_thread``."""


class Relay:
    """Takes events out of the outbox and hands them to a publisher.

    :param sessions: what makes sessions on the database of the outbox, which is that of the models
        that write into it: a ``sessionmaker``, an ``async_sessionmaker``, an engine, or a function
        that returns a session. ``None``: the ``session_factory`` given to
        :func:`sqla_signals.install`.
    :param publisher: takes the messages; by default a :class:`LocalPublisher` with the same
        sessions, which runs the receivers right here.
    :param outbox: what :func:`outbox_table` returned; needed where there are several.
    :param batch_size: how many events to claim at once; by default what the publisher likes.
    :param max_attempts: after as many an event becomes a dead letter. The pauses between them begin
        with a second and double each time, up to an hour.
    :raises InstallError: there is no outbox, or its database is none that a relay works on.
    :raises ReceiverOptionError: less than one event at once, or than one attempt.
    """

    def __init__(
        self,
        sessions: Any = None,
        publisher: Publisher | None = None,
        *,
        outbox: Outbox | None = None,
        batch_size: int | None = None,
        max_attempts: int = 10,
    ) -> None:
        at_least_one("Relay", batch_size=batch_size, max_attempts=max_attempts)
        self.sessions: Sessions = sessions if isinstance(sessions, Sessions) else Sessions(sessions)
        self.publisher: Publisher = publisher or LocalPublisher(Worker(self.sessions))
        self.outbox: Outbox = outbox or the_outbox()
        self.batch_size: int = batch_size or self.publisher.batch_size
        keep_to_one_loop(self.engine)
        self._claims = claims_for(self.engine, self.outbox, max_attempts)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def engine(self) -> Engine:
        """The engine of the outbox: that of the models which write into it."""
        return self.sessions.engine_of(self.outbox)

    def run_once(self) -> int:
        """Publish one batch of the events that are due; return how many these were.

        An event whose receivers fail is put back, and not an error here.

        :raises Exception: the database or the publisher as a whole does not work. Nothing is lost.
        """
        inside = _inside.set(self)
        try:
            publish = self.publisher.publish
            return self.sessions.run(lambda: self._claims.work(self.batch_size, publish))
        finally:
            _inside.reset(inside)

    def run(self, *, handle_signals: bool = False) -> None:
        """Publish events and wait for more, until :meth:`stop` is called.

        :param handle_signals: stop at SIGTERM and SIGINT, after the batch at hand; a second one
            ends the process as it would have otherwise. For the main thread only.

        While the database or the broker is down it goes on trying, less and less often.
        """
        with self._handling() if handle_signals else nullcontext():
            logger.info("relay of %r is running", self.outbox)
            try:
                self._work(waiting_for(self.outbox, self.engine, self._stopping))
            except BaseException:
                # Nobody sees a SystemExit that ends a thread.
                logger.exception("relay of %r: nothing more is delivered", self.outbox)
                raise
            finally:
                logger.info("relay of %r has stopped", self.outbox)

    def _work(self, waiting: Polling) -> None:
        pause = SHORTEST_POLL
        while not self._stopping.is_set():
            longest = LONGEST_POLL
            try:
                if self.run_once():
                    pause = SHORTEST_POLL
                    continue
            except Exception:
                longest = LONGEST_PAUSE
                logger.exception("relay of %r: trying again in %.1f s", self.outbox, pause)
            # Anybody may notify, as often as they like: not more often than one polls otherwise.
            self._stopping.wait(SHORTEST_POLL)
            waiting.wait(pause * random.uniform(0.75, 1.25))
            pause = min(longest, pause * 2)
        waiting.end()

    @contextmanager
    def _handling(self) -> Iterator[None]:
        before: dict[int, Any] = {}

        def restore() -> None:
            while before:
                signal.signal(*before.popitem())

        def stop(*_: object) -> None:
            restore()
            # Not here: the signal may have come while this thread holds the lock of the event.
            threading.Thread(target=self._stopping.set).start()

        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            restore()

    def stop(self) -> None:
        """Let :meth:`run` return once the batch at hand is done; for good, but for :meth:`start`.

        Waits for the thread of :meth:`start`, if there is one; not when a receiver calls it, for
        which that thread waits.
        """
        self._stopping.set()
        if (
            self._thread is not None
            and self._thread is not threading.current_thread()
            and _inside.get() is not self
        ):
            self._thread.join()
            self._thread = None

    def start(self) -> None:
        """Do :meth:`run` in a thread of this process, until :meth:`stop` or the process ends."""
        if self._stopping.is_set():
            self.stop()  # a receiver may have, and its thread is not at its end yet
        self._stopping.clear()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self.run, name="sqla_signals relay", daemon=True)
            self._thread.start()

    def __enter__(self) -> Relay:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def at_least_one(what: str, **options: int | None) -> None:
    """Refuse numbers below one, with which nothing would ever be delivered."""
    for name, number in options.items():
        if number is not None and number < 1:
            raise ReceiverOptionError(f"{what}({name}={number}): it must be 1 or more")
