"""Flushes go on whatever becomes of the other models of the process."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, select
from sqlalchemy.exc import ArgumentError, InvalidRequestError
from sqlalchemy.orm import (
    ColumnProperty,
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    registry,
    relationship,
)

import sqla_signals
from sqla_signals import (
    m2m_changed,
    post_delete,
    post_init,
    post_save,
    pre_init,
)

from .observing import FLUSH_SIGNALS, both, listen, rows


class OwnBase(DeclarativeBase):
    pass


class Lasting(OwnBase):
    """A model that stays."""

    __tablename__ = "lasting"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def base() -> Iterator[type[Any]]:
    """A declarative base with one model, ``Good``."""

    class Base(DeclarativeBase):
        pass

    class Good(Base):
        __tablename__ = "good"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str | None]

    Base.Good = Good  # type: ignore[attr-defined]
    yield Base
    Base.registry.dispose(cascade=True)


def same_table(base: Any) -> type:
    class Bad(base):
        __tablename__ = "good"
        id = Column(Integer, primary_key=True)

    return Bad


def no_primary_key(base: Any) -> type:
    class Bad(base):
        __tablename__ = "bad"
        id = Column(Integer)

    return Bad


def no_column(base: Any) -> type:
    class Bad(base):
        __tablename__ = "bad"
        __mapper_args__ = {"version_id_col": "missing", "polymorphic_on": "missing"}
        id = Column(Integer, primary_key=True)

    return Bad


def no_join_to_the_parent(base: Any) -> type:
    class Bad(base.Good):
        __tablename__ = "bad"
        id = Column(Integer, primary_key=True)

    return Bad


def imperative(base: Any) -> type:
    class Bad:
        pass

    base.registry.map_imperatively(Bad, Table("bad", MetaData(), Column("id", Integer)))
    return Bad


WAYS = [same_table, no_primary_key, no_column, no_join_to_the_parent, imperative]
ways_to_fail = pytest.mark.parametrize("define", WAYS)


def use_everything(session: Session, good: type[Any]) -> list[str]:
    """Save a row, with all that looks at the mappers of the process."""
    log = listen(sender=good)
    seen: list[str] = []

    def note(sender: Any, signal: Any, **kwargs: Any) -> None:
        seen.append(signal.name)

    for signal in (pre_init, post_init):
        signal.connect(note, weak=False, sender=good)
    post_save.connect(note, weak=False, sender="Good", fields={"name"}, on="commit")
    m2m_changed.connect(note, weak=False)
    session.add(good(name="a"))
    session.commit()
    assert set(seen) == {"pre_init", "post_init", "post_save"}
    return log.lines


@ways_to_fail
def test_a_class_whose_definition_has_failed_is_in_nobodys_way(
    engine: Engine, installed: sqla_signals.Installation, base: Any, define: Callable[[Any], type]
):
    """Also while somebody keeps the exception, and so the class: a log, a debugger."""
    with pytest.raises((ArgumentError, InvalidRequestError)) as kept:
        define(base)
    base.metadata.create_all(engine)
    with Session(engine) as session:
        assert use_everything(session, base.Good) == both("save created Good(a)")
    assert rows(engine, base.Good.name) == ["a"]
    assert "use_everything" in str(sqla_signals.explain(base.Good))
    assert kept.value is not None


def test_models_of_which_a_relationship_leads_nowhere_are_in_nobodys_way(
    engine: Engine, installed: sqla_signals.Installation, base: Any
):
    """SQLAlchemy refuses to work with their registry; others have nothing to do with it."""

    class Broken(DeclarativeBase):
        pass

    class Lost(Broken):
        __tablename__ = "lost"
        id: Mapped[int] = mapped_column(primary_key=True)
        nowhere: Mapped[Any] = relationship("Nowhere")

    base.metadata.create_all(engine)
    with Session(engine) as session:
        log = listen()
        session.add(base.Good(name="a"))
        session.commit()
        with pytest.raises(InvalidRequestError, match="Nowhere"):
            Lost()
        session.add(base.Good(name="b"))
        session.commit()
    assert log.lines == both("save created Good(a)") + both("save created Good(b)")
    assert rows(engine, base.Good.name) == ["a", "b"]
    post_save.connect(log, weak=False, sender=Lost)
    assert "Log" in str(sqla_signals.explain(base.Good))
    (notice,) = sqla_signals.explain().notices
    assert "SQLAlchemy cannot configure Lost" in notice.text
    with pytest.raises(InvalidRequestError, match="Nowhere"):
        sqla_signals.explain(Lost)
    Broken.registry.dispose()


def test_a_class_that_another_thread_is_defining_is_in_nobodys_way(
    engine: Engine, installed: sqla_signals.Installation, base: Any
):
    """In the middle of it: that thread goes on when the flush is over."""
    base.metadata.create_all(engine)
    base.registry.configure()
    is_half_made, is_flushed = threading.Event(), threading.Event()

    class Slow(ColumnProperty):
        def instrument_class(self, mapper: Any) -> None:
            is_half_made.set()
            assert is_flushed.wait(20)
            super().instrument_class(mapper)

    def define() -> None:
        table = Table("new", base.metadata, Column("id", Integer, primary_key=True))
        base.registry.map_imperatively(
            type("New", (), {}), table, properties={"id": Slow(table.c.id)}
        )

    thread = threading.Thread(target=define)
    thread.start()
    try:
        assert is_half_made.wait(20)
        with Session(engine) as session:
            assert use_everything(session, base.Good) == both("save created Good(a)")
    finally:
        is_flushed.set()
        thread.join()
    assert rows(engine, base.Good.name) == ["a"]


def test_models_that_are_defined_all_the_time_are_in_nobodys_way(
    engine: Engine, installed: sqla_signals.Installation, base: Any
):
    """However the threads take turns."""
    base.metadata.create_all(engine)
    base.registry.configure()
    interval = sys.getswitchinterval()
    is_over, made = threading.Event(), registry()

    def define() -> None:
        for number in itertools.takewhile(lambda _: not is_over.is_set(), range(1000)):
            table = Table(f"t{number}", made.metadata, Column("id", Integer, primary_key=True))
            made.map_imperatively(type(f"Class{number}", (), {}), table)

    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=define)
    thread.start()
    try:
        for _ in range(20):
            # Looked for among all mappers each time, because the receivers are new.
            log = listen(sender=base.Good)
            with Session(engine) as session:
                session.add(base.Good(name="a"))
                session.flush()
            assert log.lines == both("save created Good(a)")
            for signal in FLUSH_SIGNALS:
                signal.disconnect(log, sender=base.Good)
    finally:
        sys.setswitchinterval(interval)
        is_over.set()
        thread.join()
        made.dispose()
    assert rows(engine, base.Good.name) == []


def test_models_that_were_disposed_of_do_not_keep_an_installation_from_being_removed(
    engine: Engine, base: Any
):
    """Nothing is left to be undone on them."""
    installation = sqla_signals.install()
    base.metadata.create_all(engine)
    with Session(engine) as session:
        assert use_everything(session, base.Good) == both("save created Good(a)")
        assert rows(session, base.Good.name) == ["a"]
    base.registry.dispose(cascade=True)
    installation.remove()


# Not rollback(), nor a commit() that expires: SQLAlchemy's own work on the instances fails then.
@pytest.mark.parametrize("end", ["commit", "close"])
def test_models_that_were_disposed_of_do_not_keep_a_transaction_from_ending(
    engine: Engine, base: Any, installed: Any, end: str
):
    """There is no instance to give any more; what was written for other models is told."""
    base.metadata.create_all(engine)
    OwnBase.metadata.create_all(engine)
    told: list[tuple[str, str]] = []
    for phase in ("commit", "rollback"):
        for signal in (post_save, post_delete):

            def tell(sender, instance, phase=phase, **kwargs):
                told.append((phase, sender.__name__))

            signal.connect(tell, on=phase, weak=False)
    with Session(engine, expire_on_commit=False) as session:
        deleted = base.Good(name="deleted")
        session.add(deleted)
        session.commit()
        told.clear()
        session.delete(deleted)
        session.add_all([base.Good(name="a"), Lasting()])
        session.flush()
        base.registry.dispose(cascade=True)
        getattr(session, end)()
    committed = end == "commit"
    assert told == [("commit" if committed else "rollback", "Lasting")]
    with engine.connect() as connection:
        names = connection.scalars(select(base.metadata.tables["good"].c.name)).all()
        lasting = connection.scalars(select(Lasting.__table__.c.id)).all()
    assert (names, lasting) == ((["a"], [1]) if committed else (["deleted"], []))
