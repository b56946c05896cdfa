"""A commit flushes until nothing is left; who keeps it from ever getting there is named.

SQLAlchemy gives up after a hundred flushes, with an error that knows of no receivers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from .._sqlalchemy import is_clean, is_committing
from ..errors import SignalRecursionError
from .transactions import innermost

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from ..receivers import Receiver

MAX_FLUSHES: Final = 100
"""After as many in one commit, ``commit()`` itself gives up."""
_NAMED: Final = 10
"""The receivers of so many last flushes are named."""
_ROUNDS: Final = "sqla_signals.rounds"
"""Kept on the transaction or savepoint that commits."""


class _Rounds:
    """The flushes of one commit after which receivers were called."""

    __slots__ = ("called", "count")

    def __init__(self) -> None:
        self.count = 0
        self.called: deque[Iterable[Receiver]] = deque(maxlen=_NAMED)


def flushed(session: Session, called: Callable[[], Iterable[Receiver]]) -> None:
    """The ``post_*`` of a flush were sent; raise if this commit is never going to settle.

    :param called: asked for their receivers when it is likely that these have to be named.
    """
    transaction = innermost(session)
    if transaction is None or not is_committing(transaction):
        return
    rounds: _Rounds = transaction.__dict__.setdefault(_ROUNDS, _Rounds())
    rounds.count += 1
    if rounds.count <= MAX_FLUSHES - _NAMED:
        return
    rounds.called.append(dict.fromkeys(called()))
    if rounds.count < MAX_FLUSHES or is_clean(session):
        return
    names = " → ".join(dict.fromkeys(str(one) for round in rounds.called for one in round))
    raise SignalRecursionError(
        f"post_* receivers kept changing rows for {MAX_FLUSHES} flushes of one commit: {names}. "
        f"Let one of them do nothing for what another one has caused."
    )
