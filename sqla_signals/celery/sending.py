"""Getting tasks into a broker, and knowing that they are there.

One connection and one producer for a whole process. RabbitMQ confirms what it has taken: a batch is
sent as a whole, and then its confirmations are waited for. Redis takes a batch in one round trip,
where the version of kombu can do that.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from ..durable import BusyError, Message
from ..errors import SignalsError

if TYPE_CHECKING:
    from celery import Celery

CONFIRM_TIMEOUT: Final = 30.0
"""Seconds to wait for RabbitMQ, which may have blocked us for want of memory or disk."""


class UnroutableError(SignalsError):
    """RabbitMQ has no queue for a message. Nothing was lost: it stays in the outbox."""


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """The messages of one task."""

    task_id: str
    texts: Sequence[str]
    """The messages as JSON."""
    messages: Sequence[Message]
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``send_task``."""


Failures = dict[Parcel, Exception]


class Sender:
    """Sends tasks over a connection of its own, from any thread, also after a fork.

    :param name: the name of the task.
    :param options: arguments of ``send_task`` for every task.
    """

    def __init__(self, app: Celery, name: str, options: dict[str, Any]) -> None:
        self._app = app
        self._name = name
        self._options: dict[str, Any] = {
            "serializer": "json",
            "ignore_result": True,
            "add_to_parent": False,
            "kwargsrepr": "{}",
            "retry": False,  # the relay does
            **options,
        }
        self._lock = threading.Lock()
        self._pid = 0
        self._producer: Any = None
        self._confirms: _Confirms | None = None
        self._staging: _Staging | None = None

    def send(self, parcels: Sequence[Parcel]) -> Failures:
        """Send the tasks, and return those that the broker has refused, with the reason.

        :raises Exception: sending failed; the broker may have taken some of them all the same.
        """
        with self._lock:
            while True:
                is_new = self._open()
                try:
                    return self._send(parcels)
                except Exception:
                    self.close()
                    # The broker may have closed a connection that was open from before.
                    if is_new:
                        raise

    def close(self) -> None:
        """Close the connection; the next :meth:`send` opens another."""
        producer = self._producer
        self._producer = self._confirms = self._staging = None
        if self._pid != os.getpid():
            return  # they are those of the parent
        if producer is not None:
            _close(producer.connection)

    def _open(self) -> bool:
        """Connect unless that is done; return whether it was not."""
        if self._producer is not None and self._pid == os.getpid():
            return False
        # A forked process must not say goodbye on the connection of its parent, so it is only
        # forgotten here.
        self._pid = os.getpid()
        connection = self._app.connection_for_write()
        transport = connection.transport
        self._staging = _Staging(connection) if transport.driver_type == "filesystem" else None
        connection.connect()
        self._producer = self._app.amqp.Producer(connection, auto_declare=False)
        if (transport.driver_type, transport.driver_name) == ("amqp", "py-amqp"):
            self._confirms = _Confirms(self._producer.channel)
        return True

    def _send(self, parcels: Sequence[Parcel]) -> Failures:
        if self._confirms is not None:
            return self._send_confirmed(parcels)
        batch = getattr(self._producer, "batch", None)
        with self._staging or nullcontext(), nullcontext() if batch is None else batch():
            for parcel in parcels:
                self._send_one(parcel)
        return {}

    def _send_one(self, parcel: Parcel, **options: Any) -> None:
        self._app.send_task(
            self._name,
            parcel.texts,
            task_id=parcel.task_id,
            producer=self._producer,
            **self._options,
            **parcel.options,
            **options,
        )

    def _send_confirmed(self, parcels: Sequence[Parcel]) -> Failures:
        confirms = self._confirms
        assert confirms is not None
        connection = self._producer.connection
        try:
            for parcel in parcels:
                confirms.expect(parcel)
                self._send_one(parcel, mandatory=True)
            return confirms.wait(connection)
        except connection.channel_errors as error:
            # RabbitMQ closes the channel over one message, and does not say which.
            unsettled, failures = confirms.end()
            self._producer.revive(connection.channel())
            self._confirms = _Confirms(self._producer.channel)
            if len(parcels) == 1:
                return {parcels[0]: error}
            for parcel in unsettled or parcels:
                failures |= self._send_confirmed([parcel])
            return failures


class _Confirms:
    """Waits for the confirmations of RabbitMQ on a channel that only :class:`Sender` uses.

    kombu's own ``confirm_publish`` waits for each message before it sends the next one, which takes
    seven times as long for a thousand.
    """

    def __init__(self, channel: Any) -> None:
        self._sent = 0
        self._waiting: dict[int, Parcel] = {}
        self._failures: Failures = {}
        channel.confirm_select()
        channel.events["basic_ack"].add(self._ack)
        channel.events["basic_nack"].add(self._nack)
        channel.events["basic_return"].add(self._return)

    def expect(self, parcel: Parcel) -> None:
        """The parcel is the next that is published."""
        self._sent += 1
        self._waiting[self._sent] = parcel

    def wait(self, connection: Any) -> Failures:
        """Wait for all confirmations; return the parcels that were refused."""
        while self._waiting:
            connection.drain_events(timeout=CONFIRM_TIMEOUT)
        return self.end()[1]

    def end(self) -> tuple[list[Parcel], Failures]:
        """Begin anew; return the parcels without a confirmation, and those that were refused."""
        unsettled, failures = list(self._waiting.values()), self._failures
        self._waiting, self._failures = {}, {}
        return unsettled, failures

    def _take(self, tag: int, multiple: bool) -> Iterable[Parcel]:
        tags = [one for one in self._waiting if one <= tag] if multiple else [tag]
        return [self._waiting.pop(one) for one in tags]

    def _ack(self, tag: int, multiple: bool) -> None:
        self._take(tag, multiple)

    def _nack(self, tag: int, multiple: bool) -> None:
        for parcel in self._take(tag, multiple):
            self._failures[parcel] = BusyError("RabbitMQ refused the message: the queue is full")

    def _return(self, error: Exception, exchange: str, routing_key: str, message: Any) -> None:
        # Comes before the confirmation, which RabbitMQ sends for it as well.
        task_id = message.properties["correlation_id"]
        for parcel in self._waiting.values():
            if parcel.task_id == task_id:
                self._failures[parcel] = UnroutableError(
                    f"no queue for the exchange {exchange!r} and the routing key {routing_key!r}: "
                    f"{error}. Declare one in task_queues, or start a worker that does"
                )


class _Staging:
    """Writes tasks for ``filesystem://`` elsewhere first, so that workers find whole files.

    A worker takes a file as soon as it is there, and loses the part that is not written by then.
    The folder exists only while tasks are sent, since nobody tells a process to tidy up.
    """

    def __init__(self, connection: Any) -> None:
        options = connection.transport_options
        self._folder = Path(options["data_folder_out"])
        self._staged = self._folder / f"staged_{uuid4().hex}"
        connection.transport_options = {**options, "data_folder_out": str(self._staged)}

    def __enter__(self) -> None:
        self._staged.mkdir(mode=0o700, exist_ok=True)

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        """Move the files to where workers look, unless sending has failed; leave nothing behind."""
        try:
            if failed is None:
                for path in sorted(self._staged.iterdir()):
                    path.replace(self._folder / path.name)
        finally:
            shutil.rmtree(self._staged, ignore_errors=True)


def _close(connection: Any) -> None:
    # Whatever is wrong with it has been reported already.
    try:
        connection.close()
    except Exception:
        connection.collapse()
