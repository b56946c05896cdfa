"""Giving up: an event that fails again and again is put where somebody looks at it.

The relay gives up what it cannot publish, a worker what it cannot run; so both may do so for one
event, each for other receivers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import insert, select, update

from ..signal import logger
from .clock import database_time
from .message import Message

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from .tables import Outbox

MAX_ERROR: Final = 4_000
MAX_ERRORS: Final = 16_000
"""Characters kept of one error, and of all of an event: MariaDB's TEXT takes 65,535 bytes."""


def bury(connection: Connection, outbox: Outbox, event: Mapping[str, Any]) -> None:
    """Add a dead letter, or its receivers and its error to the one that the event has already.

    :param event: the columns of the outbox.
    """
    logger.error(
        "event %s, %s %s %s, was given up after %d attempts: %s",
        event["id"],
        event["aggregate_type"],
        event["aggregate_id"],
        event["event_type"],
        event["attempts"],
        event["last_error"],
    )
    dead = outbox.dead_letters
    same = dead.c.sequence == event["sequence"]
    known = connection.execute(select(dead).where(same).with_for_update()).first()
    if known is None:
        # An IntegrityError if somebody else is quicker: the event is given up the next time.
        connection.execute(insert(dead).values(dead_at=database_time(), **event))
        return
    connection.execute(
        update(dead)
        .where(same)
        .values(
            receivers=[
                *known.receivers,
                *(r for r in event["receivers"] if r not in known.receivers),
            ],
            attempts=max(known.attempts, event["attempts"]),
            last_error=f"{known.last_error}\n{event['last_error']}"[:MAX_ERRORS],
            dead_at=database_time(),
        )
    )


def bury_message(
    connection: Connection, outbox: Outbox, message: Message, error: Exception, attempts: int
) -> None:
    """Give a message up: its event is a dead letter for its receiver."""
    event = {
        "sequence": message.sequence,
        "id": message.id,
        "aggregate_type": message.model,
        "aggregate_id": message.subject,
        "event_type": message.kind,
        "occurred_at": message.occurred_at,
        "payload": dict(message.data),
        "headers": dict(message.headers),
        "receivers": [message.receiver],
        "attempts": attempts,
        "available_at": database_time(),
        "last_error": reason({message: error}),
    }
    bury(connection, outbox, event)


def reason(failures: Mapping[Message, Exception]) -> str:
    """Why, in a line for each receiver; as text that every database takes.

    What an error says is anybody's, and must not keep its event from being put off or given up.
    """
    lines = [f"{message.receiver}: {_said(error)}" for message, error in failures.items()]
    return "\n".join(lines)[:MAX_ERRORS]


def _said(error: Exception) -> str:
    try:
        said = str(error)
    except Exception:
        said = ""
    text = f"{type(error).__name__}: {said}".encode(errors="backslashreplace").decode()
    return text.replace("\0", r"\x00")[:MAX_ERROR]
