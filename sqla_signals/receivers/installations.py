"""The installations there are, the signals that they send, and the warning that there is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final
from weakref import WeakSet, WeakValueDictionary

from sqlalchemy.orm import Session

from .._sqlalchemy.events import listen_to_class, unlisten_to_class
from ..errors import SignalsNotInstalledWarning
from .dispatch import AnySignal
from .receiver import Receiver

model_signals: list[AnySignal] = []
"""The signals that an installation sends."""

after_configured: list[Callable[[], None]] = []
"""What installations do once mappers are configured. Not listeners of their own: SQLAlchemy cannot
gain or lose one while it is calling them, and that is when an application may install."""


class Installations:
    """A set of weak references that may be iterated over while another thread installs."""

    def __init__(self) -> None:
        self._by_id: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def add(self, installation: Any) -> None:
        """Add an installation, which makes the warning about a forgotten one unnecessary."""
        self._by_id[id(installation)] = installation
        unlisten_to_class(Session, "before_flush", _warn_of_flush)

    def discard(self, installation: Any) -> None:
        """Remove an installation, if it is there."""
        self._by_id.pop(id(installation), None)

    def __iter__(self) -> Iterator[Any]:
        found = [reference() for reference in self._by_id.valuerefs()]  # copied in one step
        return iter([one for one in found if one is not None])

    def __len__(self) -> int:
        return len(self._by_id)


installations: Final = Installations()
"""What :func:`sqla_signals.install` has returned and is not removed."""


def warn_at_flush() -> None:
    """Warn as soon as a session is flushed, unless something is installed by then."""
    listen_to_class(Session, "before_flush", _warn_of_flush)


def warn_not_installed(receivers: Sequence[Receiver], when: str) -> None:
    """Warn that these receivers are never called, if nothing is installed."""
    if not receivers or installations:
        return
    names = ", ".join(dict.fromkeys(str(receiver) for receiver in receivers[:5]))
    more = f" and {len(receivers) - 5} more" if len(receivers) > 5 else ""
    warnings.warn(
        f"{when} while sqla_signals is not installed, so these receivers are never called: "
        f"{names}{more}. Add one line where the application starts: sqla_signals.install()",
        SignalsNotInstalledWarning,
        stacklevel=2,
    )


_warned: Final[WeakSet[Receiver]] = WeakSet()


def _warn_of_flush(*_: object) -> None:
    if installations:
        return
    receivers = [
        receiver
        for signal in model_signals
        for receiver in signal.table.receivers
        if receiver not in _warned
    ]
    _warned.update(receivers)
    warn_not_installed(receivers, "a session was flushed")
