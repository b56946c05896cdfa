"""The receivers to call for a sender, in their order, and those that are muted.

A :class:`Table` has the receivers of one signal. It is made anew after each change and never
changed, so that a send needs no lock and uses the receivers that there were when it began.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from difflib import get_close_matches
from itertools import chain
from operator import attrgetter
from typing import Any, Final, NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakSet

from blinker import ANY

from .._sqlalchemy.mappers import is_mapped
from ..errors import AsyncReceiverError, ReceiverOptionError
from .blocks import block
from .receiver import (
    PHASES,
    Phase,
    Receiver,
    describe,
    describe_sender,
    identity,
    matches,
    sender_list,
)

_logger: Final = logging.getLogger("sqla_signals")


class Table:
    """The receivers of one signal, in the order of connection, looked up by sender.

    It is made when it is first asked for something, because many may be connected in a row.

    :param connected: gives the receivers.
    """

    __slots__ = (
        "_any",
        "_by_class",
        "_connected",
        "_exact",
        "_of_class",
        "_wide",
        "commit",
        "durable",
        "flush",
        "outlasts_flush",
        "receivers",
    )

    def __init__(self, connected: Callable[[], Iterable[Receiver]]) -> None:
        self._connected = connected

    def __getattr__(self, name: str) -> Any:
        """Make the table: called while a slot is empty."""
        if name not in self.__slots__:
            raise AttributeError(name)
        self._make()
        return getattr(self, name)

    def _make(self) -> None:
        self.receivers: tuple[Receiver, ...] = tuple(_in_order(self._connected()))
        phases = {receiver.phase for receiver in self.receivers}
        self.flush: bool = "flush" in phases
        """Whether there is a receiver in the phase of the flush, for any sender."""
        self.commit: bool = "commit" in phases
        """Whether there is a receiver with ``on="commit"``; not counting durable ones."""
        self.durable: bool = "durable" in phases
        """Whether there is a durable receiver, for any sender."""
        self.outlasts_flush: bool = bool(phases - {"flush"})
        """Whether there is a receiver that is called after the flush."""
        # Grouped once: a lookup asks those that may match, however many receivers there are. What
        # is put into a slot is complete, because another thread may make the table too.
        wide: list[Receiver] = []
        of_class: dict[Any, list[Receiver]] = defaultdict(list)
        named: dict[Any, list[Receiver]] = defaultdict(list)
        for r in self.receivers:
            sender = r.sender
            if isinstance(sender, type) and is_mapped(sender) and not r.propagate:
                of_class[identity(sender)].append(r)
                continue
            wide.append(r)
            if sender is not ANY and not isinstance(sender, type):
                named[identity(sender)].append(r)
        any_sender = [r for r in wide if r.sender is ANY]
        self._any = _by_phase(any_sender)
        self._wide = wide
        self._of_class = of_class
        # Only senders that someone named are kept here, so the dictionary is bounded.
        self._exact: dict[Any, dict[Phase, tuple[Receiver, ...]]] = {
            key: _by_phase(_in_order(any_sender, of_sender)) for key, of_sender in named.items()
        }
        self._by_class: WeakKeyDictionary[type, dict[Phase, tuple[Receiver, ...]]] = (
            WeakKeyDictionary()
        )

    def lookup(self, sender: Any, on: Phase = "flush") -> tuple[Receiver, ...]:
        """The receivers to call for ``sender`` in that phase, each callable once."""
        return self.phases(sender)[on]

    def phases(self, sender: Any) -> Mapping[Phase, tuple[Receiver, ...]]:
        """The receivers to call for ``sender``, by phase."""
        if isinstance(sender, type):
            found = self._by_class.get(sender)
            if found is None:
                may_match = _in_order(self._wide, self._of_class.get(identity(sender), ()))
                found = _by_phase(r for r in may_match if r.matches(sender))
                self._by_class[sender] = found
            return found
        return self._exact.get(identity(sender), self._any)


def _in_order(*groups: Iterable[Receiver]) -> list[Receiver]:
    return sorted(chain(*groups), key=attrgetter("serial"))


def _by_phase(receivers: Iterable[Receiver]) -> dict[Phase, tuple[Receiver, ...]]:
    found: dict[Phase, dict[Any, Receiver]] = {phase: {} for phase in PHASES}
    for receiver in receivers:
        unique = found[receiver.phase]
        first = unique.get(receiver.fn_id)
        # One function, several matching connections: called once, where it stood first.
        unique[receiver.fn_id] = receiver if first is None else first.merged(receiver)
    return {phase: tuple(unique.values()) for phase, unique in found.items()}


class AnySignal(Protocol):
    """What a ``Signal`` is to the modules that ``Signal`` itself imports."""

    name: str

    table: Table
    """Its receivers, by sender."""

    @property
    def receivers(self) -> Mapping[Any, Any]:
        """Its receivers, as blinker has them."""
        ...

    def forget_lookups(self) -> None:
        """Let new mappings be seen by the next lookup."""
        ...


_signals: Final[WeakSet[AnySignal]] = WeakSet()
_signals_lock: Final = threading.Lock()


def add_signal(signal: AnySignal) -> None:
    """Note a new signal, for :func:`known_signals`."""
    with _signals_lock:
        _signals.add(signal)


def known_signals() -> list[AnySignal]:
    """Every signal of the process, those of users included, by name."""
    with _signals_lock:
        return sorted(_signals, key=lambda signal: signal.name)


class _Mute(NamedTuple):
    signal: AnySignal | None
    sender: Any
    receiver: Any

    def silences(self, signal: AnySignal, sender: Any, receiver: Receiver) -> bool:
        return (
            (self.signal is None or self.signal is signal)
            and matches(self.sender, sender)
            and (self.receiver is None or self.receiver in (receiver.fn_id, receiver.name))
        )


_mutes: ContextVar[tuple[_Mute, ...]] = ContextVar("sqla_signals_mutes", default=())


@block
def mute(
    signal: AnySignal | None = None,
    sender: Any = None,
    receiver: Callable[..., Any] | str | None = None,
) -> Iterator[None]:
    """Silence signals inside a ``with`` block, in this thread or task only.

    :param signal: only this signal; ``None`` for every signal.
    :param sender: only this sender (a class, its name, any object) or a list; ``None`` for all.
    :param receiver: only this receiver, the function or its name; ``None`` for all.

    Blocks nest: leaving the inner one does not end the outer one. What happens inside the block
    is silenced, and only that: a flush inside it sends nothing, one after it sends again.
    """
    if signal is not None and not hasattr(signal, "receivers_for"):
        raise ReceiverOptionError(
            f"mute(): {signal!r} is not a signal; mute(signal=None, sender=None, receiver=None)"
        )
    who = identity(receiver) if receiver is not None else None
    if receiver is not None:
        _warn_if_unknown(receiver, who)
    token = _mutes.set(_mutes.get() + tuple(_Mute(signal, s, who) for s in sender_list(sender)))
    try:
        yield
    finally:
        _mutes.reset(token)


_warned: Final[set[str]] = set()


def _warn_if_unknown(receiver: Callable[..., Any] | str, who: Any) -> None:
    """Log, once, that there is no receiver for a :func:`mute` to silence."""
    known = [one for signal in known_signals() for one in signal.table.receivers]
    name = receiver if isinstance(receiver, str) else describe(receiver)
    if name in _warned or any(who in (one.fn_id, one.name) for one in known):
        return
    _warned.add(name)
    close = get_close_matches(name, [one.name for one in known], n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Connect it first, or mend the name"
    _logger.warning("mute(receiver=...) silences nothing: no receiver is %s. %s", name, hint)


def audible(
    signal: AnySignal, sender: Any, receivers: tuple[Receiver, ...]
) -> tuple[Receiver, ...]:
    """``receivers`` without those that a :func:`mute` block around us silences."""
    mutes = _mutes.get()
    if not mutes:
        return receivers
    return tuple(
        r for r in receivers if not any(mute.silences(signal, sender, r) for mute in mutes)
    )


active_mutes: Callable[[], tuple[Any, ...]] = _mutes.get
"""The mutes in force here and now, to ask :func:`was_audible` about later."""


def was_audible(
    signal: AnySignal, sender: Any, receiver: Receiver, occasions: Collection[tuple[Any, ...]]
) -> bool:
    """Whether at least one of the changes happened while the receiver was not muted.

    :param occasions: :func:`active_mutes`, taken when each of the changes happened.
    """
    if () in occasions:
        return True
    return not all(
        any(mute.silences(signal, sender, receiver) for mute in mutes) for mutes in occasions
    )


def is_muted(signal: AnySignal) -> bool:
    """Whether everything that ``signal`` sends is silenced here and now."""
    return any(
        m.signal in (None, signal) and m.sender is ANY and m.receiver is None for m in _mutes.get()
    )


def unawaitable(
    signal: AnySignal, receiver: Receiver, sender: Any, where: str
) -> AsyncReceiverError:
    """The error for an ``async def`` receiver of a signal that is sent by synchronous code."""
    return AsyncReceiverError(
        f"{signal.name}: receiver {receiver} is async, but {describe_sender(sender)} was sent "
        f"from {where}"
    )
