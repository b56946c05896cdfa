"""Publishers, which take messages from the relay: the protocol, and the embedded default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from .message.envelope import Message
from .worker import Worker


@runtime_checkable
class Publisher(Protocol):
    """Hands messages over to whatever runs them."""

    batch_size: int
    """How many events a relay should claim at once."""

    def publish(self, messages: Sequence[Message]) -> Mapping[Message, Exception]:
        """Hand the messages over, and return those that could not be handed over, with the reason.

        :param messages: in the order of their events. One event may come several times, for
            several receivers.

        A message that is not returned must be safe by now: the relay forgets it. A message that is
        returned is tried again later, by itself, and becomes a dead letter after too many attempts;
        a :class:`BusyError` does not count as one.
        Raise an exception if nothing can be handed over now, as when the broker is down: all of the
        messages are kept then, and no attempt counts.
        """
        ...


class LocalPublisher:
    """Runs the receivers itself, one after the other, in the process of the relay.

    :param worker: a :class:`Worker`, or what makes the sessions of one.

    Nothing else to install; as quick as one process is. A receiver that fails is tried again by the
    relay, without those that did not.
    """

    batch_size: int = 10

    def __init__(self, worker: Any = None) -> None:
        self.worker: Worker = worker if isinstance(worker, Worker) else Worker(worker)

    def publish(self, messages: Sequence[Message]) -> Mapping[Message, Exception]:
        """Run each message; return those whose receivers failed."""
        failures: dict[Message, Exception] = {}
        for message in messages:
            try:
                self.worker.run(message)
            except Exception as error:
                failures[message] = error
        return failures
