"""Stands for the queue of a mail service."""

import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Email:
    """One message."""

    to: str
    subject: str
    text: str


class EmailQueue:
    """Where the application leaves its e-mails.

    In production, `put` hands the e-mail to a task queue or to a mail service. This one keeps it in
    memory and sends nothing: what is waiting is lost with the process.
    """

    def __init__(self) -> None:
        self.waiting: list[Email] = []

    async def put(self, email: Email) -> None:
        """Leave an e-mail for delivery."""
        self.waiting.append(email)
        logger.info("to %s: %s", email.to, email.subject)


queue = EmailQueue()
