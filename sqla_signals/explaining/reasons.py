"""Why a receiver is never called, or not as often as it looks.

Only what is certain is told: what depends on the work to come, or on another process, is not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from blinker import ANY
from sqlalchemy import Column

from .._sqlalchemy.mappers import all_mappers, writes_rows
from ..bridge.flush.m2m import association_of
from ..errors import printable
from ..receivers.dispatch import audible
from ..receivers.installations import model_signals
from ..receivers.receiver import Receiver, matches, qualified_name
from ..signals.kinds import AssociationSignal
from .parts import Notice, place_of

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper

    from ..signals.signal import Signal


def notices(signal: Signal, receiver: Receiver) -> Iterator[Notice]:
    """What there is to say about a receiver; nothing about signals that are sent by hand."""
    if not any(signal is known for known in model_signals):
        return
    if isinstance(signal, AssociationSignal):
        never, limits = _never_of_association(receiver), []
    else:
        mappers = [mapper for mapper in all_mappers() if receiver.matches(mapper.class_)]
        never = _never_matched(receiver, mappers) or _never_heard(signal, receiver, mappers)
        mappers = [mapper for mapper in mappers if mapper.configured]
        tells_of_updates = "update_fields" in (signal.arguments or ())
        limits = _never_written(receiver, mappers) if tells_of_updates else []
    # A durable receiver is awaited in another process.
    is_awaited_here = receiver.is_async and not receiver.durable
    if never is None and is_awaited_here and "sqlalchemy.ext.asyncio" not in sys.modules:
        never = (
            "it is async, and nothing in this process has imported sqlalchemy.ext.asyncio, so that "
            "no AsyncSession can await it. Make it a plain function"
        )
    file, line = place_of(receiver.location)
    where = f"{file}:{line}" if file else receiver.location
    for text in [never] if never else limits:
        yield Notice(signal.name, printable(receiver.name), where, never is not None, text)


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
        names = {name for mapper in all_mappers() for name in _names_of(mapper.class_)}
        close = get_close_matches(sender, sorted(names), n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Import its module, or mend the name"
        return f"no mapped class is called {sender!r}. {hint}"
    return (
        f"{getattr(sender, '__name__', sender)} is not mapped and no model inherits it. Import the "
        f"models, or give a mapped class"
    )


def _names_of(cls: type) -> set[str]:
    return {cls.__name__, qualified_name(cls)}


def is_meant(receiver: Receiver, mapper: Mapper[Any]) -> bool:
    """Whether the sender of a receiver looks like a misspelt name of this class."""
    sender = receiver.sender
    return (
        isinstance(sender, str)
        and bool(get_close_matches(sender, _names_of(mapper.class_), n=1))
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


def _never_written(receiver: Receiver, mappers: list[Mapper[Any]]) -> list[str]:
    """For each model: the names in ``fields`` that no UPDATE writes."""
    found = []
    for mapper in mappers if receiver.fields is not None else ():
        unwritten = {
            key: why for key, why in _unwritable(mapper) if key in receiver.columns(mapper)
        }
        if unwritten:
            whys = ", ".join(f"{key!r} {why}" for key, why in sorted(unwritten.items()))
            rest = receiver.columns(mapper) - unwritten.keys()
            when = f"{', '.join(map(repr, sorted(rest)))} changes" if rest else ""
            found.append(
                f"of {mapper.class_.__name__}, {whys}: no UPDATE writes that, so it is called for "
                f"new rows{' and when ' + when if when else ' only'}"
            )
    return found


def _unwritable(mapper: Mapper[Any]) -> Iterator[tuple[str, str]]:
    for prop in mapper.column_attrs:
        column = prop.columns[0]
        if not isinstance(column, Column):
            continue
        if column.identity is not None and column.identity.always:
            yield prop.key, "is generated by the database, always"
        elif column.table not in mapper.tables:
            yield prop.key, "is of a table that the model only reads"


def _names(mappers: list[Mapper[Any]]) -> str:
    return ", ".join(mapper.class_.__name__ for mapper in mappers)
