"""``session_factory=``, what commit receivers get as their session."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, object_session, scoped_session, sessionmaker

import sqla_signals
from sqla_signals import InstallError, post_save, receiver

from ..contract.models import Author, Tag
from ..contract.observing import rows
from .observing import Unwanted, asynchronous


class Receiving(Session):
    """A class to know the factory's sessions by; counts what becomes of them."""

    made: list[Receiving]
    closed: list[Receiving]

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.made.append(self)

    def close(self) -> None:
        super().close()
        self.closed.append(self)


@pytest.fixture
def receiving() -> type[Receiving]:
    """The class, with nothing counted."""
    Receiving.made, Receiving.closed = [], []
    return Receiving


def test_commit_receivers_get_what_the_factory_makes(library: Engine, receiving):
    """One for each call, with the instance in it; committed and closed after the call."""
    sqla_signals.install(session_factory=sessionmaker(library, class_=receiving))
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, created, **kwargs):
        found.append((type(session), object_session(instance) is session, instance.name))
        session.add(Tag(name=f"for {instance.name}"))

    with Session(library) as session:
        session.add_all([Author(name="a"), Author(name="b")])
        session.commit()
    assert [(issubclass(cls, Receiving), lives, name) for cls, lives, name in found] == [
        (True, True, "a"),
        (True, True, "b"),
    ]
    assert len(receiving.made) == 2
    assert set(receiving.closed) == set(receiving.made)
    assert rows(library, Tag.name) == ["for a", "for b"]


def test_a_factorys_session_is_rolled_back_and_closed_when_the_receiver_raises(
    library: Engine, receiving
):
    """As the library's own is."""
    sqla_signals.install(session_factory=sessionmaker(library, class_=receiving))

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, session, **kwargs):
        session.add(Tag(name="lost"))
        session.flush()
        raise Unwanted

    with Session(library) as session:
        session.add(Author(name="a"))
        session.commit()
    assert set(receiving.closed) == set(receiving.made)
    assert len(receiving.made) == 1
    assert library.pool.checkedout() == 0
    assert rows(library, Tag.name) == []


def test_changes_are_saved_whatever_the_factorys_settings(library: Engine):
    """Expiring on commit and not flushing by itself are its own business."""
    sqla_signals.install(
        session_factory=sessionmaker(library, expire_on_commit=True, autoflush=False)
    )

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, created, **kwargs):
        if created:
            instance.age = 3
            session.commit()
            assert instance.name == "a"
            instance.age += 1

    with Session(library) as session:
        session.add(Author(name="a"))
        session.commit()
    assert rows(library, Author.age) == [4]


def test_the_factory_of_the_closest_installation_is_used(library: Engine, receiving):
    """That for the sessionmaker, where there is one for every session too."""

    class Other(Session):
        pass

    own = sessionmaker(library)
    sqla_signals.install(session_factory=sessionmaker(library, class_=Other))
    sqla_signals.install(own, session_factory=sessionmaker(library, class_=receiving))
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, session, **kwargs):
        found.append([cls for cls in (Other, Receiving) if isinstance(session, cls)])

    with own.begin() as session:
        session.add(Author(name="a"))
    with sessionmaker(library).begin() as session:
        session.add(Author(name="b"))
    assert found == [[Receiving], [Other]]
    assert rows(library, Author.name) == ["a", "b"]


def test_an_installation_without_a_factory_does_not_hide_one_with_it(library: Engine, receiving):
    """The closest that has one is asked."""
    own = sessionmaker(library)
    sqla_signals.install(session_factory=sessionmaker(library, class_=receiving))
    sqla_signals.install(own)
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, session, **kwargs):
        found.append(isinstance(session, Receiving))

    with own.begin() as session:
        session.add(Author(name="a"))
    assert found == [True]
    assert rows(library, Author.name) == ["a"]


def test_a_scoped_session_as_factory_gives_its_sessionmakers_sessions(library: Engine):
    """Used as a factory it gives the scope's session, which is given back clean."""
    registry = scoped_session(sessionmaker(library))
    sqla_signals.install(session_factory=registry)
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        found.append((session is registry(), len(session.identity_map), instance.name))
        session.add(Tag(name=f"for {instance.name}"))

    with Session(library) as session:
        session.add_all([Author(name="a"), Author(name="b")])
        session.commit()
    assert found == [(True, 1, "a"), (True, 1, "b")]
    registry.remove()
    assert rows(library, Tag.name) == ["for a", "for b"]


def test_a_factory_must_be_callable(library: Engine):
    """Said by ``install``."""
    with pytest.raises(InstallError, match="session_factory"):
        sqla_signals.install(session_factory=Session(library))


def test_a_factory_is_not_asked_when_nobody_is_called(library: Engine, receiving):
    """A commit without receivers opens nothing; neither does a rollback."""
    sqla_signals.install(session_factory=sessionmaker(library, class_=receiving))
    calls = []

    @receiver(post_save, sender=Author, on="rollback")
    def fn(sender, session, **kwargs):
        calls.append(session)

    with Session(library) as session:
        session.add(Author(name="a"))
        session.commit()
        session.add(Author(name="b"))
        session.flush()
        session.rollback()
    assert calls == [None]
    assert receiving.made == []
    assert rows(library, Author.name) == ["a"]


@asynchronous
async def test_an_async_sessionmaker_is_a_factory(async_engine: AsyncEngine, witness: Engine):
    """Async receivers get its ``AsyncSession``, sync ones the ``Session`` inside."""

    class Own(AsyncSession):
        pass

    own = async_sessionmaker(async_engine, class_=Own, expire_on_commit=False)
    sqla_signals.install(session_factory=own)
    found = []

    @receiver(post_save, sender=Author, on="commit")
    async def fn(sender, instance, session, created, **kwargs):
        found.append((isinstance(session, Own), instance in session))
        if created:
            instance.age = 3

    @receiver(post_save, sender=Author, on="commit")
    def sync(sender, instance, session, **kwargs):
        found.append((type(session), instance in session))

    async with AsyncSession(async_engine) as session:
        session.add(Author(name="a"))
        await session.commit()
    assert found == [(True, True), (Session, True)] * 2
    assert rows(witness, Author.age) == [3]
