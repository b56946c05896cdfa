"""One event for one receiver, as it travels: a CloudEvent 1.0 in JSON.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID, uuid5

from ..errors import SignalsError

SCHEMA: Final = 1
"""The version of what is in ``data``."""

_SPEC: Final = "1.0"


class MessageError(SignalsError):
    """A message that this process cannot run, however often it tries."""


class MalformedMessageError(MessageError, ValueError):
    """What came is no message of ours."""


class UnknownSchemaError(MessageError):
    """The message was written by a later version of ``sqla_signals``."""


class UnknownReceiverError(MessageError, LookupError):
    """No durable receiver of that name is connected in this process."""


class UnknownModelError(MessageError, LookupError):
    """The message is about a class that is not mapped in this process."""


class BusyError(SignalsError):
    """A publisher could not take a message now, through no fault of the message.

    One that :meth:`Publisher.publish` returns for a message is not counted as an attempt.
    """


@dataclass(frozen=True, slots=True)
class Event:
    """The ``event`` argument of a durable receiver."""

    id: UUID
    """The same however often the event is delivered; one for all receivers."""
    occurred_at: datetime
    """When it was written, shortly before the commit; by the clock of the database, in UTC."""
    attempt: int
    """1 when this receiver is called for the first time, as far as anybody knows."""
    sequence: int
    """Rises from event to event of one row; not without gaps, and not in the order of commits."""


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One event for one receiver."""

    id: UUID
    sequence: int
    occurred_at: datetime
    source: str
    model: str
    """``module.qualname`` of the mapped class."""
    subject: str
    """The primary key as text."""
    kind: str
    """``"created"``, ``"updated"`` or ``"deleted"``."""
    data: Mapping[str, Any]
    receiver: str
    """The name of the receiver it is for."""
    attempt: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further attributes of the CloudEvent, such as ``traceparent``."""

    @property
    def key(self) -> UUID:
        """Identifies the event for this receiver: the same in every attempt."""
        return uuid5(self.id, self.receiver)

    def to_json(self) -> str:
        """The message as text."""
        envelope: dict[str, Any] = {
            "specversion": _SPEC,
            "id": str(self.id),
            "source": self.source,
            "type": f"{self.model}.{self.kind}",
            # Not empty, says the specification.
            **({"subject": self.subject} if self.subject else {}),
            "time": self.occurred_at.isoformat(),
            "datacontenttype": "application/json",
            "sequence": str(self.sequence),
            "receiver": self.receiver,
            "attempt": self.attempt,
            **self.headers,
            "data": self.data,
        }
        return json.dumps(envelope, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Message:
        """The message that :meth:`to_json` made.

        :raises MalformedMessageError: it made no such thing.
        """
        try:
            envelope = json.loads(text)
            if envelope["specversion"] != _SPEC:
                raise ValueError(f"specversion is {envelope['specversion']!r}")
            model, _, kind = envelope["type"].rpartition(".")
            return cls(
                id=UUID(envelope["id"]),
                sequence=int(envelope["sequence"]),
                occurred_at=datetime.fromisoformat(envelope["time"]),
                source=envelope["source"],
                model=model,
                subject=envelope.get("subject", ""),
                kind=kind,
                data=dict(envelope["data"]),
                receiver=envelope["receiver"],
                attempt=envelope["attempt"],
                headers={k: v for k, v in envelope.items() if k not in _OWN},
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise MalformedMessageError(
                f"not a message of sqla_signals: {error!r}; it begins with {text[:80]!r}"
            ) from error


_OWN: Final = frozenset(
    {
        "specversion",
        "id",
        "source",
        "type",
        "subject",
        "time",
        "datacontenttype",
        "sequence",
        "receiver",
        "attempt",
        "data",
    }
)
