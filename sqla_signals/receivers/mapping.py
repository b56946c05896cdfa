"""What receivers of model signals need from the mappers: checks once a class is mapped.

The one listener outside of ``install``: added when the first receiver of a model signal is
connected, because the warning that ``install`` was forgotten has to come from somewhere.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final
from weakref import WeakSet, WeakValueDictionary

from sqlalchemy import Table, event
from sqlalchemy.orm import Mapper, Session

from .._sqlalchemy.events import listen_to_class, unlisten_to_class
from .._sqlalchemy.mappers import all_mappers
from ..errors import ReceiverOptionError, SignalsNotInstalledWarning
from .dispatch import AnySignal
from .receiver import Receiver, qualified_name

OUTBOX: Final = "sqla_signals.outbox"
"""Key in ``MetaData.info`` of what writes the durable messages of its models."""

model_signals: list[AnySignal] = []
"""The signals that an installation sends."""


class Installations:
    """A set of weak references that may be iterated over while another thread installs."""

    def __init__(self) -> None:
        self._by_id: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def add(self, installation: Any) -> None:
        """Add one."""
        self._by_id[id(installation)] = installation

    def discard(self, installation: Any) -> None:
        """Remove one, if it is there."""
        self._by_id.pop(id(installation), None)

    def __iter__(self) -> Iterator[Any]:
        found = [reference() for reference in self._by_id.valuerefs()]  # copied in one step
        return iter([one for one in found if one is not None])

    def __len__(self) -> int:
        return len(self._by_id)


installations: Final = Installations()
"""What :func:`sqla_signals.install` has returned and is not removed."""

after_configured: list[Callable[[], None]] = []
"""What installations do once mappers are configured. Not listeners of their own: SQLAlchemy cannot
gain or lose one while it is calling them, and that is when an application may install."""

_warned: WeakSet[Receiver] = WeakSet()


def durable_receivers() -> list[Receiver]:
    """The durable receivers of all signals, in no particular order."""
    return [
        receiver
        for signal in model_signals
        if signal.table.durable
        for receiver in signal.table.receivers
        if receiver.durable
    ]


def known_outbox(mapper: Mapper[Any]) -> Any:
    """What writes the durable messages of a model, ``None`` if nothing does."""
    for table in mapper.tables:
        if isinstance(table, Table) and OUTBOX in table.metadata.info:
            return table.metadata.info[OUTBOX]
    return None


def outbox_of(mapper: Mapper[Any], receiver: Receiver) -> Any:
    """What writes the durable messages of a model.

    Raises :class:`ReceiverOptionError` where there is nothing.
    """
    outbox = known_outbox(mapper)
    if outbox is not None:
        return outbox
    raise ReceiverOptionError(
        f"receiver {receiver} is durable, but {mapper.class_.__name__} has no outbox to write "
        f"its messages to. Add it to the metadata of the model, before receivers are connected: "
        f"sqla_signals.durable.outbox_table({mapper.class_.__name__}.metadata)"
    )


def connected(signal: AnySignal, receivers: Iterable[Receiver]) -> None:
    """Check new receivers as far as their classes are mapped, and the rest when they are."""
    for receiver in receivers:
        check(signal, receiver)
    for installation in installations:
        installation.listen_for(signal)
    if not event.contains(Mapper, "after_configured", _after_configured):
        listen_to_class(Mapper, "after_configured", _after_configured)
    if not installations and any(
        mapper.configured
        and (receiver.matches(mapper.class_) or not isinstance(receiver.sender, str | type))
        for mapper in all_mappers()
        for receiver in receivers
    ):
        # Configured already, so nothing else would come to say it.
        listen_to_class(Session, "before_flush", _flushed_without_install)


def installed(installation: Any) -> None:
    """Nothing was forgotten."""
    installations.add(installation)
    unlisten_to_class(Session, "before_flush", _flushed_without_install)


def check(signal: AnySignal, receiver: Receiver) -> None:
    """Raise :class:`ReceiverOptionError` if the classes mapped so far show an option to be wrong.

    That is when ``fields`` names what the class of the sender lacks, when a string sender names two
    classes of one registry, or when a durable receiver's class has no outbox or cannot be written
    into a message.
    """
    if receiver.fields is None and not receiver.durable and not isinstance(receiver.sender, str):
        return
    named: dict[Any, set[str]] = defaultdict(set)
    for mapper in all_mappers():
        if not receiver.matches(mapper.class_):
            continue
        if mapper.configured:
            try:
                receiver.check_fields(mapper)
                if receiver.durable:
                    outbox_of(mapper, receiver).check(mapper, receiver)
            except ReceiverOptionError as error:
                raise ReceiverOptionError(f"{signal.name}: {error}") from None
        if isinstance(receiver.sender, str) and not receiver.propagate:
            named[mapper.registry].add(qualified_name(mapper.class_))
    for names in named.values():
        if len(names) > 1:
            raise ReceiverOptionError(
                f"{signal.name}: receiver {receiver}: sender={receiver.sender!r} could be any of "
                f"{', '.join(sorted(names))}. Give the full name or the class."
            )


def _after_configured() -> None:
    waiting = [
        (signal, receiver) for signal in model_signals for receiver in signal.table.receivers
    ]
    for signal in model_signals:
        signal.forget_lookups()
    for signal, receiver in waiting:
        check(signal, receiver)
    if waiting and not installations:
        _warn([receiver for _, receiver in waiting], "mappers were configured")
    for prepare in list(after_configured):
        prepare()


def _flushed_without_install(*_: object) -> None:
    receivers = [
        receiver
        for signal in model_signals
        for receiver in signal.table.receivers
        if receiver not in _warned
    ]
    if receivers and not installations:
        _warned.update(receivers)
        _warn(receivers, "a session was flushed")


def _warn(receivers: list[Receiver], when: str) -> None:
    names = ", ".join(dict.fromkeys(str(receiver) for receiver in receivers[:5]))
    more = f" and {len(receivers) - 5} more" if len(receivers) > 5 else ""
    warnings.warn(
        f"{when} while sqla_signals is not installed, so these receivers are never called: "
        f"{names}{more}. Add one line where the application starts: sqla_signals.install()",
        SignalsNotInstalledWarning,
        stacklevel=2,
    )
