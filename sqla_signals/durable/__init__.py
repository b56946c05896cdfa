"""Durable delivery: receivers that run at least once, on any machine, whatever dies.

``outbox_table`` adds the tables, ``@receiver(..., durable=True)`` has events written into them,
a ``Relay`` hands these to a ``Publisher``, and a ``Worker`` runs the receiver.
"""

from .encoding import SECRET, UnserializableError
from .message import (
    BusyError,
    Event,
    MalformedMessageError,
    Message,
    MessageError,
    UnknownModelError,
    UnknownReceiverError,
    UnknownSchemaError,
)
from .publishers import LocalPublisher, Publisher
from .relay import Relay
from .running import Worker
from .tables import Outbox, outbox_table

__all__ = [
    "SECRET",
    "BusyError",
    "Event",
    "LocalPublisher",
    "MalformedMessageError",
    "Message",
    "MessageError",
    "Outbox",
    "Publisher",
    "Relay",
    "UnknownModelError",
    "UnknownReceiverError",
    "UnknownSchemaError",
    "UnserializableError",
    "Worker",
    "outbox_table",
]
