"""The place for whoever looks on; nearly always empty, and then it costs a comparison per flush.

Nothing is asked per row: an onlooker swaps the receivers in the tables of the signals for ones that
tell it of the call. What is put here is in :mod:`sqla_signals.observe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from ..changes.effects import Effect, Executed
    from .receiver import Receiver

T = TypeVar("T")

Moment = Literal[
    "before_flush",
    "after_flush",
    "after_flush_postexec",
    "before_commit",
    "after_commit",
    "after_transaction_end",
]
"""SQLAlchemy's events of those names, seen by an installation."""


class WatchedDelivery(Protocol):
    """The calls that one transaction has left to be made."""

    def receiver(
        self,
        call: Callable[[Receiver, Effect | Executed], None],
        receiver: Receiver,
        effect: Effect | Executed,
    ) -> None:
        """Do ``call(receiver, effect)``."""
        ...

    def callback(
        self,
        call: Callable[[Session, Callable[[], Any], str], None],
        session: Session,
        fn: Callable[[], Any],
        what: str,
    ) -> None:
        """Do ``call(session, fn, what)``."""
        ...


class Watcher(Protocol):
    """What is told."""

    def watched(self, signal: Any, receivers: Iterable[Receiver]) -> Iterable[Receiver]:
        """The receivers for the table of a signal, those called at once so that it is seen."""
        ...

    def session_event(self, moment: Moment, session: Session, about: Any = None) -> None:
        """It is that moment; with several installations it may be told more than once.

        :param about: the unit of work, or the transaction.
        """
        ...

    def delivery(self, session: Session, on: Literal["commit", "rollback"]) -> WatchedDelivery:
        """A transaction has ended, and what it leaves is delivered, now or later."""
        ...

    def message(self, run: Callable[[], T], message: Any) -> T:
        """Do ``run()``, which runs a durable message."""
        ...

    def failed(self, error: Exception) -> None:
        """What is being done has failed, and that is logged, not raised."""
        ...


# Another thread may end it at any moment: look once, and ask what was found.
watcher: Watcher | None = None
