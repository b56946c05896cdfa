"""Listeners that come and go while other threads run through them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy.event import registry as event_registry
from sqlalchemy.orm import Session
from sqlalchemy.util import walk_subclasses

from .mappers import all_mappers
from .sessions import all_sessions

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper


def is_listener(session: Session, event_name: str, fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` was added to this session itself, not to its class."""
    dispatch = session.__dict__.get("dispatch")
    return dispatch is not None and fn in getattr(dispatch, event_name).listeners


def listen_to_class(cls: Any, event_name: str, fn: Callable[..., Any]) -> None:
    """Add a listener of all sessions of a class, or of all mappers; once, if it is there already.

    ``event.listen`` changes collections in place (event/attr.py, ``_ClsLevelDispatch``), which
    breaks a loop over one of them in another thread or in the caller. Here they are replaced.
    """
    _replace_listeners(cls, event_name, fn, lambda others: [*others, fn])
    event_registry._stored_in_collection(
        event_registry._EventKey(cls, event_name, fn, cls), getattr(cls.dispatch, event_name)
    )


def unlisten_to_class(cls: Any, event_name: str, fn: Callable[..., Any]) -> None:
    """Undo :func:`listen_to_class`.

    SQLAlchemy may have forgotten the listener: its test fixtures call ``SessionEvents._clear()``.
    """
    _replace_listeners(cls, event_name, fn, lambda others: others)
    key = event_registry._EventKey(cls, event_name, fn, cls)
    if key.contains():
        event_registry._removed_from_collection(key, getattr(cls.dispatch, event_name))


def _replace_listeners(
    target: Any, event_name: str, fn: Callable[..., Any], replace: Callable[[list[Any]], list[Any]]
) -> None:
    of_classes = getattr(target.dispatch, event_name)
    for cls in walk_subclasses(target):
        if cls not in of_classes._clslevel:
            of_classes.update_subclass(cls)
        others = [one for one in of_classes._clslevel[cls] if one != fn]
        listeners = of_classes._clslevel[cls] = deque(replace(others))
        of_instances = target.dispatch._empty_listener_reg.get(cls)
        if of_instances is not None:
            of_instances[event_name].parent_listeners = listeners
    # Instances with listeners of their own refer to those of their class by themselves.
    owners: list[Any] = [*all_sessions(), *all_mappers()]
    for owner in owners:
        if isinstance(owner, target) and "dispatch" in owner.__dict__:
            of_instance = getattr(owner.dispatch, event_name)
            of_instance.parent_listeners = of_classes._clslevel[type(owner)]


def listen_to(owner: Any, event_name: str, fn: Callable[..., Any], *, first: bool) -> None:
    """Add a listener of one session, mapper or class manager, as with ``raw=True``.

    The collection is replaced, as by :func:`listen_to_class`.
    """
    collection = getattr(owner.dispatch, event_name).for_modify(owner.dispatch)
    others = [one for one in collection.listeners if one != fn]
    collection.listeners = deque([fn, *others] if first else [*others, fn])


def unlisten(owner: Any, event_name: str, fn: Callable[..., Any]) -> None:
    """Undo :func:`listen_to`."""
    # ClassManager.unregister (orm/instrumentation.py), for registry.dispose(), leaves none.
    collection: Any = getattr(owner.dispatch, event_name, None)
    if fn in getattr(collection, "listeners", ()):
        collection.listeners = deque(one for one in collection.listeners if one != fn)


def is_last_listener(mapper: Mapper[Any], event_name: str, fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` is the last listener of a mapper's own for an event."""
    listeners = getattr(mapper.dispatch, event_name).listeners
    return bool(listeners) and listeners[-1] == fn


def wrap_init(
    mapper: Mapper[Any], wrap: Callable[[Callable[..., None]], Callable[..., None]]
) -> None:
    """Replace the ``__init__`` of exactly this class by ``wrap(init)``.

    SQLAlchemy has an event before ``__init__`` but none after it. A ``super().__init__()`` in a
    subclass does not call the wrapper.
    """
    manager = mapper.class_manager
    init = manager.original_init
    assert init is not None
    wrapped: Any = wrap(init)
    wrapped.__wrapped__ = init
    manager.original_init = wrapped


def unwrap_init(mapper: Mapper[Any]) -> None:
    """Undo :func:`wrap_init`."""
    wrapped: Any = mapper.class_manager.original_init
    mapper.class_manager.original_init = wrapped.__wrapped__
