"""``pre_init``, ``post_init`` and ``class_prepared``: the life of classes and instances in Python.

A class is listened to while it has receivers of its own, and no other class pays for that. So this
is settled when receivers come and go and when classes are mapped, not when instances are made.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from sqlalchemy.orm import Mapper

from .._sqlalchemy.events import (
    listen_to,
    listen_to_class,
    unlisten,
    unlisten_to_class,
    unwrap_init,
    wrap_init,
)
from .._sqlalchemy.mappers import all_mappers
from ..receivers.dispatch import audible
from ..receivers.installations import after_configured, installations
from ..signals.builtin import class_prepared, post_init, pre_init
from .calling.calls import send

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, QueryContext

    from ..signals.kinds import InstanceSignal

_lock = threading.Lock()
_constructing: WeakSet[Mapper[Any]] = WeakSet()
_loading: WeakSet[Mapper[Any]] = WeakSet()
_to_prepare: deque[Mapper[Any]] = deque()
"""Configured, and not yet announced."""


def _announced(init: Callable[..., None], cls: type) -> Callable[..., None]:
    """The constructor of a class, with the signals around it."""

    def construct(instance: Any, /, *args: Any, **kwargs: Any) -> None:
        _send(pre_init, cls, args=args, kwargs=kwargs)
        init(instance, *args, **kwargs)
        _send(post_init, cls, instance=instance, loaded=False)

    return construct


def _load(state: InstanceState[Any], context: QueryContext | None) -> None:
    """``load``: an instance was made from a row, or as a copy of one."""
    session = state.session
    if session is not None and not any(one.closeness(session) for one in installations):
        return
    # A receiver may load more of the instance while the query is not done with it; this is what
    # restore_load_context does for listeners.
    runid = state.runid
    try:
        loaded = state.key is not None  # merge() tells also of what is new
        _send(post_init, state.manager.class_, instance=state.obj(), loaded=loaded)
    finally:
        state.runid = runid


def _send(signal: InstanceSignal, cls: type, **arguments: Any) -> None:
    if installations:
        receivers = audible(signal, cls, signal.table.lookup(cls))
        send(signal, cls, receivers, "Python code that cannot wait for it", **arguments)


def listen_where_needed() -> None:
    """Listen to the classes that have receivers by now, and no longer to those that have none."""
    with _lock:
        if not (pre_init.table.receivers or post_init.table.receivers or _constructing):
            return
        for mapper in all_mappers():
            cls = mapper.class_
            loads = bool(post_init.table.lookup(cls))
            _listen(mapper, constructs=loads or bool(pre_init.table.lookup(cls)), loads=loads)


def _listen(mapper: Mapper[Any], *, constructs: bool, loads: bool) -> None:
    if constructs and mapper not in _constructing:
        wrap_init(mapper, lambda init: _announced(init, mapper.class_))
        _constructing.add(mapper)
    elif not constructs and mapper in _constructing:
        unwrap_init(mapper)
        _constructing.discard(mapper)
    if loads and mapper not in _loading:
        listen_to(mapper.class_manager, "load", _load, first=False)
        _loading.add(mapper)
    elif not loads and mapper in _loading:
        unlisten(mapper.class_manager, "load", _load)
        _loading.discard(mapper)


def _receivers_changed(signal: Any, **_: Any) -> None:
    listen_where_needed()


def _mapper_configured(mapper: Mapper[Any], cls: type) -> None:
    if class_prepared.table.receivers:
        _to_prepare.append(mapper)


def _after_configured() -> None:
    listen_where_needed()
    while _to_prepare:
        _send(class_prepared, _to_prepare.popleft().class_)


def start_listening() -> None:
    """Follow classes and receivers, from now on."""
    if _after_configured not in after_configured:
        after_configured.append(_after_configured)
        for signal in (pre_init, post_init):
            signal.receiver_connected.connect(_receivers_changed)
            signal.receiver_disconnected.connect(_receivers_changed)
    listen_to_class(Mapper, "mapper_configured", _mapper_configured)
    listen_where_needed()


def stop_listening() -> None:
    """Remove every listener."""
    if _after_configured in after_configured:
        after_configured.remove(_after_configured)
        for signal in (pre_init, post_init):
            signal.receiver_connected.disconnect(_receivers_changed)
            signal.receiver_disconnected.disconnect(_receivers_changed)
    unlisten_to_class(Mapper, "mapper_configured", _mapper_configured)
    with _lock:
        for mapper in {*_constructing, *_loading}:
            _listen(mapper, constructs=False, loads=False)
        _to_prepare.clear()
