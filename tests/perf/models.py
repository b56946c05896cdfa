"""Three columns, programs that write many rows at once, and surroundings to run them in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import StaticPool

import sqla_signals
from sqla_signals import post_save, pre_save

from .pairs import Side, Work

Kind = Literal["insert", "update"]
Surroundings = Callable[[], AbstractContextManager[object]]


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "thing"

    id: Mapped[int] = mapped_column(primary_key=True)
    a: Mapped[int]
    b: Mapped[str]


class Other(Base):
    __tablename__ = "other"

    id: Mapped[int] = mapped_column(primary_key=True)
    a: Mapped[int]
    b: Mapped[str]


engine = create_engine("sqlite://", poolclass=StaticPool)


@contextmanager
def database() -> Iterator[None]:
    """The tables, in memory."""
    Base.metadata.create_all(engine)
    yield
    engine.dispose()


def new_session() -> Session:
    # Expiring is work for each row that has nothing to do with signals.
    return Session(engine, expire_on_commit=False)


def clear(engine: Engine = engine, base: Any = Base) -> None:
    """Delete every row."""
    with engine.begin() as connection:
        for table in base.metadata.tables.values():
            connection.execute(table.delete())


@contextmanager
def writing(
    kind: Kind,
    rows: int,
    *models: Any,
    commit: bool = False,
    sessions: Callable[[], AbstractContextManager[Any]] = new_session,
    clear: Callable[[], None] = clear,
) -> Iterator[Work]:
    """A session with ``rows`` rows to write, evenly of all ``models``, and the call to do it."""
    models = models or (Thing,)
    with sessions() as session:
        write = session.commit if commit else session.flush
        # What the first flush sets up is set up for all.
        session.add_all([model(a=0, b="first") for model in models])
        write()
        things = [model(a=i, b="x") for i in range(rows // len(models)) for model in models]
        session.add_all(things)
        if kind == "update":
            write()
            session.connection()
            for i, thing in enumerate(things):
                thing.a = -i - 1
                thing.b = "y"
        yield write
    if commit:
        clear()


@contextmanager
def requests(kind: Kind, count: int, engine: Engine = engine) -> Iterator[Work]:
    """So many transactions of one row, each in a session of its own, as web requests have them."""
    with Session(engine) as session:
        session.add(Thing(id=1, a=0, b="first"))
        session.commit()

    values = itertools.count(1)

    def insert() -> None:
        for _ in range(count):
            with Session(engine) as session:
                session.add(Thing(a=1, b="x"))
                session.commit()

    def update() -> None:
        for _ in range(count):
            with Session(engine) as session:
                thing = session.get(Thing, 1)
                assert thing is not None
                thing.a = next(values)
                session.commit()

    yield insert if kind == "insert" else update
    clear(engine)


def side(surroundings: Surroundings, program: Side) -> Side:
    """A side that runs a program in its surroundings."""

    @contextmanager
    def both() -> Iterator[Work]:
        with surroundings(), program() as work:
            yield work

    return both


@contextmanager
def plain() -> Iterator[None]:
    """Nobody listens."""
    yield


def installed(*connections: tuple[sqla_signals.Signal, Any, dict[str, Any]]) -> Surroundings:
    """Signals for every session, with these ``(signal, receiver, options)`` connected."""

    @contextmanager
    def surroundings() -> Iterator[None]:
        for signal, receiver, options in connections:
            signal.connect(receiver, weak=False, **options)
        installation = sqla_signals.install()
        try:
            yield
        finally:
            installation.remove()
            for signal, receiver, _ in connections:
                signal.disconnect(receiver)

    return surroundings


def does_nothing(sender: Any, instance: Any, **kwargs: Any) -> None: ...


def _hearing(model: Any, *ways: str) -> Surroundings:
    connections: dict[str, tuple[sqla_signals.Signal, Any, dict[str, Any]]] = {
        "pre": (pre_save, does_nothing, {"sender": model}),
        "post": (post_save, does_nothing, {"sender": model}),
        "commit": (post_save, does_nothing, {"sender": model, "on": "commit"}),
    }
    return installed(*(connections[way] for way in ways))


ONE_ROW: dict[str, Surroundings] = {
    "no receivers": installed(),
    "another model": _hearing(Other, "pre", "post"),
    "pre + post": _hearing(Thing, "pre", "post"),
    "commit": _hearing(Thing, "commit"),
}
"""Who listens where one row is written in a transaction."""


def listening(*listeners: tuple[str, Any], target: Any = Thing) -> Surroundings:
    """Mapper listeners, written by hand."""

    @contextmanager
    def surroundings() -> Iterator[None]:
        for name, listener in listeners:
            event.listen(target, name, listener)
        try:
            yield
        finally:
            for name, listener in listeners:
                event.remove(target, name, listener)

    return surroundings
