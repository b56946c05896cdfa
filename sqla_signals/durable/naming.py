"""The names by which another process finds a model or a receiver."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect
from sqlalchemy.orm import Mapper, configure_mappers

from .._sqlalchemy import all_mappers
from ..mapping import known_outbox, model_signals
from ..receivers import Receiver
from .message import UnknownModelError, UnknownReceiverError

if TYPE_CHECKING:
    from ..signal import ModelSignal


def model_name(cls: type) -> str:
    """``module.qualname`` of a mapped class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def find_mapper(name: str, *, has_outbox: bool = True) -> Mapper[Any]:
    """The mapper of the class with that name, or that had it, among those that have an outbox.

    :param has_outbox: ``False``: or of one that has none, if no other is found.
    :raises UnknownModelError: there is none, or are several.
    """
    configure_mappers()
    named = [mapper for mapper in all_mappers() if model_name(mapper.class_) == name]
    if not named and (moved := _moved(name)) is not None:
        named = [moved]
    found = [mapper for mapper in named if known_outbox(mapper)]
    if not found and not has_outbox:
        found = named
    if len(found) == 1:
        return found[0]
    raise UnknownModelError(
        f"{len(found) or 'no'} mapped classes are named {name}. Import the module of the model in "
        f"this process; if the class was moved, keep its old name importable until the outbox is "
        f"empty"
    )


def _moved(name: str) -> Mapper[Any] | None:
    """The mapper of the class that a module which is imported has by that name."""
    module, _, attribute = name.rpartition(".")
    # Not imported here: who can write messages must not make us run code by that.
    mapper: Any = inspect(getattr(sys.modules.get(module), attribute, None), raiseerr=False)
    return mapper if isinstance(mapper, Mapper) else None


def find_receiver(name: str, signal: ModelSignal, sender: type) -> Receiver:
    """The durable receiver with that name, which is connected for that class.

    :raises UnknownReceiverError: there is none.
    """
    known: set[str] = set()
    others: list[Receiver] = []
    for one in model_signals:
        for receiver in one.table.receivers:
            if receiver.durable and receiver.fn is not None:
                known.add(receiver.name)
                if one is signal and receiver.name == name:
                    if receiver.matches(sender):
                        return receiver
                    others.append(receiver)
    if others:
        raise UnknownReceiverError(
            f"receiver {others[0]} of {signal.name} is not connected for {model_name(sender)} in "
            f"this process, and called for nothing else. If it was when the event was written, "
            f"connect it again until the outbox is empty"
        )
    raise UnknownReceiverError(
        f"no durable receiver of {signal.name} is named {name!r} in this process, which runs only "
        f"what is connected here: {', '.join(sorted(known)) or 'nothing'}. Import the module of "
        f"the receiver; if it was renamed, connect it with name={name!r}"
    )
