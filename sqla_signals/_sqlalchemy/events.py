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
    from sqlalchemy.orm import InstanceState, Mapper

    State = InstanceState[Any]


def is_listener(session: Session, event_name: str, fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` listens to this one session, or to the one that it is like."""
    dispatch = session.__dict__.get("dispatch")
    return dispatch is not None and fn in getattr(dispatch, event_name).listeners


def listen_to_class(cls: Any, event_name: str, fn: Callable[..., Any]) -> None:
    """Add a listener of all sessions of a class, or of all mappers; once, if it is there already.

    ``event.listen`` changes the collections (event/attr.py, ``_ClsLevelDispatch``), and so breaks
    whoever runs through one of them: another thread, or the caller. Here they are replaced.
    """
    _replace_listeners(cls, event_name, fn, lambda others: [*others, fn])
    event_registry._stored_in_collection(
        event_registry._EventKey(cls, event_name, fn, cls), getattr(cls.dispatch, event_name)
    )


def unlisten_to_class(cls: Any, event_name: str, fn: Callable[..., Any]) -> None:
    """Undo :func:`listen_to_class`; also if SQLAlchemy has forgotten the listener meanwhile.

    Its own test fixtures let it, with ``SessionEvents._clear()``.
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
    """Add a listener of one session, mapper or class manager, that gets the state itself.

    It replaces the collection, as :func:`listen_to_class` does.
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
    """Let ``wrap(init)`` be called where SQLAlchemy constructs an instance of exactly this class.

    The ``init`` event comes before ``__init__``, and there is none behind it. What is replaced is
    called for the outermost constructor alone: a ``super().__init__()`` does not come here.
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
