"""Giving up: an event that fails again and again is put where somebody looks at it.

The relay gives up events that it cannot publish, a worker those that it cannot run, so both may
have a dead letter for one event, each for other receivers. A dead letter has a number of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from sqlalchemy import Text, insert, literal, select, update

from ...errors import printable
from ...signals.signal import logger
from ..message.envelope import Message
from .clock import database_time
from .raw import as_json, json_text, raw

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ..outbox import Outbox

MAX_ERROR: Final = 4_000
MAX_ERRORS: Final = 16_000
"""Characters kept of one error, and of all of an event: MariaDB's TEXT takes 65,535 bytes."""

_MAX_KEPT: Final = 1_000_000
"""Characters kept of what is no message."""


def bury(
    connection: Connection,
    outbox: Outbox,
    sequence: int,
    attempts: int,
    error: str,
    receivers: Sequence[str] | None,
) -> None:
    """Copy an event of the outbox to the dead letters, without reading it.

    :param receivers: the names of those that have not done it; ``None`` leaves them as they are.
    """
    events = outbox.table.c
    values: dict[str, Any] = {name: events[name] for name in events.keys() if name != "sequence"}  # noqa: SIM118
    values |= {"attempts": literal(attempts), "last_error": literal(error, Text())}
    if receivers is not None:
        values["receivers"] = as_json(connection, receivers)
    values["dead_at"] = database_time()
    logger.error(
        "event %d was given up after %d attempts: %s", sequence, attempts, printable(error)
    )
    connection.execute(
        insert(outbox.dead_letters)
        .from_select([*values], select(*values.values()).where(events.sequence == sequence))
        .inline()
    )


def no_message(text: object) -> Message:
    """Make a message, for no receiver, of something from a broker that is not a message."""
    kept = text if isinstance(text, str) else repr(text)
    return Message(
        id=uuid4(),
        sequence=0,
        occurred_at=datetime.now(UTC),
        source="",
        model="(no message)",
        subject="",
        kind="",
        data={"text": kept[:_MAX_KEPT]},
        receiver="",
    )


def bury_message(
    connection: Connection, outbox: Outbox, message: Message, error: Exception, attempts: int
) -> None:
    """Write a dead letter for a message that a broker has brought."""
    dead = outbox.dead_letters
    receivers = json.dumps([message.receiver] if message.receiver else [])
    values = {
        "id": message.id,
        "aggregate_type": _kept(message.model),
        "aggregate_id": _kept(message.subject),
        "event_type": message.kind,
        "occurred_at": message.occurred_at,
        "payload": as_json(connection, message.data),
        "headers": as_json(connection, message.headers),
        "receivers": json_text(connection, receivers),
        "attempts": attempts,
        "available_at": database_time(),
        "last_error": reason({message: error}),
        "dead_at": database_time(),
    }
    logger.error(
        "event %s, %s %s %s, was given up after %d attempts: %s",
        message.id,
        *map(printable, (message.model, message.subject, message.kind)),
        attempts,
        printable(values["last_error"]),
    )
    # The broker may bring a message again that was given up already.
    again = connection.execute(
        update(dead)
        .where(dead.c.id == message.id, raw(connection, dead.c.receivers).element == receivers)
        .values(attempts=attempts, last_error=values["last_error"], dead_at=database_time())
    )
    if not again.rowcount:
        connection.execute(insert(dead).values(**values).inline())


def _kept(text: str) -> str:
    """Write a text so that every database takes it."""
    return text.replace("\0", r"\x00")


def reason(failures: Mapping[Message, Exception]) -> str:
    """Say why an event has failed, in a line for each receiver.

    An error may say anything, which must not keep its event from being put off or given up.
    """
    lines = [
        f"{message.receiver}: {said(error)}" if message.receiver else said(error)
        for message, error in failures.items()
    ]
    return _kept("\n".join(lines))[:MAX_ERRORS]


def said(error: Exception) -> str:
    """Write an error as a text that every database takes."""
    try:
        words = str(error)
    except Exception:
        words = ""
    text = f"{type(error).__name__}: {words}".encode(errors="backslashreplace").decode()
    return _kept(text)[:MAX_ERROR]
