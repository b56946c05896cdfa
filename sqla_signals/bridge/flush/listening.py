"""The mapper events that tell what a flush writes, on the mappers somebody has receivers for.

Listeners are added when a flush first finds receivers for a mapper, and stay until the last
installation is removed. They do nothing outside of a flush that an installation listens to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy.orm import Mapper

from ..._sqlalchemy.events import (
    is_last_listener,
    listen_to,
    listen_to_class,
    unlisten,
    unlisten_to_class,
)
from ..._sqlalchemy.mappers import all_mappers
from ...receivers.observing import observers
from ...signals.builtin import post_delete, post_save, pre_delete, pre_save
from ..calling.calls import AFTER_FLUSH
from .flush import flushes, no_flush

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import InstanceState

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
_seen: tuple[object, ...] = ()


def listen_where_needed() -> None:
    """Listen on each mapper that has receivers by now; cheap when nothing has changed."""
    global _seen
    tables = pre_save.table, post_save.table, pre_delete.table, post_delete.table
    now = (*tables, bool(observers))
    if now == _seen:
        return
    with _lock:
        for mapper in all_mappers():
            cls, awaits_end = mapper.class_, _awaits_end(mapper)
            is_announced = bool(pre_save.table.lookup(cls))
            if is_announced:
                _listen(mapper, _BEFORE_SAVES)
            is_observed = is_announced and bool(observers)
            if awaits_end or is_observed or post_save.table.lookup(cls):
                _listen(mapper, _SAVES)
            if awaits_end or pre_delete.table.lookup(cls) or post_delete.table.lookup(cls):
                _listen(mapper, _DELETES)
        _seen = now


def _awaits_end(mapper: Mapper[Any]) -> bool:
    """Whether a receiver waits for the end of the transaction: its net effect takes all events."""
    return any(
        signal.table.lookup(mapper.class_, on)
        for signal in (post_save, post_delete)
        for on in AFTER_FLUSH
    )


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
    global _seen
    _seen = ()


def stop_listening() -> None:
    """Remove every listener."""
    global _seen
    unlisten_to_class(Mapper, "mapper_configured", _mapper_configured)
    with _lock:
        for mapper, names in list(_listening.items()):
            for name in names:
                unlisten(mapper, name, {**_BEFORE_SAVES, **_SAVES, **_DELETES}[name])
        _listening.clear()
        _seen = ()
