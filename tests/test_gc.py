"""What is forgotten by its users is not held by the library."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Column, ForeignKey, Table, create_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    sessionmaker,
)

import sqla_signals
from sqla_signals import (
    SignalRecursionError,
    m2m_changed,
    post_delete,
    post_save,
    pre_delete,
    pre_save,
    receiver,
)
from sqla_signals.receivers.receiver import Phase


class Base(DeclarativeBase):
    """The declarative base of the model that stays."""


class Thing(Base):
    """The model that stays."""

    __tablename__ = "things"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]


@pytest.fixture
def sessions(installed: sqla_signals.Installation) -> Iterator[sessionmaker[Session]]:
    """Sessions on a database in memory, with receivers of every flush signal."""

    @receiver([pre_save, post_save])
    def saved(sender, instance, changes, **kwargs):
        dict(changes)

    @receiver([pre_delete, post_delete])
    def deleted(sender, instance, **kwargs): ...

    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    yield sessionmaker(engine)
    engine.dispose()


def save(session: Session) -> None:
    """Insert, update, delete."""
    thing = Thing(name="a")
    session.add(thing)
    session.flush()
    thing.name = "b"
    session.flush()
    session.delete(thing)
    session.flush()


def save_and_commit(session: Session) -> None:
    save(session)
    session.commit()


def save_and_close(session: Session) -> None:
    save(session)
    session.close()


def save_in_a_savepoint(session: Session) -> None:
    with session.begin_nested():
        save(session)
    session.rollback()


def fail_before(session: Session) -> None:
    with pre_save.connected_to(explode), pytest.raises(ZeroDivisionError):
        save(session)


def fail_after(session: Session) -> None:
    with post_save.connected_to(explode), pytest.raises(ZeroDivisionError):
        save(session)


def never_settle(session: Session) -> None:
    with pre_save.connected_to(add_another), pytest.raises(SignalRecursionError):
        save(session)


def explode(sender, **kwargs):
    raise ZeroDivisionError


def add_another(sender, session, **kwargs):
    session.add(Thing())


@pytest.mark.parametrize(
    "work",
    [
        save,
        save_and_commit,
        save_and_close,
        save_in_a_savepoint,
        fail_before,
        fail_after,
        never_settle,
    ],
    ids=lambda work: work.__name__,
)
def test_a_session_that_is_closed_or_forgotten_is_not_held(
    sessions: sessionmaker[Session], work: Callable[[Session], None]
):
    """However its last flush ended."""
    session = sessions()
    work(session)
    reference = weakref.ref(session)
    del session
    gc.collect()
    assert reference() is None


def of_the_library() -> Counter[str]:
    """How many objects of the library's classes there are."""
    gc.collect()
    return Counter(
        f"{type(one).__module__}.{type(one).__qualname__}"
        for one in gc.get_objects()
        if str(type(one).__module__).startswith("sqla_signals")
    )


def test_a_hundred_sessions_leave_no_object_of_the_library_behind(
    sessions: sessionmaker[Session],
):
    """What one flush needs is gone with it; caches do not grow with the number of sessions."""
    kinds = (save_and_commit, save_and_close, fail_before, fail_after)
    for work in kinds:
        work(sessions())
    before = of_the_library()
    for n in range(100):
        work = kinds[n % 4]
        work(sessions())
    assert of_the_library() == before


def test_a_hundred_connections_leave_no_object_of_the_library_behind(
    sessions: sessionmaker[Session],
):
    """Disconnected, weakly connected and forgotten, or connected for a block."""
    with sessions() as session:
        save(session)
        before = of_the_library()
        for _ in range(100):
            kept = receiver(post_save, sender=Thing)(lambda sender, **kwargs: None)
            post_save.connect(lambda sender, **kwargs: None, sender="Thing")
            with post_save.connected_to(lambda sender, **kwargs: None, sender=Base):
                session.add(Thing())
                session.flush()
            post_save.disconnect(kept)
        session.flush()
        save(session)
        assert of_the_library() == before


def test_an_engine_that_is_forgotten_is_not_held(installed: sqla_signals.Installation):
    """Though receivers were given it as ``using``."""
    seen = []

    @receiver(post_save, sender=Thing)
    def saved(sender, using, **kwargs):
        seen.append(weakref.ref(using))

    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Thing())
        session.commit()
    del session
    engine.dispose()
    del engine
    gc.collect()
    assert [reference() for reference in seen] == [None]


@pytest.mark.parametrize("sender", ["class", "name", "base", "any"])
def test_a_model_class_that_is_forgotten_is_not_held(
    installed: sqla_signals.Installation, sender: str
):
    """Though it was a sender, and its mapper was listened to."""
    kept: list[Any] = []

    def live() -> weakref.ref[type]:
        class OwnBase(DeclarativeBase):
            pass

        class Passing(OwnBase):
            __tablename__ = "passing"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str | None]

        senders = {"class": Passing, "name": "Passing", "base": OwnBase, "any": None}

        @receiver([pre_save, post_save, post_delete], sender=senders[sender])
        def called(sender, **kwargs):
            kept.append(kwargs["signal"].name)

        engine = create_engine("sqlite://")
        OwnBase.metadata.create_all(engine)
        with Session(engine) as session:
            one = Passing(name="a")
            session.add(one)
            session.flush()
            session.delete(one)
            session.commit()
        engine.dispose()
        return weakref.ref(Passing)

    reference = live()
    assert kept == ["pre_save", "post_save", "post_delete"]
    gc.collect()
    assert reference() is None
    connected = bool(post_save.receivers)
    assert connected is (sender in ("name", "any")), "a connection ends with the class it names"


@pytest.mark.parametrize("on", ["flush", "commit", "rollback"])
def test_a_receiver_that_is_disconnected_is_not_held(sessions: sessionmaker[Session], on: Phase):
    """Though its model, which it refers to, is never flushed again."""

    def live() -> tuple[weakref.ref[Any], weakref.ref[type]]:
        class OwnBase(DeclarativeBase):
            pass

        class Passing(OwnBase):
            __tablename__ = "passing"
            id: Mapped[int] = mapped_column(primary_key=True)

        def called(sender, **kwargs):
            assert sender is Passing

        with sessions() as session, post_save.connected_to(called, Passing, on=on):
            OwnBase.metadata.create_all(session.connection())
            session.add(Passing())
            session.flush()
        return weakref.ref(called), weakref.ref(Passing)

    called, model = live()
    with sessions() as session:
        session.add(Thing())
        session.flush()
    gc.collect()
    assert (called(), model()) == (None, None)


def test_a_model_class_with_a_secondary_table_is_not_held(installed: sqla_signals.Installation):
    """Though rows of that table were told of."""
    told: list[str] = []

    def live() -> weakref.ref[type]:
        class OwnBase(DeclarativeBase):
            pass

        table = Table(
            "pairs",
            OwnBase.metadata,
            Column("left_id", ForeignKey("ends.id"), primary_key=True),
            Column("right_id", ForeignKey("ends.id"), primary_key=True),
        )

        class End(OwnBase):
            __tablename__ = "ends"
            id: Mapped[int] = mapped_column(primary_key=True)
            others: Mapped[list[Any]] = relationship(
                lambda: End,
                secondary=table,
                primaryjoin=lambda: End.id == table.c.left_id,
                secondaryjoin=lambda: End.id == table.c.right_id,
            )

        engine = create_engine("sqlite://")
        OwnBase.metadata.create_all(engine)
        with Session(engine) as session:
            session.add(End(others=[End()]))
            session.commit()
        engine.dispose()
        return weakref.ref(End)

    @receiver(m2m_changed)
    def called(sender, action, **kwargs):
        told.append(action)

    reference = live()
    gc.collect()
    assert told == ["pre_add", "post_add"]
    assert reference() is None


def test_a_session_with_an_installation_of_its_own_is_not_held():
    """When the installation is forgotten too, without ``remove()``."""

    def live() -> tuple[weakref.ref[Session], weakref.ref[sqla_signals.Installation]]:
        engine = create_engine("sqlite://")
        Base.metadata.create_all(engine)
        session = Session(engine)
        installation = sqla_signals.install(session)
        log = []
        post_save.connect(lambda sender, **kwargs: log.append(sender), sender=Thing, weak=False)
        session.add(Thing())
        session.commit()
        assert log == [Thing]
        session.close()
        engine.dispose()
        return weakref.ref(session), weakref.ref(installation)

    session, installation = live()
    post_save._clear_state()
    gc.collect()
    gone = session() is None
    if (left := installation()) is not None:  # do not let it disturb other tests
        left.remove()
    assert gone
