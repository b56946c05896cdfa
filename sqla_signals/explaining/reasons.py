"""Why a receiver is never called.

Only what is certain is told: what depends on the work to come, or on another process, is not.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from blinker import ANY

from .._sqlalchemy.mappers import all_mappers, writes_rows
from ..bridge.flush.m2m import association_of
from ..errors import printable
from ..receivers.dispatch import audible
from ..receivers.installations import model_signals
from ..receivers.mapped import unknown_class
from ..receivers.receiver import Receiver, matches, names_of
from ..signals.kinds import AssociationSignal
from .parts import Notice, place_of

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper

    from ..signals.signal import Signal


def notice_of(signal: Signal, receiver: Receiver) -> Notice | None:
    """Say why a receiver is never called; ``None`` if it may be, or the signal is sent by hand."""
    if not any(signal is known for known in model_signals):
        return None
    if isinstance(signal, AssociationSignal):
        text = _never_of_association(receiver)
    else:
        mappers = [mapper for mapper in all_mappers() if receiver.matches(mapper.class_)]
        text = _never_matched(receiver, mappers) or _never_heard(signal, receiver, mappers)
    # A durable receiver is awaited in another process.
    is_awaited_here = receiver.is_async and not receiver.durable
    if text is None and is_awaited_here and "sqlalchemy.ext.asyncio" not in sys.modules:
        text = (
            "it is async, and nothing in this process has imported sqlalchemy.ext.asyncio, so that "
            "no AsyncSession can await it. Make it a plain function"
        )
    if text is None:
        return None
    file, line = place_of(receiver.location)
    where = f"{file}:{line}" if file else receiver.location
    return Notice(signal.name, printable(receiver.name), where, text)


def hears(receiver: Receiver, mapper: Mapper[Any]) -> bool:
    """Whether a receiver is for what this class, or one of its relationships, sends."""
    sender = receiver.sender
    if sender is ANY or isinstance(sender, str | type):
        return receiver.matches(mapper.class_)
    return any(
        association_of(relationship).side_for(sender) is not None
        for relationship in filter(writes_rows, mapper.relationships)
    )


def _never_matched(receiver: Receiver, mappers: list[Mapper[Any]]) -> str | None:
    sender = receiver.sender
    if mappers:
        if all(mapper.polymorphic_abstract for mapper in mappers):
            return (
                f"{_names(mappers)} is polymorphic_abstract, so every instance is of a subclass. "
                f"Add propagate=True"
            )
        if not any(mapper.configured for mapper in mappers):
            return f"SQLAlchemy cannot configure {_names(mappers)}. configure_mappers() says why"
        return None
    if any(matches(sender, mapper.class_, receiver.propagate) for mapper in all_mappers()):
        fields = ", ".join(map(repr, sorted(receiver.fields or ())))
        return f"no class that it is for has a column attribute {fields}. Mend fields="
    if sender is ANY:
        return "no class is mapped. Import the models"
    if isinstance(sender, str):
        return unknown_class(sender)
    return (
        f"{getattr(sender, '__name__', sender)} is not mapped and no model inherits it. Import the "
        f"models, or give a mapped class"
    )


def is_meant(receiver: Receiver, mapper: Mapper[Any]) -> bool:
    """Whether the sender of a receiver looks like a misspelt name of this class."""
    sender = receiver.sender
    return (
        isinstance(sender, str)
        and bool(get_close_matches(sender, names_of(mapper.class_), n=1))
        and not any(receiver.matches(known.class_) for known in all_mappers())
    )


def _never_heard(signal: Signal, receiver: Receiver, mappers: list[Mapper[Any]]) -> str | None:
    if any(audible(signal, mapper.class_, (receiver,)) for mapper in mappers):
        return None
    return "it is muted here, by a mute() block around this"


def _never_of_association(receiver: Receiver) -> str | None:
    if any(hears(receiver, mapper) for mapper in all_mappers() if mapper.configured):
        return None
    if receiver.sender is ANY:
        return "no model has a relationship with a secondary table"
    return (
        f"{getattr(receiver.sender, 'name', receiver.sender)} is the secondary table of no "
        f"relationship that writes to it"
    )


def _names(mappers: list[Mapper[Any]]) -> str:
    return ", ".join(mapper.class_.__name__ for mapper in mappers)
