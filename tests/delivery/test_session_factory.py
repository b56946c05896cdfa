"""``session_factory=``, what commit receivers get as their session."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
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
    """One for a delivery, with the instance in it; committed after each call, closed in the end."""
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
    assert len(receiving.made) == 1
    assert receiving.closed == receiving.made
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


def test_a_scoped_session_is_no_factory(library: Engine):
    """It gives the application's own session, in which a receiver's work has no place."""
    registry = scoped_session(sessionmaker(library))
    with pytest.raises(InstallError, match="the session that the application is working with"):
        sqla_signals.install(registry, session_factory=registry)


@asynchronous
async def test_neither_is_an_async_scoped_session(async_engine: AsyncEngine, witness: Engine):
    """For the same reason."""
    registry = async_scoped_session(async_sessionmaker(async_engine), asyncio.current_task)
    with pytest.raises(InstallError, match="the session that the application is working with"):
        sqla_signals.install(session_factory=registry)


@pytest.mark.parametrize("which", ["its own", "another"])
def test_a_factory_that_gives_a_session_of_the_application_is_an_error_of_the_delivery(
    library: Engine, caplog: pytest.LogCaptureFixture, which: str
):
    """Logged for each receiver; the session is left as it is, whatever was done with it."""
    registry = scoped_session(sessionmaker(library))
    sqla_signals.install(session_factory=lambda: registry())
    called = []
    post_save.connect(lambda sender, **kw: called.append(sender), Author, weak=False, on="commit")
    registry.connection()
    session = registry() if which == "its own" else Session(library)
    registry.rollback()
    author = Author(name="a")
    session.add(author)
    session.commit()
    (record,) = caplog.records
    assert isinstance(record.exc_info[1], InstallError)
    assert "Give a factory that makes a new session with each call" in str(record.exc_info[1])
    assert called == []
    assert author in session
    author.name = "b"
    session.commit()
    assert rows(library, Author.name) == ["b"]
    session.close()
    registry.remove()


@pytest.mark.parametrize("made", [None, "a session", iter(())], ids=["None", "text", "generator"])
def test_a_factory_that_gives_no_session_is_an_error_of_the_delivery(
    library: Engine, caplog: pytest.LogCaptureFixture, made: Any
):
    """Said so, with what it gave."""
    sqla_signals.install(session_factory=lambda: made)
    post_save.connect(lambda sender, **kw: None, Author, weak=False, on="commit")
    with Session(library) as session:
        session.add(Author(name="a"))
        session.commit()
    (record,) = caplog.records
    assert isinstance(record.exc_info[1], InstallError)
    assert f"gave {made!r}, which is neither" in str(record.exc_info[1])
    assert rows(library, Author.name) == ["a"]


def test_a_factory_may_load_something_into_the_session_that_it_makes(library: Engine):
    """It is new all the same."""
    with Session(library) as session:
        session.add(Tag(name="tenant"))
        session.commit()

    def make() -> Session:
        made = Session(library)
        made.scalars(select(Tag)).one()
        return made

    sqla_signals.install(session_factory=make)
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, created, **kwargs):
        if created:
            found.append(instance.name)
            instance.age = 3

    with Session(library) as session:
        session.add_all([Author(name="a"), Author(name="b")])
        session.commit()
    assert found == ["a", "b"]
    assert rows(library, Author.age) == [3, 3]


def source(library: Engine, given: str, **options: Any) -> sessionmaker[Session]:
    """A sessionmaker, installed for or given as ``session_factory``."""
    maker = sessionmaker(library, **options)
    if given == "install":
        sqla_signals.install(maker)
    else:
        sqla_signals.install(session_factory=maker)
    return maker


@pytest.mark.parametrize("given", ["install", "session_factory"])
def test_a_receiver_that_fails_in_a_joined_transaction_undoes_its_own_work_only(
    library: Engine, given: str
):
    """Whoever makes its session, that joins the Connection with a savepoint."""
    with library.connect() as connection:
        maker = source(connection, given)

        @receiver(post_save, sender=Author, on="commit")
        def fails(sender, session, **kwargs):
            session.add(Tag(name="lost"))
            session.flush()
            raise Unwanted

        outer = connection.begin()
        with maker(bind=connection, join_transaction_mode="create_savepoint") as session:
            session.add(Author(name="a"))
            session.commit()
        assert outer.is_active
        outer.commit()
    assert rows(library, Author.name) == ["a"]
    assert rows(library, Tag.name) == []


@pytest.mark.parametrize("given", ["install", "session_factory"])
def test_the_session_of_a_receiver_begins_by_itself(library: Engine, given: str):
    """Although the application's sessions do not."""
    maker = source(library, given, autobegin=False)

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, created, **kwargs):
        if created:
            instance.age = 3

    with maker() as session, session.begin():
        session.add(Author(name="a"))
    assert rows(library, Author.age) == [3]


class Routed(Session):
    """A session that goes where it was told to after it was made."""

    engine: Engine | None = None

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        assert self.engine is not None
        return self.engine


def test_the_session_that_the_installed_factory_makes_has_the_attributes_of_the_other_one(
    library: Engine,
):
    """So it goes where that one has gone."""
    maker = sessionmaker(class_=Routed)
    sqla_signals.install(maker)

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, created, **kwargs):
        if created:
            instance.age = 3

    with maker() as session:
        session.engine = library
        session.add(Author(name="a"))
        session.commit()
    assert rows(library, Author.age) == [3]


def test_a_scoped_session_of_a_class_is_installed_for_the_class(library: Engine):
    """There is no factory that could make sessions for receivers; they are like the others."""

    class Own(Session):
        pass

    registry = scoped_session(Own)
    sqla_signals.install(registry)
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, session, **kwargs):
        found.append((type(session), session is registry()))

    registry(bind=library)
    registry.add(Author(name="a"))
    registry.commit()
    assert found == [(Own, False)]
    registry.remove()
    assert rows(library, Author.name) == ["a"]


@asynchronous
async def test_an_async_sessionmaker_over_a_sessionmaker_makes_the_session(
    async_engine: AsyncEngine, witness: Engine
):
    """As SQLAlchemy's manual has it for events; it may be either of them that is installed."""
    for install in (lambda sync, front: sync, lambda sync, front: front):
        sync = sessionmaker()
        front = async_sessionmaker(async_engine, sync_session_class=sync)
        installation = sqla_signals.install(install(sync, front))
        found = []

        @receiver(post_save, sender=Author, on="commit", dispatch_uid="fn")
        async def fn(sender, instance, session, found=found, **kwargs):
            found.append((isinstance(session, AsyncSession), instance in session))

        async with front() as session:
            session.add(Author(name="a"))
            await session.commit()
        assert found == [(True, True)]
        post_save.disconnect(dispatch_uid="fn")
        installation.remove()
    assert rows(witness, Author.name) == ["a", "a"]


class Audited(Session):
    """A session with an ``__init__`` of its own, in which it makes what refers to it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tags = Tags(self)


class Tags:
    """A repository, as applications have them."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def add(self, name: str) -> None:
        """Add one."""
        self.session.add(Tag(name=name))


@pytest.mark.parametrize("scoped", [False, True], ids=["sessionmaker", "scoped_session"])
def test_the_factory_that_was_given_to_install_makes_the_session(library: Engine, scoped: bool):
    """So it is complete: what refers to the session refers to the receiver's own."""
    maker = sessionmaker(library, class_=Audited)
    sqla_signals.install(scoped_session(maker) if scoped else maker)
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        found.append(session.tags.session is session)
        session.tags.add(f"for {instance.name}")

    with maker() as session:
        session.add(Author(name="a"))
        session.commit()
        assert [*session.new] == []
    assert found == [True]
    assert rows(library, Tag.name) == ["for a"]


def test_the_session_that_the_installed_factory_makes_is_on_the_binds_of_the_one_that_did_the_work(
    library: Engine,
):
    """Whatever the factory says: a session may have been given others; so for ``info``."""
    maker = sessionmaker(info={"by": "the factory"})
    sqla_signals.install(maker)
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, created, using, **kwargs):
        found.append((dict(session.info), using is session.get_bind(Author)))
        if created:
            instance.age = 3

    with maker(bind=library, info={"tenant": 1}) as session:
        session.add(Author(name="a"))
        session.commit()
    with maker(binds={Author: library}) as session:
        session.add(Author(name="b"))
        session.commit()
    given = {"by": "the factory", "tenant": 1}
    assert found == [(given, True)] * 2 + [({"by": "the factory"}, True)] * 2
    assert rows(library, Author.age) == [3, 3]


@asynchronous
async def test_an_async_sessionmaker_that_was_given_to_install_makes_the_session(
    async_engine: AsyncEngine, witness: Engine
):
    """With the ``AsyncSession`` in front."""
    maker = async_sessionmaker(async_engine, sync_session_class=Audited)
    sqla_signals.install(maker)
    found = []

    @receiver(post_save, sender=Author, on="commit")
    async def fn(sender, instance, session, **kwargs):
        sync = session.sync_session
        found.append((sync.tags.session is sync, instance in session))
        sync.tags.add("for " + instance.name)

    async with maker() as session:
        session.add(Author(name="a"))
        await session.commit()
    assert found == [(True, True)]
    assert rows(witness, Tag.name) == ["for a"]


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
