"""One call per receiver, instance and root transaction."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_signals import UNSET, Change, post_delete, post_save, receiver

from ..contract.models import Author, Base, Book, Named, Note, Page
from ..contract.observing import rows
from .models import Coin, Document, Versioned
from .observing import Deliveries, Transaction, deliveries


def given(engine: Engine, *instances: Any) -> None:
    """Put rows into the database, without any signal."""
    with engine.begin() as connection:
        for instance in instances:
            values = {k: v for k, v in vars(instance).items() if not k.startswith("_")}
            connection.execute(type(instance).__table__.insert(), values)


# -- each sentence, in every kind of transaction ---------------------------------------------------


def test_each_row_is_told_once_per_receiver_and_root_transaction(
    committing: Transaction, log: Deliveries
):
    """However many flushes have written it."""
    given(committing.engine, Author(id=1, name="a"), Author(id=2, name="b"))

    def work(session: Session) -> None:
        for age in (1, 2, 3):
            session.get(Author, 1).age = age
            session.get(Author, 2).age = age
            session.flush()

    committing(work)
    assert log.lines == ["commit updated Author(a)", "commit updated Author(b)"]
    assert rows(committing.engine, Author.name, Author.age) == [("a", 3), ("b", 3)]


def test_the_next_root_transaction_tells_only_of_itself(committing: Transaction, log: Deliveries):
    """Nothing survives the root transaction."""
    committing(lambda session: session.add(Author(name="a")))
    committing(lambda session: session.add(Author(name="b")))
    committing(lambda session: session.get(Author, 1))
    assert log.lines == ["commit created Author(a)", "commit created Author(b)"]
    assert rows(committing.engine, Author.name) == ["a", "b"]


def test_created_then_updated_is_created(committing: Transaction, log: Deliveries):
    """With every column as it was committed, and nothing as the old value."""

    def work(session: Session) -> None:
        author = Author(id=5, name="a")
        session.add(author)
        session.flush()
        author.name = "b"
        session.flush()
        author.age = 9

    committing(work)
    assert log.lines == ["commit created Author(b)"]
    assert log.only.update_fields is None
    assert log.only.changes == {
        "id": Change(UNSET, 5),
        "name": Change(UNSET, "b"),
        "age": Change(UNSET, 9),
    }
    assert rows(committing.engine, Author.name, Author.age) == [("b", 9)]


def test_created_then_deleted_is_nothing(committing: Transaction, log: Deliveries):
    """The row was never there for anybody else."""

    def work(session: Session) -> None:
        author, other = Author(name="a"), Author(name="b")
        session.add_all([author, other])
        session.flush()
        author.age = 3
        session.flush()
        session.delete(author)
        session.flush()

    committing(work)
    assert log.lines == ["commit created Author(b)"]
    assert rows(committing.engine, Author.name) == ["b"]


def test_updated_then_deleted_is_a_delete(committing: Transaction, log: Deliveries):
    """The update does not matter any more."""
    given(committing.engine, Author(id=1, name="a"), Author(id=2, name="b"))

    def work(session: Session) -> None:
        author = session.get(Author, 1)
        author.age = 3
        session.flush()
        session.delete(author)

    committing(work)
    assert log.lines == ["commit deleted Author(a)"]
    assert rows(committing.engine, Author.name) == ["b"]


def test_changes_run_from_the_first_old_to_the_last_new_value(
    committing: Transaction, log: Deliveries
):
    """Across flushes and released savepoints."""
    given(committing.engine, Author(id=1, name="a", age=1))

    def work(session: Session) -> None:
        author = session.get(Author, 1)
        author.name = "b"
        session.flush()
        with session.begin_nested():
            author.name = "c"
            session.flush()
            author.age = 2
        author.name = "d"

    committing(work)
    assert log.only.line == "commit updated Author(d)"
    assert log.only.changes == {"name": Change("a", "d"), "age": Change(1, 2)}
    assert log.only.update_fields == {"name", "age"}
    assert rows(committing.engine, Author.name, Author.age) == [("d", 2)]


def test_reverted_to_the_old_value_is_not_a_change(committing: Transaction, log: Deliveries):
    """An update of which nothing remains is not told at all."""
    given(committing.engine, Author(id=1, name="a", age=1), Author(id=2, name="b", age=1))

    def work(session: Session) -> None:
        one, two = session.get(Author, 1), session.get(Author, 2)
        one.name, one.age, two.name = "x", 2, "x"
        session.flush()
        one.name, two.name = "a", "b"

    committing(work)
    assert log.only.line == "commit updated Author(a)"
    assert log.only.changes == {"age": Change(1, 2)}
    assert log.only.update_fields == {"age"}
    assert rows(committing.engine, Author.name, Author.age) == [("a", 2), ("b", 1)]


@pytest.mark.parametrize("flushes", ["the same flush", "two flushes"])
def test_a_key_deleted_and_added_again_is_a_delete_and_a_created_save(
    committing: Transaction, log: Deliveries, flushes: str
):
    """In one flush it is a row switch, in two a DELETE and an INSERT; it is told alike."""
    given(committing.engine, Author(id=1, name="a", age=1))

    def work(session: Session) -> None:
        session.delete(session.get(Author, 1))
        if flushes == "two flushes":
            session.flush()
        session.add(Author(id=1, name="b"))

    committing(work)
    assert log.lines == ["commit deleted Author(a)", "commit created Author(b)"]
    assert log.calls[1].changes["name"] == Change(UNSET, "b")
    assert rows(committing.engine, Author.id, Author.name) == [(1, "b")]


def test_a_rolled_back_transaction_has_a_net_effect_too(undoing: Transaction, log: Deliveries):
    """It is what would have been committed."""
    given(
        undoing.engine,
        *[Author(id=number, name=name) for number, name in enumerate("abcd", 1)],
    )

    def work(session: Session) -> None:
        updated, deleted, reverted, replaced = (session.get(Author, n) for n in (1, 2, 3, 4))
        new, gone = Author(id=5, name="e"), Author(id=6, name="f")
        session.add_all([new, gone])
        updated.age = deleted.age = reverted.age = 1
        session.flush()
        updated.age, reverted.age, new.age = 2, None, 3
        for author in (deleted, gone, replaced):
            session.delete(author)
        session.flush()
        session.add(Author(id=4, name="D"))
        session.flush()

    undoing(work)
    assert sorted(log.lines) == [
        "rollback created Author(D)",
        "rollback created Author(e)",
        "rollback deleted Author(b)",
        "rollback deleted Author(d)",
        "rollback updated Author(a)",
    ]
    (updated,) = [call for call in log.calls if "updated" in call.line]
    assert updated.changes == {"age": Change(None, 2)}
    assert rows(undoing.engine, Author.name, Author.age) == [(name, None) for name in "abcd"]


# -- with receivers of one signal only -------------------------------------------------------------


def test_created_then_deleted_is_nothing_where_only_saves_are_heard(session: Session):
    """What is not heard counts all the same."""
    saved = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, **kwargs):
        saved.append(instance.name)

    author = Author(name="a")
    session.add_all([author, Author(name="b")])
    session.flush()
    session.delete(author)
    session.commit()
    assert saved == ["b"]
    assert rows(session.get_bind(), Author.name) == ["b"]


def test_created_then_deleted_is_nothing_where_only_deletes_are_heard(session: Session):
    """A row that was never there for others cannot be gone."""
    session.add(Author(name="there before"))
    session.commit()
    deleted = []

    @receiver(post_delete, sender=Author, on="commit")
    def fn(sender, instance, **kwargs):
        deleted.append(instance.name)

    author = Author(name="a")
    session.add(author)
    session.flush()
    session.delete(author)
    session.delete(session.get(Author, 1))
    session.commit()
    assert deleted == ["there before"]
    assert rows(session.get_bind(), Author.name) == []


def test_updated_then_deleted_is_no_save_where_only_saves_are_heard(session: Session):
    """There is no row left to be told of."""
    session.add(Author(name="a"))
    session.commit()
    saved = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, **kwargs):
        saved.append(instance.name)

    author = session.get(Author, 1)
    author.age = 3
    session.flush()
    session.delete(author)
    session.commit()
    assert saved == []
    assert rows(session.get_bind(), Author.name) == []


def test_a_key_deleted_and_added_again_is_created_where_only_saves_are_heard(session: Session):
    """Not an update, although the row was updated before."""
    session.add(Author(id=1, name="a"))
    session.commit()
    saved = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, created, changes, **kwargs):
        saved.append((instance.name, created, changes["name"]))

    author = session.get(Author, 1)
    author.name = "b"
    session.flush()
    session.delete(author)
    session.flush()
    session.add(Author(id=1, name="c"))
    session.commit()
    assert saved == [("c", True, Change(UNSET, "c"))]
    assert rows(session.get_bind(), Author.name) == ["c"]


# -- keys ------------------------------------------------------------------------------------------


def test_a_row_whose_key_changes_is_one_row(session: Session, log: Deliveries):
    """Under its last key, with the first as the old value."""
    given(session.get_bind(), Coin(code="DEM", name="mark"))
    coin = session.get(Coin, "DEM")
    coin.name = "Mark"
    session.flush()
    coin.code = "EUX"
    session.flush()
    coin.code, coin.name = "EUR", "euro"
    session.commit()
    assert log.only.line == "commit updated Coin(euro)"
    assert log.only.key == ("EUR",)
    assert log.only.changes == {"code": Change("DEM", "EUR"), "name": Change("mark", "euro")}
    assert rows(session.get_bind(), Coin.code, Coin.name) == [("EUR", "euro")]


def test_a_row_whose_key_changed_and_is_deleted_is_one_delete(session: Session, log: Deliveries):
    """Of the row that was there before."""
    given(session.get_bind(), Coin(code="DEM", name="mark"))
    coin = session.get(Coin, "DEM")
    coin.code = "EUR"
    session.flush()
    session.delete(coin)
    session.commit()
    assert log.lines == ["commit deleted Coin(mark)"]
    assert rows(session.get_bind(), Coin.code) == []


def test_a_new_row_under_a_key_that_another_has_left_is_created(session: Session, log: Deliveries):
    """It is not taken for the one that has moved away."""
    given(session.get_bind(), Coin(code="DEM", name="mark"))
    coin = session.get(Coin, "DEM")
    coin.code = "EUR"
    session.flush()
    session.add(Coin(code="DEM", name="new"))
    session.flush()
    coin.name = "euro"
    session.commit()
    assert log.lines == ["commit updated Coin(euro)", "commit created Coin(new)"]
    assert log.calls[0].changes == {"code": Change("DEM", "EUR"), "name": Change("mark", "euro")}
    assert rows(session.get_bind(), Coin.code, Coin.name) == [("DEM", "new"), ("EUR", "euro")]


def test_two_rows_that_swap_their_keys_by_way_of_a_third_stay_apart(
    session: Session, log: Deliveries
):
    """Each has its own first old and last new value; the third key is not seen."""
    given(session.get_bind(), Coin(code="A", name="one"), Coin(code="B", name="two"))
    one, two = session.get(Coin, "A"), session.get(Coin, "B")
    for coin, code in ((one, "?"), (two, "A"), (one, "B")):
        coin.code = code
        session.flush()
    one.name, two.name = "ONE", "TWO"
    session.commit()
    assert log.lines == ["commit updated Coin(ONE)", "commit updated Coin(TWO)"]
    assert [call.key for call in log.calls] == [("B",), ("A",)]
    assert [call.changes["code"] for call in log.calls] == [Change("A", "B"), Change("B", "A")]
    assert rows(session.get_bind(), Coin.code, Coin.name) == [("A", "TWO"), ("B", "ONE")]


def test_a_key_that_passes_from_one_row_to_another_in_one_flush_keeps_them_apart(
    session: Session, log: Deliveries
):
    """The first one moves on, the second one takes its key."""
    given(session.get_bind(), Coin(code="A", name="one"), Coin(code="B", name="two"))
    one, two = session.get(Coin, "A"), session.get(Coin, "B")
    one.code, two.code = "C", "A"
    session.flush()
    one.name, two.name = "ONE", "TWO"
    session.commit()
    assert log.lines == ["commit updated Coin(ONE)", "commit updated Coin(TWO)"]
    assert [call.changes["code"] for call in log.calls] == [Change("A", "C"), Change("B", "A")]
    assert rows(session.get_bind(), Coin.code, Coin.name) == [("A", "TWO"), ("C", "ONE")]


# -- the same row as several Python objects --------------------------------------------------------


def test_a_row_through_two_python_objects_is_one_row(session: Session, log: Deliveries):
    """One was expunged and the row loaded again; the values are those of the second."""
    given(session.get_bind(), Author(id=1, name="a", age=1))
    first = session.get(Author, 1)
    first.name = "b"
    session.flush()
    session.expunge(first)
    second = session.get(Author, 1)
    assert second is not first
    second.name, second.age = "c", 2
    session.commit()
    assert log.only.line == "commit updated Author(c)"
    assert log.only.changes == {"name": Change("a", "c"), "age": Change(1, 2)}
    assert rows(session.get_bind(), Author.name, Author.age) == [("c", 2)]


def test_a_row_created_through_one_object_and_deleted_through_another_is_nothing(
    session: Session, log: Deliveries
):
    """It is the row that counts."""
    author = Author(name="a")
    session.add(author)
    session.flush()
    session.expunge(author)
    session.delete(session.get(Author, author.id))
    session.commit()
    assert log.lines == []
    assert rows(session.get_bind(), Author.name) == []


def test_a_row_whose_object_is_garbage_in_between_is_one_row(session: Session, log: Deliveries):
    """It may come back as another object, or never."""
    given(session.get_bind(), Author(id=1, name="a"), Author(id=2, name="b"))
    for age in (1, 2):
        session.get(Author, 1).age = age
        if age == 1:
            session.get(Author, 2).age = 9
        session.flush()
        session.expunge_all()
        gc.collect()
    session.commit()
    assert [line.split("(")[0] for line in log.lines] == ["commit updated Author"] * 2
    changes = {call.key: call.changes for call in log.calls}
    assert changes == {(1,): {"age": Change(None, 2)}, (2,): {"age": Change(None, 9)}}
    assert rows(session.get_bind(), Author.name, Author.age) == [("a", 2), ("b", 9)]


def test_an_object_that_was_expunged_is_delivered_with_its_committed_values(session: Session):
    """What is done to it outside of the session afterwards was not committed."""
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, **kwargs):
        found.append(instance.name)

    author = Author(name="a")
    session.add(author)
    session.flush()
    session.expunge(author)
    author.name = "never written"
    session.commit()
    assert found == ["a"]
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_an_object_that_missed_the_rollback_of_a_savepoint_is_delivered_with_committed_values(
    session: Session,
):
    """It was outside of the session just then, and holds what was undone."""
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, changes, **kwargs):
        found.append((instance.name, instance.age, sorted(changes)))

    session.add_all([told := Author(name="a"), untold := Author(name="b")])
    session.commit()
    found.clear()
    told.age = 1
    session.flush()
    with session.begin_nested() as savepoint:
        told.name = untold.name = "undone"
        session.flush()
        session.expunge(told)
        session.expunge(untold)
        savepoint.rollback()
    session.add_all([told, untold])
    untold.age = 2
    session.commit()
    assert found == [("a", 1, ["age"]), ("b", 2, ["age"])]
    assert sorted(rows(session.get_bind(), Author.name)) == ["a", "b"]


def test_instances_that_are_equal_are_different_rows(session: Session):
    """A model may define ``__eq__`` without ``__hash__``, as dataclasses do."""

    class Same(DeclarativeBase):
        pass

    class Twin(Same):
        __tablename__ = "twins"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Twin)

        __hash__ = None

    Same.metadata.create_all(session.get_bind())
    log = deliveries(sender=Twin)
    session.add_all([Twin(id=1, name="a"), Twin(id=2, name="b")])
    session.commit()
    assert log.lines == ["commit created Twin(a)", "commit created Twin(b)"]
    assert rows(session.get_bind(), Twin.name) == ["a", "b"]


# -- savepoints ------------------------------------------------------------------------------------


def test_what_a_savepoint_undid_is_not_in_the_net_change(session: Session, log: Deliveries):
    """The chain goes on from what was there before it."""
    given(session.get_bind(), Author(id=1, name="a"))
    author = session.get(Author, 1)
    author.name = "b"
    session.flush()
    savepoint = session.begin_nested()
    author.name = "c"
    session.flush()
    savepoint.rollback()
    author.name = "d"
    session.commit()
    assert [(call.line, call.changes) for call in log.calls] == [
        ("rollback updated Author(c)", {"name": Change("b", "c")}),
        ("commit updated Author(d)", {"name": Change("a", "d")}),
    ]
    assert rows(session.get_bind(), Author.name) == ["d"]


def test_a_deletion_that_a_savepoint_undid_leaves_the_row_created(
    session: Session, log: Deliveries
):
    """It was created before, and it is there."""
    author = Author(name="a")
    session.add(author)
    session.flush()
    savepoint = session.begin_nested()
    session.delete(author)
    session.flush()
    savepoint.rollback()
    session.commit()
    assert log.lines == ["rollback deleted Author(a)", "commit created Author(a)"]
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_changes_are_reverted_across_a_savepoint(session: Session, log: Deliveries):
    """Changed outside and changed back inside is no change."""
    given(session.get_bind(), Author(id=1, name="a"))
    author = session.get(Author, 1)
    author.name = "b"
    session.flush()
    with session.begin_nested():
        author.name = "a"
    session.commit()
    assert log.lines == []
    assert rows(session.get_bind(), Author.name) == ["a"]


# -- fields ----------------------------------------------------------------------------------------


def test_fields_are_looked_for_in_the_net_change(session: Session):
    """A field that changed and changed back in between did not change."""
    given(session.get_bind(), Author(id=1, name="a", age=1), Author(id=2, name="b", age=1))
    found = []

    @receiver(post_save, sender=Author, on="commit", fields={"name"})
    def fn(sender, instance, created, **kwargs):
        found.append((instance.name, created))

    one, two = session.get(Author, 1), session.get(Author, 2)
    one.name, one.age, two.name = "x", 2, "x"
    session.flush()
    one.name, two.age = "a", 2
    session.commit()
    assert found == [("x", False)]
    assert rows(session.get_bind(), Author.name, Author.age) == [("a", 2), ("x", 2)]


def test_fields_let_every_new_row_through(session: Session):
    """Also if the field was set by the INSERT and not by the last flush."""
    found = []

    @receiver(post_save, sender=Author, on="commit", fields={"name"})
    def fn(sender, instance, created, **kwargs):
        found.append((instance.name, created))

    author = Author(name="a")
    session.add(author)
    session.flush()
    author.age = 3
    session.commit()
    assert found == [("a", True)]
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_fields_of_a_row_that_was_rolled_back_are_looked_for_in_its_net_change(session: Session):
    """The same rule for the other end."""
    given(session.get_bind(), Author(id=1, name="a", age=1), Author(id=2, name="b", age=1))
    found = []

    @receiver(post_save, sender=Author, on="rollback", fields={"name"})
    def fn(sender, instance, changes, **kwargs):
        found.append((instance.id, changes["name"]))

    one, two = session.get(Author, 1), session.get(Author, 2)
    one.name = two.name = "x"
    session.flush()
    one.name, one.age = "a", 5
    session.flush()
    session.rollback()
    assert found == [(2, Change("b", "x"))]
    assert rows(session.get_bind(), Author.name) == ["a", "b"]


# -- order and receivers ---------------------------------------------------------------------------


def test_the_order_is_that_of_first_occurrence(session: Session, log: Deliveries):
    """Over the whole transaction, whatever the model and the signal; later changes move nothing."""
    given(session.get_bind(), Author(id=1, name="a"), Book(id=1, name="b"), Author(id=3, name="c"))
    author, gone = session.get(Author, 1), session.get(Author, 3)
    session.get(Book, 1).name = "B"
    session.flush()
    with session.begin_nested():
        new = Author(id=4, name="n")
        session.add(new)
        session.flush()
        author.age = 1
    session.delete(gone)
    session.flush()
    session.get(Book, 1).name = "BB"
    new.name = "N"
    session.commit()
    assert log.lines == [
        "commit updated Book(BB)",
        "commit created Author(N)",
        "commit updated Author(a)",
        "commit deleted Author(c)",
    ]
    assert rows(session.get_bind(), Author.name) == ["N", "a"]
    assert rows(session.get_bind(), Book.name) == ["BB"]


def test_one_receiver_is_called_once_however_many_of_its_senders_match(session: Session):
    """For each row, in the place of its first connection."""
    found = []

    def twice(sender, instance, **kwargs):
        found.append(("twice", instance.name))

    @receiver(post_save, on="commit")
    def other(sender, instance, **kwargs):
        found.append(("other", instance.name))

    post_save.connect(twice, [Author, "Author", Named, Base], weak=False, on="commit")
    post_save.connect(twice, weak=False, on="commit", name="again")
    session.add(Author(name="a"))
    session.commit()
    assert found == [("other", "a"), ("twice", "a")]
    assert rows(session.get_bind(), Author.name) == ["a"]


def test_a_cascade_is_delivered_with_its_origin(session: Session):
    """Every row that went along, and what it went along with."""
    session.add(Book(name="b", pages=[Page(name="p", notes=[Note(name="n")])]))
    session.commit()
    found = []

    @receiver(post_delete, on="commit")
    def fn(sender, instance, origin, **kwargs):
        found.append((instance.name, origin and origin.name))

    session.delete(session.get(Book, 1))
    session.commit()
    assert sorted(found) == [("b", None), ("n", "b"), ("p", "b")]
    assert [rows(session.get_bind(), model.name) for model in (Book, Page, Note)] == [[], [], []]


# -- versions, onupdate, values that change in place -----------------------------------------------


def test_a_version_counter_and_an_onupdate_column_are_update_fields(
    session: Session, log: Deliveries
):
    """They were written along, and nobody has assigned them."""
    given(session.get_bind(), Versioned(id=1, name="a", version=1))
    row = session.get(Versioned, 1)
    for name in ("b", "c"):
        row.name = name
        session.flush()
    session.commit()
    assert log.only.line == "commit updated Versioned(c)"
    assert log.only.changes["name"] == Change("a", "c")
    assert log.only.update_fields == {"name", "version", "touched"}
    assert rows(session.get_bind(), Versioned.name, Versioned.version) == [("c", 3)]


def test_a_reverted_change_of_a_versioned_row_has_left_its_version(
    session: Session, log: Deliveries
):
    """The row is not what it was, so it is told; what was reverted is not among the changes."""
    given(session.get_bind(), Versioned(id=1, name="a", version=1))
    row = session.get(Versioned, 1)
    for name in ("b", "a"):
        row.name = name
        session.flush()
    session.commit()
    assert log.only.line == "commit updated Versioned(a)"
    assert "name" not in log.only.changes
    assert {"version", "touched"} <= log.only.update_fields
    assert rows(session.get_bind(), Versioned.name, Versioned.version) == [("a", 3)]


def test_a_value_that_was_changed_in_place_runs_to_its_last_value(
    session: Session, log: Deliveries
):
    """A ``MutableDict`` that was written twice."""
    session.add(Document(id=1, name="d", tracked={"n": 0}))
    session.commit()
    log.clear()
    document = session.get(Document, 1)
    document.tracked["n"] = 1
    session.flush()
    document.tracked["n"] = 2
    session.commit()
    assert log.only.line == "commit updated Document(d)"
    assert log.only.changes["tracked"].new == {"n": 2}
    assert rows(session.get_bind(), Document.tracked) == [{"n": 2}]


def test_a_value_computed_by_the_database_is_what_the_database_has(
    session: Session, log: Deliveries
):
    """The net change ends at ``UNSET`` if it was not fetched, and the instance loads it."""
    given(session.get_bind(), Author(id=1, name="a", age=1))
    loaded = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, **kwargs):
        loaded.append(instance.age)

    author = session.get(Author, 1)
    author.age = 5
    session.flush()
    author.age = Author.age + 1
    session.commit()
    assert loaded == [6]
    assert log.only.changes["age"].old == 1
    assert log.only.changes["age"].new in (UNSET, 6)
    assert rows(session.get_bind(), Author.age) == [6]


def test_what_other_statements_did_to_a_row_is_in_the_instance(session: Session):
    """It is loaded again where the session knows that it is out of date."""
    session.add(Author(id=1, name="a", age=1))
    session.commit()
    found = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, **kwargs):
        found.append((instance.name, instance.age))

    author = session.get(Author, 1)
    author.name = "b"
    session.flush()
    session.execute(text("UPDATE authors SET age = 7"))
    session.expire(author)
    session.commit()
    assert found == [("b", 7)]
    assert rows(session.get_bind(), Author.name, Author.age) == [("b", 7)]
