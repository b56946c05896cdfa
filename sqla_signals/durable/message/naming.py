"""The names by which another process finds a model or a receiver."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

from sqlalchemy.orm import Mapper

from ..._sqlalchemy.mappers import all_mappers, configured_mappers, mapper_of
from ...receivers.installations import after_configured
from ...receivers.mapped import durable_receivers, known_outbox
from ...receivers.receiver import Receiver, qualified_name
from .envelope import UnknownModelError, UnknownReceiverError

if TYPE_CHECKING:
    from ...signals.kinds import ModelSignal
    from ..tables.tables import OutboxTables


def find_mapper(name: str, outbox: OutboxTables | None = None) -> Mapper[Any]:
    """The mapper of the class that has this name, or had it, and an outbox.

    :param outbox: among those of this outbox only.
    :raises UnknownModelError: there is none, or are several.
    """
    found = _found.get((name, outbox))
    if found is None or mapper_of(found.class_) is not found:  # disposed of
        found = _found[name, outbox] = _search(name, outbox)
    return found


_found: Final[WeakValueDictionary[tuple[str, Any], Mapper[Any]]] = WeakValueDictionary()
"""Mappers by name and outbox, until others are configured: each message names one."""

after_configured.append(_found.clear)


def _search(name: str, outbox: OutboxTables | None) -> Mapper[Any]:
    moved = _moved(name)
    found = [
        mapper
        for mapper in configured_mappers()
        if (qualified_name(mapper.class_) == name or mapper.class_ is moved)
        and (of := known_outbox(mapper)) is not None
        and (outbox is None or of is outbox)
    ]
    if len(found) == 1:
        return found[0]
    raise UnknownModelError(
        f"{len(found) or 'no'} mapped classes{'' if outbox is None else f' of {outbox!r}'} are "
        f"named {name!r}. Import the module of the model in this process; if the class was moved, "
        f"keep its old name importable until the outbox is empty"
    )


def find_origin(name: str, mapper: Mapper[Any]) -> Mapper[Any] | None:
    """The mapper of a class with that name from which deletes cascade to the rows of ``mapper``.

    ``None`` if they do so from no such class.
    """
    known: set[Mapper[Any]] = set()
    waiting = {mapper}
    while waiting:
        child = waiting.pop()
        for parent in all_mappers():
            if parent not in known and any(
                relationship.cascade.delete and _related(relationship.mapper, child)
                for relationship in parent.relationships
            ):
                if qualified_name(parent.class_) == name:
                    return parent
                known.add(parent)
                waiting.add(parent)
    return None


def _related(one: Mapper[Any], other: Mapper[Any]) -> bool:
    return one.isa(other) or other.isa(one)


def _moved(name: str) -> Any:
    """The value of this name in a module that is imported already.

    It is only compared with mapped classes: whoever can write messages must not be able to import,
    look up or call anything. So this reads the dictionary of the module, and does not ask the
    module, whose ``__getattr__`` would run the code of an application.
    """
    module, _, attribute = name.rpartition(".")
    found = sys.modules.get(module)
    if not isinstance(found, ModuleType):
        return None
    names: dict[str, Any] = object.__getattribute__(found, "__dict__")
    return names.get(attribute)


def find_receiver(name: str, signal: ModelSignal, sender: type) -> Receiver:
    """The durable receiver with that name, which is connected for that class.

    :raises UnknownReceiverError: there is none.
    """
    for receiver in signal.table.lookup(sender, "durable"):
        if receiver.name == name and receiver.fn is not None:
            return receiver
    named = [
        receiver
        for receiver in signal.table.receivers
        if receiver.durable and receiver.name == name and receiver.fn is not None
    ]
    if named:
        raise UnknownReceiverError(
            f"receiver {named[0]} of {signal.name} is not connected for {qualified_name(sender)} "
            f"in this process, and called for nothing else. If it was when the event was written, "
            f"connect it again until the outbox is empty"
        )
    known = {receiver.name for receiver in durable_receivers() if receiver.fn is not None}
    raise UnknownReceiverError(
        f"no durable receiver of {signal.name} is named {name!r} in this process, which runs only "
        f"what is connected here: {', '.join(sorted(known)) or 'nothing'}. Import the module of "
        f"the receiver; if it was renamed, connect it with name={name!r}"
    )
