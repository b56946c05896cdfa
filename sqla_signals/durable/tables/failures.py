"""What becomes of an event that has failed: a pause and another attempt, at last a dead letter."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from sqlalchemy import update

from ...errors import printable
from ...signals.signal import logger
from ..message.envelope import BusyError
from .clock import database_time
from .dead_letters import bury, reason, said
from .raw import as_json

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ..outbox import Outbox
    from .reading import Claim

FIRST_RETRY: Final = 1.0
LONGEST_RETRY: Final = 3600.0
"""Seconds between attempts; twice as long each time."""


def pause_after(attempt: int, longest: float = LONGEST_RETRY) -> float:
    """Seconds until the next attempt; at random, so that failed events do not all come at once."""
    pause: float = min(longest, FIRST_RETRY * 2 ** min(max(attempt - 1, 0), 30))
    return pause * random.uniform(0.75, 1.25)


def given_up(connection: Connection, outbox: Outbox, claim: Claim, max_attempts: int) -> bool:
    """Put a failed event off, or give it up after its attempts; return whether it was given up."""
    attempt = min(claim.attempt, max_attempts)
    errors = claim.failures.values()
    if errors and all(isinstance(error, BusyError) for error in errors):
        attempt -= 1  # does not count
    why = said(claim.unread) if claim.unread is not None else reason(claim.failures)
    names = [message.receiver for message in claim.failures] or None
    # An event that cannot be read now will never be.
    if claim.unread is not None or attempt >= max_attempts:
        bury(connection, outbox, claim.sequence, attempt, why, names)
        return True
    pause = pause_after(attempt)
    logger.warning("event %d is tried again in %.1f s: %s", claim.sequence, pause, printable(why))
    connection.execute(
        update(outbox.table)
        .where(outbox.table.c.sequence == claim.sequence)
        .values(
            last_error=why,
            attempts=attempt,
            available_at=database_time(pause),
            receivers=as_json(connection, names),
        )
    )
    return False
