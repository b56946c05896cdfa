"""Reading what a relay has claimed: bounded, and each event guarded by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError

from ..message.envelope import MAX_BYTES, MalformedMessageError, Message
from .dead_letters import said
from .raw import from_json, raw

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ..outbox import Outbox

MAX_BATCH_BYTES: Final = 16_000_000
"""Events that are handed over together are read up to here, or one if that is larger."""

_MAX_ATTEMPTS: Final = 1_000_000_000


class RelayKilledError(Exception):
    """The error of an event with which each relay was killed that began with it."""


@dataclass(slots=True, eq=False)
class Claim:
    """An event that is ours for now."""

    sequence: int
    failed: int
    """Attempts that have failed."""
    size: int
    """Bytes of what is read of it."""
    row: Any = None
    """The same for events that must be handed over one after the other."""
    begun: int = 0
    """Attempts that have begun and were never ended."""
    handled: bool = False
    """Whether it was handed over, or never can be."""
    messages: Sequence[Message] = ()
    failures: dict[Message, Exception] = field(default_factory=dict)
    unread: MalformedMessageError | None = None
    """Why it cannot be read."""

    @classmethod
    def of(cls, sequence: int, failed: Any, size: int) -> Claim:
        """A claim on a row of the outbox, in which somebody may have written anything."""
        return cls(sequence, max(failed, 0) if isinstance(failed, int) else 0, size)

    @property
    def attempt(self) -> int:
        """Which attempt this is."""
        return min(self.failed + self.begun, _MAX_ATTEMPTS) + 1

    @property
    def is_done(self) -> bool:
        """Whether nothing has failed, as far as anybody knows."""
        return not self.failures and self.unread is None


def read(
    connection: Connection, outbox: Outbox, claims: Sequence[Claim], max_attempts: int
) -> list[Claim]:
    """Read events into their claims, up to a number of bytes; return the claims that were read."""
    room = MAX_BATCH_BYTES
    found: list[Claim] = []
    for claim in claims:
        if found and claim.size > room:
            break
        found.append(claim)
        room -= claim.size
        if claim.size > MAX_BYTES:
            claim.unread = MalformedMessageError(
                f"the event has {claim.size:,} bytes, and what has more than {MAX_BYTES:,} is "
                f"not read. Keep large columns out of messages with info=SECRET"
            )
    rows = _rows(connection, outbox, [claim for claim in found if claim.unread is None])
    for claim in found:
        if row := rows.get(claim.sequence):
            try:
                claim.messages = _messages(outbox, claim, row)
            except MalformedMessageError as error:
                claim.unread = error
        if claim.attempt > max_attempts:
            _give_up(connection, outbox, claim)
    return found


def _rows(connection: Connection, outbox: Outbox, claims: Sequence[Claim]) -> dict[int, Any]:
    """The rows of events, by their keys."""
    if not claims:
        return {}
    columns = [raw(connection, column) for column in outbox.table.columns]
    where = outbox.table.c.sequence.in_([claim.sequence for claim in claims])
    try:
        rows = connection.execute(select(*columns).where(where)).all()
    except DBAPIError as error:
        # SQLite takes any bytes for a text, and its driver does not.
        if connection.dialect.name != "sqlite" or error.connection_invalidated:
            raise
        if len(claims) > 1:
            each = [_rows(connection, outbox, [claim]) for claim in claims]
            return {key: row for found in each for key, row in found.items()}
        claims[0].unread = MalformedMessageError(said(error))
        return {}
    return {row.sequence: row._mapping for row in rows}


def _messages(outbox: Outbox, claim: Claim, row: Mapping[Any, Any]) -> list[Message]:
    """The messages of an event, one for each receiver that has not done it yet."""
    receivers = from_json(row["receivers"])
    if type(receivers) is not list or not receivers or {str} != {*map(type, receivers)}:
        raise MalformedMessageError("the receivers of the event are no list of names")
    occurred_at = row["occurred_at"]
    if isinstance(occurred_at, datetime):
        occurred_at = occurred_at.isoformat()
    if isinstance(occurred_at, str) and "+" not in occurred_at:
        occurred_at += "+00:00"
    data, headers = from_json(row["payload"]), from_json(row["headers"])
    return [
        Message.checked(
            id=str(row["id"]),
            sequence=claim.sequence,
            occurred_at=occurred_at,
            source=outbox.source,
            model=row["aggregate_type"],
            subject=row["aggregate_id"],
            kind=row["event_type"],
            data=data,
            receiver=receiver,
            attempt=claim.attempt,
            headers=headers,
            outbox=outbox,
        )
        for receiver in dict.fromkeys(receivers)
    ]


def _give_up(connection: Connection, outbox: Outbox, claim: Claim) -> None:
    """Make an event fail, without another attempt, for the receivers that are not in the inbox."""
    killed = RelayKilledError("each relay that began with this was killed")
    if not claim.messages:
        claim.unread = claim.unread or MalformedMessageError(str(killed))
        return
    inbox = outbox.inbox.c
    noted = select(inbox.receiver).where(inbox.event_id == claim.messages[0].id)
    done = {*connection.scalars(noted)}
    claim.failures = {one: killed for one in claim.messages if one.receiver not in done}
    claim.messages = ()
