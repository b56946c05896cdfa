"""The witness itself, without signals: what it says of programs whose writes are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import inspect, select

from . import models as m
from .recorder import Database, Flush, RecordedSession, Recorder, key_of
from .witness import Statement


@pytest.fixture(scope="module")
def sqlite_database() -> Iterator[Database]:
    database = Database()
    yield database
    database.remove()


@pytest.fixture(scope="module")
def postgresql_database(postgresql_url: str) -> Iterator[Database]:
    database = Database(postgresql_url)
    yield database
    database.remove()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def session(request: pytest.FixtureRequest) -> Iterator[RecordedSession]:
    database = request.getfixturevalue(f"{request.param}_database")
    with RecordedSession(database.engine, info={"recorder": Recorder(database)}) as session:
        yield session
    database.clear()


def flushed(session: RecordedSession) -> Flush:
    """Flush, and return what happened."""
    session.info["recorder"].finished.clear()
    session.flush()
    (flush,) = session.info["recorder"].finished
    return flush


def kinds(flush: Flush) -> list[tuple[str, str]]:
    """The table and the kind of each fate."""
    return sorted((fate.key[0], fate.kind) for fate in flush.fates)


def test_the_fates_are_those_of_the_instances_and_not_of_the_rows_of_each_table(session):
    """Three tables make a manager; inserting, changing and deleting one is one fate each."""
    manager = m.Manager(name="a", salary=1, title="b")
    session.add(manager)
    assert kinds(flushed(session)) == [("people", "created")]

    manager.title = "c"
    flush = flushed(session)
    assert kinds(flush) == [("people", "updated")]
    assert flush.fates[0].columns_set == {("people", "version"), ("managers", "title")}
    assert flush.fates[0].old["managers"]["title"] == "b"
    assert flush.fates[0].new["managers"]["title"] == "c"

    session.delete(manager)
    assert kinds(flushed(session)) == [("people", "deleted")]


def test_orphans_and_their_own_children_are_deleted(session):
    """The witness sees each row of a cascade that the unit of work carries out."""
    order = m.Order(items=[m.Item(notes=[m.Note(), m.Note()]), m.Item()])
    session.add(order)
    assert kinds(flushed(session)) == [
        ("items", "created"),
        ("items", "created"),
        ("notes", "created"),
        ("notes", "created"),
        ("orders", "created"),
    ]
    order.items.pop(0)
    assert kinds(flushed(session)) == [
        ("items", "deleted"),
        ("notes", "deleted"),
        ("notes", "deleted"),
    ]


def test_children_that_stay_are_updated_when_the_parent_goes(session):
    """A foreign key that the unit of work sets to NULL is an update of the child."""
    team = m.Team(players=[m.Player()])
    session.add(team)
    session.flush()
    session.delete(team)
    flush = flushed(session)
    assert kinds(flush) == [("players", "updated"), ("teams", "deleted")]
    assert flush.fates[0].columns_set == {("players", "team_id")}


def test_what_the_database_cascades_is_set_apart(session):
    """ON DELETE CASCADE and SET NULL fire triggers, for rows that no statement named."""
    folder = m.Folder(files=[m.File()], labels=[m.Label()], links=[m.Link()])
    session.add(folder)
    session.commit()
    session.delete(session.scalars(select(m.Folder)).one())
    flush = flushed(session)
    assert kinds(flush) == [("folders", "deleted")]
    assert sorted((w.table, w.operation) for w in flush.cascaded) == [
        ("files", "DELETE"),
        ("labels", "UPDATE"),
        ("links", "DELETE"),
    ]


def test_children_that_the_session_knows_are_deleted_by_the_unit_of_work(session):
    """With passive_deletes, a loaded child is deleted by a statement of its own."""
    folder = m.Folder(files=[m.File()])
    session.add(folder)
    session.flush()
    session.delete(folder)
    flush = flushed(session)
    assert kinds(flush) == [("files", "deleted"), ("folders", "deleted")]
    assert flush.cascaded == []


def test_post_update_and_the_insert_before_it_are_one_creation(session):
    """The row is inserted and then updated in one flush: created, with the last values."""
    entry = m.Entry(name="a")
    widget = m.Widget(entries=[entry], favorite=entry)
    session.add(widget)
    flush = flushed(session)
    assert kinds(flush) == [("entries", "created"), ("widgets", "created")]
    (fate,) = (fate for fate in flush.fates if fate.key[0] == "widgets")
    assert fate.new["widgets"]["favorite_id"] == entry.id
    assert ("widgets", "favorite_id") in fate.columns_set


def test_post_update_and_the_delete_after_it_are_one_deletion(session):
    """The foreign key is set to NULL before the row goes: deleted, once."""
    widget = m.Widget(entries=[entry := m.Entry()], favorite=entry)
    session.add(widget)
    session.flush()
    session.delete(widget)
    flush = flushed(session)
    assert kinds(flush) == [("entries", "deleted"), ("widgets", "deleted")]
    assert [s.operation for s in flush.statements.values()] == ["UPDATE", "DELETE", "DELETE"]


def test_a_key_that_changes_is_followed(session):
    """The update of a primary key is one fate, under the new key; children are cascaded to."""
    country = m.Country(code="k1", cities=[m.City()])
    session.add(country)
    session.commit()
    country.code = "k2"
    flush = flushed(session)
    assert kinds(flush) == [("countries", "updated")]
    assert flush.fates[0].key == ("countries", ("k2",)) == key_of(country)
    assert [w.table for w in flush.cascaded] == ["cities"]


def test_a_key_change_that_the_unit_of_work_carries_to_the_children(session):
    """With passive_updates=False, each child has an UPDATE of its own."""
    region = m.Region(code="k1", towns=[m.Town(), m.Town()])
    session.add(region)
    session.commit()
    region.code = "k2"
    assert kinds(flushed(session)) == [
        ("regions", "updated"),
        ("towns", "updated"),
        ("towns", "updated"),
    ]


def test_a_row_switch_is_an_update_to_the_database(session):
    """Deleting an instance and adding its key again is one UPDATE; only the session knows more."""
    old = m.Country(code="k1", name="a")
    session.add(old)
    session.flush()
    session.delete(old)
    new = m.Country(code="k1", name="b")
    session.add(new)
    flush = flushed(session)
    assert kinds(flush) == [("countries", "updated")]
    key = "countries", ("k1",)
    assert flush.born == [(new, key)]
    assert flush.died == [(old, key)]


def test_a_row_switch_may_write_nothing(session):
    """When only the key is set, the session exchanges the instances and the row stays."""
    old = m.Country(code="k1")
    session.add(old)
    session.flush()
    session.delete(old)
    session.add(new := m.Country(code="k1"))
    flush = flushed(session)
    assert (flush.fates, [b for b, _ in flush.born], [d for d, _ in flush.died]) == (
        [],
        [new],
        [old],
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda stamp: setattr(stamp, "name", stamp.name),
        lambda stamp: (setattr(stamp, "name", "b"), setattr(stamp, "name", "a")),
    ],
    ids=["same", "reverted"],
)
def test_nothing_is_written_for_no_net_change(session, change: Callable[[m.Stamp], object]):
    """An assignment of the same value, or a reverted one, has no statement and no fate."""
    stamp = m.Stamp(name="a")
    session.add(stamp)
    session.flush()
    change(stamp)
    flush = flushed(session)
    assert (flush.statements, flush.fates) == ({}, [])


def test_an_update_that_changes_no_value_is_a_write(session):
    """The trigger fires for an expression that yields what was there."""
    stamp = m.Stamp(n=1)
    session.add(stamp)
    session.flush()
    stamp.n = m.Stamp.n + 0
    flush = flushed(session)
    assert kinds(flush) == [("stamps", "updated")]
    assert flush.fates[0].columns_set == {
        ("stamps", "n"),
        ("stamps", "updated"),
        ("stamps", "measured"),
    }
    assert flush.fates[0].old["stamps"]["n"] == flush.fates[0].new["stamps"]["n"] == 1


def test_a_deleted_row_whose_key_is_used_again_is_two_fates(session):
    """SQLite gives a free integer key away again; the new row is not the old one."""
    writes = [
        ("DELETE FROM items WHERE items.id = ?", {"id": 1}, {}),
        ("INSERT INTO items (name) VALUES (?)", {}, {"id": 1}),
    ]
    from .recorder import BASES
    from .witness import Write, fates

    log = []
    for at, (sql, old, new) in enumerate(writes):
        statement = Statement.parse(at, sql)
        assert statement is not None
        log.append(Write(statement.table, statement.operation, old, new, statement))
    assert [fate.kind for fate in fates(log, BASES)] == ["deleted", "created"]


def test_every_row_that_a_statement_counts_is_in_the_log(session):
    """Triggers and statements agree over a tour of the schema: same tables, same operations."""
    things = [
        m.Order(items=[m.Item(notes=[m.Note()])]),
        m.Shelf(books={m.Book(), m.Book()}),
        m.Account(profile=m.Profile(), badge=m.Badge()),
        m.Truck(motor=m.Motor()),
        m.Ticket(agent=m.Agent()),
        m.Student(courses=[m.Course()], clubs=[m.Club()]),
        m.Membership(member=m.Member(), guild=m.Guild()),
        m.Node(children=[m.Node()]),
        m.Directory(children=[m.Directory()]),
        m.Step(next=m.Step()),
        m.Stop(stops=[m.Stop()]),
        m.Company(people=[m.Person(), m.Engineer(desks=[m.Desk()])]),
        m.Kennel(dogs=[m.Dog()]),
        m.Cat(),
        m.Document(clauses=[m.Clause()]),
        m.Gauge(n=1),
        m.Polygon(corners=[m.Corner(x=1), m.Corner(x=1)]),
        m.Config(options={"a": 1}, extra={"b": 2}),
    ]
    for thing in things:
        session.add(thing)
        inserted = flushed(session)
        session.delete(thing)
        deleted = flushed(session)
        for flush in (inserted, deleted):
            assert {s.table for s in flush.statements.values()} == {
                *(table for fate in flush.fates for table in fate.new),
                *(s.table for s in flush.statements.values() if s.table.startswith("student_")),
            }
            assert not flush.cascaded
        born = {key for _, key in inserted.born}
        assert {fate.key for fate in inserted.fates if fate.created} == born
        died = {key for _, key in deleted.died}
        assert {fate.key for fate in deleted.fates if fate.deleted} == died
        assert inspect(thing).deleted


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("UPDATE items SET name=?, n=(items.n + ?) WHERE items.id = ?", {"name", "n"}),
        ("UPDATE a SET x=coalesce(b, c), y=%(y)s::INTEGER WHERE a.id = 1", {"x", "y"}),
        ("UPDATE a SET x=CASE WHEN (a.y = 1) THEN 1 ELSE 2 END WHERE a.id = 1", {"x"}),
        ("UPDATE a SET x=length('abc') RETURNING y", {"x"}),
    ],
)
def test_the_columns_that_an_update_assigns_are_read_from_its_text(sql: str, expected: set[str]):
    """Commas, comparisons and clauses that follow do not confuse the reading."""
    statement = Statement.parse(1, sql)
    assert statement is not None
    assert statement.columns_set == expected
