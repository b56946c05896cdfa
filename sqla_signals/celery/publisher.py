"""The publisher that the relay has, and the task that the workers run: two ends of one queue."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4, uuid5

from celery import signals
from celery.exceptions import Reject, Retry, SoftTimeLimitExceeded

from ..durable import BusyError, MalformedMessageError, Message, UnknownModelError, Worker
from ..durable.message.naming import find_mapper
from ..durable.outbox import models_by_outbox, the_outbox
from ..durable.relay import at_least_one
from ..durable.sessions import bind_for_writing, engines_of
from ..durable.tables.dead_letters import bury_message, no_message
from ..durable.tables.failures import pause_after
from ..errors import InstallError, ReceiverOptionError, SignalsError, printable
from ..receivers.mapped import known_outbox
from ..signals.signal import logger
from .checks import TASK_OPTIONS, check, warn_of_forgetting, warn_of_pickle
from .sending import Parcel, Sender

if TYPE_CHECKING:
    from celery import Celery
    from sqlalchemy import Engine

    from ..durable import Outbox

LONGEST_RETRY: Final = 600.0
"""Seconds before a failed receiver is called again, at most.

Or half the visibility timeout of Redis, which counts while a worker holds a task back.
"""

_REJECTED: Final = 1.0
"""Seconds before a task that could not be sent again goes back to the broker."""

_MAX_RETRIES: Final = 1_000_000_000


class MessageTooLargeError(SignalsError, ValueError):
    """A message is larger than ``max_bytes``."""


class CeleryPublisher:
    """Hands messages to Celery, whose workers run the receivers.

    :param app: the Celery app, with its settings.
    :param sessions: what makes the sessions of the receivers, as for
        :class:`~sqla_signals.durable.Worker`.
    :param queue: the name of the queue; by default where the app routes the task.
    :param events_per_message: how many calls of receivers travel and run as one task. More is much
        faster in the relay and the broker; they then run one after the other in one worker.
    :param max_attempts: after as many a receiver is given up for this event: a dead letter.
    :param max_bytes: larger messages are refused; they stay in the outbox and become dead letters.
    :param name: the name of the task; one for each publisher of an app.
    :param batch_size: how many events a relay claims at once.
    :raises InstallError: settings of the app would lose events; it says which, and what to set.
    :raises ReceiverOptionError: the app has a task of that name, or a number is below one.

    Make it where both the relay and the workers import it: it registers the task with the app.
    """

    def __init__(
        self,
        app: Celery,
        sessions: Any = None,
        *,
        queue: str | None = None,
        events_per_message: int = 1,
        max_attempts: int = 10,
        max_bytes: int = 8_000_000,
        name: str = "sqla_signals.run",
        batch_size: int | None = None,
    ) -> None:
        at_least_one(
            "CeleryPublisher",
            events_per_message=events_per_message,
            max_attempts=max_attempts,
            max_bytes=max_bytes,
            batch_size=batch_size,
        )
        if name in app.tasks:
            raise ReceiverOptionError(
                f"the Celery app {app.main!r} has a task {name!r} already. A second publisher "
                f"needs a name of its own: CeleryPublisher(..., name='{name}.too')"
            )
        self.app: Celery = app
        self.events_per_message: int = events_per_message
        self.max_attempts: int = max_attempts
        self.max_bytes: int = max_bytes
        self.batch_size: int = batch_size or max(100, 10 * events_per_message)
        self._sessions = sessions
        self._pid = os.getpid()

        def run(task: Any, *texts: str) -> None:
            self._run(task, texts)

        self.task: Any = app.task(
            run, bind=True, name=name, shared=False, max_retries=None, **TASK_OPTIONS
        )
        check(app, self.task)
        warn_of_pickle(app)
        self._sender = Sender(app, name, {} if queue is None else {"queue": queue})
        signals.celeryd_after_setup.connect(self._worker_set_up)
        signals.worker_process_init.connect(self._forked)

    # -- the relay's end ---------------------------------------------------------------------------

    def publish(self, messages: Sequence[Message]) -> Mapping[Message, Exception]:
        """Send the messages as tasks; return those that the broker did not take.

        :raises Exception: the broker is down, or its queue is full to the last message.
        """
        failures: dict[Message, Exception] = {}
        parcels = self._pack(messages, failures)
        refused = self._sender.send(parcels) if parcels else {}
        if parcels and len(refused) == len(parcels):
            error = next(iter(refused.values()))
            if isinstance(error, BusyError):
                raise error
        for parcel, error in refused.items():
            failures.update(dict.fromkeys(parcel.messages, error))
        return failures

    def close(self) -> None:
        """Close the connection to the broker; publishing opens another."""
        self._sender.close()

    def _pack(
        self, messages: Sequence[Message], failures: dict[Message, Exception]
    ) -> list[Parcel]:
        parcels = []
        waiting: list[tuple[Message | None, str]] = []
        size = 0
        for message in messages:
            try:
                text = message.to_json()
                length = len(text)  # which is ASCII
                if length > self.max_bytes:
                    raise MessageTooLargeError(
                        f"event {message.id} is a message of {length:,} bytes, and max_bytes is "
                        f"{self.max_bytes:,}. Keep large columns out of messages with info=SECRET"
                    )
            except Exception as error:
                failures[message] = error
                continue
            if waiting and (
                len(waiting) == self.events_per_message or size + length > self.max_bytes
            ):
                parcels.append(_parcel(waiting))
                waiting, size = [], 0
            waiting.append((message, text))
            size += length
        if waiting:
            parcels.append(_parcel(waiting))
        return parcels

    # -- the worker's end --------------------------------------------------------------------------

    @cached_property
    def worker(self) -> Worker:
        """What runs the messages."""
        return self._sessions if isinstance(self._sessions, Worker) else Worker(self._sessions)

    def _run(self, task: Any, texts: Sequence[str]) -> None:
        attempt = _checked_attempt(task.request.retries)
        failed: list[tuple[Message | None, str, Exception]] = []
        waiting = [*texts]
        while waiting:
            text = waiting.pop(0)
            message = None
            try:
                message = Message.from_json(text)
                self.worker.run(message, attempt)
            except SoftTimeLimitExceeded as error:
                failed.append((message, text, error))
                # It comes once for each task: what is left would meet the hard limit next, which
                # nobody notes.
                self._send_again(waiting, {"retries": attempt - 1})
                break
            except Exception as error:
                failed.append((message, text, error))
            except SystemExit as error:
                if _is_told_to_end(error):
                    raise
                failed.append((message, text, _exited(message, error)))
        again = [
            text
            for message, text, error in failed
            # What is no message will be none the next time.
            if (message is not None and attempt < self.max_attempts)
            or not self._bury(message, text, error, attempt)
        ]
        pause = pause_after(attempt, self._longest_retry)
        self._send_again(again, {"countdown": pause, "retries": attempt})
        if failed and len(texts) == 1:
            # What Celery shows to those who watch it.
            last = failed[0][2]
            raise Retry(exc=last, when=pause) if again else last

    def _send_again(self, texts: Sequence[str], options: dict[str, Any]) -> None:
        """Send each message as a task of its own."""
        parcels = [_parcel([(_message(text), text)], **options) for text in texts]
        try:
            if parcels and (refused := self._sender.send(parcels)):
                raise next(iter(refused.values()))
        except Exception as error:
            # Not gone, so this task must not be either; but not at once again.
            time.sleep(_REJECTED)
            raise Reject(error, requeue=True) from error

    @cached_property
    def _longest_retry(self) -> float:
        timeout = (self.app.conf.broker_transport_options or {}).get("visibility_timeout")
        return min(LONGEST_RETRY, timeout / 2) if timeout else LONGEST_RETRY

    def _bury(self, message: Message | None, text: str, error: Exception, attempts: int) -> bool:
        """Write a dead letter; return whether that worked."""
        sessions = self.worker.sessions
        try:
            outbox, engine = self._outbox_of(message)

            def bury() -> None:
                with engine.begin() as connection:
                    bury_message(connection, outbox, message or no_message(text), error, attempts)

            sessions.run(bury)
        except Exception:
            logger.exception("a message could not be made a dead letter: %.200s", printable(text))
            return False
        return True

    def _worker_set_up(self, **_: Any) -> None:
        warn_of_forgetting(self.app)

    def _forked(self, **_: Any) -> None:
        """Leave the database connections that were open before the fork to the parent."""
        if os.getpid() == self._pid:  # the pool is solo, which sends this as well
            return
        session, _front = self.worker.sessions.make()
        models = [mapper for models in models_by_outbox().values() for mapper in models]
        for engine in engines_of(session, models):
            engine.dispose(close=False)

    def _outbox_of(self, message: Message | None) -> tuple[Outbox, Engine]:
        """The outbox that a message is from, and its engine; the first, if no model tells."""
        sessions = self.worker.sessions
        if message is not None:
            try:
                mapper = find_mapper(message.model)
            except UnknownModelError:
                pass
            else:
                session, _ = sessions.make()
                return known_outbox(mapper), bind_for_writing(session, mapper).engine
        try:
            outbox = the_outbox()
        except InstallError:
            outbox = min(models_by_outbox(), key=lambda one: one.table.fullname)
        return outbox, sessions.engine_of(outbox)


def _checked_attempt(retries: Any) -> int:
    """The number of the attempt, by a header of the broker in which anything may be written."""
    return min(max(retries, 0), _MAX_RETRIES) + 1 if isinstance(retries, int) else 1


def _message(text: str) -> Message | None:
    try:
        return Message.from_json(text)
    except MalformedMessageError:
        return None


def _is_told_to_end(error: SystemExit) -> bool:
    """Whether the pool's handler of signals has raised it, which interrupts any receiver."""
    return any(
        frame.f_globals.get("__name__") == "billiard.common"
        for frame, _ in walk_tb(error.__traceback__)
    )


def _exited(message: Message | None, error: SystemExit) -> SignalsError:
    """The error of a message whose receiver has raised SystemExit, which would end the process."""
    where = " ".join(getattr(error, "__notes__", ()))
    failure = SignalsError(
        f"a receiver ended with SystemExit({error.code!r}), and a worker goes on all the same. "
        f"Raise an exception that says what went wrong. {where}"
    )
    failure.__cause__ = error
    logger.error("event %s: %s", message and message.id, failure, exc_info=error)
    return failure


def _parcel(messages: Sequence[tuple[Message | None, str]], **options: Any) -> Parcel:
    first = messages[0][0]
    if first is None:
        task_id, shown = uuid4(), "(what is no message)"
    elif len(messages) == 1:
        task_id = first.key
        shown = f"({first.model} {first.subject} {first.kind}, event {first.id})"
        options["shadow"] = printable(first.receiver)
    else:
        # The same for the same messages.
        task_id = uuid5(first.key, " ".join(one.key.hex for one, _ in messages if one))
        shown = f"({len(messages)} messages, the first for {first.receiver})"
    return Parcel(
        str(task_id),
        [text for _, text in messages],
        [message for message, _ in messages if message],
        {"argsrepr": printable(shown), **options},
    )
