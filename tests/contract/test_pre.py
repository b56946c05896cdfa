"""``pre_save`` and ``pre_delete``, before the first statement of a flush."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, event, inspect, select
from sqlalchemy.orm import Session, make_transient, make_transient_to_detached

import sqla_signals
from sqla_signals import (
    UNSET,
    Change,
    SignalRecursionError,
    SignalsError,
    post_save,
    pre_delete,
    pre_save,
    receiver,
)

from .models import Author, Book, Note, Page, Tag
from .observing import Log, both, listen, rows


@pytest.fixture
def author(session: Session) -> Author:
    """An author in the database, loaded."""
    author = Author(name="a", age=1)
    session.add(author)
    session.commit()
    author.name
    return author


# -- when ----------------------------------------------------------------------------------------


def test_pre_signals_are_sent_before_the_first_statement_of_the_flush(
    session: Session, author: Author, statements: list[str]
):
    """All of them: for inserts, updates and deletes."""
    page = Page(name="p")
    session.add(page)
    session.flush()
    session.delete(page)
    author.name = "c"
    session.add(Tag(name="t"))
    seen = []

    @receiver([pre_save, pre_delete])
    def fn(sender, signal, **kwargs):
        seen.append((signal.name, sender.__name__, list(statements)))

    statements.clear()
    session.flush()
    assert sorted(seen) == [
        ("pre_delete", "Page", []),
        ("pre_save", "Author", []),
        ("pre_save", "Tag", []),
    ]
    assert {sql.split()[0] for sql in statements} == {"INSERT", "UPDATE", "DELETE"}
    assert rows(session, Author.name) == ["c"]
    assert rows(session, Page.name) == []


def test_pre_save_of_a_new_row_says_created_and_shows_what_is_assigned(session: Session, log: Log):
    """``update_fields`` is ``None``; there is no old value."""
    author = Author(name="a", age=1)
    session.add(author)
    session.flush()
    sent = log.one("pre_save", author)
    assert sent["created"] is True
    assert sent["update_fields"] is None
    assert sent.changes == {"name": Change(UNSET, "a"), "age": Change(UNSET, 1)}
    assert inspect(author).persistent


def test_pre_save_of_an_update_shows_old_and_new_values(session: Session, author, log: Log):
    """Only of what changes; ``update_fields`` has the same names."""
    author.name = "b"
    author.age = 1
    session.flush()
    sent = log.one("pre_save", author)
    assert sent["created"] is False
    assert sent["update_fields"] == frozenset({"name"})
    assert isinstance(sent["update_fields"], frozenset)
    assert sent.changes == {"name": Change("a", "b")}
    assert rows(session, Author.name, Author.age) == [("b", 1)]


def test_the_old_value_is_unset_if_it_was_never_loaded(session: Session, author, log: Log):
    """Assigning to an expired attribute does not load it, and neither do we."""
    session.expire(author)
    author.name = "b"
    session.flush()
    assert log.one("pre_save").changes == {"name": Change(UNSET, "b")}
    assert log.one("post_save").changes == {"name": Change(UNSET, "b")}


def test_what_the_flush_itself_sets_appears_in_post_save_and_not_in_pre_save(
    session: Session, log: Log
):
    """The foreign key of a new parent."""
    book = Book(name="b", author=Author(name="a"))
    session.add(book)
    session.flush()
    assert "author_id" not in (log.one("pre_save", book).changes or {})
    changes = log.one("post_save", book).changes
    assert changes is not None
    assert changes["author_id"] == Change(UNSET, book.author_id)
    assert book.author_id is not None


def test_each_pre_save_receiver_sees_what_the_one_before_assigned(session: Session, author):
    """``changes`` is taken anew for each of them."""
    seen = []

    @receiver(pre_save, sender=Author)
    def first(sender, instance, **kwargs):
        instance.age = 2

    @receiver(pre_save, sender=Author)
    def second(sender, changes, update_fields, **kwargs):
        seen.append((dict(changes), update_fields))

    author.name = "b"
    session.flush()
    assert seen == [({"name": Change("a", "b"), "age": Change(1, 2)}, {"name", "age"})]


# -- what a receiver may do ----------------------------------------------------------------------


def test_a_receiver_may_change_the_instance_and_that_is_written(session: Session, log: Log):
    """Of a new row and of an existing one."""

    @receiver(pre_save, sender=Author)
    def upper(sender, instance, **kwargs):
        instance.name = instance.name.upper()

    author = Author(name="a")
    session.add(author)
    session.flush()
    assert rows(session, Author.name) == ["A"]
    author.name = "b"
    session.flush()
    assert rows(session, Author.name) == ["B"]
    assert log.post == ["post_save created Author(A)", "post_save updated Author(B)"]
    assert log.sent[-1].changes == {"name": Change("A", "B")}


def test_a_receiver_may_change_another_instance_which_gets_its_own_signals(
    session: Session, author: Author, log: Log
):
    """One that was clean becomes part of the flush."""

    @receiver(pre_save, sender=Book)
    def count(sender, instance, **kwargs):
        author.age += 1

    session.add(Book(name="b"))
    session.flush()
    assert log.pre == ["pre_save created Book(b)", "pre_save updated Author(a)"]
    assert sorted(log.post) == ["post_save created Book(b)", "post_save updated Author(a)"]
    assert rows(session, Author.age) == [2]


def test_a_change_of_an_instance_already_announced_is_written_and_not_announced_again(
    session: Session, log: Log
):
    """One ``pre_save`` for each row."""
    first, second = Author(name="first"), Author(name="second")

    @receiver(pre_save, sender=Author)
    def fn(sender, instance, **kwargs):
        if instance is second:
            first.age = 3

    session.add_all([first, second])
    session.flush()
    assert log.pre == ["pre_save created Author(first)", "pre_save created Author(second)"]
    assert rows(session, Author.name, Author.age) == [("first", 3), ("second", None)]
    changes = log.one("post_save", first).changes
    assert changes is not None
    assert changes["age"] == Change(UNSET, 3)


def test_a_receiver_may_add_instances_which_get_their_own_signals_until_nothing_new_appears(
    session: Session, log: Log
):
    """A chain of three, each added by the ``pre_save`` of the one before."""

    @receiver(pre_save, sender=Author)
    def book(sender, instance, session, created, **kwargs):
        session.add(Book(name="b", author=instance))

    @receiver(pre_save, sender=Book)
    def page(sender, instance, session, created, **kwargs):
        instance.pages.append(Page(name="p"))

    @receiver(pre_save, sender=Page)
    def note(sender, instance, session, created, **kwargs):
        instance.notes.append(Note(name="n"))

    session.add(Author(name="a"))
    session.flush()
    assert log.lines == both(
        "save created Author(a)",
        "save created Book(b)",
        "save created Page(p)",
        "save created Note(n)",
    )
    assert rows(session, Author.name) + rows(session, Book.name) == ["a", "b"]
    assert rows(session, Page.name) + rows(session, Note.name) == ["p", "n"]


def test_a_receiver_may_delete_another_instance_which_gets_its_own_signals(
    session: Session, author: Author, log: Log
):
    """With everything that the deletion takes along."""
    book = Book(name="b", pages=[Page(name="p")])
    session.add(book)
    session.flush()
    log.clear()

    @receiver(pre_save, sender=Author)
    def fn(sender, session, **kwargs):
        session.delete(book)

    author.name = "c"
    session.flush()
    assert log.pre[0] == "pre_save updated Author(c)"
    assert sorted(log.pre[1:]) == ["pre_delete Book(b)", "pre_delete Page(p)"]
    assert sorted(log.post) == [
        "post_delete Book(b)",
        "post_delete Page(p)",
        "post_save updated Author(c)",
    ]
    assert rows(session, Book.name) == rows(session, Page.name) == []


def test_a_receiver_may_delete_the_very_instance(session: Session, author: Author, log: Log):
    """Its update is not written; the deletion is announced and done."""

    @receiver(pre_save, sender=Author)
    def fn(sender, instance, session, **kwargs):
        session.delete(instance)

    author.name = "b"
    session.flush()
    assert log.lines == [
        "pre_save updated Author(b)",
        "pre_delete Author(b)",
        "post_delete Author(b)",
    ]
    assert rows(session, Author.name) == []


def test_a_receiver_may_delete_what_is_about_to_be_announced(session: Session, author, log: Log):
    """An instance that will be deleted is not announced as saved any more."""
    other = Author(name="other")
    session.add(other)
    session.flush()
    log.clear()
    first = min(author, other, key=lambda each: each.id)
    second = other if first is author else author
    done = []

    @receiver(pre_save, sender=Author)
    def fn(sender, instance, session, **kwargs):
        if not done:
            done.append(instance)
            session.delete(second if instance is first else first)

    first.age = second.age = 5
    session.flush()
    (kept,) = done
    gone = second if kept is first else first
    assert log.pre == [f"pre_save updated Author({kept.name})", f"pre_delete Author({gone.name})"]
    assert rows(session, Author.name) == [kept.name]


def test_a_receiver_may_expunge_a_new_instance_which_is_then_not_written(
    session: Session, log: Log
):
    """The very one, or one whose ``pre_save`` has not been sent."""

    @receiver(pre_save, sender=Author)
    def fn(sender, instance, session, **kwargs):
        if instance.name == "a":
            session.expunge(instance)
            session.expunge(last)

    last = Author(name="c")
    session.add_all([Author(name="a"), Author(name="b"), last])
    session.flush()
    assert log.pre == ["pre_save created Author(a)", "pre_save created Author(b)"]
    assert log.post == ["post_save created Author(b)"]
    assert rows(session, Author.name) == ["b"]
    assert inspect(last).transient


def test_a_receiver_may_expunge_a_changed_or_deleted_instance(session: Session, author, log: Log):
    """Its row stays as it was."""
    book = Book(name="b")
    session.add(book)
    session.flush()
    log.clear()

    @receiver(pre_save, sender=Author)
    def changed(sender, instance, session, **kwargs):
        session.expunge(instance)

    @receiver(pre_delete, sender=Book)
    def deleted(sender, instance, session, **kwargs):
        session.expunge(instance)

    author.name = "c"
    session.delete(book)
    session.flush()
    assert log.lines == ["pre_save updated Author(c)", "pre_delete Book(b)"]
    assert rows(session, Author.name) == ["a"]
    assert rows(session, Book.name) == ["b"]


def test_a_receiver_may_save_a_deletion_by_adding_the_instance_again(
    session: Session, author, log: Log
):
    """Then nothing is deleted, and ``post_delete`` is not sent."""

    @receiver(pre_delete, sender=Author)
    def fn(sender, instance, session, **kwargs):
        session.add(instance)

    session.delete(author)
    session.flush()
    assert log.lines == ["pre_delete Author(a)"]
    assert rows(session, Author.name) == ["a"]
    assert author in session


def insert_instead(instance: Author, session: Session) -> None:
    """As SQLAlchemy's example of versioned rows does."""
    make_transient(instance)
    instance.id = None
    session.add(instance)


@pytest.mark.parametrize("first", [True, False])
def test_an_update_that_a_receiver_turns_into_an_insert_is_announced_as_one(
    session: Session, author: Author, first: bool
):
    """Whoever stands behind that receiver hears of the INSERT alone."""
    log = Log()
    if not first:
        pre_save.connect(log, weak=False)

    @receiver(pre_save, sender=Author)
    def never_update(sender, instance, created, session, **kwargs):
        if not created:
            insert_instead(instance, session)

    @receiver(pre_save, sender=Author)
    def fill_in(sender, instance, created, **kwargs):
        if created:
            instance.age = 7

    if first:
        pre_save.connect(log, weak=False)
    post_save.connect(log, weak=False)
    author.name = "b"
    session.commit()
    expected = both("save created Author(b)")
    assert log.lines == (expected if first else ["pre_save updated Author(b)", *expected])
    assert rows(session, Author.name, Author.age) == [("a", 1), ("b", 7)]


def test_an_insert_that_a_receiver_turns_into_an_update_is_announced_as_one(
    session: Session, author: Author
):
    """The row was there already."""
    key = author.id
    session.expunge(author)
    log = Log()

    @receiver(pre_save, sender=Author)
    def never_twice(sender, instance, created, session, **kwargs):
        if created:
            session.expunge(instance)
            instance.id = key
            make_transient_to_detached(instance)
            session.add(instance)
            instance.name = "b"

    receiver([pre_save, post_save], sender=Author)(log)
    session.add(Author(name="new"))
    session.commit()
    assert log.lines == both("save updated Author(b)")
    assert rows(session, Author.name) == ["b"]


def test_a_delete_that_a_receiver_turns_into_an_insert_is_announced_as_one(
    session: Session, author: Author, log: Log
):
    """A row under another key; the old one stays."""

    @receiver(pre_delete, sender=Author)
    def never_delete(sender, instance, session, **kwargs):
        insert_instead(instance, session)

    session.delete(author)
    session.commit()
    assert log.lines == ["pre_delete Author(a)", *both("save created Author(a)")]
    assert rows(session, Author.name) == ["a", "a"]


def test_an_update_that_another_listener_turns_into_an_insert_is_announced_right_before_it(
    session: Session, author: Author, log: Log
):
    """A ``before_flush`` listener behind ours."""

    def never_update(session: Session, context: Any, instances: Any) -> None:
        insert_instead(author, session)

    event.listen(session, "before_flush", never_update)
    author.name = "b"
    session.commit()
    assert log.lines == ["pre_save updated Author(b)", *both("save created Author(b)")]
    assert rows(session, Author.name) == ["a", "b"]


def test_receivers_behind_one_that_deletes_the_instance_do_not_hear_of_an_update(
    session: Session, author: Author
):
    """There is none."""

    @receiver(pre_save, sender=Author)
    def delete_instead(sender, instance, session, **kwargs):
        session.delete(instance)

    log = listen()
    author.name = "b"
    session.commit()
    assert log.lines == both("delete Author(b)")
    assert rows(session, Author.id) == []


def test_a_receiver_may_take_a_change_back(session: Session, author: Author, log: Log):
    """Then nothing is written, and ``post_save`` is not sent."""

    @receiver(pre_save, sender=Author)
    def fn(sender, instance, **kwargs):
        instance.name = "a"

    author.name = "b"
    session.flush()
    assert log.lines == ["pre_save updated Author(b)"]
    assert rows(session, Author.name) == ["a"]


def test_a_receiver_may_query_and_load(session: Session, author: Author, log: Log):
    """Nothing is flushed by that; the rows are those from before."""
    session.add(Book(name="b", author=author))
    session.flush()
    session.expire_all()
    log.clear()
    seen = []

    @receiver(pre_save, sender=Tag)
    def fn(sender, session, **kwargs):
        seen.append(session.scalars(select(Tag)).all())
        seen.append(session.scalars(select(Author)).one() is author)
        seen.append([book.name for book in author.books])
        session.refresh(author)

    session.add(Tag(name="t"))
    session.flush()
    assert seen == [[], True, ["b"]]
    assert log.lines == both("save created Tag(t)")
    assert rows(session, Tag.name) == ["t"]


def test_a_receiver_may_change_a_collection(session: Session, author: Author, log: Log):
    """The foreign keys follow, and their rows are announced."""
    kept, given = Book(name="kept", author=author), Book(name="given")
    session.add_all([kept, given])
    session.flush()
    session.refresh(given)
    log.clear()

    @receiver(pre_save, sender=Author)
    def fn(sender, instance, **kwargs):
        instance.books[:] = [given]

    author.age = 9
    session.flush()
    assert log.pre[0] == "pre_save updated Author(a)"
    assert sorted(log.pre[1:]) == ["pre_save updated Book(given)", "pre_save updated Book(kept)"]
    assert rows(session, Book.name, Book.author_id) == [("given", author.id), ("kept", None)]
    assert log.one("post_save", given).changes == {"author_id": Change(None, author.id)}
    assert log.one("post_save", kept).changes == {"author_id": Change(author.id, None)}


# -- receivers that never settle -----------------------------------------------------------------


def test_a_cycle_that_never_settles_raises_an_error_that_names_its_receivers(session: Session):
    """Two receivers that add for each other; nothing was written, and the session is usable."""

    @receiver(pre_save, sender=Author)
    def adds_a_book(sender, session, **kwargs):
        session.add(Book(name="b"))

    @receiver(pre_save, sender=Book)
    def adds_an_author(sender, session, **kwargs):
        session.add(Author(name="a"))

    @receiver(pre_save, sender=Tag)
    def has_nothing_to_do_with_it(sender, **kwargs): ...

    session.add(Tag(name="t"))
    session.add(Author(name="a"))
    with pytest.raises(SignalRecursionError) as caught:
        session.flush()
    message = str(caught.value)
    assert "adds_a_book" in message
    assert "adds_an_author" in message
    assert "has_nothing_to_do_with_it" not in message
    assert isinstance(caught.value, SignalsError)
    assert isinstance(caught.value, RecursionError)
    assert rows(session, Author.id) == rows(session, Book.id) == rows(session, Tag.id) == []
    session.rollback()
    pre_save.disconnect(adds_an_author)
    session.add(Author(name="a"))
    session.commit()
    assert rows(session, Author.name) == ["a"]
    assert rows(session, Book.name) == ["b"]


def test_a_receiver_that_adds_its_own_like_for_ever_is_such_a_cycle(session: Session):
    """A cycle of one."""

    @receiver(pre_save, sender=Author)
    def adds_another(sender, session, **kwargs):
        session.add(Author(name="a"))

    session.add(Author(name="a"))
    with pytest.raises(SignalRecursionError, match="adds_another"):
        session.flush()
    assert rows(session, Author.id) == []


def test_a_long_chain_that_settles_is_no_cycle(session: Session, log: Log):
    """Twenty rounds are fine."""

    @receiver(pre_save, sender=Author)
    def adds_a_younger_one(sender, instance, session, **kwargs):
        if instance.age:
            session.add(Author(name="a", age=instance.age - 1))

    session.add(Author(name="a", age=20))
    session.flush()
    assert log.lines == both(*["save created Author(a)"] * 21)
    assert len(rows(session, Author.id)) == 21


# -- veto ----------------------------------------------------------------------------------------


class NotToday(Exception):
    """What a veto may raise."""


@pytest.mark.parametrize("signal", [pre_save, pre_delete], ids=lambda signal: signal.name)
def test_raising_vetoes_the_flush_and_nothing_is_written(
    session: Session, library: Engine, author, statements: list[str], signal
):
    """The exception reaches the caller unchanged, no statement ran, and the session is usable."""
    error = NotToday("closed")

    @receiver(signal, sender=Author)
    def veto(sender, **kwargs):
        raise error

    session.add(Book(name="b"))
    session.flush()
    author.books
    if signal is pre_save:
        author.name = "c"
    else:
        session.delete(author)
    session.add(Tag(name="t"))
    statements.clear()
    with pytest.raises(NotToday) as caught:
        session.flush()
    assert caught.value is error
    assert statements == []
    assert rows(session, Author.name) == ["a"]
    # What was flushed before is still there, and the transaction goes on.
    assert rows(session, Book.name) == ["b"]
    signal.disconnect(veto)
    session.commit()
    assert rows(library, Tag.name) == ["t"]
    assert rows(library, Author.name) == (["c"] if signal is pre_save else [])


def test_after_a_veto_the_flush_can_be_tried_again_or_given_up(session: Session, library, log: Log):
    """Mended, it goes through, with signals as if for the first time; or it is rolled back."""

    @receiver(pre_save, sender=Author)
    def adult(sender, instance, **kwargs):
        if instance.age < 18:
            raise NotToday

    author = Author(name="a", age=17)
    session.add(author)
    with pytest.raises(NotToday):
        session.commit()
    log.clear()
    author.age = 18
    session.commit()
    assert log.lines == both("save created Author(a)")
    author.age = 3
    with pytest.raises(NotToday):
        session.flush()
    session.rollback()
    assert author.age == 18
    assert rows(library, Author.age) == [18]


def test_a_vetoed_autoflush_reaches_the_caller_of_the_query(session: Session):
    """And a veto in ``commit()`` reaches the caller of ``commit()``."""

    @receiver(pre_save, sender=Author)
    def veto(sender, **kwargs):
        raise NotToday

    session.add(Author(name="a"))
    with pytest.raises(NotToday):
        session.scalars(select(Author)).all()
    with session.no_autoflush:
        assert session.scalars(select(Author)).all() == []
    with pytest.raises(NotToday):
        session.commit()
    session.rollback()
    session.commit()
    assert rows(session, Author.id) == []


def test_no_receiver_is_called_after_the_one_that_raised(session: Session):
    """Neither for this instance nor for another."""
    seen = []

    @receiver(pre_save, sender=Author)
    def veto(sender, instance, **kwargs):
        seen.append(instance.name)
        raise NotToday

    @receiver([pre_save, post_save], sender=Author)
    def later(sender, **kwargs):
        seen.append("later")

    session.add_all([Author(name="a"), Author(name="b")])
    with pytest.raises(NotToday):
        session.flush()
    assert seen == ["a"]


# -- what cannot be foreseen ---------------------------------------------------------------------


def test_what_another_before_flush_listener_adds_after_ours_is_announced_before_its_own_statement(
    session: Session, log: Log, statements: list[str]
):
    """It has one ``pre_save`` and one ``post_save`` like any other row."""
    seen = []

    @event.listens_for(session, "before_flush", once=True)
    def add_tag(session, context, objects):
        session.add(Tag(name="t"))

    @receiver(pre_save, sender=Tag)
    def fn(sender, **kwargs):
        seen.append([sql for sql in statements if "tags" in sql])

    session.add(Author(name="a"))
    statements.clear()
    session.flush()
    assert seen == [[]]
    assert sorted(log.lines) == sorted(both("save created Author(a)", "save created Tag(t)"))
    assert rows(session, Tag.name) == ["t"]


def test_what_another_before_flush_listener_adds_before_ours_is_foreseen(
    library: Engine, statements: list[str]
):
    """It is there when we look."""
    with Session(library) as session:

        @event.listens_for(session, "before_flush", once=True)
        def add_tag(session, context, objects):
            session.add(Tag(name="t"))

        installation = sqla_signals.install(session)
        log = Log()
        seen = []

        @receiver(pre_save, sender=Tag)
        def fn(sender, **kwargs):
            seen.append(list(statements))

        receiver([pre_save, post_save])(log)
        session.add(Author(name="a"))
        statements.clear()
        session.flush()
        installation.remove()
        assert seen == [[]]
        assert sorted(log.lines) == sorted(both("save created Author(a)", "save created Tag(t)"))
