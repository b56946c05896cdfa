"""Each call has its own session and transaction, and an instance that lives in it."""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, inspect, select, text, update
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import Session, object_session, scoped_session, sessionmaker

import sqla_signals
from sqla_signals import InstallError, on_commit, post_bulk, post_delete, post_save, receiver

from ..conftest import before_sqlalchemy, create_sqlite_engine
from ..contract.models import Author, Base, Book, Page, Tag
from ..contract.observing import rows
from .models import Document, Shelf
from .observing import Deliveries, Transaction, Unwanted, asynchronous, deliveries

# -- each sentence, in every kind of transaction ---------------------------------------------------


def test_the_instance_lives_in_the_session(committing: Transaction):
    """Persistent, and the one that a query for its key gives."""
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        found.append(
            (
                object_session(instance) is session,
                instance in session,
                inspect(instance).persistent,
                inspect(instance).modified,
                session.get(Author, instance.id) is instance,
                session.scalars(select(Author)).one() is instance,
            )
        )

    committing(lambda session: session.add(Author(name="a")))
    assert found == [(True, True, True, False, True, True)]
    assert rows(committing.engine, Author.name) == ["a"]


def test_the_session_is_not_the_one_that_did_the_work_nor_in_its_transaction(
    committing: Transaction,
):
    """It has begun nothing yet; its first statement begins its own transaction."""
    working, found = [], []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        before = session.in_transaction()
        session.execute(text("SELECT 1"))
        found.append((session in working, before, session.in_transaction()))

    def work(session: Session) -> None:
        working.append(session)
        session.add(Author(name="a"))

    committing(work)
    assert found == [(False, False, True)]
    assert rows(committing.engine, Author.name) == ["a"]


def test_reading_what_was_loaded_needs_no_sql(committing: Transaction):
    """Every column of a new row, keys that the database gave included."""
    found, statements = [], []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        bind = session.get_bind()

        def count(*args: Any) -> None:
            statements.append(args[2])

        event.listen(bind, "before_cursor_execute", count)
        found.append((instance.id, instance.name, instance.age, session.in_transaction()))
        event.remove(bind, "before_cursor_execute", count)

    committing(lambda session: session.add(Author(name="a", age=3)))
    assert found == [(1, "a", 3, False)]
    assert statements == []
    assert rows(committing.engine, Author.id, Author.name, Author.age) == [(1, "a", 3)]


def test_the_rest_and_relationships_load_lazily(committing: Transaction):
    """As with any instance in a session."""
    found = []

    @receiver(post_save, sender=Book, on="commit")
    def fn(sender, instance, **kwargs):
        found.append(
            (instance.author.name, [p.name for p in instance.pages], instance.author.books)
        )
        found.append(instance)

    @receiver(post_save, sender=Document, on="commit")
    def document_saved(sender, instance, **kwargs):
        found.append(instance.body)

    with committing.engine.begin() as connection:
        connection.execute(Document.__table__.insert().values(id=1, name="d", body="long"))

    def work(session: Session) -> None:
        session.add(Book(name="b", author=Author(name="a"), pages=[Page(name="p")]))
        session.flush()
        session.get(Document, 1).name = "D"

    committing(work)
    assert found[0] == ("a", ["p"], [found[1]])
    assert found[2] == "long"


def test_changes_made_to_the_instance_are_saved(committing: Transaction):
    """They are committed when the receiver returns, and there after ``commit()``."""
    after = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, created, **kwargs):
        if created:
            instance.age = 7
            instance.books.append(Book(name="by the receiver"))

    committing(
        lambda session: session.add(Author(name="a")),
        after=lambda: after.extend(
            [rows(committing.engine, Author.age), rows(committing.engine, Book.author_id)]
        ),
    )
    assert after == [[7], [1]]


def test_what_a_receiver_did_is_committed_when_the_next_one_is_called(committing: Transaction):
    """Its transaction ends with its call."""
    seen = []

    @receiver(post_save, sender=Author, on="commit")
    def first(sender, session, **kwargs):
        session.add(Tag(name="by the first"))

    @receiver(post_save, sender=Author, on="commit")
    def second(sender, session, **kwargs):
        seen.append(rows(committing.engine, Tag.name))

    committing(lambda session: session.add(Author(name="a")))
    assert seen == [["by the first"]]
    assert rows(committing.engine, Tag.name) == ["by the first"]


def test_what_a_receiver_did_is_rolled_back_when_it_raises(committing: Transaction):
    """Its own work only; the others run, and so does the work it was called for."""

    @receiver(post_save, sender=Author, on="commit")
    def before(sender, session, **kwargs):
        session.add(Tag(name="before"))

    @receiver(post_save, sender=Author, on="commit")
    def fails(sender, instance, session, **kwargs):
        instance.name = "lost"
        session.add(Tag(name="lost"))
        session.flush()
        raise Unwanted

    @receiver(post_save, sender=Author, on="commit")
    def after(sender, instance, session, **kwargs):
        session.add(Tag(name=f"after {instance.name}"))

    committing(lambda session: session.add(Author(name="a")))
    assert rows(committing.engine, Tag.name) == ["after a", "before"]
    assert rows(committing.engine, Author.name) == ["a"]


def test_a_deleted_instance_is_detached_and_readable(committing: Transaction):
    """Also if it was loaded, expired and deleted without anybody reading it."""
    with committing.engine.begin() as connection:
        for name in ("a", "b"):
            connection.execute(Author.__table__.insert().values(name=name, age=3))
    found = []

    @receiver(post_delete, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        assert object_session(instance) is None
        assert inspect(instance).detached
        assert session.scalars(select(Author)).all() == []
        found.append((instance.id, instance.name, instance.age))

    def work(session: Session) -> None:
        read, expired = session.get(Author, 1), session.get(Author, 2)
        session.expire(expired)
        session.delete(read)
        session.delete(expired)

    committing(work)
    assert sorted(found) == [(1, "a", 3), (2, "b", 3)]
    assert rows(committing.engine, Author.name) == []


def test_each_instance_of_each_call_is_another_one(committing: Transaction):
    """What one receiver does to its instance, the next one does not see."""
    found = []

    def first(sender, instance, session, **kwargs):
        found.append((instance, instance.name))
        session.expunge(instance)
        instance.name = "spoiled"

    def second(sender, instance, **kwargs):
        found.append((instance, instance.name))

    post_save.connect(first, Author, weak=False, on="commit")
    post_save.connect(second, Author, weak=False, on="commit")
    committing(lambda session: session.add(Author(name="a")))
    assert [name for _, name in found] == ["a", "a"]
    assert found[0][0] is not found[1][0]
    assert rows(committing.engine, Author.name) == ["a"]


def test_values_that_change_in_place_are_not_shared_between_instances(committing: Transaction):
    """Neither between receivers nor with the session that did the work."""
    found = []

    def fn(sender, instance, session, created, **kwargs):
        found.append((dict(instance.plain), dict(instance.tracked)))
        assert isinstance(instance.tracked, MutableDict)
        session.expunge(instance)
        instance.plain["spoiled"] = instance.tracked["spoiled"] = True

    post_save.connect(fn, Document, weak=False, on="commit")
    post_save.connect(lambda s, **kw: fn(s, **kw), Document, weak=False, on="commit")
    plain, tracked = {"p": 1}, {"t": 1}

    def work(session: Session) -> None:
        session.add(Document(plain=plain, tracked=tracked))

    committing(work)
    assert found == [({"p": 1}, {"t": 1})] * 2
    assert (plain, tracked) == ({"p": 1}, {"t": 1})
    assert rows(committing.engine, Document.plain, Document.tracked) == [({"p": 1}, {"t": 1})]


def test_a_value_that_is_tracked_in_place_is_tracked_in_the_instance(committing: Transaction):
    """Changing a ``MutableDict`` in a receiver is a change that is saved."""

    @receiver(post_save, sender=Document, on="commit")
    def fn(sender, instance, created, **kwargs):
        if created:
            instance.tracked["by"] = "receiver"

    committing(lambda session: session.add(Document(tracked={"t": 1})))
    assert rows(committing.engine, Document.tracked) == [{"t": 1, "by": "receiver"}]


# -- nothing is shared and nothing is left ---------------------------------------------------------


def test_a_delivery_has_one_session_which_is_empty_in_each_call(session: Session):
    """Whatever the call before has done with it: its transaction and its instances are gone."""
    found, kept = [], []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, created, session, **kwargs):
        if not created:
            return
        assert not session.in_transaction()
        found.append((session.hash_key, [*session], [*session.new], session.get_transaction()))
        kept.append(instance)
        if instance.name == "a":
            session.scalars(select(Author)).all()
        elif instance.name == "b":
            session.begin_nested()
            session.add(Tag(name="left pending in a savepoint"))
        elif instance.name == "c":
            session.add(Tag(name="undone"))
            session.flush()
            raise Unwanted
        elif instance.name == "d":
            session.close()

    session.add_all([Author(name=name) for name in "abcde"])
    session.commit()
    assert len({key for key, *_ in found}) == 1
    assert [rest for _, *rest in found] == [[[one], [], None] for one in kept]
    assert all(object_session(one) is None for one in kept)
    assert rows(session.get_bind(), Author.name) == list("abcde")
    assert rows(session.get_bind(), Tag.name) == ["left pending in a savepoint"]


def test_the_session_is_empty_again_whatever_the_call_was_for(session: Session):
    """A deletion whose row the receiver has written again, or a statement."""
    found = []

    @receiver([post_save, post_delete], sender=Author, on="commit")
    def fn(sender, instance, session, signal, **kwargs):
        found.append((signal.name, [one for one in session if one is not instance]))
        if signal is post_delete:
            session.add(Author(id=1, name="back"))

    @receiver(post_bulk, sender=Author, on="commit")
    def executed(sender, session, **kwargs):
        found.append(("post_bulk", [*session]))
        session.scalars(select(Author).where(Author.id == 1)).all()

    session.add_all([author := Author(id=1, name="a"), Author(id=2, name="b")])
    session.commit()
    found.clear()
    session.delete(author)
    session.flush()
    session.execute(update(Author).where(Author.id == 2).values(name="c"))
    session.execute(update(Author).where(Author.id == 2).values(name="d"))
    session.commit()
    expected = ["post_delete", "post_bulk", "post_bulk", "post_save"]
    assert found == [(name, []) for name in expected]
    assert sorted(rows(session.get_bind(), Author.name)) == ["back", "d"]


def test_each_delivery_has_another_session(session: Session):
    """So one that a receiver has kept by mistake is not used again."""
    kept = []

    @receiver(post_save, on="commit")
    def fn(sender, instance, session, **kwargs):
        kept.append(session)

    for name in "ab":
        session.add(Author(name=name))
        session.commit()
    assert kept[0] is not kept[1]
    assert not any(own.in_transaction() or [*own] for own in kept)
    assert rows(session.get_bind(), Author.name) == ["a", "b"]


def test_a_receiver_that_keeps_only_the_instance_keeps_its_own(session: Session):
    """It holds what was committed, and what happens in the next call does not touch it."""
    kept = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        for earlier in kept:
            assert earlier not in session
        session.scalars(select(Author)).all()
        kept.append(instance)

    session.add_all([Author(name="a"), Author(name="b")])
    session.commit()
    assert [(author.id, author.name) for author in kept] == [(1, "a"), (2, "b")]
    assert rows(session.get_bind(), Author.name) == ["a", "b"]


def test_a_thousand_calls_leave_no_connection_checked_out_and_no_session_alive(
    session: Session, caplog: pytest.LogCaptureFixture
):
    """Whether they succeeded, failed, or did nothing."""
    caplog.set_level("CRITICAL", "sqla_signals")  # a record that is kept keeps its traceback
    references, engine = [], session.get_bind()

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        references.append(weakref.ref(session))
        references.append(weakref.ref(instance))
        if instance.id % 3 == 0:
            session.execute(text("SELECT 1"))
        if instance.id % 50 == 0:
            raise Unwanted

    session.add_all([Author(id=number, name="a") for number in range(1, 1001)])
    session.commit()
    assert engine.pool.checkedout() == 0
    assert len(references) == 2000
    gc.collect()
    assert not any(reference() for reference in references)
    assert len(rows(engine, Author.id)) == 1000


def test_a_call_is_over_when_it_is_over_without_waiting_for_garbage_collection(session: Session):
    """The connection is back in the pool before the next receiver runs."""
    counts, engine = [], session.get_bind()

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, session, **kwargs):
        counts.append(engine.pool.checkedout())
        session.execute(text("SELECT 1"))

    session.add_all([Author(name=name) for name in "abc"])
    gc.disable()
    try:
        session.commit()
        counts.append(engine.pool.checkedout())
    finally:
        gc.enable()
    assert counts == [0, 0, 0, 0]
    assert rows(engine, Author.name) == ["a", "b", "c"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_passes_through_and_leaves_everything_clean(
    session: Session, log: Deliveries, interruption: type[BaseException]
):
    """The receiver's work is rolled back, what was committed before is not, and life goes on."""

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        session.add(Tag(name="never"))
        session.flush()
        raise interruption

    engine = session.get_bind()
    session.add(Author(name="a"))
    with pytest.raises(interruption):
        session.commit()
    assert engine.pool.checkedout() == 0
    assert rows(engine, Author.name) == ["a"]
    assert rows(engine, Tag.name) == []
    post_save.disconnect(fn)
    log.clear()
    session.add(Author(name="b"))
    session.commit()
    assert log.lines == ["commit created Author(b)"]


def test_an_interruption_at_the_end_of_a_block_passes_through(committing: Transaction):
    """In every kind of transaction."""

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        session.add(Tag(name="never"))
        session.flush()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        committing(lambda session: session.add(Author(name="a")))
    post_save.disconnect(fn)
    log = deliveries()
    committing(lambda session: session.add(Author(name="b")))
    assert log.lines == ["commit created Author(b)"]
    assert rows(committing.engine, Author.name) == ["a", "b"]
    assert rows(committing.engine, Tag.name) == []


# -- what a receiver may do with its session -------------------------------------------------------


def test_a_receiver_may_commit_and_roll_back_its_own_session(session: Session):
    """It is an ordinary one; what it left uncommitted is committed at the end."""

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        session.add(Tag(name="first"))
        session.commit()
        session.add(Tag(name="second"))
        session.rollback()
        with session.begin_nested():
            session.add(Tag(name="third"))
        session.add(Tag(name="fourth"))
        assert instance.name == "a"

    session.add(Author(name="a"))
    session.commit()
    assert rows(session.get_bind(), Tag.name) == ["first", "fourth", "third"]


def test_a_receiver_may_close_its_own_session(session: Session, log: Deliveries):
    """What it had not committed is lost, and the next receiver has a session all the same."""

    def fn(sender, session, **kwargs):
        session.add(Tag(name="lost"))
        session.flush()
        session.close()

    post_save.connect(fn, Author, weak=False, on="commit")

    @receiver(post_save, sender=Author, on="commit")
    def second(sender, session, **kwargs):
        session.add(Tag(name="kept"))

    session.add(Author(name="a"))
    session.commit()
    assert rows(session.get_bind(), Tag.name) == ["kept"]


def test_a_savepoint_that_a_receiver_leaves_open_is_committed(session: Session):
    """Like ``Session.commit()`` does."""

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, session, **kwargs):
        session.begin_nested()
        session.add(Tag(name="inside"))

    session.add(Author(name="a"))
    session.commit()
    assert rows(session.get_bind(), Tag.name) == ["inside"]


def test_a_receiver_may_begin_the_transaction_itself(session: Session):
    """``with session.begin():`` works, because nothing has begun one."""

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        assert instance.name == "a"
        with session.begin():
            session.add(Tag(name="inside"))

    session.add(Author(name="a"))
    session.commit()
    assert rows(session.get_bind(), Tag.name) == ["inside"]


def test_a_receiver_may_delete_the_instance(session: Session, log: Deliveries):
    """And then that is delivered."""

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        session.delete(instance)

    session.add(Author(name="a"))
    session.commit()
    assert log.lines == ["commit created Author(a)", "commit deleted Author(a)"]
    assert rows(session.get_bind(), Author.name) == []


def test_a_receiver_of_a_statement_may_keep_what_it_loads(session: Session, library: Engine):
    """It is detached when the call is over."""
    session.add(Author(name="a"))
    session.commit()
    kept = []

    @receiver(post_bulk, sender=Author, on="commit")
    def keeps(sender, session, **kwargs):
        kept.append(session.scalars(select(Author)).one())

    session.execute(update(Author).values(name="b"))
    session.commit()
    assert [(one.name, inspect(one).detached) for one in kept] == [("b", True)]
    assert rows(library, Author.name) == ["b"]


def test_a_row_that_is_gone_meanwhile_is_still_readable(session: Session, library: Engine):
    """The committed values are there; what was not loaded cannot be had any more."""
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        with library.begin() as other:
            other.execute(Author.__table__.delete())
        found.append((instance.name, instance.books))

    session.add(Author(name="a"))
    session.commit()
    assert found == [("a", [])]
    assert rows(library, Author.name) == []


def test_an_instance_may_be_merged_into_the_session_that_did_the_work(session: Session):
    """After the commit it is an instance like any other."""
    kept = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, created, **kwargs):
        if created:
            kept.append(instance)

    author = Author(name="a")
    session.add(author)
    session.commit()
    kept[0].name = "merged"
    assert session.merge(kept[0]) is author
    session.commit()
    assert rows(session.get_bind(), Author.name) == ["merged"]


def test_values_are_those_committed_whatever_the_session_had_not_flushed(session: Session):
    """Without autoflush and with a partial flush, something may be left that was never written."""
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, **kwargs):
        found.append((instance.name, instance.age))

    author = Author(name="a", age=1)
    session.add(author)
    session.flush()

    @event.listens_for(session, "after_commit", once=True)
    def after_commit(session: Session) -> None:
        author.age = 99

    session.commit()
    assert found == [("a", 1)]
    assert rows(session.get_bind(), Author.age) == [1]


def test_an_object_made_stale_by_a_rolled_back_savepoint_is_delivered_with_its_row(
    session: Session,
):
    """Its attributes are expired, so they are loaded when asked for."""
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, **kwargs):
        found.append((instance.id, instance.name, instance.age))

    author = Author(name="a", age=1)
    session.add(author)
    session.flush()
    savepoint = session.begin_nested()
    author.name, author.age = "b", 2
    session.flush()
    savepoint.rollback()
    session.commit()
    assert found == [(1, "a", 1)]
    assert rows(session.get_bind(), Author.name, Author.age) == [("a", 1)]


# -- sessions of all kinds -------------------------------------------------------------------------


def test_one_connection_in_the_pool_is_enough(tmp_path, installed):
    """The work's connection is back before the first receiver needs one."""
    engine = create_sqlite_engine(tmp_path / "small.db")
    small = create_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=0)
    Base.metadata.create_all(engine)
    engine.dispose()
    seen = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        seen.append(session.scalars(select(Author.name)).all())
        session.add(Tag(name=instance.name))

    @receiver(post_save, sender=Tag, on="commit")
    def tag_saved(sender, instance, session, **kwargs):
        seen.append(session.scalars(select(Tag.name)).all())

    with Session(small) as session:
        session.add(Author(name="a"))
        session.commit()
        assert small.pool.checkedout() == 0
    with sessionmaker(small).begin() as session:
        session.add(Author(name="b"))
    assert small.pool.checkedout() == 0
    assert seen == [["a"], ["a"], ["a", "b"], ["a", "b"]]
    small.dispose()


def test_a_session_with_several_binds(session: Session, tmp_path):
    """Each row is read and written where it lives, and ``using`` says where that is."""
    one = create_sqlite_engine(tmp_path / "one.db")
    two = create_sqlite_engine(tmp_path / "two.db")
    for engine in (one, two):
        Base.metadata.create_all(engine)
    found = []

    @receiver(post_save, on="commit", sender=[Author, Tag])
    def fn(sender, instance, session, created, using, **kwargs):
        found.append((instance.name, using is session.get_bind(sender), using))
        if created and sender is Author:
            session.add(Tag(name="from one to two"))
            instance.age = 3

    with Session(binds={Author: one, Tag: two}) as several:
        several.add_all([Author(name="a"), Tag(name="t")])
        several.commit()
    assert sorted(found, key=lambda f: f[0]) == [
        ("a", True, one),
        ("a", True, one),
        ("from one to two", True, two),
        ("t", True, two),
    ]
    assert rows(one, Author.name, Author.age) == [("a", 3)]
    assert rows(two, Tag.name) == ["from one to two", "t"]
    assert rows(one, Tag.name) == []
    assert rows(two, Author.name) == []
    for engine in (one, two):
        assert engine.pool.checkedout() == 0
        engine.dispose()


class Tenant(Session):
    """A Session subclass with a signature of its own, as applications and extensions have them."""

    def __init__(self, tenant: str, *, engines: dict[str, Engine]) -> None:
        super().__init__()
        self.tenant = tenant
        self.engines = engines

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine:
        return self.engines[self.tenant]


def test_a_session_subclass_with_an_init_of_its_own(library: Engine, installed):
    """The receivers' sessions are of that class, and have its attributes."""
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, created, **kwargs):
        found.append((type(session), session.tenant))
        if created:
            instance.age = 3

    with Tenant("here", engines={"here": library}) as session:
        session.add(Author(name="a"))
        session.commit()
    assert found == [(Tenant, "here"), (Tenant, "here")]
    assert rows(library, Author.age) == [3]


def test_a_scoped_session(library: Engine, installed):
    """The receivers' session is not the one of the scope, which stays where it is."""
    registry = scoped_session(sessionmaker(library))
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, created, **kwargs):
        found.append((session is registry(), registry() is scope))
        if created:
            instance.age = 3

    scope = registry()
    registry.add(Author(name="a"))
    registry.commit()
    assert found == [(False, True)] * 2
    registry.add(Author(name="b"))
    registry.flush()
    registry.remove()
    assert rows(library, Author.name, Author.age) == [("a", 3)]


def test_a_session_with_execution_options_on_its_engine(library: Engine, installed):
    """The receivers' session is on the same bind."""
    options = library.execution_options(schema_translate_map={None: None}, mark="kept")
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, using, **kwargs):
        found.append((using is options, session.connection().get_execution_options()["mark"]))

    with Session(options) as session:
        session.add(Author(name="a"))
        session.commit()
    assert found == [(True, "kept")]
    assert rows(library, Author.name) == ["a"]


def test_a_session_that_does_not_expire_or_autoflush(library: Engine, installed):
    """The settings of the session that did the work matter to its instances only."""
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        found.append((instance is author, instance.name, "books" in inspect(instance).dict))

    with Session(library, expire_on_commit=False, autoflush=False) as session:
        author = Author(name="a", books=[Book(name="b")])
        session.add(author)
        session.commit()
        assert author.__dict__["name"] == "a"
    assert found == [(False, "a", False)]
    assert rows(library, Author.name) == ["a"]


@pytest.mark.skipif(before_sqlalchemy("2.0.22"), reason="close_resets_only came with 2.0.22")
def test_a_session_that_may_not_be_used_after_close(library: Engine, log: Deliveries):
    """``close_resets_only=False``: the session may be closed for good, the receivers' is not."""
    kept = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, created, **kwargs):
        if created:
            kept.append(session)
            instance.age = 3

    session = Session(library, close_resets_only=False)
    session.add(Author(name="a"))
    session.commit()
    session.close()
    with pytest.raises(InvalidRequestError):
        session.connection()
    assert rows(library, Author.age) == [3]


def test_the_own_sessions_info_is_that_of_the_session_that_did_the_work(library: Engine, installed):
    """What an application keeps there, such as the user, is there too."""
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, session, **kwargs):
        found.append(dict(session.info))
        session.info["user"] = "somebody else"

    with Session(library, info={"user": "me"}) as session:
        on_commit(session, lambda: found.append("called back"))
        session.add(Author(name="a"))
        session.commit()
        assert session.info["user"] == "me"
    assert found == [{"user": "me"}, "called back"]
    assert rows(library, Author.name) == ["a"]


def test_listeners_of_one_session_are_not_called_for_the_receivers_session(
    library: Engine, installed
):
    """A hook on the caller's session is for that session's work alone."""
    calls = []

    @receiver(post_save, sender=Author, on="commit")
    def reads(sender, session, **kwargs):
        session.scalars(select(Author)).all()

    @receiver(post_save, sender=Author, on="commit")
    def writes(sender, session, **kwargs):
        session.add(Tag(name="t"))

    with Session(library) as session:
        for name in ("after_begin", "before_flush", "after_commit", "after_transaction_end"):
            event.listen(
                session, name, lambda session, *_, name=name: calls.append((name, session))
            )
        session.add_all([Author(name="a"), Author(name="b")])
        session.commit()
        assert {owner for _, owner in calls} == {session}
    assert [name for name, _ in calls].count("after_commit") == 1
    assert rows(library, Tag.name) == ["t", "t"]


class Mails:
    """A repository of a session."""

    def __init__(self, session: Any) -> None:
        self.session = session


def bound_method(session: Any) -> Any:
    return session.flush


def closure(session: Any) -> Any:
    return lambda: session


REFERRING = {
    "itself": lambda session: session,
    "repository": Mails,
    "repositories": lambda session: {"mails": [Mails(session)]},
    "method": bound_method,
    "closure": closure,
    "partial": lambda session: functools.partial(print, session),
    "weakly": weakref.ref,
}


@pytest.mark.parametrize("attribute", REFERRING)
def test_an_attribute_that_refers_to_the_session_is_an_error_with_the_remedy(
    library: Engine, installed, caplog: pytest.LogCaptureFixture, attribute: str
):
    """Work by way of it would be done in the caller's session, and lost without a word."""
    called = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, session, **kwargs):
        called.append(session)

    with Session(library) as session:
        session.mails = REFERRING[attribute](session)
        session.add(Author(name="a"))
        session.commit()
        assert [*session.new] == []
        del session.mails
    (record,) = caplog.records
    error = record.exc_info[1]
    assert isinstance(error, InstallError)
    assert "the attribute 'mails' of Session" in str(error)
    assert "sqla_signals.install(session_factory=...)" in str(error)
    assert called == []
    assert rows(library, Author.name) == ["a"]
    caplog.clear()


@asynchronous
async def test_so_is_an_attribute_of_the_asyncsession(
    async_engine: AsyncEngine, witness: Engine, caplog: pytest.LogCaptureFixture
):
    """In front of it, to which it may refer as well."""
    called = []

    @receiver(post_save, sender=Author, on="commit")
    async def fn(sender, session, **kwargs):
        called.append(session)

    for owner in (lambda session: session, lambda session: session.sync_session):
        async with AsyncSession(async_engine) as session:
            owner(session).mails = Mails(session)
            session.add(Author(name="a"))
            await session.commit()
            del owner(session).mails
    assert [type(record.exc_info[1]) for record in caplog.records] == [InstallError] * 2
    assert called == []
    assert rows(witness, Author.name) == ["a", "a"]
    caplog.clear()


def test_other_attributes_come_along_and_containers_are_copied(library: Engine, installed):
    """A receiver that adds to a list of its session adds to its own."""
    found = []
    registry = scoped_session(sessionmaker(library))

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, session, **kwargs):
        found.append((session.tenant, list(session.notes), session.registry is registry))
        session.notes.append("of the receiver")

    with Session(library) as session:
        session.tenant, session.notes, session.registry = "here", ["of the caller"], registry
        session.add(Author(name="a"))
        session.commit()
        assert session.notes == ["of the caller"]
    assert found == [("here", ["of the caller"], True)]
    assert rows(library, Author.name) == ["a"]


def test_what_is_in_the_info_of_the_session_is_shared(library: Engine, installed):
    """Whatever it is: listeners of the class look for it there."""
    found = []
    shared = {"sessions": []}

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, session, **kwargs):
        found.append(session.info["shared"] is shared)
        session.info["of the receiver"] = True

    with Session(library, info={"shared": shared}) as session:
        shared["sessions"].append(session)
        session.add(Author(name="a"))
        session.commit()
        assert session.info == {"shared": shared}
    assert found == [True]
    assert rows(library, Author.name) == ["a"]
    shared.clear()


# -- the schema that the transaction worked in -----------------------------------------------------

OTHER = {None: "other"}


@pytest.fixture
def tenants(postgresql_engine: Engine) -> Engine:
    """Two schemas with the same tables; the first has an author with the key of the second's."""
    with postgresql_engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA IF EXISTS other CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA other")
    for schema_map in ({}, OTHER):
        with postgresql_engine.begin() as connection:
            connection = connection.execution_options(schema_translate_map=schema_map)
            Base.metadata.create_all(connection)
    with Session(postgresql_engine) as session:
        session.add(Author(id=1, name="of another tenant"))
        session.commit()
    return postgresql_engine


def ages(engine: Engine) -> dict[str, list[Any]]:
    """The ages of the authors, by schema."""
    with engine.connect() as connection:
        return {
            schema: [*connection.exec_driver_sql(f"SELECT name, age FROM {schema}.authors")]
            for schema in ("public", "other")
        }


@pytest.mark.postgresql
@pytest.mark.parametrize(
    "made_by", ["class", "installed factory", "session_factory", "other engine"]
)
@pytest.mark.parametrize("given", ["connection", "engine", "joined connection"])
def test_a_receiver_works_in_the_schema_of_the_transaction_that_it_follows(
    tenants: Engine, made_by: str, given: str
):
    """Never in another tenant's, wherever its session and the schema come from."""
    maker = sessionmaker(tenants)
    another = create_engine(tenants.url)
    factory = {"session_factory": maker, "other engine": sessionmaker(another)}.get(made_by)
    sqla_signals.install(
        *([maker] if made_by == "installed factory" else []), session_factory=factory
    )

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, created, session, **kwargs):
        if created:
            assert [author.name for author in session.scalars(select(Author))] == ["mine"]
            instance.age = 3

    with ExitStack() as stack:
        if given == "engine":
            session = maker(bind=tenants.execution_options(schema_translate_map=OTHER))
        elif given == "connection":
            session = maker()
            session.connection(execution_options={"schema_translate_map": OTHER})
        else:
            connection = stack.enter_context(tenants.connect())
            connection = connection.execution_options(schema_translate_map=OTHER)
            session = maker(bind=connection)
        session.add(Author(id=1, name="mine"))
        session.commit()
        session.close()
    another.dispose()
    expected = {"public": [("of another tenant", None)], "other": [("mine", 3)]}
    assert ages(tenants) == expected


@pytest.mark.postgresql
def test_the_schema_of_one_transaction_is_not_that_of_the_next(tenants: Engine, installed):
    """Each has its own."""

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, created, session, **kwargs):
        if created:
            instance.age = 3

    with Session(tenants) as session:
        session.connection(execution_options={"schema_translate_map": OTHER})
        session.add(Author(id=2, name="other's"))
        session.commit()
        session.add(Author(id=2, name="public's"))
        session.commit()
    expected = {
        "public": [("of another tenant", None), ("public's", 3)],
        "other": [("other's", 3)],
    }
    assert ages(tenants) == expected


def test_a_failed_receiver_does_not_keep_its_session_alive(
    session: Session, caplog: pytest.LogCaptureFixture
):
    """Its traceback refers to its frame, which refers to the session."""
    caplog.set_level("CRITICAL", "sqla_signals")
    references: list[weakref.ref[Session]] = []

    @receiver(post_save, sender=Shelf, on="commit")
    def fn(sender, session, **kwargs):
        references.append(weakref.ref(session))
        frame = sys._getframe()
        assert frame
        raise Unwanted

    session.add_all([Shelf(name="a"), Shelf(name="b")])
    session.commit()
    gc.collect()
    assert [reference() for reference in references] == [None, None]
