"""One event for one receiver, as it travels: a CloudEvent 1.0 in JSON.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid5

from ...errors import SignalsError

if TYPE_CHECKING:
    from ..tables.tables import OutboxTables

SCHEMA: Final = 1
"""The version of what is in ``data``."""

_SPEC: Final = "1.0"

KINDS: Final = frozenset({"created", "updated", "deleted"})
"""What can have happened to a row."""

MAX_BYTES: Final = 64_000_000
"""A larger message is not read."""

_MAX_NAME: Final = 255
_MAX_ATTEMPT: Final = 1_000_000_000
_MAX_SEQUENCE: Final = 2**63 - 1


class MessageError(SignalsError):
    """A message that this process cannot run, however often it tries."""


class MalformedMessageError(MessageError, ValueError):
    """A text or a row is not a message of ``sqla_signals``."""


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


@contextmanager
def _only_malformed() -> Iterator[None]:
    """Turn whatever goes wrong in reading a message into a :class:`MalformedMessageError`."""
    try:
        yield
    except MalformedMessageError:
        raise
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise MalformedMessageError(f"not a message of sqla_signals: {error!r:.200}") from error


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
    outbox: OutboxTables | None = None
    """The outbox it was claimed from, in the process of the relay; no message says that."""

    @property
    def key(self) -> UUID:
        """Identifies the event for this receiver: the same in every attempt."""
        return uuid5(self.id, self.receiver)

    def to_json(self) -> str:
        """Write the message as text."""
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
        # NaN, which the JSON column of SQLite takes, goes as Python writes it.
        return json.dumps(envelope, separators=(",", ":"))

    @classmethod
    @_only_malformed()
    def from_json(cls, text: str | bytes) -> Message:
        """Read a message that :meth:`to_json` has written.

        :raises MalformedMessageError: the text is not such a message.
        """
        envelope = read_json(text)
        if type(envelope) is not dict:
            raise TypeError(f"it begins with {text[:80]!r}")
        if envelope["specversion"] != _SPEC:
            raise ValueError(f"specversion is {envelope['specversion']!r:.80}")
        model, _, kind = _text(envelope["type"], 2 * _MAX_NAME).rpartition(".")
        return cls.checked(
            id=envelope["id"],
            sequence=int(_text(envelope["sequence"], 20)),
            occurred_at=envelope["time"],
            source=envelope["source"],
            model=model,
            subject=envelope.get("subject", ""),
            kind=kind,
            data=envelope["data"],
            receiver=envelope["receiver"],
            attempt=envelope["attempt"],
            headers={key: value for key, value in envelope.items() if key not in _OWN},
        )

    @classmethod
    @_only_malformed()
    def checked(cls, **values: Any) -> Message:
        """Make a message of values that anybody may have written.

        :raises MalformedMessageError: a value has the wrong type, or is too large.
        """
        occurred_at = datetime.fromisoformat(_text(values["occurred_at"], 64))
        if occurred_at.tzinfo is None or not 1970 <= occurred_at.year < 9999:
            raise ValueError("the time has no zone, or is none of ours")
        headers = values["headers"]
        if not isinstance(headers, dict) or not all(
            type(header) is str and len(header) <= _MAX_HEADER for header in headers.values()
        ):
            raise TypeError("an attribute is not a string")
        if values["kind"] not in KINDS:
            raise ValueError(f"nothing that can happen to a row is {values['kind']!r:.80}")
        return cls(
            id=UUID(_text(values["id"], 64)),
            sequence=_number(values["sequence"], _MAX_SEQUENCE),
            occurred_at=occurred_at.astimezone(UTC),
            source=_text(values["source"], 2000),
            model=_text(values["model"]),
            subject=_text(values["subject"]),
            kind=values["kind"],
            data=_data(values["data"]),
            receiver=_text(values["receiver"]),
            attempt=_number(values["attempt"], _MAX_ATTEMPT),
            headers=headers,
            outbox=values.get("outbox"),
        )


_MAX_HEADER: Final = 10_000
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


@_only_malformed()
def read_json(text: str | bytes) -> Any:
    """Read JSON that anybody may have written.

    :raises MalformedMessageError: it is not JSON, too large or too deep.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{len(text):,} bytes are more than {MAX_BYTES:,}")
    return json.loads(text)


def _text(value: Any, longest: int = _MAX_NAME) -> str:
    if type(value) is not str or len(value) > longest:
        raise ValueError(f"{value!r:.80} is not a string of at most {longest} characters")
    value.encode()  # a lone surrogate has no place in a name
    return value


def _number(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r:.80} is not a number up to {most}")
    return value


_DATA: Final[Mapping[str, type]] = {
    "schema": int,
    "key": list,
    "snapshot": dict,
    "changes": dict,
    "along": list,
    "raw": bool,
    "origin": dict,
}


def _data(value: Any) -> dict[str, Any]:
    """Check ``data`` down to the values of columns, which their types check."""
    if type(value) is not dict:
        raise TypeError("data is not an object")
    for name, kind in _DATA.items():
        if name in value and type(value[name]) is not kind:
            raise TypeError(f"{name} is not a {kind.__name__}")
    changes, along = value.get("changes", {}), value.get("along", ())
    if not all(
        type(change) is dict and change.keys() <= {"old", "new"} for change in changes.values()
    ):
        raise TypeError("changes are not old and new values")
    if not all(type(key) is str for key in along):
        raise TypeError("along are not names")
    origin = value.get("origin")
    if origin is not None:
        _text(origin["model"])
        if origin["key"] is not None and type(origin["key"]) is not list:
            raise TypeError("the key of the origin is not a list")
    return value
