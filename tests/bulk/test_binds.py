"""``{"signals": "rows"}`` in sessions that choose a bind for each statement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    Delete,
    Engine,
    ForeignKey,
    Insert,
    StaticPool,
    Update,
    create_engine,
    delete,
    event,
    insert,
    inspect,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    sessionmaker,
)

import sqla_signals
from sqla_signals import BulkOptionError, Change, post_bulk, post_delete, post_save, pre_bulk
from tests.contract.observing import asynchronous, rows

from .shop import Base, Employee, Heard, Manager, Order, create_triggers, witnessed
from .test_rows import ROWS, fill, updates, upsert


class Follower:
    """A database with all tables and no rows, as one that is far behind its leader."""

    def __init__(self, path: Path) -> None:
        self.engine = create_engine(f"sqlite:///{path}")
        Base.metadata.create_all(self.engine)
        self.statements: list[str] = []
        event.listen(self.engine, "before_cursor_execute", self._note)

    def _note(self, connection: Any, cursor: Any, statement: str, *more: Any) -> None:
        self.statements.append(statement)


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[Follower]:
    """The database that is only to be read."""
    follower = Follower(tmp_path / "follower.db")
    yield follower
    follower.engine.dispose()


@pytest.fixture
def leader(shop: Engine) -> Iterator[Engine]:
    """The shop with five orders in it, and signals installed."""
    installation = sqla_signals.install(bulk="raise")
    with Session(shop) as session:
        fill(session)
    yield shop
    installation.remove()


def recipe(leader: Engine, follower: Follower) -> Session:
    """SQLAlchemy's own, with its ``get_bind`` that takes two arguments and no more."""

    class RoutingSession(Session):
        def get_bind(self, mapper: Any = None, clause: Any = None) -> Any:  # type: ignore[override]
            if self._flushing or isinstance(clause, (Update, Delete, Insert)):
                return leader
            return follower.engine

    return RoutingSession()


def options_each_time(leader: Engine, follower: Follower) -> Session:
    """With an engine that is made anew whenever it is asked for."""

    class RoutingSession(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **kw: Any) -> Any:
            writes = self._flushing or isinstance(clause, (Update, Delete, Insert))
            return (leader if writes else follower.engine).execution_options(new=True)

    return RoutingSession()


def by_turns(leader: Engine, follower: Follower) -> Session:
    """Which sends each list of parameters somewhere else than the one before."""
    binds = [leader, follower.engine]

    class RoutingSession(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **kw: Any) -> Any:
            if self._flushing or isinstance(clause, (Update, Delete, Insert)):
                return leader
            binds.reverse()
            return binds[-1]

    return RoutingSession()


def listener(leader: Engine, follower: Follower) -> Session:
    """A listener, called after ours, that sends each SELECT to the follower."""
    session = Session(follower.engine)

    @event.listens_for(session, "do_orm_execute")
    def route(state: Any) -> None:
        state.bind_arguments["bind"] = follower.engine if state.is_select else leader

    return session


def by_class(leader: Engine, follower: Follower) -> Session:
    """The class has a bind of its own."""
    return Session(follower.engine, binds={Order: leader})


def by_table(leader: Engine, follower: Follower) -> Session:
    """Its table has."""
    return Session(follower.engine, binds={Order.__table__: leader})


def by_mapper(leader: Engine, follower: Follower) -> Session:
    """A ``get_bind`` that looks at the class, and knows nothing of a bind that is given."""

    class RoutingSession(Session):
        def get_bind(self, mapper: Any = None, clause: Any = None, **kw: Any) -> Any:
            found = mapper is not None and inspect(mapper).class_ is Order
            return leader if found else follower.engine

    return RoutingSession()


LISTS = [recipe, options_each_time, by_turns, listener]
"""Where a list of parameters goes elsewhere: SQLAlchemy asks for the bind of the mapper alone."""
SESSIONS = [*LISTS, by_class, by_table, by_mapper]

STATEMENTS: dict[str, tuple[Any, Any, list[tuple[str, str]]]] = {
    "update": (lambda s: update(Order).where(Order.id > 3).values(total=9), None, updates(4, 5)),
    "update returning": (
        lambda s: update(Order).where(Order.id > 3).values(total=9).returning(Order),
        None,
        updates(4, 5),
    ),
    "delete": (lambda s: delete(Order).where(Order.id == 1), None, [("delete", "1")]),
    "insert": (lambda s: insert(Order).values(id=8, total=8), None, [("insert", "8")]),
    "upsert": (
        lambda s: upsert(s).values(id=2, total=9).on_conflict_do_update(
            index_elements=["id"], set_={"total": 9}
        ),
        None,
        updates(2),
    ),
    "insert list": (lambda s: insert(Order), [{"id": 8}], [("insert", "8")]),
    "update list": (lambda s: update(Order), [{"id": 4, "total": 9}], updates(4)),
}  # fmt: skip


@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "begun elsewhere"])
@pytest.mark.parametrize("statement", STATEMENTS)
@pytest.mark.parametrize("make", SESSIONS)
def test_all_goes_to_the_bind_of_the_statement(
    leader: Engine, follower: Follower, make: Any, statement: str, begun: bool
):
    """Locks and queries too: what the statement changes is read where it is changed."""
    make_statement, parameters, expected = STATEMENTS[statement]
    if parameters is not None and make in LISTS:
        pytest.skip("SQLAlchemy itself sends it elsewhere")
    heard = Heard().connect(Order)
    with make(leader, follower) as session:
        if begun:
            session.connection(bind_arguments={"bind": follower.engine}).execute(text("SELECT 1"))
            del follower.statements[:]
        with Session(leader) as of_leader:
            built = make_statement(of_leader)
        result = session.execute(built, parameters, execution_options=ROWS)
        if "returning" in statement:
            assert {one.total for one in result.scalars()} == {9}
        session.commit()
    assert follower.statements == []
    with Session(leader) as witness:
        assert heard.rows("post") == heard.rows("pre") == witnessed(witness) == expected
    assert {call["using"].url for call in heard.calls} == {leader.url}


@pytest.mark.parametrize("signals", ["rows", "skip"])
@pytest.mark.parametrize("statement", ["insert list", "update list"])
@pytest.mark.parametrize("make", [recipe, by_turns])
def test_a_list_goes_where_sqlalchemy_sends_it(
    leader: Engine, follower: Follower, make: Any, statement: str, signals: str
):
    """It asks for the bind of the mapper alone, and not twice where we have asked."""
    with follower.engine.begin() as connection:
        connection.execute(insert(Order.__table__), [{"id": 4, "total": 4}])
        create_triggers(connection, Base.metadata)
    del follower.statements[:]
    make_statement, parameters, expected = STATEMENTS[statement]
    heard = Heard().connect(Order, bulk=False)
    with make(leader, follower) as session:
        built = make_statement(session)
        session.execute(built, parameters, execution_options={"signals": signals})
        session.commit()
    found = []
    for engine in (leader, follower.engine):
        with Session(engine) as witness:
            found.append(witnessed(witness, "orders"))
    assert sorted(found) == [[], expected]
    if signals == "rows":
        assert heard.rows("post") == heard.rows("pre") == expected
        used = leader if found[0] else follower.engine
        assert {call["using"] for call in heard.calls} == {used}


@pytest.mark.parametrize("operation", ["update", "delete", "insert"])
def test_a_bind_that_the_caller_gives(leader: Engine, follower: Follower, operation: str):
    """``bind_arguments={"bind": ...}``, in a session on another one."""
    heard = Heard().connect(Order)
    make_statement, _, expected = STATEMENTS[operation]
    with Session(follower.engine) as session:
        session.execute(
            make_statement(session),
            execution_options=ROWS,
            bind_arguments={"bind": leader},
        )
        session.commit()
    assert follower.statements == []
    with Session(leader) as witness:
        assert heard.rows("post") == witnessed(witness) == expected
    assert {call["using"] for call in heard.calls} == {leader}


def test_statements_without_the_signals_of_rows(leader: Engine, follower: Follower):
    """The two signals of a statement name the bind, with a ``get_bind`` of two arguments too."""
    heard = Heard()
    pre_bulk.connect(heard, Order)
    post_bulk.connect(heard, Order)
    with recipe(leader, follower) as session:
        session.execute(update(Order).values(total=1))
        session.commit()
    assert heard.statements == ["pre_bulk update Order", "post_bulk update Order 5"]
    assert [call["using"] for call in heard.calls] == [leader, leader]
    assert follower.statements == []


def test_pending_changes_are_flushed_to_their_own_binds(leader: Engine, follower: Follower):
    """Those of other classes too, before the statement."""
    session = Session(leader, binds={Employee: follower.engine})
    heard = Heard().connect(Order)
    with session:
        session.add(Employee(id=1, name="e"))
        session.get(Order, 1).total = 50
        session.execute(
            update(Order).where(Order.total > 40).values(status="x"), execution_options=ROWS
        )
        session.commit()
    assert rows(follower.engine, Employee.__table__.c.name) == ["e"]
    assert heard.rows("post") == [*updates(1), *updates(1)]


def test_columns_of_subclasses_are_read_there_as_well(leader: Engine, follower: Follower):
    """Also those in other tables, which take a query of their own."""
    with Session(leader) as session:
        session.add_all([Employee(id=1, name="e"), Manager(id=2, name="m", budget=3)])
        session.commit()
        witnessed(session)
        session.commit()
    heard = Heard().connect()
    with recipe(leader, follower) as session:
        session.execute(update(Employee).values(name="x"), execution_options=ROWS)
        session.execute(delete(Employee).where(Employee.id == 2), execution_options=ROWS)
        session.commit()
    assert follower.statements == []
    seen = [call["seen"] for call in heard.calls if call["sender"] is Manager]
    assert [one["budget"] for one in seen] == [3, 3, 3, 3]
    with Session(leader) as witness:
        expected = [("delete", "2"), *updates(1, 2)]
        assert heard.rows("post") == witnessed(witness, "employees") == expected


@contextmanager
def families(leader: Engine, other: Engine) -> Iterator[tuple[type, type]]:
    """Parents on the leader with children that are loaded along, the tables on both engines."""

    class OwnBase(DeclarativeBase):
        pass

    class Parent(OwnBase):
        __tablename__ = "parents"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str | None]
        children: Mapped[list[Any]] = relationship("Child", lazy="selectin")

    class Child(OwnBase):
        __tablename__ = "children"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id: Mapped[int] = mapped_column(ForeignKey("parents.id"))

    for engine in (leader, other):
        OwnBase.metadata.create_all(engine)
    with leader.begin() as connection:
        connection.execute(insert(Parent.__table__), [{"id": 1}, {"id": 2}])
        connection.execute(insert(Child.__table__), [{"id": 5, "parent_id": 1}])
    yield Parent, Child


def test_what_is_loaded_along_is_read_from_where_it_is_written(leader: Engine, follower: Follower):
    """By the recipe, from the leader."""
    with families(leader, follower.engine) as (Parent, _):
        heard = Heard().connect(Parent)
        del follower.statements[:]
        with recipe(leader, follower) as session:
            session.execute(update(Parent).values(name="x"), execution_options=ROWS)
            assert follower.statements == []
            loaded = [call["seen"]["children"] for call in heard.of("post_save")]
            assert [[one.id for one in children] for children in loaded] == [[5], []]


@pytest.mark.parametrize("by", ["class", "table"])
def test_what_is_loaded_along_from_another_database(leader: Engine, follower: Follower, by: str):
    """With ``binds``, each class is read from its own bind, as by any query."""
    with families(leader, follower.engine) as (Parent, Child):
        with follower.engine.begin() as connection:
            connection.execute(insert(Parent.__table__), [{"id": 2}])
            connection.execute(insert(Child.__table__), [{"id": 6, "parent_id": 2}])
        heard = Heard().connect(Parent)
        of = (lambda cls: cls) if by == "class" else (lambda cls: cls.__table__)
        with Session(binds={of(Parent): leader, of(Child): follower.engine}) as session:
            session.execute(update(Parent).values(name="x"), execution_options=ROWS)
            loaded = [call["seen"]["children"] for call in heard.of("post_save")]
            assert [[one.id for one in children] for children in loaded] == [[], [6]]


@asynchronous
async def test_an_async_session_in_front_of_one_that_routes(
    leader: Engine, async_engine: AsyncEngine, follower: Follower
):
    """With async receivers."""
    heard = Heard()

    async def saved(sender: Any, **arguments: Any) -> None:
        heard(sender, **arguments)

    post_save.connect(saved, Order)
    writes = async_engine.sync_engine

    class RoutingSession(Session):
        def get_bind(self, mapper: Any = None, clause: Any = None) -> Any:  # type: ignore[override]
            if self._flushing or isinstance(clause, (Update, Delete, Insert)):
                return writes
            return follower.engine

    async with AsyncSession(sync_session_class=RoutingSession) as session:
        result = await session.execute(
            update(Order).where(Order.id > 3).values(total=9), execution_options=ROWS
        )
        assert result.rowcount == 2
        await session.commit()
    assert heard.rows("post") == updates(4, 5)
    assert [call["seen"]["total"] for call in heard.calls] == [9, 9]
    assert follower.statements == []


# -- other listeners -----------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("operation", ["update", "delete"])
def test_a_listener_that_restricts_the_statement(leader: Engine, operation: str, first: bool):
    """Wherever it stands, the rows are those of the statement that is executed."""
    sqla_signals.install().remove()
    maker = sessionmaker(leader)

    def restrict(state: Any) -> None:
        if not state.is_select:
            state.statement = state.statement.where(Order.total > 3)

    heard = Heard()
    if first:
        event.listen(maker, "do_orm_execute", restrict)
    installation = sqla_signals.install(maker)
    heard.connect(Order)
    if not first:
        event.listen(maker, "do_orm_execute", restrict)
    statement = update(Order).values(total=0) if operation == "update" else delete(Order)
    with maker() as session:
        session.execute(statement, execution_options=ROWS)
        assert heard.rows("post") == heard.rows("pre") == witnessed(session)
        assert heard.rows("post") == [(operation, "4"), (operation, "5")]
        assert {str(call["statement"].whereclause) for call in heard.of("pre_bulk")} == {
            "orders.total > :total_1"
        }
    installation.remove()


def test_a_listener_that_executes_the_statement_several_times(leader: Engine):
    """Each time has signals of its own."""
    maker = sessionmaker(leader)
    heard = Heard().connect(Order)

    @event.listens_for(maker, "do_orm_execute")
    def twice(state: Any) -> Any:
        if state.is_update:
            state.invoke_statement()
            return state.invoke_statement()
        return None

    with maker() as session:
        statement = update(Order).where(Order.id == 1).values(total=Order.total + 1)
        session.execute(statement, execution_options=ROWS)
        assert heard.rows("post") == witnessed(session) == [*updates(1), *updates(1)]
        assert [call["changes"]["total"] for call in heard.of("post_save")] == [
            Change(1, 2),
            Change(2, 3),
        ]


def marking(leader: Engine, statement: Callable[[Any], Any]) -> Any:
    """A sessionmaker whose listener executes another statement in place of each DELETE."""
    maker = sessionmaker(leader)

    @event.listens_for(maker, "do_orm_execute")
    def mark(state: Any) -> Any:
        if state.is_delete:
            return state.invoke_statement(statement(state.statement.whereclause))
        return None

    return maker


@pytest.mark.parametrize("signals", ["rows", None])
def test_a_listener_that_executes_another_statement_in_its_place(leader: Engine, signals: Any):
    """What is told of is what is executed: here a row is marked instead of deleted."""
    heard = Heard().connect(Order)
    maker = marking(leader, lambda where: update(Order).where(where).values(status="deleted"))

    with maker() as session:
        options = {"signals": signals} if signals else {}
        session.execute(delete(Order).where(Order.id == 1), execution_options=options)
        assert witnessed(session) == updates(1)
        assert heard.rows("post") == heard.rows("pre") == (updates(1) if signals else [])
        assert heard.statements == ["pre_bulk update Order", "post_bulk update Order 1"]


def test_a_listener_that_executes_what_somebody_listens_to_in_its_place(leader: Engine):
    """The receivers are those of the statement that is executed, not of the one it replaced."""
    saved: list[Any] = []
    post_save.connect(lambda sender, instance, **_: saved.append(instance.id), Order, weak=False)
    maker = marking(leader, lambda where: update(Order).where(where).values(status="deleted"))

    with maker() as session:
        session.execute(delete(Order).where(Order.id == 1), execution_options=ROWS)
        assert witnessed(session) == updates(1)
        assert saved == [1]


@pytest.mark.parametrize("signals", ["rows", None])
def test_a_listener_that_executes_a_statement_on_a_table_in_its_place(leader: Engine, signals: Any):
    """No class is named by it, so nothing is sent."""
    orders = Order.__table__
    heard = Heard().connect(Order)
    maker = marking(leader, lambda _: update(orders).where(orders.c.id == 1).values(state="x"))

    with maker() as session:
        options = {"signals": signals} if signals else {}
        session.execute(delete(Order).where(Order.id == 1), execution_options=options)
        assert witnessed(session) == updates(1)
        assert heard.calls == heard.statements == []


# -- schemas -------------------------------------------------------------------------------------


@pytest.fixture
def tenant(engine: Engine) -> Iterator[Any]:
    """A connection to a database with a second schema, and a class with a table in both."""

    class OwnBase(DeclarativeBase):
        pass

    class Note(OwnBase):
        __tablename__ = "notes"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str | None]

    installation = sqla_signals.install(bulk="raise")
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("ATTACH DATABASE ':memory:' AS tenant")
            connection.rollback()
        else:
            connection.exec_driver_sql("CREATE SCHEMA tenant")
        OwnBase.metadata.create_all(connection)
        connection.exec_driver_sql(
            "CREATE TABLE tenant.notes (id INTEGER PRIMARY KEY, name VARCHAR)"
        )
        ours, theirs = (
            text("INSERT INTO notes VALUES (1, 'ours')"),
            text("INSERT INTO tenant.notes VALUES (1, 'theirs'), (2, 'theirs')"),
        )
        connection.execute(ours)
        connection.execute(theirs)
        yield connection, Note
    installation.remove()


@pytest.mark.parametrize("operation", ["update", "delete", "insert", "insert list", "upsert"])
@pytest.mark.parametrize("given", ["execution", "statement", "listener"])
def test_a_schema_for_one_statement(tenant: Any, operation: str, given: str):
    """The rows are looked up and loaded where they are written."""
    connection, Note = tenant
    heard = Heard().connect(Note)
    schema: Any = {"schema_translate_map": {None: "tenant"}}
    with Session(connection) as session:
        new = upsert(session, Note).values(id=1, name="x")
        statement: Any = {
            "update": update(Note).values(name="x"),
            "delete": delete(Note),
            "insert": insert(Note).values(id=7, name="x"),
            "insert list": insert(Note),
            "upsert": new.on_conflict_do_update(index_elements=["id"], set_={"name": "x"}),
        }[operation]
        parameters = [{"id": 7, "name": "x"}] if operation == "insert list" else None
        options = dict(ROWS)
        if given == "execution":
            options |= schema
        elif given == "statement":
            statement = statement.execution_options(**schema)
        else:

            @event.listens_for(session, "do_orm_execute")
            def translate(state: Any) -> None:
                state.update_execution_options(**schema)

        session.execute(statement, parameters, execution_options=options)
        read = "SELECT id, name FROM {}notes ORDER BY id"
        assert connection.execute(text(read.format(""))).all() == [(1, "ours")]
        theirs = {
            "update": [(1, "x"), (2, "x")],
            "delete": [],
            "upsert": [(1, "x"), (2, "theirs")],
        }.get(operation, [(1, "theirs"), (2, "theirs"), (7, "x")])
        assert connection.execute(text(read.format("tenant."))).all() == theirs
        expected = {
            "update": updates(1, 2),
            "delete": [("delete", "1"), ("delete", "2")],
            "upsert": updates(1),
        }.get(operation, [("insert", "7")])
        assert heard.rows("post") == heard.rows("pre") == expected
        if operation == "update":
            assert heard.of("post_save")[0]["changes"] == {"name": Change("theirs", "x")}


def test_a_list_of_updates_knows_no_schema_for_one_statement(tenant: Any):
    """SQLAlchemy does not hand it on, with signals or without."""
    connection, Note = tenant
    heard = Heard().connect(Note)
    with Session(connection) as session:
        session.execute(
            update(Note),
            [{"id": 1, "name": "x"}],
            execution_options={**ROWS, "schema_translate_map": {None: "tenant"}},
        )
        names = text("SELECT name FROM notes UNION ALL SELECT name FROM tenant.notes")
        assert connection.execute(names).scalars().all() == ["x", "theirs", "theirs"]
        assert heard.of("post_save")[0]["changes"] == {"name": Change("ours", "x")}


# -- shards --------------------------------------------------------------------------------------


@pytest.fixture
def sharded() -> Iterator[Any]:
    """A sessionmaker on two shards, whose chooser needs an instance, and their engines."""
    engines = {name: create_engine("sqlite://", poolclass=StaticPool) for name in ("eu", "us")}
    for engine in engines.values():
        Base.metadata.create_all(engine)
        with engine.begin() as connection:
            connection.execute(insert(Order.__table__), [{"id": 1}, {"id": 2}])
    maker = sessionmaker(
        class_=ShardedSession,
        shards=engines,
        shard_chooser=lambda mapper, instance, clause=None: instance.status,
        identity_chooser=lambda mapper, primary_key, **kw: list(engines),
        execute_chooser=lambda context: list(engines),
    )
    installation = sqla_signals.install(bulk="raise")
    yield maker, engines
    installation.remove()
    for engine in engines.values():
        engine.dispose()


@pytest.mark.parametrize(
    ("statement", "parameters"),
    [
        (update(Order).values(total=1), None),
        (update(Order), [{"id": 1, "total": 1}]),
        (delete(Order), None),
        (insert(Order).values(id=7), None),
        (insert(Order), [{"id": 7}]),
    ],
    ids=["update", "update list", "delete", "insert", "insert list"],
)
def test_rows_of_several_shards_are_refused(sharded: Any, statement: Any, parameters: Any):
    """By name, with the remedy, before anything is executed or announced."""
    maker, engines = sharded
    heard = Heard().connect(Order)
    with maker() as session:
        with pytest.raises(BulkOptionError, match=r"ShardedSession.*engine of one shard"):
            session.execute(statement, parameters, execution_options=ROWS)
        session.commit()
    assert heard.calls == []
    for engine in engines.values():
        assert rows(engine, Order.id, Order.total) == [(1, None), (2, None)]


def test_the_remedy_for_shards(sharded: Any):
    """A session on one of them."""
    _, engines = sharded
    heard = Heard().connect(Order)
    with Session(engines["us"]) as session:
        session.execute(update(Order).values(total=1), execution_options=ROWS)
        session.commit()
    assert heard.rows("post") == updates(1, 2)
    assert rows(engines["eu"], Order.total) == [None, None]


def test_statements_on_several_shards(sharded: Any):
    """They are told of once, without a bind of their own; the chooser is asked for none."""
    maker, engines = sharded
    heard = Heard()
    pre_bulk.connect(heard, Order)
    post_bulk.connect(heard, Order)
    with maker() as session:
        result = session.execute(update(Order).values(total=1))
        assert result.rowcount == 4
        session.commit()
    assert heard.statements == ["pre_bulk update Order", "post_bulk update Order 4"]
    assert [call["using"] for call in heard.calls] == [None, None]
    assert [rows(engine, Order.total) for engine in engines.values()] == [[1, 1], [1, 1]]


def test_flush_signals_of_several_shards_stay(sharded: Any):
    """What is refused is what a statement does."""
    maker, engines = sharded
    heard = Heard()
    post_save.connect(heard, Order)
    post_delete.connect(heard, Order)
    with maker() as session:
        session.add_all([Order(id=3, status="eu"), Order(id=3, status="us")])
        session.flush()
    assert {call["using"] for call in heard.calls} == set(engines.values())
