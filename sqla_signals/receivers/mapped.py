"""Receivers and the mapped classes that they are connected for: checks, and outboxes.

A class may be mapped long after a receiver was connected for it, so the checks are made twice:
when a receiver is connected, and each time that mappers were configured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Final

from sqlalchemy import Table, event
from sqlalchemy.orm import Mapper

from .._sqlalchemy.events import listen_to_class
from .._sqlalchemy.mappers import all_mappers
from ..errors import ReceiverOptionError
from .dispatch import AnySignal
from .installations import (
    after_configured,
    installations,
    model_signals,
    warn_at_flush,
    warn_not_installed,
)
from .receiver import Receiver, names_of, qualified_name

OUTBOX: Final = "sqla_signals.outbox"
"""Key in ``MetaData.info`` of what writes the durable messages of its models."""


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


def unknown_class(name: str) -> str:
    """What to say of a name that no mapped class has, with the nearest name that there is."""
    names = {one for mapper in all_mappers() for one in names_of(mapper.class_)}
    close = get_close_matches(name, sorted(names), n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Import its module, or mend the name"
    return f"no mapped class is called {name!r}. {hint}"


def connect(signal: AnySignal, receivers: Iterable[Receiver]) -> None:
    """Check new receivers as far as their classes are mapped, and the rest when they are."""
    for receiver in receivers:
        _check(signal.name, receiver)
    for installation in installations:
        installation.listen_for(signal)
    # The one listener without an installation, because the warning that install() was forgotten
    # has to come from somewhere.
    if not event.contains(Mapper, "after_configured", _after_configured):
        listen_to_class(Mapper, "after_configured", _after_configured)
    if not installations and any(
        mapper.configured
        and (receiver.matches(mapper.class_) or not isinstance(receiver.sender, str | type))
        for mapper in all_mappers()
        for receiver in receivers
    ):
        warn_at_flush()  # these mappers are configured already, so that event does not come again


def _check(signal: str, receiver: Receiver) -> None:
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
                raise ReceiverOptionError(f"{signal}: {error}") from None
        if isinstance(receiver.sender, str) and not receiver.propagate:
            named[mapper.registry].add(qualified_name(mapper.class_))
    for names in named.values():
        if len(names) > 1:
            raise ReceiverOptionError(
                f"{signal}: receiver {receiver}: sender={receiver.sender!r} could be any of "
                f"{', '.join(sorted(names))}. Give the full name or the class."
            )


def _after_configured() -> None:
    for signal in model_signals:
        signal.forget_lookups()
    receivers = []
    for signal in model_signals:
        for receiver in signal.table.receivers:
            _check(signal.name, receiver)
            receivers.append(receiver)
    warn_not_installed(receivers, "mappers were configured")
    for prepare in list(after_configured):
        prepare()
