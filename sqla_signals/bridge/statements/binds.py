"""The bind that a statement goes to, and how the queries around it get to the same one.

A session may choose its binds itself. SQLAlchemy's recipe for readers and writers overrides
``Session.get_bind`` and sends to the leader what is flushed and each UPDATE and DELETE, and to a
follower each SELECT. A row that a statement is about to change must be read where it is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import TableClause, inspect, update

from ..._sqlalchemy.statements import BIND_ARGUMENT, dml_strategy

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.orm import Mapper, ORMExecuteState, Session

    Bind = Engine | Connection


def bind_of(context: ORMExecuteState, mapper: Mapper[Any]) -> Bind:
    """The bind that SQLAlchemy is going to execute the statement on."""
    session = context.session
    if dml_strategy(context) == "bulk":
        # orm/bulk_persistence.py, _bulk_insert() and _bulk_update(): by the base mapper alone.
        bind: Bind = session.get_bind(mapper.base_mapper)
        return bind
    arguments = {**context.bind_arguments, "clause": context.statement}
    arguments.pop(BIND_ARGUMENT, None)
    bind = session.get_bind(**arguments)
    return bind


@contextmanager
def own_choice_of_bind(session: Session) -> Iterator[None]:
    """Let the session choose the bind of an invoked statement as it does for any other."""
    choose = session.get_bind

    def get_bind(*arguments: Any, **options: Any) -> Any:
        options.pop(BIND_ARGUMENT, None)
        return choose(*arguments, **options)

    with _replaced(session, get_bind):
        yield


@contextmanager
def one_bind(session: Session, written: Mapper[Any], bind: Bind) -> Iterator[None]:
    """Let everything about the rows of a class go to one bind.

    What is loaded along with them, such as the other end of a relationship, is read from where an
    UPDATE of its own class would go.
    """
    choose = session.get_bind

    def get_bind(mapper: Any = None, **options: Any) -> Any:
        options.pop(BIND_ARGUMENT, None)
        if options.get("bind") is bind:
            return bind
        if mapper is None:
            return choose(**options)
        loaded: Any = inspect(mapper).mapper
        if loaded.base_mapper is written.base_mapper:
            return bind
        if isinstance(loaded.local_table, TableClause):
            options["clause"] = update(loaded)
        return choose(loaded, **options)

    with _replaced(session, get_bind):
        yield


@contextmanager
def _replaced(session: Session, get_bind: Callable[..., Any]) -> Iterator[None]:
    attributes = session.__dict__
    before = {name: attributes[name] for name in ("get_bind",) if name in attributes}
    attributes["get_bind"] = get_bind
    try:
        yield
    finally:
        del attributes["get_bind"]
        attributes.update(before)
