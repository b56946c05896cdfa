"""The mapper events that tell what a flush writes, on the mappers somebody has receivers for.

Listeners are added when a flush first finds receivers for a mapper, and stay until the last
installation is removed. They do nothing outside of a flush that an installation listens to.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy.orm import Mapper

from ..._sqlalchemy.events import (
    is_last_listener,
    listen_to,
    listen_to_class,
    unlisten,
    unlisten_to_class,
)
from ..._sqlalchemy.mappers import all_mappers, mapper_of
from ...receivers.mapped import unknown_class
from ...receivers.observing import observers
from ...receivers.receiver import matches
from ...signals.builtin import post_save, pre_save
from ...signals.signal import logger
from ..calling.audience import ROW_SIGNALS, Tables, tables
from .flush import flushes, no_flush

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import InstanceState

    from ...receivers.receiver import Receiver
    from ...signals.signal import Signal

    State = InstanceState[Any]


def before_insert(mapper: Mapper[Any], connection: Connection, state: State) -> None:
    """Announce an INSERT that was not foreseen."""
    flush = flushes.get(state.session_id, no_flush)()
    if flush is not None:
        announcement = flush.announcement
        if announcement.hears_saves and state not in announcement.created:
            announcement.send_late(state, is_delete=False)


def before_update(mapper: Mapper[Any], connection: Connection, state: State) -> None:
    """Announce an UPDATE that was not foreseen, and keep the history."""
    flush = flushes.get(state.session_id, no_flush)()
    if flush is not None:
        announcement = flush.announcement
        if announcement.hears_saves and state not in announcement.updates:
            announcement.send_late(state, is_delete=False)
        flush.record.remember(state)


def before_delete(mapper: Mapper[Any], connection: Connection, state: State) -> None:
    """Announce a DELETE that was not foreseen, and load what could not be read after it."""
    flush = flushes.get(state.session_id, no_flush)()
    if flush is not None:
        flush.before_delete(state)


def after_insert(mapper: Mapper[Any], connection: Connection, state: State) -> None:
    """Note an INSERT."""
    flush = flushes.get(state.session_id, no_flush)()
    if flush is not None:
        flush.record.inserted(state)


def after_update(mapper: Mapper[Any], connection: Connection, state: State) -> None:
    """Note an UPDATE, if one was emitted."""
    flush = flushes.get(state.session_id, no_flush)()
    if flush is not None:
        flush.record.updated(state)


def after_delete(mapper: Mapper[Any], connection: Connection, state: State) -> None:
    """Note a DELETE."""
    flush = flushes.get(state.session_id, no_flush)()
    if flush is not None:
        flush.record.deleted(state)


_BEFORE_SAVES: Final = {"before_insert": before_insert, "before_update": before_update}
_SAVES: Final = {
    "before_update": before_update,
    "after_insert": after_insert,
    "after_update": after_update,
}
_DELETES: Final = {"before_delete": before_delete, "after_delete": after_delete}

_lock = threading.Lock()
_listening: WeakKeyDictionary[Mapper[Any], set[str]] = WeakKeyDictionary()
_settled: tuple[Tables, bool] | None = None
"""The receivers, and whether they were observed, for which all mappers have their listeners."""
_new_mappers: list[weakref.ref[Mapper[Any]]] = []
"""Configured since."""


def listen_where_needed() -> None:
    """Listen on each mapper that has receivers by now; cheap when nothing has changed.

    Only what has come since the last time is looked at: there may be a thousand mappers.
    """
    global _settled
    is_observed = bool(observers)
    now = tables(), is_observed
    if now == _settled and not _new_mappers:
        return
    with _lock:
        configured = list(_new_mappers)
        new = {mapper for reference in configured if (mapper := reference()) is not None}
        known: set[Receiver] = set()
        if _settled is not None and _settled[1] >= is_observed:
            known = {receiver for table in _settled[0] for receiver in table.receivers}
        for signal, table in zip(ROW_SIGNALS, now[0], strict=True):
            for receiver in table.receivers:
                listeners = _listeners_for(signal, receiver, is_observed)
                mappers = new if receiver in known else {*new, *_mappers_of(receiver)}
                mine = [mapper for mapper in mappers if receiver.matches(mapper.class_)]
                for mapper in mine:
                    _listen(mapper, listeners)
                if receiver not in known and not mine:
                    _warn_if_misspelt(signal, receiver)
        # Last: until then a flush of another thread waits for the lock.
        _settled = now
        del _new_mappers[: len(configured)]


_warned: Final[WeakSet[Receiver]] = WeakSet()


def _warn_if_misspelt(signal: Signal, receiver: Receiver) -> None:
    """Log, once, that no mapped class has the name that a receiver was connected to."""
    name = receiver.sender
    if isinstance(name, str) and receiver not in _warned:
        _warned.add(receiver)
        if not any(matches(name, mapper.class_, receiver.propagate) for mapper in all_mappers()):
            why = unknown_class(name)
            logger.warning("%s: receiver %s is not called: %s", signal.name, receiver, why)


def _listeners_for(
    signal: Signal, receiver: Receiver, is_observed: bool
) -> Mapping[str, Callable[..., None]]:
    """What has to be noted so that a receiver can be called."""
    if receiver.phase != "flush":
        return {**_SAVES, **_DELETES}  # a net effect takes all that happened to a row
    if signal is pre_save:
        return {**_BEFORE_SAVES, **_SAVES} if is_observed else _BEFORE_SAVES
    return _SAVES if signal is post_save else _DELETES


def _mappers_of(receiver: Receiver) -> Iterable[Mapper[Any]]:
    """The mappers that a receiver may be for."""
    sender = receiver.sender
    mapper = mapper_of(sender) if isinstance(sender, type) and not receiver.propagate else None
    # A sender that is no mapped class stands for what issubclass() says, which an abstract base
    # class may say of any class.
    return all_mappers() if mapper is None else [mapper]


def _listen(mapper: Mapper[Any], listeners: Mapping[str, Callable[..., None]]) -> None:
    names = _listening.setdefault(mapper, set())
    for name, listener in listeners.items():
        if name not in names:
            # What another listener assigns after the statement was not written: ours comes first.
            listen_to(mapper, name, listener, first=name.startswith("after"))
            names.add(name)


def stay_last(mapper: Mapper[Any]) -> None:
    """Let ``before_update`` run after any listener that could still turn nothing into an UPDATE."""
    if "before_update" in _listening.get(mapper, ()) and not is_last_listener(
        mapper, "before_update", before_update
    ):
        with _lock:
            listen_to(mapper, "before_update", before_update, first=False)


def start_listening() -> None:
    """Look again for mappers with receivers whenever one is configured."""
    listen_to_class(Mapper, "mapper_configured", _mapper_configured)


def _mapper_configured(mapper: Mapper[Any], cls: type) -> None:
    _new_mappers.append(weakref.ref(mapper))


def stop_listening() -> None:
    """Remove every listener."""
    global _settled
    unlisten_to_class(Mapper, "mapper_configured", _mapper_configured)
    with _lock:
        for mapper, names in list(_listening.items()):
            for name in names:
                unlisten(mapper, name, {**_BEFORE_SAVES, **_SAVES, **_DELETES}[name])
        _listening.clear()
        _settled = None
